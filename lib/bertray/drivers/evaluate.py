"""How good is a bundle on a split of a data set, how sure, and how much better than the simplest thing that works?

1. predict   the split's texts with the bundle, and with TF-IDF + logistic regression fitted on the training rows
2. compare   the same metrics for both
3. trust     are scores what they claim, what does a review cost and bring, are texts out of scope found
4. write     metrics.json and predictions.parquet (the split's columns, `predicted`, `score`, `review`, `num_tokens`,
             `truncated`, `baseline_predicted`)

Legend: N rows, C classes.
"""

from __future__ import annotations

import io
import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.bundle.info import BundleInfo, read_info
from bertray.bundle.predictions import is_given, label_lists
from bertray.cli import JobResult
from bertray.data.dataset import Dataset
from bertray.drivers.config import MAX_BASELINE_ROWS, EvaluateConfig
from bertray.errors import RequestError
from bertray.metrics import baseline
from bertray.metrics.calibration import (
    expected_calibration_error,
    negative_log_likelihood,
    probabilities,
    tune_thresholds,
)
from bertray.metrics.classification import (
    full_metrics,
    multi_label_metrics,
    out_of_scope_metrics,
    review_metrics,
    summary_metrics,
)
from bertray.reports.terminal import print_evaluation
from bertray.schema import LABEL, NO_CLASS, NUM_TOKENS, REVIEW, SCORE, TEXT, TRUNCATED
from bertray.storage.location import Location
from bertray.storage.outputs import refuse_in_bundle
from bertray.types import ProblemType
from bertray.versions import versions

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle

_log = logging.getLogger(__name__)

_OF_ONE_LABEL = ("accuracy", "precision_weighted", "recall_weighted", "f1_weighted", "f1_macro")
_OF_SEVERAL_LABELS = ("f1_micro", "f1_macro", "subset_accuracy")
_SUMMARY = ("num_rows", *_OF_ONE_LABEL, *_OF_SEVERAL_LABELS, "ece", "nll", "review", "out_of_scope", "baseline")
_ENGINE = ("engine", "precision", "accuracy_fp32", "accuracy_int8", "accuracy_fp16", "accuracy_drop_points")

PREDICTED, BASELINE_PREDICTED = "predicted", "baseline_predicted"


@dataclass(frozen=True)
class EvaluateResult:
    """How good a bundle is.

    Attributes:
        output: the place of metrics.json and predictions.parquet.
        metrics: what metrics.json holds.
        predictions: what predictions.parquet holds: the rows of the split beside what the bundle says.
    """

    output: str
    metrics: dict[str, Any]
    predictions: pa.Table


def run(config: EvaluateConfig) -> JobResult:
    """The job of the command line."""
    metrics = evaluate(config).metrics
    print_evaluation(metrics)
    names = [key for key in dict.fromkeys((*_SUMMARY, *_ENGINE, "wall_s")) if key in metrics]
    return JobResult({"output": config.output, **{key: metrics[key] for key in names}})


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate, and write both files.

    Raises:
        RequestError: bundle or data set are missing, or do not have the same labels; a threshold for texts out of
            scope does not go with them.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    refuse_in_bundle(output)
    dataset = Dataset.open(config.data)
    _check_threshold(config, dataset)
    _check_labels(read_info(Location.of(config.bundle)), dataset)
    from bertray.bundle.openvino import open_bundle  # torch, which takes seconds, after the checks

    bundle, engine = open_bundle(config.bundle, config.engine, config.precision)
    rows = dataset.split(config.split)

    _log.info("predicting %d rows in %s", rows.num_rows, bundle.encoder.precision)
    tokens, logits_NC = bundle.logits(rows[TEXT])
    predictions = bundle.predictions(tokens, logits_NC)
    probabilities_NC = np.nan_to_num(probabilities(logits_NC, bundle.info.problem_type))
    train = _baseline_rows(dataset) if config.baseline else None
    if dataset.problem_type == "multi_label_classification":
        compared = _several_labels(bundle, dataset, rows, probabilities_NC, train)
    else:
        compared = _one_label(dataset, rows, predictions, train)
    metrics = {
        **compared.metrics,
        **_calibration(logits_NC, dataset.targets(rows), dataset.problem_type),
        "review": _review(bundle, compared.is_right_N, predictions),
        "out_of_scope": _out_of_scope(config, bundle, dataset, rows, predictions, probabilities_NC),
        "problem_type": dataset.problem_type,
        "split": config.split,
        **engine,
        "precision": bundle.encoder.precision,
        "bundle": str(Location.of(config.bundle)),
        "bundle_fingerprint": bundle.info.fingerprint(),
        "data": str(dataset.location),
        "same_data_as_training": bundle.info.data_fingerprint == dataset.fingerprint(),
        "config": config.model_dump(),
        "versions": versions(),
        "wall_s": round(time.monotonic() - started_s, 1),
    }
    if not metrics["same_data_as_training"]:
        _log.warning("warning: the bundle was trained on another data set; its training rows may stand in this split")
    table = rows.append_column(PREDICTED, compared.predicted)
    for name in (SCORE, REVIEW, NUM_TOKENS, TRUNCATED):
        table = table.append_column(name, predictions[name])
    table = table.append_column(BASELINE_PREDICTED, compared.baseline_predicted)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    (output / "predictions.parquet").put(buffer.getvalue())
    (output / "metrics.json").put((json.dumps(metrics, indent=2, ensure_ascii=False) + "\n").encode())
    return EvaluateResult(str(output), metrics, table)


def _check_threshold(config: EvaluateConfig, dataset: Dataset) -> None:
    if config.oos_threshold is None:
        return
    if dataset.oos_label is None:
        raise RequestError(
            f"--oos-threshold {config.oos_threshold:g} has no meaning: {dataset.location} names no label of texts out "
            "of scope. Leave it out, or prepare the data set with --oos-label"
        )
    if dataset.oos_label in dataset.labels:
        raise RequestError(
            f"--oos-threshold {config.oos_threshold:g} has no meaning: {dataset.oos_label!r} is a class of "
            f"{dataset.location}, which the bundle predicts by itself. Leave it out"
        )


def _check_labels(info: BundleInfo, dataset: Dataset) -> None:
    if info.problem_type != dataset.problem_type:
        raise RequestError(
            f"the bundle is for {info.problem_type}, {dataset.location} for {dataset.problem_type}: evaluate "
            "the bundle on a data set prepared as its own was, with or without --multi-label"
        )
    if info.labels == dataset.labels:
        return
    missing = sorted(set(info.labels) ^ set(dataset.labels))
    raise RequestError(
        f"bundle and data set have different labels ({', '.join(missing)} stand in one alone): evaluate the bundle on "
        f"a data set prepared with its labels: {', '.join(info.labels)}"
    )


class _Compared(NamedTuple):
    """A bundle beside the baseline, if that is wanted."""

    metrics: dict[str, Any]
    is_right_N: np.ndarray  # whether `label` is true of the row
    predicted: pa.Array | pa.ChunkedArray
    baseline_predicted: pa.Array  # null without the baseline


def _baseline_rows(dataset: Dataset) -> pa.Table:
    """Training rows that the baseline is fitted on: all, or a sample."""
    train = dataset.split("train")
    num_rows = train.num_rows
    if num_rows > MAX_BASELINE_ROWS:
        chosen = np.random.default_rng(0).choice(num_rows, MAX_BASELINE_ROWS, replace=False)
        train = train.take(pa.array(np.sort(chosen)))
    _log.info("fitting the baseline on %d of %d training rows", train.num_rows, num_rows)
    return train


def _baseline_metrics(train: pa.Table, scores: dict[str, float]) -> dict[str, Any]:
    return {"name": baseline.NAME, "num_training_rows": train.num_rows, **scores}


def _one_label(dataset: Dataset, rows: pa.Table, predictions: pa.Table, train: pa.Table | None) -> _Compared:
    """Metrics are of the rows that have a class.

    Args:
        train: what the baseline is fitted on; None: there is none.
    """
    true_N, predicted_N = dataset.targets(rows), _predicted(dataset, predictions)
    has_class_N = true_N != NO_CLASS
    metrics = {**full_metrics(true_N[has_class_N], predicted_N[has_class_N], dataset.labels), "baseline": None}
    baseline_predicted = pa.nulls(rows.num_rows, pa.string())
    if train is not None:
        baseline_N = baseline.predict_baseline(train, rows)
        simplest = summary_metrics(true_N[has_class_N], baseline_N[has_class_N], len(dataset.labels))
        metrics["baseline"] = _baseline_metrics(train, simplest)
        baseline_predicted = pa.array(dataset.labels).take(pa.array(baseline_N))
    is_right_N = has_class_N & (predicted_N == true_N)
    return _Compared(metrics, is_right_N, predictions[LABEL], baseline_predicted)


def _predicted(dataset: Dataset, predictions: pa.Table) -> np.ndarray:
    """Label ids (int64 [N]); of a row without a prediction `NO_CLASS`."""
    ids = pc.index_in(predictions[LABEL], value_set=pa.array(dataset.labels)).fill_null(NO_CLASS)
    return np.asarray(ids.to_numpy(), dtype=np.int64)


def _several_labels(
    bundle: Bundle, dataset: Dataset, rows: pa.Table, probabilities_NC: np.ndarray, train: pa.Table | None
) -> _Compared:
    """The baseline has thresholds chosen as the bundle's were, on the validation rows, or like it 0.5.

    Args:
        train: what the baseline is fitted on; None: there is none.
    """
    thresholds = bundle.info.thresholds
    true_NC = dataset.targets(rows)
    given_NC = is_given(probabilities_NC, thresholds)
    metrics = multi_label_metrics(true_NC, given_NC, dataset.labels)
    if thresholds is not None:
        for label, threshold in zip(dataset.labels, thresholds, strict=True):
            metrics["per_class"][label]["threshold"] = threshold
    predicted = label_lists(probabilities_NC, given_NC, dataset.labels)
    metrics["baseline"], baseline_predicted = None, pa.nulls(rows.num_rows, predicted.type)
    if train is not None:
        validation = dataset.split("validation")
        texts = pa.concat_tables([validation, rows])
        simplest_NC = baseline.predict_multi_label_baseline(train, dataset.targets(train), texts)
        simplest_thresholds = None
        if thresholds is not None:
            simplest_thresholds = tune_thresholds(simplest_NC[: len(validation)], dataset.targets(validation))
        simplest_NC = simplest_NC[len(validation) :]
        simplest_given_NC = is_given(simplest_NC, simplest_thresholds)
        simplest = multi_label_metrics(true_NC, simplest_given_NC, dataset.labels)
        names = ("f1_micro", "f1_macro", "subset_accuracy")
        metrics["baseline"] = _baseline_metrics(train, {name: simplest[name] for name in names})
        baseline_predicted = label_lists(simplest_NC, simplest_given_NC, dataset.labels)
    is_right_N = true_NC[np.arange(len(rows)), probabilities_NC.argmax(axis=1)] > 0
    return _Compared(metrics, is_right_N, predicted, baseline_predicted)


def _calibration(logits_NC: np.ndarray, targets: np.ndarray, problem_type: ProblemType) -> dict[str, float | None]:
    """Of the rows that have a class, and a prediction; None where there is no such row."""
    counted_N = np.isfinite(logits_NC).all(axis=1)
    if problem_type == "single_label_classification":
        counted_N &= targets != NO_CLASS
    logits_NC, targets = logits_NC[counted_N], targets[counted_N]
    if not len(targets):
        return {"ece": None, "nll": None}
    return {
        "ece": expected_calibration_error(probabilities(logits_NC, problem_type), targets),
        "nll": negative_log_likelihood(logits_NC, targets),
    }


def _review(bundle: Bundle, is_right_N: np.ndarray, predictions: pa.Table) -> dict[str, Any] | None:
    """Of all rows; a text out of scope that nobody looks at is wrong."""
    info = bundle.info
    if info.review_below is None:
        return None
    return {
        "review_below": info.review_below,
        "target_precision": info.target_precision,
        **review_metrics(is_right_N, predictions[REVIEW].to_numpy()),
    }


def _out_of_scope(
    config: EvaluateConfig,
    bundle: Bundle,
    dataset: Dataset,
    rows: pa.Table,
    predictions: pa.Table,
    probabilities_NC: np.ndarray,
) -> dict[str, Any] | None:
    """By the class that stands for it, or where there is none, by a score below a threshold."""
    if dataset.oos_label is None:
        return None
    true_N, predicted_N = dataset.targets(rows), _predicted(dataset, predictions)
    if dataset.oos_label in dataset.labels:
        oos_id, threshold = dataset.labels.index(dataset.oos_label), None
        true_N = np.where(true_N == oos_id, NO_CLASS, true_N)
        score_N = 1 - probabilities_NC[:, oos_id]
        is_rejected_N = predicted_N == oos_id
    else:
        threshold = bundle.info.review_below if config.oos_threshold is None else config.oos_threshold
        score_N = probabilities_NC.max(axis=1).astype(np.float64)
        is_rejected_N = score_N < (0 if threshold is None else threshold)
    # What has no prediction is rejected too.
    predicted_N = np.where(is_rejected_N, NO_CLASS, predicted_N)
    return {
        "label": dataset.oos_label,
        "is_class": dataset.oos_label in dataset.labels,
        "threshold": threshold,
        **out_of_scope_metrics(true_N, predicted_N, score_N),
    }
