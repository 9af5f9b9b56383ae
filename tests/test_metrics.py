"""Metrics against values worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from bertray.baseline import predict_baseline
from bertray.metrics import full_metrics, summary_metrics

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
