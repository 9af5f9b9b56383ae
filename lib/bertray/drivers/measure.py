"""What bertray evaluate measures: a bundle's predictions on a split, beside those of a baseline on the same rows.

Legend: N rows, C classes.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa

from bertray.bundle.info import BundleInfo
from bertray.data.dataset import Dataset
from bertray.drivers.config import MAX_BASELINE_ROWS, EvaluateConfig
from bertray.metrics import classification
from bertray.schema import NO_CLASS, REVIEW, SCORE
from bertray.tasks.task import TASKS

_log = logging.getLogger(__name__)


def measure(
    info: BundleInfo,
    dataset: Dataset,
    rows: pa.Table,
    predictions: pa.Table,
    logits_NC: np.ndarray,
    config: EvaluateConfig,
) -> tuple[dict[str, Any], dict[str, pa.Array]]:
    """The metrics as metrics.json holds them, and columns for the rows.

    These are `predicted` and `baseline_predicted`, and `is_right` where something is reviewed or has a score: whether
    the label that the score is of, or the class between cuts, is right.
    """
    task, targets = TASKS[info.problem_type], dataset.targets(rows)
    counted_N, predicted = task.is_in_scope(rows), task.evaluated(predictions)
    metrics = task.measured(logits_NC[counted_N], targets[counted_N], info)
    decided, true = task.decided(logits_NC, info)[counted_N], targets[counted_N]
    metrics["intervals"] = task.difference_intervals(decided, None, true, len(info.labels))
    metrics["baseline"], baseline_predicted = None, pa.nulls(len(targets), predicted.type)
    if config.baseline:
        train = _baseline_rows(dataset)
        splits = {"train": train, "validation": dataset.split("validation")}
        other, baseline_predicted = task.baseline(splits, rows, info)
        other = other[counted_N]
        metrics["baseline"] = {
            "name": task.baseline_name,
            "num_training_rows": train.num_rows,
            **task.summary(other, true, len(info.labels)),
            "difference_intervals": task.difference_intervals(decided, other, true, len(info.labels)),
        }
    is_right_N = counted_N & task.is_best_right(logits_NC, targets, info)
    metrics["review"] = metrics["out_of_scope"] = None
    if task.reviews(info):  # over all rows: a text out of scope that is not reviewed counts as wrong
        chosen = {"review_below": info.review_below, "target_precision": info.target_precision}
        metrics["review"] = chosen | classification.review_metrics(is_right_N, predictions[REVIEW].to_numpy())
    if dataset.oos_label is not None:
        threshold = info.review_below if config.oos_threshold is None else config.oos_threshold
        metrics["out_of_scope"] = _out_of_scope(dataset, targets, logits_NC, threshold)
    columns = {"predicted": predicted, "baseline_predicted": baseline_predicted}
    if task.reviews(info) or SCORE in predictions.column_names:
        columns["is_right"] = pa.array(is_right_N)
    return metrics, columns


def _baseline_rows(dataset: Dataset) -> pa.Table:
    """Training rows to fit the baseline on: all, or a sample."""
    train = dataset.split("train")
    num_rows = train.num_rows
    if num_rows > MAX_BASELINE_ROWS:
        chosen = np.random.default_rng(0).choice(num_rows, MAX_BASELINE_ROWS, replace=False)
        train = train.take(pa.array(np.sort(chosen)))
    _log.info("fitting the baseline on %d of %d training rows", train.num_rows, num_rows)
    return train


def _out_of_scope(
    dataset: Dataset, true_N: np.ndarray, logits_NC: np.ndarray, threshold: float | None
) -> dict[str, Any]:
    """How well texts out of scope are rejected: by their own class if there is one, otherwise by a low score."""
    label, labels, task = dataset.oos_label, dataset.labels, TASKS[dataset.problem_type]
    predicted_N, probabilities_NC = task.decided(logits_NC), np.nan_to_num(task.probabilities(logits_NC))
    if label in labels:
        oos_id, threshold = labels.index(label), None
        true_N = np.where(true_N == oos_id, NO_CLASS, true_N)
        score_N = 1 - probabilities_NC[:, oos_id]
        is_rejected_N = predicted_N == oos_id
    else:
        score_N = probabilities_NC.max(axis=1).astype(np.float64)
        is_rejected_N = score_N < (0 if threshold is None else threshold)
    # A row without a prediction is NO_CLASS already, which counts as rejected.
    metrics = classification.out_of_scope_metrics(true_N, np.where(is_rejected_N, NO_CLASS, predicted_N), score_N)
    return {"label": label, "is_class": label in labels, "threshold": threshold, **metrics}
