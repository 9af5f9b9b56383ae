"""Tables on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from bertray import schema
from bertray.schema import LABEL, SCORE, SPLITS, TEXT
from bertray.scoring.gate import Verdict
from bertray.training.trials import SEARCHED, TrialRecord, best_of

_MAX_TABLE_ROWS = 30
_EXCERPT_CHARS = 70
_NUM_SUSPECTS_SHOWN = 20
_WEIGHTED = ("precision_weighted", "recall_weighted", "f1_weighted")
# In the order shown; single-label and multi-label metrics each have some of them.
SUMMARY_METRICS = ("accuracy", *_WEIGHTED, "f1_micro", "f1_macro", "subset_accuracy")

_Row = Sequence[object]
_SECTION: _Row = ()  # between two sections of a table


def print_dataset(report: dict[str, Any]) -> None:
    """Print the rows of each label and split, rows out of scope, rows by number of labels, and what was taken out."""

    def line(name: str, counts: dict[str, int]) -> _Row:
        return name, *(counts[split] for split in SPLITS)

    oos_label = report.get("oos_label")
    classes = [line(label, counts) for label, counts in report["labels"].items() if label != oos_label]
    rows = classes[:_MAX_TABLE_ROWS]
    if (hidden := len(classes) - _MAX_TABLE_ROWS) > 0:
        rows.append((f"… {hidden} more labels",))
    if oos_label is not None:
        kind = "a class" if oos_label in report["labels"] else "no class"
        rows.append(line(f"{oos_label} (out of scope, {kind})", report["num_rows_oos"]))
    rows.append(_SECTION)
    for number, counts in report.get("num_rows_by_labels", {}).items():
        rows.append(line(f"rows with {number} label{'s' * (number != '1')}", counts))
    rows.append(line("all", report["splits"]))
    out = ", ".join(f"{count} {reason}" for reason, count in report["num_rows_out"].items()) or "none"
    note = f"{report['num_rows_in']} rows read, {report['num_rows_kept']} kept; taken out: {out}"
    _print("data set", ["label", *(f">{split}" for split in SPLITS)], rows, note)


def print_evaluation(metrics: dict[str, Any]) -> None:
    """Print metrics of the bundle and the baseline, how reliable the scores are, then every class."""
    baseline = metrics["baseline"]
    columns = ["metric", ">this bundle"]
    if baseline:
        columns += [f">{baseline['name']}, {baseline['num_training_rows']:,} training rows", ">difference"]
    rows = []
    for name in (name for name in SUMMARY_METRICS if name in metrics):
        beside = (f"{baseline[name]:.4f}", f"{metrics[name] - baseline[name]:+.4f}") if baseline else ()
        rows.append((name, f"{metrics[name]:.4f}", *beside))
    _print(f"{metrics['num_rows']} {metrics['split']} rows", columns, rows)
    _print("how sure it is", ["what", ">value"], _certainty(metrics))
    _print_classes(metrics)


def _certainty(metrics: dict[str, Any]) -> Iterable[_Row]:
    yield "expected calibration error (0: scores are what they claim)", _shown(metrics["ece"])
    yield "negative log-likelihood", _shown(metrics["nll"])
    if review := metrics["review"]:
        wanted = "" if review["target_precision"] is None else f" (wanted: {review['target_precision']:g})"
        yield _SECTION
        below = "every row" if review["review_below"] > 1 else f"{review['review_below']:.4f}"
        yield "rows below this score are to be reviewed", below
        yield "coverage: rows that need no review", _shown(review["coverage"])
        yield f"precision of their labels{wanted}", _shown(review["precision"])
    if scope := metrics["out_of_scope"]:
        rejected = f"class {scope['label']}"
        if not scope["is_class"]:
            rejected = "no threshold" if scope["threshold"] is None else f"score below {scope['threshold']:.4f}"
        num_in, num_out = scope["num_rows_in_scope"], scope["num_rows_out_of_scope"]
        yield _SECTION
        yield f"out of scope: {num_out} of {num_in + num_out} rows; rejected by", rejected
        yield "in-scope accuracy (a rejected row is wrong)", _shown(scope["in_scope_accuracy"])
        yield "in-scope coverage (rows not rejected)", _shown(scope["in_scope_coverage"])
        yield "out-of-scope recall (rows rejected)", _shown(scope["oos_recall"])
        yield "out-of-scope precision (of rejected rows)", _shown(scope["oos_precision"])
        yield "AUROC of the score", _shown(scope["auroc"])


def _shown(share: float | None) -> str:
    return "no rows" if share is None else f"{share:.4f}"


def _print_classes(metrics: dict[str, Any]) -> None:
    per_class = sorted(metrics["per_class"].items(), key=lambda item: item[1]["f1"])
    has_thresholds, has_confusion = "threshold" in per_class[0][1], "confusion_matrix" in metrics
    columns = ["label", ">precision", ">recall", ">f1", ">rows"]
    columns += [">given from"] * has_thresholds + [">most often taken for"] * has_confusion
    rows = []
    for label, scores in per_class:
        row = [label, *(f"{scores[name]:.3f}" for name in ("precision", "recall", "f1")), scores["num_rows"]]
        if has_thresholds:
            row.append(f"{scores['threshold']:.3f}")
        if has_confusion:
            index = metrics["labels"].index(label)
            counts = np.array(metrics["confusion_matrix"][index])
            counts[index] = 0
            row.append(f"{metrics['labels'][counts.argmax()]} ({counts.max()})" if counts.any() else "")
        rows.append(row)
    _print("by class, the weakest first", columns, rows, rest="in metrics.json")


def print_scoring(summary: dict[str, Any], failures: list[dict[str, str]], title: str = "scoring") -> None:
    """Print the summary of a scoring run or of its plan, and why shards failed."""
    shown = ((key, f"{value:,}" if isinstance(value, int | float) else value) for key, value in summary.items())
    _print(title, None, shown)
    if failures:
        rows = [(failure["path"], failure["reason"]) for failure in failures]
        _print(
            "failed shards: the next run tries them again", ["path", "reason"], rows, rest="in the run's summary.json"
        )


def print_verdict(verdict: Verdict, shards_with_errors: list[dict[str, Any]]) -> None:
    """Print what the gate compared, and what to do if it holds the run back."""
    columns = ["against", "what", "before", "now", ">moved by", ">limit", ">"]
    rows = [
        (one.against, one.what, one.before, one.now, f"{one.value:.3f}", f"{one.limit:g}", "beyond" * one.is_beyond)
        for one in verdict.movements
    ]
    _print("the gate", columns, rows)
    if verdict.error_fraction > verdict.max_error_fraction:
        worst = [
            (shard["path"], f"{shard['num_rows_error']} of {shard['num_rows']}", shard["failure"] or "")
            for shard in shards_with_errors
        ]
        _print("shards with most errors", ["path", "rows with an error", "failure"], worst)
    if verdict.is_held:
        reasons = "\n  ".join(verdict.reasons)
        _say(f"held: predictions are in place, but runs/latest.json does not announce them:\n  {reasons}")
        _say("Look at them. If they are right, repeat the command with --accept; else fix archive or bundle and rerun.")


def print_audit(report: dict[str, Any], suspects: pa.Table) -> None:
    """Print the labels with most suspects, and the first suspects."""
    is_multi_label = report["problem_type"] == "multi_label_classification"
    columns = ["label", ">rows", ">suspects", *([">missing"] * is_multi_label), ">estimated noise"]
    columns += [] if is_multi_label else ["most often probably"]
    labels = sorted(report["labels"].items(), key=lambda item: -item[1]["num_suspects"] - item[1].get("num_missing", 0))
    rows = []
    for label, facts in labels:
        counts = (facts[name] for name in ("num_rows", "num_suspects", "num_missing") if name in facts)
        other = f"{facts['most_often']} ({facts['num_most_often']})" if "most_often" in facts else ""
        rows.append((label, *counts, f"{facts['noise']:.1%}", *([] if is_multi_label else [other])))
    _print("labels by suspects", columns, rows, rest="labels")

    rows = []
    for row in suspects.slice(0, _NUM_SUSPECTS_SHOWN).to_pylist():
        given, suggested = (
            ", ".join(row[f"{name}s"]) or "none" if is_multi_label else row[name]
            for name in (LABEL, schema.SUGGESTED_LABEL)
        )
        given_p, suggested_p = (f"{row[name]:.2f}" for name in (schema.GIVEN_PROBABILITY, schema.SUGGESTED_PROBABILITY))
        source = f"{row[schema.SOURCE].rsplit('/', 1)[-1]}, row {row[schema.SOURCE_ROW]}"
        rows.append((_excerpt(row[TEXT]), given, given_p, suggested, suggested_p, source))
    note = f"{report['num_suspects']} of {report['num_rows']} rows are suspect; estimated noise {report['noise']:.1%}"
    _print("the most suspect rows", ["text", "label", "p", "probably", "p", "from"], rows, note)


def print_trials(records: Sequence[TrialRecord]) -> None:
    """Print finished trials, the best first: the options in which they differ, their scores, how they ended."""
    best = best_of(records)
    varied = [name for name in SEARCHED if len({record.options[name] for record in records}) > 1]
    # The terminal is narrow, and the seed follows from the trial's number.
    varied = [name for name in varied if name != "seed"] or varied
    rows = []
    for record in sorted(records, key=lambda one: (-one.f1_macro, one.number)):
        note = "best" if record is best else record.failure or ("" if record.status == "done" else record.status)
        scores = (f"{score:.4f}" if record.scores else "" for score in (record.accuracy, record.f1_macro))
        options = (f"{record.options[name]:g}" for name in varied)
        rows.append((record.number, *options, len(record.history), *scores, note))
    names = ["trial", *(name.replace("_", " ") for name in varied), "epochs run", "accuracy", "macro-F1"]
    columns = [*(f">{name}" for name in names), ""]
    _print(f"{len(records)} trials", columns, rows, rest="in the bundle's trials.json")


def print_look(archive: Path, predictions: Path, num_rows: int = 5) -> None:
    """Print a few texts of a local archive beside their predictions."""
    shard = min(archive.rglob("*.parquet"))
    file = predictions / shard.relative_to(archive)
    texts, predicted = pq.ParquetFile(shard).read([TEXT]), pq.ParquetFile(file).read()
    rows = []
    for row in range(0, texts.num_rows, max(1, texts.num_rows // num_rows))[:num_rows]:
        label, score, error = (predicted[name][row].as_py() for name in (LABEL, SCORE, schema.ERROR))
        excerpt = _excerpt(texts[TEXT][row].as_py() or "")
        rows.append((row, excerpt, label or error, "" if score is None else f"{score:.3f}"))
    _print(f"a look at {file}", ["row", TEXT, LABEL, SCORE], rows)


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT_CHARS else f"{text[:_EXCERPT_CHARS]}…"


def _print(title: str, columns: Sequence[str] | None, rows: Iterable[_Row], note: str = "", rest: str = "") -> None:
    """Print a table and a note below it.

    Args:
        columns: headings; one that begins with > is right-aligned. None: the table has no heading.
        rest: where the rows after the first `_MAX_TABLE_ROWS` are; empty: print all rows.
    """
    table = Table(title=title, title_justify="left", show_header=columns is not None)
    for name in columns or ():
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    rows = list(rows)
    if rest and (hidden := len(rows) - _MAX_TABLE_ROWS) > 0:
        rows, note = rows[:_MAX_TABLE_ROWS], f"{hidden} more {rest}"
    for row in rows:
        if row == _SECTION:
            table.add_section()
        else:
            table.add_row(*map(str, row))
    _say(table)
    if note:
        _say(note)


def _say(what: Table | str) -> None:
    # Labels and paths are data, not markup. A log has no width; rich would assume 80.
    width = None if sys.stderr.isatty() else 120
    Console(stderr=True, width=width, markup=False, emoji=False, highlight=False).print(what)
