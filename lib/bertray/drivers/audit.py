"""Training rows whose labels are probably wrong: the driver of bertray audit.

1. check   data set, encoder, output and cluster, before any time is spent
2. divide  training rows into folds: every label in each, equal texts in the same            [data.splits]
3. judge   each fold by a model that was fine-tuned on the others                            [drivers.cross_validation]
4. doubt   labels that these models find improbable, and rank them                           [metrics.label_issues]
5. write   suspects.parquet, label_quality.json, and their page

Legend: N training rows, M of them with tokens, C classes.
"""

from __future__ import annotations

import logging
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from bertray import schema
from bertray.cli import JobResult
from bertray.data.cleaning import comparison_keys
from bertray.data.dataset import Dataset
from bertray.data.splits import folds
from bertray.drivers import ray_address
from bertray.errors import RequestError, missing_extra
from bertray.reports.pages import add_page
from bertray.reports.terminal import print_audit
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.storage.outputs import put_json, put_records, refuse_in_bundle, refuse_to_replace
from bertray.tasks.task import TASKS
from bertray.training.config import AuditConfig
from bertray.training.preflight import check_origin, naming_rows, open_data, refuse_to_replace_data, with_absolute_paths
from bertray.versions import versions

if TYPE_CHECKING:
    from bertray.metrics.label_issues import LabelIssues

_log = logging.getLogger(__name__)

_SUMMARY = ("num_rows", "num_rows_without_tokens", "num_suspects", "noise", "out_of_fold", "warnings", "wall_s")

SUSPECTS_FILE, REPORT_FILE = "suspects.parquet", "label_quality.json"


class AuditResult(NamedTuple):
    """The result of an audit."""

    report: dict[str, Any]  # what label_quality.json holds
    suspects: pa.Table  # rows in `schema.suspect_schema`, the worst first
    quality_N: np.ndarray  # of every training row's label, from 0 to 1; NaN for rows without tokens


def run(config: AuditConfig) -> JobResult:
    """The job of the command line."""
    found = audit(config)
    print_audit(found.report, found.suspects)
    return JobResult({"output": config.output, **{key: found.report[key] for key in _SUMMARY}})


def audit(config: AuditConfig) -> AuditResult:
    """Find the labels that are probably wrong, and write both files.

    Raises:
        RequestError: an option, data, encoder, output or the cluster does not fit, or the data set was changed.
        LockedError: another run works on the same output.
        BertrayError: the loss of a fold is not a number, or a fold was lost too often.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    refuse_in_bundle(output)
    refuse_to_replace_data(config)
    refuse_to_replace(output, [REPORT_FILE, SUSPECTS_FILE], overwrite=config.overwrite)
    ray_address.prepare()
    dataset = open_data(config)
    try:
        from bertray.metrics import label_issues
    except ImportError as error:
        raise missing_extra(f"bertray audit ({error})", "audit") from error
    # From here on torch and Ray, which take seconds to import.
    from bertray.drivers import cluster
    from bertray.drivers.cross_validation import out_of_fold_logits
    from bertray.model.pretrained import classifier_and_head, load_tokenizer
    from bertray.tokenization.tokenizer import ColumnTokenizer

    tokenizer, encoder_config = load_tokenizer(config.encoder, config.max_length, config.overlap)
    # Loaded once to see that it can be.
    _log.info("%s", classifier_and_head(config.encoder, dataset.labels, dataset.problem_type, config.seed)[1])
    config = with_absolute_paths(config, dataset)
    data_fingerprint = dataset.fingerprint()
    check_origin(config.encoder, data_fingerprint, is_audit=True)
    rows, task = dataset.split("train"), TASKS[dataset.problem_type]
    fold_N = folds(task.strata(rows), config.folds, config.seed, comparison_keys(rows).to_pylist())

    with RunLock(output, new_run_id()).held() as lock, cluster.session():
        column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
        with naming_rows(dataset):
            logits_NC = out_of_fold_logits(config, dataset, rows, fold_N, column_tokenizer, encoder_config)
        if dataset.fingerprint() != data_fingerprint:
            raise RequestError(
                f"{dataset.location} was changed while its labels were judged, so the results may belong to other "
                "rows: run the same command again"
            )
        judged = np.flatnonzero(np.isfinite(logits_NC).all(axis=1))
        targets, logits_MC = dataset.targets(rows.take(pa.array(judged))), logits_NC[judged]
        issues = task.issues(targets, logits_MC)
        metrics = task.summary(task.decided(logits_MC), targets, len(dataset.labels))
        suspects = _suspects(dataset, rows, judged, issues, label_issues.ranked(issues))
        for facts in issues.by_label:
            if "most_often" in facts:
                facts["most_often"] = dataset.labels[facts["most_often"]]
        report = {
            "num_rows": rows.num_rows,
            "num_rows_without_tokens": rows.num_rows - len(judged),
            "num_suspects": suspects.num_rows,
            "noise": issues.noise,
            "out_of_fold": metrics,
            "warnings": _warnings(metrics),
            "labels": dict(zip(dataset.labels, issues.by_label, strict=True)),
            "num_rows_by_fold": np.bincount(fold_N, minlength=config.folds).tolist(),
            "problem_type": task.problem_type,
            "data_fingerprint": data_fingerprint,
            "config": config.model_dump(),
            "versions": {**versions(), "cleanlab": version("cleanlab")},
            "wall_s": round(time.monotonic() - started_s, 1),
        }
        for warning in report["warnings"]:
            _log.warning("warning: %s", warning)
        lock.check()
        (output / REPORT_FILE).remove()  # without it the folder holds no audit: a crash cannot mix two audits
        put_records(output / SUSPECTS_FILE, suspects)
        put_json(output / REPORT_FILE, report)
        add_page(output, config.page_texts)
    quality_N = np.full(rows.num_rows, np.nan)
    quality_N[judged] = issues.quality_N
    return AuditResult(report, suspects, quality_N)


def _suspects(dataset: Dataset, rows: pa.Table, judged: np.ndarray, issues: LabelIssues, order: np.ndarray) -> pa.Table:
    """The suspect rows as they are written, in the order of `label_issues.ranked`."""
    found = rows.take(pa.array(judged[order]))
    task = TASKS[dataset.problem_type]
    columns = {
        **dict(zip(found.column_names, found.columns, strict=True)),
        schema.ROW: judged[order],
        schema.GIVEN_PROBABILITY: issues.given_probability_N[order],
        schema.SUGGESTED_PROBABILITY: issues.suggested_probability_N[order],
        schema.QUALITY: issues.quality_N[order],
        schema.SUGGESTED + task.column: task.names(issues.suggested[order], dataset.labels),
    }
    return pa.Table.from_pydict(columns, schema=schema.suspect_schema(dataset.problem_type))


def _warnings(metrics: dict[str, float]) -> list[str]:
    """Warnings about models with these scores on rows that they were not trained on."""
    name = next(one for one in ("accuracy", "f1_micro", "spearman") if one in metrics)
    if metrics[name] >= 0.5:  # models that agree with fewer labels have learnt too little to doubt any
        return []
    return [
        f"the models' {name} on rows that they have not seen is {metrics[name]:.2f}: the suspects then say more about "
        "the models than about the labels. Raise --epochs or --learning-rate until it is as good as bertray evaluate's"
    ]
