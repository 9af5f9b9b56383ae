"""Batches: every row once, budgets kept, little padding, no dependence on the number of workers."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from bertray.packing import budget_batches, epoch_batches, pad
from bertray.tokenization import TokenColumn

lengths_strategy = st.lists(st.integers(0, 40), max_size=200).map(lambda lengths: np.array(lengths, dtype=np.int64))


@given(lengths_strategy, st.integers(1, 200))
def test_budget_batches_hold_every_document_once_within_the_budget(lengths_N: np.ndarray, budget: int) -> None:
    batches = budget_batches(lengths_N, budget)
    rows = np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)
    assert sorted(rows) == np.flatnonzero(lengths_N).tolist()
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths_N[batch].max() <= budget


@given(lengths_strategy, st.integers(1, 16), st.integers(0, 3), st.integers(1, 3))
def test_epoch_batches_hold_every_row_once(lengths_N: np.ndarray, batch_size: int, seed: int, epoch: int) -> None:
    batches = epoch_batches(lengths_N, batch_size, seed, epoch)
    rows = np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)
    assert sorted(rows) == list(range(len(lengths_N)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    again = epoch_batches(lengths_N, batch_size, seed, epoch)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ_and_padding_is_small() -> None:
    lengths_N = np.random.default_rng(0).lognormal(3, 0.7, size=5000).astype(np.int64) + 2
    first, second, other = (
        np.concatenate(epoch_batches(lengths_N, 32, seed, epoch)) for seed, epoch in ((0, 1), (0, 2), (1, 1))
    )
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    for batches, most in ((epoch_batches(lengths_N, 32, 0, 1), 0.10), (budget_batches(lengths_N, 2048), 0.03)):
        padded = sum(len(batch) * lengths_N[batch].max() for batch in batches)
        assert 1 - lengths_N.sum() / padded < most


def test_pad() -> None:
    tokens = TokenColumn(
        np.array([1, 2, 3, 4, 5], dtype=np.int32), np.array([0, 3, 3, 5]), np.zeros(3, dtype=bool), pa.nulls(3)
    )
    input_ids_BL, mask_BL = pad(tokens, np.array([2, 0]), pad_id=9)
    assert input_ids_BL.tolist() == [[4, 5, 9], [1, 2, 3]]
    assert mask_BL.tolist() == [[1, 1, 0], [1, 1, 1]]
