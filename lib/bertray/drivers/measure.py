"""What bertray evaluate measures: a bundle's predictions on a split, beside those of a baseline on the same rows.

Legend: N rows, C classes.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import BundleInfo
from bertray.bundle.predictions import is_given, label_lists
from bertray.data.dataset import Dataset
from bertray.drivers.config import MAX_BASELINE_ROWS
from bertray.metrics import baseline, calibration, classification
from bertray.schema import LABEL, NO_CLASS, REVIEW

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Rows beside the bundle's predictions."""

    info: BundleInfo
    dataset: Dataset
    rows: pa.Table
    predictions: pa.Table
    logits_NC: np.ndarray

    @property
    def probabilities_NC(self) -> np.ndarray:
        """0 for a row without a prediction."""
        return np.asarray(np.nan_to_num(calibration.probabilities(self.logits_NC, self.info.problem_type)))

    def targets(self) -> np.ndarray:
        return self.dataset.targets(self.rows)

    def predicted_N(self) -> np.ndarray:
        """Label ids (int64); `NO_CLASS` for a row without a prediction."""
        ids = pc.index_in(self.predictions[LABEL], value_set=pa.array(self.dataset.labels))
        return np.asarray(ids.fill_null(NO_CLASS).to_numpy(), dtype=np.int64)


def measure(
    split: Split, oos_threshold: float | None, *, with_baseline: bool
) -> tuple[dict[str, Any], pa.Array, pa.Array]:
    """The metrics as metrics.json holds them, and the labels predicted by the bundle and by the baseline."""
    train = _baseline_rows(split.dataset) if with_baseline else None
    compare = _multi_label if split.info.problem_type == "multi_label_classification" else _single_label
    compared, is_right_N, predicted, baseline_predicted = compare(split, train)
    metrics = {
        **compared,
        **_calibration(split),
        "review": None if split.info.review_below is None else _review(split, is_right_N),
        "out_of_scope": _out_of_scope(split, oos_threshold),
    }
    return metrics, predicted, baseline_predicted


# The metrics, whether each row has the label in `label`, and the labels predicted by the bundle and by the baseline.
_Compared = tuple[dict[str, Any], np.ndarray, pa.Array, pa.Array]


def _baseline_rows(dataset: Dataset) -> pa.Table:
    """Training rows to fit the baseline on: all, or a sample."""
    train = dataset.split("train")
    num_rows = train.num_rows
    if num_rows > MAX_BASELINE_ROWS:
        chosen = np.random.default_rng(0).choice(num_rows, MAX_BASELINE_ROWS, replace=False)
        train = train.take(pa.array(np.sort(chosen)))
    _log.info("fitting the baseline on %d of %d training rows", train.num_rows, num_rows)
    return train


def _baseline_metrics(train: pa.Table, scores: dict[str, float], intervals: dict[str, list[float]]) -> dict[str, Any]:
    return {"name": baseline.NAME, "num_training_rows": train.num_rows, **scores, "difference_intervals": intervals}


def _single_label(split: Split, train: pa.Table | None) -> _Compared:
    """Compare over the rows that have a class."""
    labels, true_N, predicted_N = split.dataset.labels, split.targets(), split.predicted_N()
    has_class_N = true_N != NO_CLASS
    metrics = classification.full_metrics(true_N[has_class_N], predicted_N[has_class_N], labels)
    metrics["baseline"], baseline_predicted = None, pa.nulls(len(true_N), pa.string())
    if train is not None:
        baseline_N = baseline.predict_baseline(train, split.rows)
        of_classes = true_N[has_class_N], predicted_N[has_class_N], baseline_N[has_class_N]
        scores = classification.summary_metrics(of_classes[0], of_classes[2], len(labels))
        intervals = classification.difference_intervals(*of_classes, len(labels))
        metrics["baseline"] = _baseline_metrics(train, scores, intervals)
        baseline_predicted = pa.array(labels).take(pa.array(baseline_N))
    return metrics, has_class_N & (predicted_N == true_N), split.predictions[LABEL], baseline_predicted


def _multi_label(split: Split, train: pa.Table | None) -> _Compared:
    """Compare; the baseline's thresholds are tuned on validation rows if the bundle's were, else 0.5 too."""
    dataset, thresholds, true_NC = split.dataset, split.info.thresholds, split.targets()
    given_NC = is_given(split.probabilities_NC, thresholds)
    metrics = classification.multi_label_metrics(true_NC, given_NC, dataset.labels)
    for label, threshold in zip(dataset.labels, thresholds or (), strict=False):
        metrics["per_class"][label]["threshold"] = threshold
    predicted = label_lists(split.probabilities_NC, given_NC, dataset.labels)
    metrics["baseline"], baseline_predicted = None, pa.nulls(len(true_NC), predicted.type)
    if train is not None:
        validation = dataset.split("validation")
        texts = pa.concat_tables([validation, split.rows])
        both_NC = baseline.predict_multi_label_baseline(train, dataset.targets(train), texts)
        validation_NC, baseline_NC = np.split(both_NC, [len(validation)])
        tuned = thresholds and calibration.tune_thresholds(validation_NC, dataset.targets(validation))
        also_given_NC = is_given(baseline_NC, tuned)
        scores = classification.multi_label_metrics(true_NC, also_given_NC, dataset.labels)
        intervals = classification.difference_intervals(true_NC, given_NC, also_given_NC, len(dataset.labels))
        metrics["baseline"] = _baseline_metrics(train, {name: scores[name] for name in intervals}, intervals)
        baseline_predicted = label_lists(baseline_NC, also_given_NC, dataset.labels)
    is_right_N = true_NC[np.arange(len(true_NC)), split.probabilities_NC.argmax(axis=1)] > 0
    return metrics, is_right_N, predicted, baseline_predicted


def _calibration(split: Split) -> dict[str, float | None]:
    """Over the rows with a class and a prediction; None if there are none."""
    targets, problem_type = split.targets(), split.info.problem_type
    counted_N = np.isfinite(split.logits_NC).all(axis=1)
    if problem_type == "single_label_classification":
        counted_N &= targets != NO_CLASS
    logits_NC, targets = split.logits_NC[counted_N], targets[counted_N]
    if not len(targets):
        return {"ece": None, "nll": None}
    return {
        "ece": calibration.expected_calibration_error(calibration.probabilities(logits_NC, problem_type), targets),
        "nll": calibration.negative_log_likelihood(logits_NC, targets),
    }


def _review(split: Split, is_right_N: np.ndarray) -> dict[str, Any]:
    """Over all rows: a text out of scope that is not reviewed counts as wrong."""
    chosen = {"review_below": split.info.review_below, "target_precision": split.info.target_precision}
    return chosen | classification.review_metrics(is_right_N, split.predictions[REVIEW].to_numpy())


def _out_of_scope(split: Split, threshold: float | None) -> dict[str, Any] | None:
    """How well texts out of scope are rejected: by their own class if there is one, otherwise by a low score."""
    label, labels = split.dataset.oos_label, split.dataset.labels
    if label is None:
        return None
    true_N, predicted_N = split.targets(), split.predicted_N()
    if label in labels:
        oos_id, threshold = labels.index(label), None
        true_N = np.where(true_N == oos_id, NO_CLASS, true_N)
        score_N = 1 - split.probabilities_NC[:, oos_id]
        is_rejected_N = predicted_N == oos_id
    else:
        threshold = split.info.review_below if threshold is None else threshold
        score_N = split.probabilities_NC.max(axis=1).astype(np.float64)
        is_rejected_N = score_N < (0 if threshold is None else threshold)
    # A row without a prediction is NO_CLASS already, which counts as rejected.
    metrics = classification.out_of_scope_metrics(true_N, np.where(is_rejected_N, NO_CLASS, predicted_N), score_N)
    return {"label": label, "is_class": label in labels, "threshold": threshold, **metrics}
