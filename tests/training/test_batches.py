"""A step's batch follows from seed and step; ranks and parts divide it without a rest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bertray.training.batches import TrainingBatches, micro_batches

lengths_strategy = st.lists(st.integers(1, 128), min_size=1, max_size=200).map(np.array)


@given(lengths_strategy, st.integers(1, 16), st.integers(0, 3), st.integers(1, 3))
def test_an_epoch_holds_every_row_once(lengths_S: np.ndarray, batch_size: int, seed: int, epoch: int) -> None:
    batches = TrainingBatches(lengths_S, batch_size, seed)
    steps = range((epoch - 1) * batches.steps_per_epoch + 1, epoch * batches.steps_per_epoch + 1)
    rows = np.concatenate([batches.at(step) for step in steps])
    assert sorted(rows) == list(range(len(lengths_S)))
    assert all(1 <= len(batches.at(step)) <= batch_size for step in steps)


@given(lengths_strategy, st.integers(1, 16), st.integers(1, 400), st.integers(1, 400))
def test_a_batch_does_not_depend_on_what_was_read_before(
    lengths_S: np.ndarray, batch_size: int, one: int, other: int
) -> None:
    used = TrainingBatches(lengths_S, batch_size, 7)
    used.at(other)
    np.testing.assert_array_equal(used.at(one), TrainingBatches(lengths_S, batch_size, 7).at(one))


@given(lengths_strategy, st.integers(1, 64), st.integers(1, 8), st.integers(1, 300))
def test_ranks_and_parts_divide_a_batch(lengths_S: np.ndarray, batch_size: int, world_size: int, budget: int) -> None:
    batch = TrainingBatches(lengths_S, batch_size, 0).at(1)
    shares = [batch[rank::world_size] for rank in range(world_size)]
    assert sorted(np.concatenate(shares)) == sorted(batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for rows in shares:
        parts = micro_batches(rows, lengths_S, budget)
        assert sorted(np.concatenate([np.zeros(0, np.int64), *parts])) == sorted(rows)
        assert all(len(part) == 1 or lengths_S[part].sum() <= budget for part in parts)


def test_epochs_and_seeds_differ_and_lengths_in_a_batch_are_alike() -> None:
    lengths_S = np.random.default_rng(0).lognormal(3, 0.7, size=5000).astype(np.int64) + 2

    def epoch(seed: int, number: int) -> list[np.ndarray]:
        batches = TrainingBatches(lengths_S, 32, seed)
        return [
            batches.at((number - 1) * batches.steps_per_epoch + step + 1) for step in range(batches.steps_per_epoch)
        ]

    first, second, other = (np.concatenate(epoch(seed, number)) for seed, number in ((0, 1), (0, 2), (1, 1)))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)
    padded = sum(len(batch) * lengths_S[batch].max() for batch in epoch(0, 1))
    assert 1 - lengths_S.sum() / padded < 0.10
