"""evaluation/report.html: is this model good enough, and better than the simple one?

    metrics.json          scores, their intervals, the baseline, classes, confusions
    predictions.parquet   what the scores are worth, by score, length and file; the mistakes it was surest of

Legend: N rows of the split, C classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from bertray.reports.layout import number, percent, plain_words, points, rendered, source_of
from bertray.reports.terminal import SUMMARY_METRICS
from bertray.schema import HIGH, LOW, NUM_TOKENS, SCORE, SOURCE, TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import read_json, read_rows
from bertray.tasks.task import TASKS

# The first of these that there is answers the question; whether more is better; how it is written.
_MAIN = {"mae": (False, "n"), "accuracy": (True, "percent"), "f1_micro": (True, "percent")}
_MAX_CLASSES_OF_MATRIX, _MAX_CONFUSIONS, _MAX_GROUPS = 20, 10, 20
_NUM_BINS, _NUM_LENGTHS, _NUM_POINTS = 10, 5, 80
_LEAST_ROWS_OF_POINT = 20


def render(facts: dict[str, Any]) -> str:
    """The page."""
    return rendered("evaluation.html", facts)


def facts(folder: Location, num_texts: int) -> dict[str, Any]:
    """What the page shows of an output of bertray evaluate."""
    metrics = read_json(folder / "metrics.json", "Evaluate again")
    rows = read_rows(folder / "predictions.parquet", "Evaluate again")
    task = TASKS[metrics["problem_type"]]
    true, given = rows[task.column], rows["predicted"]
    if task.outputs:  # numbers
        error_N = np.abs(_numbers(given) - _numbers(true))
        worth_N, doubt_N, how = error_N, -error_N, ["mean error", "n"]
        scores = _bins(_numbers(given), _numbers(true))
        coverage: list[list[float]] = []
    else:
        right_N = np.array([_same(one, other) for one, other in zip(true.to_pylist(), given.to_pylist(), strict=True)])
        worth_N, how = right_N.astype(float), ["right", "percent"]
        score_N = _numbers(rows[SCORE])
        # Old outputs of several labels a row do not say whether the likeliest one is right.
        is_known = "is_right" in rows.column_names or not pa.types.is_list(given.type)
        best_N = rows["is_right"].to_numpy() if "is_right" in rows.column_names else right_N
        scores = _bins(score_N, best_N.astype(float)) if is_known else []
        coverage = _coverage(score_N, best_N) if is_known else []
        doubt_N = np.where(best_N, np.inf, -np.nan_to_num(score_N, nan=-1.0))
    surest = np.argsort(doubt_N, kind="stable")[:num_texts]
    surest = surest[np.isfinite(doubt_N[surest])]
    return {
        **dict.fromkeys(("interval", "review", "out_of_scope", "baseline")),
        **metrics,
        "place": folder,
        "main": _main(metrics),
        "compared": _compared(metrics),
        "how": how,
        "scores": scores,
        "coverage": coverage,
        "told": len(scores) > 1
        and coverage
        and {
            "gap": max(scores, key=lambda one: abs(one[0] - one[1])),
            "half": min(coverage, key=lambda one: abs(one[0] - 0.5)),
        },
        "classes": _classes(metrics),
        "matrix": _matrix(metrics),
        "confusions": _confusions(metrics),
        "surest": _shown(rows.take(pa.array(surest)), task.column),
        "lengths": _by_length(rows[NUM_TOKENS].to_numpy(), worth_N),
        "groups": _by_group(rows[SOURCE].to_pylist(), worth_N),
        "num_texts": num_texts,
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.cast(pa.float64()).to_numpy())


def _same(true: Any, given: Any) -> bool:
    return bool(set(true) == set(given) if isinstance(true, list) else true == given)


def _main(metrics: dict[str, Any]) -> dict[str, Any]:
    """The score that answers the question, its interval, and the difference to the baseline with its own."""
    name = next(one for one in _MAIN if one in metrics)
    is_more_better, unit = _MAIN[name]
    found: dict[str, Any] = {"name": name, "unit": unit, "value": metrics[name], "than": None}
    found["low"], found["high"] = metrics.get("intervals", {}).get(name, (None, None))
    if (baseline := metrics["baseline"]) and name in baseline:
        ends = baseline["difference_intervals"][name]
        difference = metrics[name] - baseline[name]
        if not is_more_better:
            ends, difference = [-end for end in reversed(ends)], -difference
        found |= {"than": baseline["name"], "better": difference, "better_low": ends[0], "better_high": ends[1]}
    return found


def _compared(metrics: dict[str, Any]) -> list[list[Any]]:
    """Of each score: its name, the model's, the baseline's, the difference and its interval, as text."""
    baseline, rows = metrics["baseline"] or {}, []
    show, differ = (number, partial(number, sign="+")) if "mae" in metrics else (percent, points)
    for name in (one for one in SUMMARY_METRICS if one in metrics):
        row = [plain_words(name), show(metrics[name]), "–", "–", "–"]
        if name in baseline:
            low, high = map(differ, baseline["difference_intervals"][name])
            row[2:] = [show(baseline[name]), differ(metrics[name] - baseline[name]), f"{low} to {high}"]
        rows.append(row)
    return rows


def _classes(metrics: dict[str, Any]) -> list[list[Any]]:
    """Label, support, precision, recall, F1, with several labels a row its threshold; the weakest first.

    A class that no row has comes last: it has neither recall nor F1.
    """
    nothing = {"recall": None, "f1": None}
    found = [(one, of if of["num_rows"] else {**of, **nothing}) for one, of in metrics.get("per_class", {}).items()]
    ordered = sorted(found, key=lambda item: 2.0 if item[1]["f1"] is None else item[1]["f1"])
    names = ("num_rows", "precision", "recall", "f1", "threshold")
    return [[label, *(scores[name] for name in names if name in scores)] for label, scores in ordered]


def _bins(claimed_N: np.ndarray, true_N: np.ndarray) -> list[list[float]]:
    """Of the rows by what was claimed, in bins of as many rows: mean claim, mean truth, number of rows."""
    known_N = np.isfinite(claimed_N) & np.isfinite(true_N)
    claimed_N, true_N = claimed_N[known_N], true_N[known_N]
    if not len(claimed_N):
        return []
    num_bins = max(1, min(_NUM_BINS, len(claimed_N) // _LEAST_ROWS_OF_POINT))
    bin_N = np.digitize(claimed_N, np.unique(np.quantile(claimed_N, np.arange(1, num_bins) / num_bins)))
    groups = [bin_N == index for index in np.unique(bin_N)]
    return [[float(claimed_N[one].mean()), float(true_N[one].mean()), int(one.sum())] for one in groups]


def _coverage(score_N: np.ndarray, right_N: np.ndarray) -> list[list[float]]:
    """Points [share of rows, share of these that are right, score] if the rows with the highest scores are kept."""
    order = np.argsort(-np.nan_to_num(score_N, nan=-1.0), kind="stable")
    right = np.cumsum(right_N[order])
    first = min(_LEAST_ROWS_OF_POINT, len(order))
    ends = np.unique(np.linspace(first, len(order), _NUM_POINTS).astype(int)) if len(order) else np.array([], int)
    return [[end / len(order), float(right[end - 1] / end), float(score_N[order[end - 1]])] for end in ends.tolist()]


def _matrix(metrics: dict[str, Any]) -> dict[str, Any] | None:
    """The confusion matrix, of the classes with most mistakes if there are many."""
    if "confusion_matrix" not in metrics:
        return None
    counts_CC = np.array(metrics["confusion_matrix"])
    mistakes_CC = counts_CC - np.diag(np.diag(counts_CC))
    worst = np.argsort(-(mistakes_CC.sum(axis=0) + mistakes_CC.sum(axis=1)), kind="stable")[:_MAX_CLASSES_OF_MATRIX]
    shown = np.sort(worst)
    return {
        "labels": [metrics["labels"][index] for index in shown],
        "rows": counts_CC[np.ix_(shown, shown)].tolist(),
        "others": (counts_CC.sum(axis=1)[shown] - counts_CC[np.ix_(shown, shown)].sum(axis=1)).tolist(),
        "most": int(mistakes_CC.max(initial=0)),
        "num_classes": len(counts_CC),
    }


def _confusions(metrics: dict[str, Any]) -> list[list[Any]]:
    """True label, predicted label, rows, and these as a share of the true label's; most rows first."""
    counts_CC = np.array(metrics.get("confusion_matrix", np.zeros((0, 0), int)))
    mistakes_CC, num_true_C = counts_CC - np.diag(np.diag(counts_CC)), counts_CC.sum(axis=1)
    pairs = [divmod(int(at), len(counts_CC)) for at in np.argsort(-mistakes_CC, axis=None, kind="stable")]
    names = metrics.get("labels", [])
    return [
        [names[true], names[given], int(mistakes_CC[true, given]), float(mistakes_CC[true, given] / num_true_C[true])]
        for true, given in pairs[:_MAX_CONFUSIONS]
        if mistakes_CC[true, given]
    ]


def _shown(rows: pa.Table, column: str) -> list[list[Any]]:
    """Rows for people: text, what is true, what was given, how sure, where from."""

    def named(answer: Any) -> Any:
        return (", ".join(answer) or "none") if isinstance(answer, list) else "no answer" if answer is None else answer

    return [
        [row[TEXT], named(row[column]), named(row["predicted"]), _how_sure(row), source_of(row)]
        for row in rows.to_pylist()
    ]


def _how_sure(row: dict[str, Any]) -> Any:
    return percent(row[SCORE]) if SCORE in row else f"{number(row[LOW])} to {number(row[HIGH])}"


def _by_length(num_tokens_N: np.ndarray, worth_N: np.ndarray) -> list[list[Any]]:
    """Fifths of the rows by length: which lengths, rows, their mean worth."""
    edges: Any = np.unique(np.quantile(num_tokens_N, np.arange(1, _NUM_LENGTHS) / _NUM_LENGTHS)) if len(worth_N) else []
    bin_N, found = np.digitize(num_tokens_N, edges), list[list[Any]]()
    for index in np.unique(bin_N):
        lengths, worth = num_tokens_N[bin_N == index], worth_N[bin_N == index]
        found.append([f"{lengths.min():,} to {lengths.max():,} tokens", len(worth), _mean(worth)])
    return found


def _by_group(sources: list[str], worth_N: np.ndarray) -> list[list[Any]]:
    """The files that rows came from, the largest first: name, rows, mean worth; none if it is one file."""
    names, group_N = np.unique(np.array(sources, dtype=object), return_inverse=True)
    order = np.argsort(-np.bincount(group_N, minlength=len(names)), kind="stable")[:_MAX_GROUPS]
    groups = [(names[index], worth_N[group_N == index]) for index in order]
    return [[str(name), len(worth), _mean(worth)] for name, worth in groups] if len(names) > 1 else []


def _mean(worth: np.ndarray) -> float | None:
    known = worth[np.isfinite(worth)]
    return float(known.mean()) if len(known) else None
