"""Metrics against values worked out by hand."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from bertray.metrics.baseline import predict_baseline, predict_multi_label_baseline
from bertray.metrics.classification import (
    Counts,
    full_metrics,
    intervals,
    out_of_scope_metrics,
    review_metrics,
    summary_metrics,
)
from bertray.schema import NO_CLASS

TRUE = np.array([0, 0, 0, 1, 1, 2])
PREDICTED = np.array([0, 0, 1, 1, 0, 2])


def test_by_hand() -> None:
    metrics = full_metrics(TRUE, PREDICTED, ("a", "b", "c", "never"))
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    assert metrics["recall_weighted"] == pytest.approx(4 / 6)
    assert metrics["precision_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2 + 1) / 6)
    assert metrics["f1_weighted"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2 + 1) / 6)
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)  # a class that never occurs does not count
    assert metrics["confusion_matrix"] == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert metrics["per_class"]["a"] == {
        "precision": pytest.approx(2 / 3),
        "recall": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
        "num_rows": 3,
    }
    assert metrics["per_class"]["never"]["num_rows"] == 0
    assert metrics["num_rows"] == 6
    assert metrics["labels"] == ["a", "b", "c", "never"]


def test_a_class_that_is_predicted_but_never_true_lowers_macro_f1() -> None:
    assert summary_metrics(np.array([0, 0]), np.array([0, 1]), 2)["f1_macro"] == pytest.approx((2 / 3 + 0) / 2)


def test_the_baseline_learns_words() -> None:
    train = pa.table({"text": ["red apple", "green apple", "fast car", "slow car"] * 3, "label_id": [0, 0, 1, 1] * 3})
    rows = pa.table({"text": ["an apple", "my car"]})
    assert predict_baseline(train, rows).tolist() == [0, 1]


def test_the_baseline_reads_texts_without_words() -> None:
    train = pa.table({"text": ["+", "+ 7", "-", "- \U0001f642"] * 3, "label_id": [0, 0, 1, 1] * 3})
    assert predict_baseline(train, pa.table({"text": ["+", "\U0001f642"]})).tolist() == [0, 1]


TRUE_NC = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=np.float32)
PREDICTED_NC = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])


@pytest.mark.parametrize("kind", [bool, np.int64, np.float32])
def test_several_labels_by_hand(kind: type) -> None:
    metrics = full_metrics(TRUE_NC, PREDICTED_NC.astype(kind), ("a", "b", "c", "never"))
    assert metrics["subset_accuracy"] == 2 / 4  # the row without labels is right too
    # 3 hits, 1 false alarm, 2 misses
    assert metrics["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert metrics["f1_macro"] == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)  # a label that never occurs does not count
    assert metrics["per_class"] == {
        "a": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "num_rows": 2},
        "b": {"precision": pytest.approx(2 / 3), "recall": 1.0, "f1": pytest.approx(4 / 5), "num_rows": 2},
        "c": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "num_rows": 1},
        "never": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "num_rows": 0},
    }
    assert metrics["labels"] == ["a", "b", "c", "never"]
    assert metrics["num_rows"] == 4


def test_a_label_that_is_predicted_but_never_true_lowers_macro_f1_of_several() -> None:
    true_NC, predicted_NC = np.array([[1, 0], [1, 0]]), np.array([[1, 0], [1, 1]])
    assert full_metrics(true_NC, predicted_NC, ("a", "b"))["f1_macro"] == 0.5


def test_no_label_anywhere_is_no_division_by_zero() -> None:
    nothing_NC = np.zeros((2, 2))
    metrics = full_metrics(nothing_NC, nothing_NC, ("a", "b"))
    assert (metrics["f1_micro"], metrics["f1_macro"], metrics["subset_accuracy"]) == (0.0, 0.0, 1.0)


def test_the_baseline_learns_words_of_several_labels() -> None:
    texts = ["red apple", "green apple", "red car", "green car", "slow"] * 4
    train = pa.table({"text": texts})
    has_NC = np.array([["red" in text, "apple" in text, True] for text in texts], dtype=np.float32)
    rows = pa.table({"text": ["a red apple", "my red bike", "a green apple", "slow"]})
    probabilities_NC = predict_multi_label_baseline(train, has_NC, rows)
    assert (probabilities_NC > 0.5).tolist() == [
        [True, True, True],
        [True, False, True],
        [False, True, True],
        [False, False, True],  # the last label is on every training row
    ]
    assert ((probabilities_NC >= 0) & (probabilities_NC <= 1)).all()
    assert np.array_equal(probabilities_NC, predict_multi_label_baseline(train, has_NC, rows))


def test_review_by_hand() -> None:
    found = review_metrics(np.array([True, True, False, False]), np.array([False, False, False, True]))
    assert found == {"coverage": 0.75, "precision": pytest.approx(2 / 3), "num_rows_review": 1}
    assert review_metrics(np.array([True]), np.array([True])) == {
        "coverage": 0.0,
        "precision": None,
        "num_rows_review": 1,
    }


def test_out_of_scope_by_hand() -> None:
    true_N = np.array([0, 1, 2, 2, NO_CLASS, NO_CLASS])
    predicted_N = np.array([0, 2, 2, NO_CLASS, NO_CLASS, 1])
    score_N = np.array([0.9, 0.6, 0.8, 0.3, 0.2, 0.6])
    assert out_of_scope_metrics(true_N, predicted_N, score_N) == {
        "in_scope_accuracy": 2 / 4,
        "in_scope_coverage": 3 / 4,
        "oos_recall": 1 / 2,
        "oos_precision": 1 / 2,
        "auroc": pytest.approx((4 + 2 + 0.5) / 8),  # of the 8 pairs
        "num_rows_in_scope": 4,
        "num_rows_out_of_scope": 2,
    }
    found = out_of_scope_metrics(true_N[:2], predicted_N[:2], score_N[:2])
    assert (found["in_scope_accuracy"], found["oos_recall"], found["oos_precision"], found["auroc"]) == (
        0.5,
        None,
        None,
        None,
    )


def test_a_row_without_a_prediction_is_wrong_and_no_class() -> None:
    found = full_metrics(np.array([0, 0, 1]), np.array([0, NO_CLASS, 1]), ("a", "b"))
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["confusion_matrix"] == [[1, 0], [0, 1]]


def summary_of_one(true_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """By scikit-learn."""
    occurring = np.setdiff1d(np.union1d(true_N, predicted_N), [NO_CLASS])
    settings: Any = {"labels": np.arange(4), "average": "weighted", "zero_division": 0}
    return {
        "accuracy": accuracy_score(true_N, predicted_N),
        "precision_weighted": precision_score(true_N, predicted_N, **settings),
        "recall_weighted": recall_score(true_N, predicted_N, **settings),
        "f1_weighted": f1_score(true_N, predicted_N, **settings),
        "f1_macro": f1_score(true_N, predicted_N, labels=occurring, average="macro", zero_division=0),
    }


def summary_of_several(true_NC: np.ndarray, predicted_NC: np.ndarray) -> dict[str, float]:
    """By scikit-learn."""
    f1_C = f1_score(true_NC, predicted_NC, average=None, zero_division=0)[(true_NC | predicted_NC).any(axis=0)]
    return {
        "subset_accuracy": accuracy_score(true_NC, predicted_NC),
        "f1_micro": f1_score(true_NC, predicted_NC, average="micro", zero_division=0),
        "f1_macro": f1_C.mean() if len(f1_C) else 0.0,
    }


def decisions(is_multi_label: bool, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 80 rows and 4 classes: true, nearly right, and less so."""
    rng = np.random.default_rng(seed)
    if is_multi_label:
        true = rng.random((80, 4)) < 0.3
        predicted, other = (true ^ (rng.random(true.shape) < wrong) for wrong in (0.1, 0.2))
    else:
        true = rng.integers(0, 4, 80)
        predicted, other = (np.where(rng.random(80) < wrong, rng.integers(-1, 4, 80), true) for wrong in (0.1, 0.3))
    return true, predicted, other


@pytest.mark.parametrize("is_multi_label", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 80])
def test_the_summary_is_scikit_learns(is_multi_label: bool, num_rows: int) -> None:
    for seed in range(10):
        true, predicted, other = (one[:num_rows] for one in decisions(is_multi_label, seed))
        for side in (predicted, other):
            expected = (summary_of_several if is_multi_label else summary_of_one)(true, side)
            assert summary_metrics(true, side, 4) == pytest.approx(expected)


def difference_intervals(
    true: np.ndarray, predicted: np.ndarray, other: np.ndarray, num_classes: int
) -> dict[str, list[float]]:
    first, second = (Counts(true, one, num_classes) for one in (predicted, other))
    return intervals(first.metrics, second.metrics, len(true))


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_the_interval_is_of_the_metrics_over_rows_drawn_again(
    is_multi_label: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, predicted, other = decisions(is_multi_label, 3)
    monkeypatch.setattr("bertray.metrics.classification._NUM_RESAMPLES", 50)
    found = difference_intervals(true, predicted, other, 4)
    of_rows = summary_of_several if is_multi_label else summary_of_one
    draws = np.random.default_rng(0)
    all_drawn = [draws.integers(80, size=80) for _ in range(50)]
    both_drawn = [[of_rows(true[drawn], side[drawn]) for side in (predicted, other)] for drawn in all_drawn]
    assert len(found) == (3 if is_multi_label else 5)
    for name, interval in found.items():
        differences = [first[name] - second[name] for first, second in both_drawn]
        assert interval == pytest.approx(np.quantile(differences, [0.025, 0.975]))


def test_the_interval_of_a_difference_by_hand() -> None:
    # Of 400 rows, 300 are right on both sides and 60 on the first alone: 0.15, and its standard error is 0.0179.
    true, first, second = np.zeros(400, int), np.repeat([0, 1], [360, 40]), np.repeat([0, 1], [300, 100])
    assert difference_intervals(true, first, second, 2)["accuracy"] == pytest.approx([0.115, 0.185], abs=0.005)
    for num_rows in (400, 0):
        nothing = difference_intervals(true[:num_rows], first[:num_rows], first[:num_rows], 2)
        assert list(nothing.values()) == [[0.0, 0.0]] * 5
