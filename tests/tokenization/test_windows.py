"""Windows cover a document in order and overlap as asked; their logits become the document's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertray.tokenization.windows import aggregate, cut, training_weights
from bertray.types import LongDocuments


def test_the_example_of_the_module() -> None:
    documents_S, *others = cut(np.array([3, 11]), window=5, stride=1)
    assert [one.tolist() for one in (documents_S, *others)] == [[0, 1, 1, 1], [0, 0, 3, 6], [3, 5, 5, 5]]
    logits_SC = np.array([[1, 0], [2, 4], [0, 0], [4, 2]], dtype=np.float32)
    assert aggregate(logits_SC, documents_S, 2, "mean").tolist() == [[1, 0], [2, 2]]
    assert aggregate(logits_SC, documents_S, 2, "max").tolist() == [[1, 0], [4, 4]]


@given(st.lists(st.integers(0, 200), max_size=12), st.integers(1, 40), st.integers(0, 39))
def test_every_token_is_covered_in_order_by_full_windows(lengths: list[int], window: int, stride: int) -> None:
    stride = min(stride, window - 1)
    documents_S, starts_S, lengths_S = windows = cut(np.array(lengths, dtype=np.int64), window, stride)
    assert all(one.dtype == np.int64 for one in windows)
    assert documents_S.tolist() == sorted(documents_S.tolist())
    for document, length in enumerate(lengths):
        mine = documents_S == document
        starts, ends = starts_S[mine], (starts_S + lengths_S)[mine]
        assert starts[0] == 0
        assert ends[-1] == length
        if length <= window:
            assert len(starts) == 1
            continue
        assert (ends - starts == window).all()
        overlaps = ends[:-1] - starts[1:]
        assert (overlaps >= stride).all()
        assert overlaps.max() - overlaps.min() <= 1  # evenly spread
        # One window fewer would not do.
        assert window + (len(starts) - 2) * (window - stride) < length


def test_no_documents_and_a_very_long_one() -> None:
    assert [len(one) for one in cut(np.zeros(0, dtype=np.int64), 5, 1)] == [0, 0, 0]
    documents_S, starts_S, _ = cut(np.array([10**7]), 254, 64)
    assert len(documents_S) == 52632
    assert starts_S[-1] == 10**7 - 254


@pytest.mark.parametrize("how", ["mean", "max"])
@given(st.lists(st.integers(0, 5), max_size=10), st.integers(0, 2**32))
def test_aggregation_is_that_of_a_loop(how: LongDocuments, counts: list[int], seed: int) -> None:
    documents_S = np.repeat(np.arange(len(counts)), counts)
    logits_SC = np.random.default_rng(seed).normal(size=(len(documents_S), 3)).astype(np.float32)
    logits_NC = aggregate(logits_SC, documents_S, len(counts), how)
    assert logits_NC.shape == (len(counts), 3)
    assert logits_NC.dtype == np.float32
    for document, count in enumerate(counts):
        mine_SC = logits_SC[documents_S == document]
        if count == 0:
            assert np.isnan(logits_NC[document]).all()
        elif how == "max":
            assert np.array_equal(logits_NC[document], mine_SC.max(axis=0))
        else:
            np.testing.assert_allclose(logits_NC[document], mine_SC.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize("how", ["truncate", "mean", "max"])
def test_documents_of_one_window_keep_their_logits(how: LongDocuments) -> None:
    logits_SC = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    logits_NC = aggregate(logits_SC, np.array([0, 2, 3]), 5, how)
    assert np.array_equal(logits_NC[[0, 2, 3]], logits_SC)
    assert np.isnan(logits_NC[[1, 4]]).all()


@pytest.mark.parametrize("how", ["mean", "max"])
def test_a_window_without_a_number_is_not_hidden_by_the_others(how: LongDocuments) -> None:
    logits_SC = np.array([[1, 2], [np.nan, 1], [3, 4]], dtype=np.float32)
    assert np.isnan(aggregate(logits_SC, np.array([0, 0, 1]), 2, how)).tolist() == [[True, False], [False, False]]


def test_documents_weigh_the_same_in_training() -> None:
    documents_S = np.array([0, 1, 1, 1, 3, 3])
    weights_S = training_weights(documents_S)
    assert weights_S.dtype == np.float32
    assert weights_S.mean() == pytest.approx(1)
    assert np.bincount(documents_S, weights_S)[[0, 1, 3]] == pytest.approx([2, 2, 2])
    assert training_weights(np.arange(7)).tolist() == [1.0] * 7  # truncated texts: a plain mean
