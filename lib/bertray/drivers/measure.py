"""What bertray evaluate measures: a bundle's predictions on a split, beside those of a baseline on the same rows.

Legend: N rows, C classes.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from bertray.bundle.info import BundleInfo
from bertray.data.dataset import Dataset
from bertray.drivers.config import MAX_BASELINE_ROWS
from bertray.metrics import classification
from bertray.schema import NO_CLASS, REVIEW
from bertray.tasks.task import TASKS

_log = logging.getLogger(__name__)


class Split(NamedTuple):
    """Rows beside the bundle's predictions."""

    info: BundleInfo
    dataset: Dataset
    rows: pa.Table
    predictions: pa.Table
    logits_NC: np.ndarray


def measure(
    split: Split, oos_threshold: float | None, *, with_baseline: bool
) -> tuple[dict[str, Any], pa.Array, pa.Array]:
    """The metrics as metrics.json holds them, and the labels predicted by the bundle and by the baseline."""
    task, info, dataset = TASKS[split.info.problem_type], split.info, split.dataset
    targets = dataset.targets(split.rows)
    counted_N, logits_NC, predicted = task.is_in_scope(split.rows), split.logits_NC, task.evaluated(split.predictions)
    metrics = task.measured(logits_NC[counted_N], targets[counted_N], info)
    metrics["baseline"], baseline_predicted = None, pa.nulls(len(targets), predicted.type)
    if with_baseline:
        train = _baseline_rows(dataset)
        splits = {"train": train, "validation": dataset.split("validation")}
        other, baseline_predicted = task.baseline(splits, split.rows, info)
        decided, other, true = (of_all[counted_N] for of_all in (task.decided(logits_NC, info), other, targets))
        metrics["baseline"] = {
            "name": task.baseline_name,
            "num_training_rows": train.num_rows,
            **task.summary(other, true, len(info.labels)),
            "difference_intervals": task.difference_intervals(decided, other, true, len(info.labels)),
        }
    is_right_N = counted_N & task.is_best_right(logits_NC, targets, info)
    metrics["review"] = _review(split, is_right_N) if task.reviews(info) else None
    metrics["out_of_scope"] = _out_of_scope(split, targets, oos_threshold) if dataset.oos_label is not None else None
    return metrics, predicted, baseline_predicted


def _baseline_rows(dataset: Dataset) -> pa.Table:
    """Training rows to fit the baseline on: all, or a sample."""
    train = dataset.split("train")
    num_rows = train.num_rows
    if num_rows > MAX_BASELINE_ROWS:
        chosen = np.random.default_rng(0).choice(num_rows, MAX_BASELINE_ROWS, replace=False)
        train = train.take(pa.array(np.sort(chosen)))
    _log.info("fitting the baseline on %d of %d training rows", train.num_rows, num_rows)
    return train


def _review(split: Split, is_right_N: np.ndarray) -> dict[str, Any]:
    """Over all rows: a text out of scope that is not reviewed counts as wrong."""
    chosen = {"review_below": split.info.review_below, "target_precision": split.info.target_precision}
    return chosen | classification.review_metrics(is_right_N, split.predictions[REVIEW].to_numpy())


def _out_of_scope(split: Split, true_N: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """How well texts out of scope are rejected: by their own class if there is one, otherwise by a low score."""
    label, labels, task = split.dataset.oos_label, split.dataset.labels, TASKS[split.info.problem_type]
    predicted_N, probabilities_NC = task.decided(split.logits_NC), np.nan_to_num(task.probabilities(split.logits_NC))
    if label in labels:
        oos_id, threshold = labels.index(label), None
        true_N = np.where(true_N == oos_id, NO_CLASS, true_N)
        score_N = 1 - probabilities_NC[:, oos_id]
        is_rejected_N = predicted_N == oos_id
    else:
        threshold = split.info.review_below if threshold is None else threshold
        score_N = probabilities_NC.max(axis=1).astype(np.float64)
        is_rejected_N = score_N < (0 if threshold is None else threshold)
    # A row without a prediction is NO_CLASS already, which counts as rejected.
    metrics = classification.out_of_scope_metrics(true_N, np.where(is_rejected_N, NO_CLASS, predicted_N), score_N)
    return {"label": label, "is_class": label in labels, "threshold": threshold, **metrics}
