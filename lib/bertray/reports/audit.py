"""label_check/report.html: how many labels are probably wrong, and where?

label_quality.json   suspects and estimated noise, by label
suspects.parquet     the rows, the worst first
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from bertray import schema
from bertray.reports.layout import number, rendered, source_of
from bertray.storage.location import Location
from bertray.storage.outputs import read_json, read_rows
from bertray.tasks.task import TASKS

_MAX_PAIRS, _MAX_LABELS, _MAX_TEXTS_OF_PAIR = 30, 200, 5


def render(facts: dict[str, Any]) -> str:
    """The page."""
    return rendered("audit.html", facts)


def facts(folder: Location, num_texts: int) -> dict[str, Any]:
    """What the page shows of an output of bertray audit."""
    report = read_json(folder / "label_quality.json", "Audit again")
    suspects = read_rows(folder / "suspects.parquet", "Audit again")
    given = TASKS[report["problem_type"]].column
    answers = suspects.select([given, schema.SUGGESTED + given]).to_pylist()
    changes = [_change(row[given], row[schema.SUGGESTED + given]) for row in answers]
    counts = Counter(one for one in changes if one)
    labels = [
        [label, one["num_rows"], one["num_suspects"], one.get("num_missing"), one["noise"], one.get("most_often", "")]
        for label, one in report["labels"].items()
    ]
    labels.sort(key=lambda row: (-row[2] - (row[3] or 0), row[0]))
    has_missing = any(row[3] is not None for row in labels)  # several labels a row
    return {
        **report,
        "place": folder,
        "by_label": [row if has_missing else [*row[:3], *row[4:]] for row in labels],
        "has_missing": has_missing,
        "pairs": [[*pair, count] for pair, count in counts.most_common(_MAX_PAIRS)],
        "num_pairs": len(counts),
        "groups": _groups(suspects, changes, counts, num_texts, given),
        "num_texts": num_texts,
        "worst": labels[0],
    }


def _change(given: Any, suggested: Any) -> tuple[str, str] | None:
    """From which label to which; None: numbers have no pairs. Of lists, what differs."""
    if isinstance(given, list):
        gone, come = ([one for one in a if one not in b] for a, b in ((given, suggested), (suggested, given)))
        return ", ".join(gone) or "nothing", ", ".join(come) or "nothing"
    return (given, suggested) if isinstance(given, str) else None


def _groups(
    suspects: pa.Table, changes: list[Any], counts: Counter[Any], num_texts: int, given: str
) -> list[dict[str, Any]]:
    """Of each pair, the most frequent first, the worst rows, at most so many in all: text, how sure, source.

    Where the pair does not say it, also what was given and suggested: of lists, and of numbers.
    """
    groups, left = list[dict[str, Any]](), num_texts
    for pair in [pair for pair, _ in counts.most_common()] or [None]:
        most = min(left, _MAX_TEXTS_OF_PAIR) if pair else left
        rows = [index for index, change in enumerate(changes) if change == pair][:most]
        if not rows:
            break
        left -= len(rows)
        shown = [_shown(row, given) for row in suspects.take(pa.array(rows)).to_pylist()]
        groups.append({"pair": pair, "number": counts[pair], "rows": shown})
    return groups


def _shown(row: dict[str, Any], given: str) -> list[Any]:
    answers = [row[given], row[schema.SUGGESTED + given]]
    told = [
        ", ".join(one) or "none" if isinstance(one, list) else number(one)
        for one in answers
        if not isinstance(one, str)
    ]
    names = schema.GIVEN_PROBABILITY, schema.SUGGESTED_PROBABILITY
    sure = [row[name] for name in names if name in row]
    return [row[schema.TEXT], *told, *sure, source_of(row)]
