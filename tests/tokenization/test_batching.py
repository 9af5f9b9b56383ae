"""Batches: every row once, budgets kept, little padding, no dependence on the number of workers."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertray.model.pretrained import load_tokenizer
from bertray.tokenization.batching import equal_runs, num_filler, pack, packed_batches, pad, padded_batches
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn
from tests.conftest import SHARED_DATA, needs_shared_data

lengths_strategy = st.lists(st.integers(1, 40), max_size=200).map(lambda lengths: np.array(lengths, dtype=np.int64))


@given(lengths_strategy, st.integers(1, 200))
def test_batches_hold_every_sequence_once_within_the_budget(lengths_S: np.ndarray, budget: int) -> None:
    for plan in (packed_batches, padded_batches):
        batches = plan(lengths_S, budget)
        rows = np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)
        assert sorted(rows) == list(range(len(lengths_S)))
        for batch in batches:
            held = lengths_S[batch].sum() if plan is packed_batches else len(batch) * lengths_S[batch].max()
            assert len(batch) == 1 or held <= budget


def test_at_most_2_percent_of_a_budget_is_wasted() -> None:
    lengths_S = 2 + np.random.default_rng(0).lognormal(3, 0.7, size=4096).astype(np.int64)  # as of news and abstracts
    padded = sum(len(batch) * lengths_S[batch].max() for batch in padded_batches(lengths_S, 2048))
    assert 1 - lengths_S.sum() / padded <= 0.02
    full = packed_batches(lengths_S, 2048)[:-1]
    assert 1 - lengths_S[np.concatenate(full)].sum() / (2048 * len(full)) <= 0.02


@pytest.mark.parametrize("name", ["csabstruct", "banking77", "goemotions_multilabel", "movie_reviews_long"])
@needs_shared_data
def test_little_is_wasted_on_real_lengths(name: str) -> None:
    tokenizer = ColumnTokenizer(load_tokenizer("minilm", 512)[0].backend_tokenizer, 512)
    texts = pq.read_table(SHARED_DATA / name / "train.parquet", columns=["text"])["text"][:4096]
    lengths_S = tokenizer.encode(texts).lengths_S
    padded = sum(len(batch) * lengths_S[batch].max() for batch in padded_batches(lengths_S, 2048))
    assert 1 - lengths_S.sum() / padded <= 0.02


TOKENS = TokenColumn(
    np.array([1, 2, 3, 4, 5], dtype=np.int32),
    np.array([0, 3, 5]),
    np.array([0, 2]),
    np.zeros(3, dtype=bool),
    pa.nulls(3),
)


def test_pad() -> None:
    input_ids_BL, mask_BL = pad(TOKENS, np.array([1, 0]), pad_id=9)
    assert input_ids_BL.tolist() == [[4, 5, 9], [1, 2, 3]]
    assert mask_BL.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_pack() -> None:
    input_ids_T, position_ids_T, offsets_B1 = pack(TOKENS, np.array([1, 0, 0]))
    assert input_ids_T.tolist() == [4, 5, 1, 2, 3, 1, 2, 3]
    assert position_ids_T.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert offsets_B1.tolist() == [0, 2, 5, 8]
    assert equal_runs(offsets_B1) == ((0, 1, 2), (2, 2, 3))


def test_filler_leaves_few_numbers_of_tokens() -> None:
    filled = {num_tokens: num_tokens + num_filler(num_tokens) for num_tokens in range(1, 4097)}
    assert all(0 <= total - num_tokens <= max(7, num_tokens / 16) for num_tokens, total in filled.items())
    assert len({total for num_tokens, total in filled.items() if 256 < num_tokens <= 4096}) == 4 * 16
    assert [num_filler(total) for total in filled.values()] == [0] * len(filled)
