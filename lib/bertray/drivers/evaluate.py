"""Measure a bundle on a split of a data set, beside TF-IDF + logistic regression on the same rows.

1. predict   the split's texts with the bundle, and with the baseline fitted on the training rows
2. compare   the same metrics for both
3. trust     calibration of the scores, cost and benefit of a review, detection of texts out of scope
4. write     metrics.json and predictions.parquet (the split's columns, `predicted`, `score`, `review`, `num_tokens`,
             `truncated`, `baseline_predicted`)

Legend: N rows, C classes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import BundleInfo, read_info
from bertray.bundle.predictions import is_given, label_lists
from bertray.cli import JobResult
from bertray.data.dataset import Dataset
from bertray.drivers.config import MAX_BASELINE_ROWS, EvaluateConfig
from bertray.errors import RequestError
from bertray.metrics import baseline, calibration, classification
from bertray.reports.terminal import SUMMARY_METRICS, print_evaluation
from bertray.schema import LABEL, NO_CLASS, NUM_TOKENS, REVIEW, SCORE, TEXT, TRUNCATED
from bertray.storage.location import Location
from bertray.storage.outputs import put_json, put_records, refuse_in_bundle
from bertray.versions import versions

_log = logging.getLogger(__name__)

_METRICS_FILE = "metrics.json"
_ENGINE = ("engine", "precision", "accuracy_fp32", "accuracy_int8", "accuracy_fp16", "accuracy_drop_points")
_SUMMARY = ("num_rows", *SUMMARY_METRICS, "ece", "nll", "review", "out_of_scope", "baseline", *_ENGINE, "wall_s")


@dataclass(frozen=True)
class EvaluateResult:
    """How good a bundle is.

    Attributes:
        output: the folder of metrics.json and predictions.parquet.
        metrics: the content of metrics.json.
        predictions: the content of predictions.parquet: the rows of the split beside the bundle's predictions.
    """

    output: str
    metrics: dict[str, Any]
    predictions: pa.Table


def run(config: EvaluateConfig) -> JobResult:
    """The job of the command line."""
    metrics = evaluate(config).metrics
    print_evaluation(metrics)
    return JobResult({"output": config.output, **{name: metrics[name] for name in _SUMMARY if name in metrics}})


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate the bundle and write both files.

    Raises:
        RequestError: bundle or data set are missing or have different labels, or --oos-threshold does not apply.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    refuse_in_bundle(output)
    dataset = Dataset.open(config.data)
    _check(config.oos_threshold, dataset, read_info(Location.of(config.bundle)))
    from bertray.bundle.openvino import open_bundle  # imports torch, which takes seconds

    bundle, engine = open_bundle(config.bundle, config.engine, config.precision)
    info, rows = bundle.info, dataset.split(config.split)
    _log.info("predicting %d rows in %s", rows.num_rows, bundle.encoder.precision)
    tokens, logits_NC = bundle.logits(rows[TEXT])
    probabilities_NC = np.nan_to_num(calibration.probabilities(logits_NC, info.problem_type))
    split = _Split(info, dataset, rows, bundle.predictions(tokens, logits_NC), logits_NC, probabilities_NC)
    train = _baseline_rows(dataset) if config.baseline else None
    compare = _multi_label if dataset.problem_type == "multi_label_classification" else _single_label
    compared, is_right_N, predicted, baseline_predicted = compare(split, train)
    metrics = {
        **compared,
        **_calibration(split),
        "review": None if info.review_below is None else _review(split, is_right_N),
        "out_of_scope": _out_of_scope(split, config.oos_threshold),
        "problem_type": dataset.problem_type,
        "split": config.split,
        **engine,
        "precision": bundle.encoder.precision,
        "bundle": str(Location.of(config.bundle)),
        "bundle_fingerprint": info.fingerprint(),
        "data": str(dataset.location),
        "same_data_as_training": info.data_fingerprint == dataset.fingerprint(),
        "config": config.model_dump(),
        "versions": versions(),
        "wall_s": round(time.monotonic() - started_s, 1),
    }
    if not metrics["same_data_as_training"]:
        _log.warning("warning: the bundle was trained on another data set; this split may hold its training rows")
    table = rows.append_column("predicted", predicted)
    for name in (SCORE, REVIEW, NUM_TOKENS, TRUNCATED):
        table = table.append_column(name, split.predictions[name])
    table = table.append_column("baseline_predicted", baseline_predicted)
    (output / _METRICS_FILE).remove()  # without it the folder holds no evaluation: a crash cannot mix two of them
    put_records(output / "predictions.parquet", table)
    put_json(output / _METRICS_FILE, metrics)
    return EvaluateResult(str(output), metrics, table)


def _check(threshold: float | None, dataset: Dataset, info: BundleInfo) -> None:
    if threshold is not None and (dataset.oos_label is None or dataset.oos_label in dataset.labels):
        why = f"{dataset.oos_label!r} is a class of {dataset.location}, which the bundle predicts itself. Leave it out"
        if dataset.oos_label is None:
            why = (
                f"{dataset.location} has no label for texts out of scope. Leave it out, or prepare it with --oos-label"
            )
        raise RequestError(f"--oos-threshold {threshold:g} has no meaning: {why}")
    if info.problem_type != dataset.problem_type:
        raise RequestError(
            f"the bundle is for {info.problem_type}, {dataset.location} for {dataset.problem_type}: evaluate the "
            "bundle on a data set prepared as its training data was, with or without --multi-label"
        )
    if info.labels != dataset.labels:
        differing = ", ".join(sorted(set(info.labels) ^ set(dataset.labels)))
        raise RequestError(
            f"bundle and data set have different labels (only one of them has {differing}): evaluate the bundle on a "
            f"data set prepared with its labels: {', '.join(info.labels)}"
        )


class _Split(NamedTuple):
    """Rows beside the bundle's predictions."""

    info: BundleInfo
    dataset: Dataset
    rows: pa.Table
    predictions: pa.Table
    logits_NC: np.ndarray
    probabilities_NC: np.ndarray  # 0 for a row without a prediction

    def targets(self) -> np.ndarray:
        return self.dataset.targets(self.rows)

    def predicted_N(self) -> np.ndarray:
        """Label ids (int64); `NO_CLASS` for a row without a prediction."""
        ids = pc.index_in(self.predictions[LABEL], value_set=pa.array(self.dataset.labels))
        return np.asarray(ids.fill_null(NO_CLASS).to_numpy(), dtype=np.int64)


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


def _baseline_metrics(train: pa.Table, scores: dict[str, float]) -> dict[str, Any]:
    return {"name": baseline.NAME, "num_training_rows": train.num_rows, **scores}


def _single_label(split: _Split, train: pa.Table | None) -> _Compared:
    """Compare over the rows that have a class."""
    labels, true_N, predicted_N = split.dataset.labels, split.targets(), split.predicted_N()
    has_class_N = true_N != NO_CLASS
    metrics = classification.full_metrics(true_N[has_class_N], predicted_N[has_class_N], labels)
    metrics["baseline"], baseline_predicted = None, pa.nulls(len(true_N), pa.string())
    if train is not None:
        baseline_N = baseline.predict_baseline(train, split.rows)
        scores = classification.summary_metrics(true_N[has_class_N], baseline_N[has_class_N], len(labels))
        metrics["baseline"] = _baseline_metrics(train, scores)
        baseline_predicted = pa.array(labels).take(pa.array(baseline_N))
    return metrics, has_class_N & (predicted_N == true_N), split.predictions[LABEL], baseline_predicted


def _multi_label(split: _Split, train: pa.Table | None) -> _Compared:
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
        given_NC = is_given(baseline_NC, tuned)
        scores = classification.multi_label_metrics(true_NC, given_NC, dataset.labels)
        names = ("f1_micro", "f1_macro", "subset_accuracy")
        metrics["baseline"] = _baseline_metrics(train, {name: scores[name] for name in names})
        baseline_predicted = label_lists(baseline_NC, given_NC, dataset.labels)
    is_right_N = true_NC[np.arange(len(true_NC)), split.probabilities_NC.argmax(axis=1)] > 0
    return metrics, is_right_N, predicted, baseline_predicted


def _calibration(split: _Split) -> dict[str, float | None]:
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


def _review(split: _Split, is_right_N: np.ndarray) -> dict[str, Any]:
    """Over all rows: a text out of scope that is not reviewed counts as wrong."""
    chosen = {"review_below": split.info.review_below, "target_precision": split.info.target_precision}
    return chosen | classification.review_metrics(is_right_N, split.predictions[REVIEW].to_numpy())


def _out_of_scope(split: _Split, threshold: float | None) -> dict[str, Any] | None:
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
