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
from bertray.cli import printable
from bertray.schema import LABEL, SCORE, SPLITS, TEXT
from bertray.scoring.gate import Verdict
from bertray.tasks.task import TASKS
from bertray.training.trials import SEARCHED, TrialRecord, best_of

_MAX_TABLE_ROWS = 30
_EXCERPT_CHARS = 70
_NUM_SUSPECTS_SHOWN = 20
# Fewer rows hardly differ when they are drawn again, and their interval would look certain.
_MIN_ROWS_OF_INTERVAL = 20
_WEIGHTED = ("precision_weighted", "recall_weighted", "f1_weighted")
# In the order shown; each problem type has some of them.
_OF_NUMBERS = ("mae", "rmse", "r2", "pearson", "spearman")
SUMMARY_METRICS = (*_OF_NUMBERS, "accuracy", *_WEIGHTED, "f1_micro", "f1_macro", "subset_accuracy", "quadratic_kappa")

_SHOWN_AT_0 = ("num_shards_pending", "num_shards_committed", "num_shards_failed", "num_rows", "num_rows_error")

_Row = dict[str, Any]
_SECTION: _Row = {}  # between two sections of a table


def print_dataset(report: dict[str, Any]) -> None:
    """Print the rows of each label and split, rows out of scope, rows by number of labels, and what was taken out."""

    def line(name: str, counts: dict[str, Any]) -> _Row:
        return {heading: name, **{split: counts[split] for split in SPLITS}}

    heading = "of the numbers" if "values" in report else "label"
    oos_label = report.get("oos_label")
    classes = [line(label, counts) for label, counts in report["labels"].items() if label != oos_label]
    rows = classes[:_MAX_TABLE_ROWS]
    if (hidden := len(classes) - _MAX_TABLE_ROWS) > 0:
        rows.append({heading: f"… {hidden} more labels"})
    if oos_label is not None:
        kind = "a class" if oos_label in report["labels"] else "no class"
        rows.append(line(f"{oos_label} (out of scope, {kind})", report["num_rows_oos"]))
    rows.append(_SECTION)
    for number, counts in report.get("num_rows_by_labels", {}).items():
        rows.append(line(f"rows with {number} label{'s' * (number != '1')}", counts))
    for name in report.get("values", {}).get("train", ()):
        rows.append(line(name.replace("_", " "), {split: report["values"][split][name] for split in SPLITS}))
    rows.append(line("all", report["splits"]))
    _print("data set", rows)
    out = ", ".join(f"{count} {reason}" for reason, count in report["num_rows_out"].items()) or "none"
    _say(f"{report['num_rows_in']} rows read, {report['num_rows_kept']} kept; taken out: {out}")


def print_evaluation(metrics: dict[str, Any]) -> None:
    """Print metrics of the bundle and the baseline, how reliable the scores are, then every class."""
    names = [name for name in SUMMARY_METRICS if name in metrics]
    rows: list[_Row] = [{"metric": name, "this bundle": metrics[name]} for name in names]
    if baseline := metrics["baseline"]:
        heading = f"{baseline['name']}, {baseline['num_training_rows']:,} training rows"
        for name, row in zip(names, rows, strict=True):
            if name not in baseline:  # it has no cuts
                continue
            low, high = baseline["difference_intervals"][name]
            interval = f" ({low:+.3f} to {high:+.3f})" if metrics["num_rows"] >= _MIN_ROWS_OF_INTERVAL else ""
            row |= {heading: baseline[name], "difference (95 %)": f"{metrics[name] - baseline[name]:+.3f}{interval}"}
    _print(f"{metrics['num_rows']} {metrics['split']} rows", rows)
    _print("how sure it is", [{"what": what, "value": value} if what else _SECTION for what, value in _trust(metrics)])
    classes: list[_Row] = [{"label": label, **scores} for label, scores in metrics.get("per_class", {}).items()]
    if "confusion_matrix" in metrics:
        confused_CC = np.array(metrics["confusion_matrix"])
        np.fill_diagonal(confused_CC, 0)
        for row, counts in zip(classes, confused_CC, strict=True):
            other = f"{metrics['labels'][counts.argmax()]} ({counts.max()})" if counts.any() else ""
            row["most often taken for"] = other
    if classes:
        _print("by class, the weakest first", sorted(classes, key=lambda row: row["f1"]), rest="in metrics.json")


def _trust(metrics: dict[str, Any]) -> Iterable[tuple[str, object]]:
    if interval := metrics.get("interval"):
        yield f"share of true values in their interval (wanted: {interval['wanted']:g})", interval["coverage"]
        yield "mean width of the intervals", interval["mean_width"]
    if "ece" in metrics:
        yield "expected calibration error (0: scores are what they claim)", metrics["ece"]
        yield "negative log-likelihood", metrics["nll"]
    if review := metrics["review"]:
        wanted = "" if review["target_precision"] is None else f" (wanted: {review['target_precision']:g})"
        yield "", None
        if (below := review["review_below"]) is None:
            yield "rows whose interval holds a cut are to be reviewed", review["num_rows_review"]
        else:
            yield "rows below this score are to be reviewed", "every row" if below > 1 else below
        yield "coverage: rows that need no review", review["coverage"]
        yield f"precision of their labels{wanted}", review["precision"]
    if scope := metrics["out_of_scope"]:
        rejected = f"class {scope['label']}"
        if not scope["is_class"]:
            rejected = "no threshold" if scope["threshold"] is None else f"score below {scope['threshold']:.4f}"
        num_in, num_out = scope["num_rows_in_scope"], scope["num_rows_out_of_scope"]
        yield "", None
        yield f"out of scope: {num_out} of {num_in + num_out} rows; rejected by", rejected
        yield "in-scope accuracy (a rejected row is wrong)", scope["in_scope_accuracy"]
        yield "in-scope coverage (rows not rejected)", scope["in_scope_coverage"]
        yield "out-of-scope recall (rows rejected)", scope["oos_recall"]
        yield "out-of-scope precision (of rejected rows)", scope["oos_precision"]
        yield "AUROC of the score", scope["auroc"]


def print_scoring(
    summary: dict[str, Any], failures: list[dict[str, str]], title: str = "scoring", *, older: Sequence[str] = ()
) -> None:
    """Print the summary of a scoring run or of its plan, why shards failed, and some that are older.

    Most counts of 0 are left out.
    """
    shown = {
        key: f"{value:,}" if isinstance(value, int | float) else str(value)
        for key, value in summary.items()
        if key != "sick_nodes" and (value not in (0, []) or isinstance(value, float) or key in _SHOWN_AT_0)
    }
    _print(title, [{"what": key, "value": value} for key, value in shown.items()])
    if sick := summary.get("sick_nodes"):
        _print("machines at fault: what failed there was tried again", sick)
    if failures:
        _print("failed shards: the next run tries them again", failures, rest="in the run's summary.json")
    if older:
        _print("older shards", [{"path": path} for path in older])


def print_problems(problems: list[dict[str, str]], *, is_repaired: bool) -> None:
    """Print what does not hold of an output, and the next step."""
    _print("what does not hold", problems, rest="problems")
    dropped = "the records of the files that do not hold are dropped"
    first = f"{dropped}: " if is_repaired else f"with --repair {dropped}; then "
    _say(f"{first}the next bertray score scores their shards again")


def print_verdict(verdict: Verdict, shards_with_errors: list[dict[str, Any]]) -> None:
    """Print what the gate compared, and what to do if it holds the run back."""
    _print("the gate", [{**one, "is_beyond": "yes" if one["is_beyond"] else ""} for one in verdict.table()])
    if verdict.error_fraction > verdict.max_error_fraction:
        worst = [
            {
                "path": one["path"],
                "rows with an error": f"{one['num_rows_error']} of {one['num_rows']}",
                "failure": one["failure"] or "",
            }
            for one in shards_with_errors
        ]
        _print("shards with most errors", worst)
    if verdict.is_held:
        reasons = "\n  ".join(verdict.reasons)
        _say(f"held: nothing is published; what was scored waits in staging/:\n  {reasons}")
        _say("Look at them. If they are right, repeat the command with --accept; else fix archive or bundle and rerun.")


def print_audit(report: dict[str, Any], suspects: pa.Table) -> None:
    """Print the labels with most suspects, and the first suspects."""
    rows = []
    for label, facts in report["labels"].items():
        row = {"label": label, "rows": facts["num_rows"], "suspects": facts["num_suspects"]}
        row |= {"missing": facts["num_missing"]} if "num_missing" in facts else {}
        row |= {"estimated noise": f"{facts['noise']:.1%}"}
        if "most_often" in facts:
            row["most often probably"] = f"{facts['most_often']} ({facts['num_most_often']})"
        rows.append(row)
    rows.sort(key=lambda row: -row["suspects"] - row.get("missing", 0))
    _print("labels by suspects", rows, rest="labels")

    rows, column = [], TASKS[report["problem_type"]].column
    for row in suspects.slice(0, _NUM_SUSPECTS_SHOWN).to_pylist():
        given, suggested = (
            ", ".join(one) or "none" if isinstance(one, list) else one
            for one in (row[column], row[schema.SUGGESTED + column])
        )
        names = (schema.GIVEN_PROBABILITY, schema.SUGGESTED_PROBABILITY)
        given_p, suggested_p = (f"{row[name]:.2f}" if name in row else "" for name in names)
        source = f"{row[schema.SOURCE].rsplit('/', 1)[-1]}, row {row[schema.SOURCE_ROW]}"
        shown = {"text": _excerpt(row[TEXT]), "label": given, "p": given_p}
        rows.append({**shown, "probably": suggested, "p ": suggested_p, "from": source})
    _print("the most suspect rows", rows)
    _say(f"{report['num_suspects']} of {report['num_rows']} rows are suspect; estimated noise {report['noise']:.1%}")


def print_trials(records: Sequence[TrialRecord]) -> None:
    """Print finished trials, the best first: the options in which they differ, their scores, how they ended."""
    best = best_of(records)
    varied = [name for name in SEARCHED if len({record.options[name] for record in records}) > 1]
    # The terminal is narrow, and the seed follows from the trial's number.
    varied = [name for name in varied if name != "seed"] or varied
    names = {name: words for task in TASKS.values() for name, words in task.metric_names.items()}
    rows = []
    for record in sorted(records, key=lambda one: (-one.score, one.number)):
        row: _Row = {"trial": record.number}
        row |= {name.replace("_", " "): f"{record.options[name]:g}" for name in varied}
        row["epochs run"] = len(record.history)
        row |= {words: record.scores[name] for name, words in names.items() if name in record.scores}
        status = "" if record.status == "done" else record.status
        rows.append({**row, "": "best" if record is best else record.failure or status})
    _print(f"{len(records)} trials", rows, rest="in the bundle's trials.json")


def print_look(archive: Path, predictions: Path, num_rows: int = 5) -> None:
    """Print a few texts of a local archive beside their predictions."""
    shard = min(archive.rglob("*.parquet"))
    file = predictions / shard.relative_to(archive)
    texts = pq.ParquetFile(shard).read([TEXT], use_threads=False)
    predicted = pq.ParquetFile(file).read(use_threads=False)
    rows = []
    for row in range(0, texts.num_rows, max(1, texts.num_rows // num_rows))[:num_rows]:
        label, score, error = (predicted[name][row].as_py() for name in (LABEL, SCORE, schema.ERROR))
        excerpt = _excerpt(texts[TEXT][row].as_py() or "")
        rows.append({"row": row, TEXT: excerpt, LABEL: label or error, SCORE: "" if score is None else f"{score:.3f}"})
    _print(f"a look at {file}", rows)


def _excerpt(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT_CHARS else f"{text[:_EXCERPT_CHARS]}…"


def _print(title: str, rows: Iterable[_Row], rest: str = "") -> None:
    """Print rows as a table, whose headings are their keys.

    Args:
        rest: where the rows after the first `_MAX_TABLE_ROWS` are; empty: print all rows.
    """
    rows = list(rows)
    shown = rows[:_MAX_TABLE_ROWS] if rest else rows
    table = Table(title=title, title_justify="left")
    columns = dict.fromkeys(name for row in shown for name in row)
    for name in columns:
        is_number = any(isinstance(row.get(name), int | float) for row in shown)
        table.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in shown:
        if row:
            table.add_row(*(_shown(row.get(name, "")) for name in columns))
        else:
            table.add_section()
    _say(table)
    if len(rows) > len(shown):
        _say(f"{len(rows) - len(shown)} more {rest}")


def _shown(value: object) -> str:
    if value is None:
        return "no rows"  # a share of them
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value).replace("\n", "\\n"))


def _say(what: Table | str) -> None:
    # Labels and paths are data, not markup. A log has no width; rich would assume 80.
    width = None if sys.stderr.isatty() else 120
    Console(stderr=True, width=width, markup=False, emoji=False, highlight=False).print(what)
