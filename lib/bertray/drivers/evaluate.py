"""Measure a bundle on a split of a data set, beside TF-IDF + logistic regression on the same rows.

1. predict   the split's texts with the bundle, and with the baseline fitted on the training rows
2. compare   the same metrics for both
3. trust     calibration of the scores, cost and benefit of a review, detection of texts out of scope
4. write     metrics.json and predictions.parquet (the split's columns, `score`, `review`, `num_tokens`, `truncated`,
             `predicted`, `baseline_predicted`, `is_right`)
5. show      report.html                                                                       [reports.evaluation]

Legend: N rows, C classes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bertray.bundle.info import BundleInfo, read_info
from bertray.cli import JobResult
from bertray.data.dataset import Dataset
from bertray.drivers.config import EvaluateConfig
from bertray.errors import RequestError
from bertray.reports.pages import add_page
from bertray.reports.terminal import print_evaluation
from bertray.schema import NUM_TOKENS, TEXT, TRUNCATED
from bertray.storage.location import Location
from bertray.storage.outputs import put_json, put_records, refuse_in_bundle, refuse_to_replace
from bertray.tasks.task import TASKS
from bertray.versions import versions

_log = logging.getLogger(__name__)

_METRICS_FILE, _PREDICTIONS_FILE = "metrics.json", "predictions.parquet"
# Of metrics.json, but not of the summary in one line.
_LONG = {"per_class", "confusion_matrix", "labels", "f1_at_cuts", "config", "versions"}


@dataclass(frozen=True)
class EvaluateResult:
    """How good a bundle is."""

    output: str  # the folder of metrics.json and predictions.parquet
    metrics: dict[str, Any]  # the content of metrics.json
    predictions: pa.Table  # the content of predictions.parquet: rows of the split beside the bundle's predictions


def run(config: EvaluateConfig) -> JobResult:
    """The job of the command line."""
    metrics = evaluate(config).metrics
    print_evaluation(metrics)
    return JobResult({"output": config.output, **{name: value for name, value in metrics.items() if name not in _LONG}})


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Evaluate the bundle and write both files, and their page.

    Raises:
        RequestError: bundle or data set are missing or have different labels, or --oos-threshold does not apply.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    refuse_in_bundle(output)
    dataset = Dataset.open(config.data)
    _check(config.oos_threshold, dataset, read_info(Location.of(config.bundle)))
    if dataset.location.contains(output) or output.contains(dataset.location):
        raise RequestError(f"--output {output} and --data {dataset.location} share a folder: choose another one")
    refuse_to_replace(output, [_METRICS_FILE, _PREDICTIONS_FILE], overwrite=config.overwrite)
    # From here on torch and scikit-learn, which take seconds to import.
    from bertray.bundle.openvino import open_bundle
    from bertray.drivers.measure import measure

    bundle, engine = open_bundle(config.bundle, config.engine, config.precision)
    info, rows = bundle.info, dataset.split(config.split)
    _log.info("predicting %d rows in %s", rows.num_rows, bundle.encoder.precision)
    tokens, logits_NC = bundle.logits(rows[TEXT])
    predictions = bundle.predictions(tokens, logits_NC)
    measured, columns = measure(info, dataset, rows, predictions, logits_NC, config)
    metrics = {
        **measured,
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
    if info.origin == "adopted":
        _log.warning("warning: nobody knows what the bundle was trained on; this split may hold its training rows")
    elif not metrics["same_data_as_training"]:
        _log.warning("warning: the bundle was trained on another data set; this split may hold its training rows")
    table, trusted = rows, (*TASKS[info.problem_type].trust_columns, NUM_TOKENS, TRUNCATED)
    for name, column in ({name: predictions[name] for name in trusted} | columns).items():
        table = table.append_column(name, column)
    (output / _METRICS_FILE).remove()  # without it the folder holds no evaluation: a crash cannot mix two of them
    put_records(output / _PREDICTIONS_FILE, table)
    put_json(output / _METRICS_FILE, metrics)
    add_page(output, config.page_texts)
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
            "bundle on a data set prepared as its training data was, with or without --multi-label or --regression"
        )
    if info.labels != dataset.labels:
        differing = ", ".join(sorted(set(info.labels) ^ set(dataset.labels)))
        raise RequestError(
            f"bundle and data set have different labels (only one of them has {differing}): evaluate the bundle on a "
            f"data set prepared with its labels: {', '.join(info.labels)}"
        )
