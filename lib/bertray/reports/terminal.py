"""Tables in the terminal, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from bertray.schema import (
    ERROR,
    GIVEN_PROBABILITY,
    LABEL,
    SCORE,
    SOURCE,
    SOURCE_ROW,
    SPLITS,
    SUGGESTED_LABEL,
    SUGGESTED_PROBABILITY,
    TEXT,
)
from bertray.scoring.gate import Verdict
from bertray.training.trials import SEARCHED, TrialRecord, best_of

_MAX_TABLE_ROWS = 30
_EXCERPT_CHARS = 70
_NUM_SUSPECTS_SHOWN = 20
_SUMMARY_METRICS = (
    "accuracy",
    "precision_weighted",
    "recall_weighted",
    "f1_weighted",
    "f1_micro",
    "f1_macro",
    "subset_accuracy",
)


def print_dataset(report: dict[str, Any]) -> None:
    """Labels by split, rows out of scope, rows by their number of labels, and what cleaning took out."""
    table = Table(title="data set", title_justify="left")
    table.add_column("label")
    for split in SPLITS:
        table.add_column(split, justify="right")
    oos_label = report.get("oos_label")
    classes = [(label, counts) for label, counts in report["labels"].items() if label != oos_label]
    for label, counts in classes[:_MAX_TABLE_ROWS]:
        table.add_row(label, *(str(counts[split]) for split in SPLITS))
    if (hidden := len(classes) - _MAX_TABLE_ROWS) > 0:
        table.add_row(f"… {hidden} more labels", *[""] * len(SPLITS))
    if oos_label is not None:
        kind = "a class" if oos_label in report["labels"] else "no class"
        table.add_row(f"{oos_label} (out of scope, {kind})", *(str(report["num_rows_oos"][split]) for split in SPLITS))
    table.add_section()
    for number, counts in report.get("num_rows_by_labels", {}).items():
        table.add_row(f"rows with {number} label{'s' * (number != '1')}", *(str(counts[split]) for split in SPLITS))
    table.add_row("all", *(str(report["splits"][split]) for split in SPLITS))
    out = ", ".join(f"{count} {reason}" for reason, count in report["num_rows_out"].items()) or "none"
    _print(table, f"{report['num_rows_in']} rows read, {report['num_rows_kept']} kept; taken out: {out}")


def print_evaluation(metrics: dict[str, Any]) -> None:
    """The bundle, beside the baseline if there is one, how sure it is, then every class."""
    baseline = metrics["baseline"]
    table = Table(title=f"{metrics['num_rows']} {metrics['split']} rows", title_justify="left")
    table.add_column("metric")
    table.add_column("this bundle", justify="right")
    if baseline:
        table.add_column(f"{baseline['name']}, {baseline['num_training_rows']:,} training rows", justify="right")
        table.add_column("difference", justify="right")
    for name in (name for name in _SUMMARY_METRICS if name in metrics):
        beside = [f"{baseline[name]:.4f}", f"{metrics[name] - baseline[name]:+.4f}"] if baseline else []
        table.add_row(name, f"{metrics[name]:.4f}", *beside)
    _print(table)
    _print_how_sure(metrics)
    _print_classes(metrics)


def _print_classes(metrics: dict[str, Any]) -> None:
    has_thresholds = any("threshold" in scores for scores in metrics["per_class"].values())
    classes = Table(title="by class, the weakest first", title_justify="left")
    classes.add_column("label")
    for name in ("precision", "recall", "f1", "rows"):
        classes.add_column(name, justify="right")
    if has_thresholds:
        classes.add_column("given from", justify="right")
    if "confusion_matrix" in metrics:
        classes.add_column("most often taken for", justify="right")
    ranked = sorted(metrics["per_class"].items(), key=lambda item: item[1]["f1"])
    for label, scores in ranked[:_MAX_TABLE_ROWS]:
        values = [*(f"{scores[name]:.3f}" for name in ("precision", "recall", "f1")), str(scores["num_rows"])]
        if has_thresholds:
            values.append(f"{scores['threshold']:.3f}")
        if "confusion_matrix" in metrics:
            values.append(_confused_with(metrics, label))
        classes.add_row(label, *values)
    hidden = len(ranked) - _MAX_TABLE_ROWS
    _print(classes, f"{hidden} more in metrics.json" if hidden > 0 else "")


def _print_how_sure(metrics: dict[str, Any]) -> None:
    table = Table(title="how sure it is", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_row("expected calibration error (0: scores are what they claim)", _shown(metrics["ece"]))
    table.add_row("negative log-likelihood", _shown(metrics["nll"]))
    if review := metrics["review"]:
        wanted = "" if review["target_precision"] is None else f" (wanted: {review['target_precision']:g})"
        table.add_section()
        below = "every row" if review["review_below"] > 1 else f"{review['review_below']:.4f}"
        table.add_row("rows below this score are to be reviewed", below)
        table.add_row("coverage: rows that need no review", _shown(review["coverage"]))
        table.add_row(f"precision of their labels{wanted}", _shown(review["precision"]))
    if scope := metrics["out_of_scope"]:
        rejected = f"class {scope['label']}"
        if not scope["is_class"]:
            rejected = "no threshold" if scope["threshold"] is None else f"score below {scope['threshold']:.4f}"
        num_in, num_out = scope["num_rows_in_scope"], scope["num_rows_out_of_scope"]
        table.add_section()
        table.add_row(f"out of scope: {num_out} of {num_in + num_out} rows; rejected by", rejected)
        table.add_row("in-scope accuracy (a rejected row is wrong)", _shown(scope["in_scope_accuracy"]))
        table.add_row("in-scope coverage (rows not rejected)", _shown(scope["in_scope_coverage"]))
        table.add_row("out-of-scope recall (rows rejected)", _shown(scope["oos_recall"]))
        table.add_row("out-of-scope precision (of rejected rows)", _shown(scope["oos_precision"]))
        table.add_row("AUROC of the score", _shown(scope["auroc"]))
    _print(table)


def _shown(share: float | None) -> str:
    return "no rows" if share is None else f"{share:.4f}"


def _confused_with(metrics: dict[str, Any], label: str) -> str:
    index = metrics["labels"].index(label)
    counts = [0 if other == index else count for other, count in enumerate(metrics["confusion_matrix"][index])]
    most = max(counts)
    return f"{metrics['labels'][counts.index(most)]} ({most})" if most else ""


def print_scoring(summary: dict[str, Any], failures: list[dict[str, str]], title: str = "scoring") -> None:
    """What a scoring run did or would do, in a few lines, and why shards failed."""
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in summary.items():
        table.add_row(key, f"{value:,}" if isinstance(value, int | float) else str(value))
    _print(table)
    if failures:
        failed = Table(title="failed shards: the next run tries them again", title_justify="left")
        failed.add_column("path", overflow="fold")
        failed.add_column("reason", overflow="fold")
        for failure in failures[:_MAX_TABLE_ROWS]:
            failed.add_row(failure["path"], failure["reason"])
        hidden = len(failures) - _MAX_TABLE_ROWS
        _print(failed, f"{hidden} more in the run's summary.json" if hidden > 0 else "")


def print_verdict(verdict: Verdict, shards_with_errors: list[dict[str, Any]]) -> None:
    """What the gate compared, and what to do where it holds something back."""
    table = Table(title="the gate", title_justify="left")
    for name in ("against", "what", "before", "now"):
        table.add_column(name)
    for name in ("moved by", "limit", ""):
        table.add_column(name, justify="right")
    for one in verdict.movements:
        beyond = "beyond" if one.is_beyond else ""
        table.add_row(one.against, one.what, one.before, one.now, f"{one.value:.3f}", f"{one.limit:g}", beyond)
    _print(table)
    if verdict.error_fraction > verdict.max_error_fraction:
        worst = Table(title="shards with most errors", title_justify="left")
        worst.add_column("path", overflow="fold")
        worst.add_column("rows with an error", justify="right")
        worst.add_column("failure", overflow="fold")
        for shard in shards_with_errors:
            worst.add_row(shard["path"], f"{shard['num_rows_error']} of {shard['num_rows']}", shard["failure"] or "")
        _print(worst)
    if verdict.is_held:
        reasons = "\n  ".join(verdict.reasons)
        _say(f"held: predictions are in place, but runs/latest.json does not announce them:\n  {reasons}")
        _say("Look at them. Then say --accept with the same command; or mend archive or bundle, and run it again.")


def print_audit(report: dict[str, Any], suspects: pa.Table) -> None:
    """The labels with most suspects, and the first suspects."""
    labels = Table(title="labels by suspects", title_justify="left")
    is_multi_label = report["problem_type"] == "multi_label_classification"
    labels.add_column("label")
    for name in ("rows", "suspects", *(("missing",) if is_multi_label else ()), "estimated noise"):
        labels.add_column(name, justify="right")
    if not is_multi_label:
        labels.add_column("most often probably")
    by_suspects = sorted(
        report["labels"].items(), key=lambda item: -item[1]["num_suspects"] - item[1].get("num_missing", 0)
    )
    for label, facts in by_suspects[:_MAX_TABLE_ROWS]:
        counts = [facts[name] for name in ("num_rows", "num_suspects", "num_missing") if name in facts]
        values = [*map(str, counts), f"{facts['noise']:.1%}"]
        if not is_multi_label:
            values.append(f"{facts['most_often']} ({facts['num_most_often']})" if "most_often" in facts else "")
        labels.add_row(label, *values)
    hidden = len(by_suspects) - _MAX_TABLE_ROWS
    _print(labels, f"… {hidden} more labels" if hidden > 0 else "")

    table = Table(title="the most suspect rows", title_justify="left")
    for name in ("text", "label", "p", "probably", "p", "from"):
        table.add_column(name, overflow="fold")
    for row in suspects.slice(0, _NUM_SUSPECTS_SHOWN).to_pylist():
        given, suggested = (
            ", ".join(row[f"{name}s"]) or "none" if is_multi_label else row[name] for name in (LABEL, SUGGESTED_LABEL)
        )
        probabilities = (f"{row[name]:.2f}" for name in (GIVEN_PROBABILITY, SUGGESTED_PROBABILITY))
        source = f"{row[SOURCE].rsplit('/', 1)[-1]}, row {row[SOURCE_ROW]}"
        table.add_row(_excerpt(row[TEXT]), given, next(probabilities), suggested, next(probabilities), source)
    note = f"{report['num_suspects']} of {report['num_rows']} rows are suspect; estimated noise {report['noise']:.1%}"
    _print(table, note)


def print_trials(records: Sequence[TrialRecord]) -> None:
    """Trials that have ended, the best first: in which options they differ, and what became of them."""
    best = best_of(records)
    varied = [name for name in SEARCHED if len({record.options[name] for record in records}) > 1]
    # Every trial has a seed of its own, which its number tells; the terminal is narrow.
    varied = [name for name in varied if name != "seed"] or varied
    table = Table(title=f"{len(records)} trials", title_justify="left")
    for name in ("trial", *(name.replace("_", " ") for name in varied), "epochs run", "accuracy", "macro-F1"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for record in sorted(records, key=lambda one: (-one.f1_macro, one.number))[:_MAX_TABLE_ROWS]:
        note = "best" if record is best else record.failure or ("" if record.status == "done" else record.status)
        scores = (f"{score:.4f}" if record.scores else "" for score in (record.accuracy, record.f1_macro))
        options = (f"{record.options[name]:g}" for name in varied)
        table.add_row(str(record.number), *options, str(len(record.history)), *scores, note)
    hidden = len(records) - _MAX_TABLE_ROWS
    _print(table, f"{hidden} more in the bundle's trials.json" if hidden > 0 else "")


def print_look(archive: Path, predictions: Path, num_rows: int = 5) -> None:
    """A few texts of a local archive beside what was predicted for them."""
    shard = min(archive.rglob("*.parquet"))
    texts = pq.ParquetFile(shard).read([TEXT])
    labels = pq.ParquetFile(predictions / shard.relative_to(archive)).read()
    table = Table(title=f"a look at {predictions / shard.relative_to(archive)}", title_justify="left")
    for name in ("row", TEXT, LABEL, SCORE):
        table.add_column(name)
    for row in range(0, texts.num_rows, max(1, texts.num_rows // num_rows))[:num_rows]:
        excerpt = _excerpt(texts[TEXT][row].as_py() or "")
        label, score = labels[LABEL][row].as_py(), labels[SCORE][row].as_py()
        table.add_row(str(row), excerpt, label or labels[ERROR][row].as_py(), "" if score is None else f"{score:.3f}")
    _print(table)


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT_CHARS else f"{text[:_EXCERPT_CHARS]}…"


def _print(table: Table, note: str = "") -> None:
    _say(table)
    if note:
        _say(note)


def _say(what: Table | str) -> None:
    # Labels and paths are data, not markup. A log has no width; rich would assume 80.
    width = None if sys.stderr.isatty() else 120
    Console(stderr=True, width=width, markup=False, emoji=False, highlight=False).print(what)
