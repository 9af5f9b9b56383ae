"""Training rows whose labels are probably wrong: the driver of bertray audit.

1. check   data set, encoder, output and cluster, before any time is spent
2. divide  training rows into folds: every label in each, equal texts in the same            [data.splits]
3. judge   each fold by a model that was fine-tuned on the others                            [drivers.cross_validation]
4. doubt   labels that these models find improbable, ranked                                  [metrics.label_issues]
5. write   suspects.parquet, and label_quality.json last

Legend: N training rows, M of them that have tokens, C classes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from bertray.cli import JobResult, keep_ray_on_loopback
from bertray.data.cleaning import comparison_keys
from bertray.data.dataset import Dataset
from bertray.data.splits import folds
from bertray.errors import DivergedError, RequestError, missing_extra
from bertray.metrics.calibration import probabilities
from bertray.metrics.classification import multi_label_metrics, summary_metrics
from bertray.model.sources import encoder_folder
from bertray.reports.terminal import print_audit
from bertray.schema import (
    GIVEN_PROBABILITY,
    LABEL,
    LABELS,
    QUALITY,
    ROW,
    SUGGESTED_LABEL,
    SUGGESTED_LABELS,
    SUGGESTED_PROBABILITY,
    suspect_schema,
)
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.storage.outputs import put_records, refuse_in_bundle
from bertray.training.config import AuditConfig
from bertray.training.preflight import check_data, check_origin, with_absolute_places, with_rows
from bertray.versions import versions

if TYPE_CHECKING:
    from bertray.metrics.label_issues import LabelIssues

_log = logging.getLogger(__name__)

# Models that agree with fewer labels than this have learnt too little to doubt any.
_FEWEST_AGREED = 0.5

_SUMMARY = ("num_rows", "num_rows_without_tokens", "num_suspects", "noise", "out_of_fold", "warnings", "wall_s")

SUSPECTS_FILE, REPORT_FILE = "suspects.parquet", "label_quality.json"


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
        report: what label_quality.json holds.
        suspects: in `schema.suspect_schema`, the worst first.
        quality_N: of every training row's label, from 0 to 1; NaN of rows without tokens.
    """

    report: dict[str, Any]
    suspects: pa.Table
    quality_N: np.ndarray


def run(config: AuditConfig) -> JobResult:
    """The job of the command line."""
    found = audit(config)
    print_audit(found.report, found.suspects)
    return JobResult({"output": config.output, **{key: found.report[key] for key in _SUMMARY}})


def audit(config: AuditConfig) -> Audit:
    """Find the labels that are probably wrong, and write both files.

    Raises:
        RequestError: something about data, encoder, output or cluster does not fit, and nothing was started; or the
            data set was written anew meanwhile.
        LockedError: another run is at work on the same output.
        BertrayError: the loss of a fold is not a number, or a fold was lost too often.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    refuse_in_bundle(output)
    dataset = Dataset.open(config.data)
    if output.contains(dataset.location):
        raise RequestError(f"--output {output} holds --data {dataset.location}: choose a folder of its own")
    check_data(dataset, config)
    label_issues = _label_issues()
    encoder_folder(config.encoder)  # is there; it may have to be downloaded
    keep_ray_on_loopback()
    # From here on torch and Ray, which take seconds to import.
    from bertray.drivers import cluster
    from bertray.drivers.cross_validation import out_of_fold_logits
    from bertray.model.pretrained import load_tokenizer
    from bertray.tokenization.tokenizer import ColumnTokenizer

    tokenizer, encoder_config = load_tokenizer(config.encoder, config.max_length, config.overlap)
    config = with_absolute_places(config, dataset, output)
    data_fingerprint = dataset.fingerprint()
    check_origin(config.encoder, data_fingerprint, is_audit=True)
    rows = dataset.split("train")
    is_multi_label = dataset.problem_type == "multi_label_classification"
    label_sets = rows[LABELS].to_pylist() if is_multi_label else [[label] for label in rows[LABEL].to_pylist()]
    fold_N = folds(label_sets, config.folds, config.seed, comparison_keys(rows).to_pylist())

    with RunLock(output, new_run_id()).held() as lock, cluster.session():
        column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
        try:
            logits_NC = out_of_fold_logits(config, dataset, rows, fold_N, column_tokenizer, encoder_config)
        except DivergedError as error:
            raise with_rows(error, dataset) from error
        if dataset.fingerprint() != data_fingerprint:
            raise RequestError(
                f"{dataset.location} was written anew while its labels were judged, so that rows are no longer what "
                "was found in them: say the same command again"
            )
        judged = np.flatnonzero(np.isfinite(logits_NC).all(axis=1))
        probabilities_MC = probabilities(logits_NC[judged], dataset.problem_type)
        targets = dataset.targets(rows.take(pa.array(judged)))
        find = label_issues.find_multi_label_issues if is_multi_label else label_issues.find_issues
        issues = find(targets, probabilities_MC)
        suspects = _suspects(dataset, rows, judged, issues, label_issues.ranked(issues))
        metrics = _metrics(dataset, targets, probabilities_MC)
        warnings = _warnings(metrics)
        for warning in warnings:
            _log.warning("warning: %s", warning)
        report = {
            "num_rows": rows.num_rows,
            "num_rows_without_tokens": rows.num_rows - len(judged),
            "num_suspects": suspects.num_rows,
            "noise": issues.noise,
            "out_of_fold": metrics,
            "warnings": warnings,
            "labels": {
                label: _named(facts, dataset.labels)
                for label, facts in zip(dataset.labels, issues.by_label, strict=True)
            },
            "num_rows_by_fold": np.bincount(fold_N, minlength=config.folds).tolist(),
            "problem_type": dataset.problem_type,
            "data_fingerprint": data_fingerprint,
            "config": config.model_dump(),
            "versions": {**versions(), "cleanlab": version("cleanlab")},
            "wall_s": round(time.monotonic() - started_s, 1),
        }
        lock.check()
        (output / REPORT_FILE).remove()  # without it the folder holds no audit: a crash leaves no mixture
        put_records(output / SUSPECTS_FILE, suspects)
        (output / REPORT_FILE).put((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    quality_N = np.full(rows.num_rows, np.nan)
    quality_N[judged] = issues.quality_N
    return Audit(report, suspects, quality_N)


def _label_issues() -> ModuleType:
    """The module that finds them, whose package the default install lacks."""
    try:
        return import_module("bertray.metrics.label_issues")
    except ImportError as error:
        raise missing_extra(f"bertray audit ({error})", "audit") from error


def _suspects(dataset: Dataset, rows: pa.Table, judged: np.ndarray, issues: LabelIssues, order: np.ndarray) -> pa.Table:
    """The suspect rows as they are written, in the order of `label_issues.ranked`."""
    found = rows.take(pa.array(judged[order]))
    names = np.array(dataset.labels, dtype=object)
    suggested: Sequence[Any]
    if dataset.problem_type == "multi_label_classification":
        column, suggested = SUGGESTED_LABELS, [names[has_C].tolist() for has_C in issues.suggested[order]]
    else:
        column, suggested = SUGGESTED_LABEL, names[issues.suggested[order]]
    schema = suspect_schema(dataset.problem_type)
    columns = {name: found[name] for name in schema.names if name in found.column_names} | {
        ROW: pa.array(judged[order]),
        column: pa.array(suggested, schema.field(column).type),
        GIVEN_PROBABILITY: pa.array(issues.given_probability_N[order]),
        SUGGESTED_PROBABILITY: pa.array(issues.suggested_probability_N[order]),
        QUALITY: pa.array(issues.quality_N[order]),
    }
    return pa.table(columns).select(schema.names).cast(schema)


def _metrics(dataset: Dataset, targets: np.ndarray, probabilities_MC: np.ndarray) -> dict[str, float]:
    """How well the folds' models, all together, predict the labels as they are given."""
    if dataset.problem_type == "multi_label_classification":
        found = multi_label_metrics(targets, probabilities_MC >= 0.5, dataset.labels)
        return {name: found[name] for name in ("f1_micro", "f1_macro", "subset_accuracy")}
    return summary_metrics(targets, probabilities_MC.argmax(axis=1), len(dataset.labels))


def _warnings(metrics: dict[str, float]) -> list[str]:
    """What to say of models that predict rows as `_metrics` has it."""
    name = "accuracy" if "accuracy" in metrics else "f1_micro"
    if metrics[name] >= _FEWEST_AGREED:
        return []
    return [
        f"the models' {name} on rows that they have not seen is {metrics[name]:.2f}: so far below 1, suspects say more "
        "of the models than of the labels. Raise --epochs or --learning-rate until it is as good as bertray evaluate's"
    ]


def _named(facts: dict[str, Any], labels: tuple[str, ...]) -> dict[str, Any]:
    """Facts of a label, with the name of another in place of its id."""
    return {**facts, "most_often": labels[facts["most_often"]]} if "most_often" in facts else facts
