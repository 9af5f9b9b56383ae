"""Which labelled rows stay, and why the others go.

Every function takes a table of `bertray.data.readers` and returns the rows that stay and a count for every reason, so
that rows in = rows kept + rows out, always. Texts are compared trimmed and in Unicode NFC but kept as they were read:
the model must train on what it will meet in the archive.

    " Skills: Python"  Skills     kept
    "Skills: Python "  Skills     duplicate
    "M.Sc. Physics"    Education  kept            (2 of 3 say Education)
    "M.Sc. Physics"    Education  duplicate
    "M.Sc. Physics"    Projects   label_outvoted
    "   "              Skills     text_empty

A row with several labels is judged by its set of labels as a whole:

    "Well done, love"  [love, admiration]  kept
    "Well done, love"  [admiration, love]  duplicate
    "Well done, love"  [love]              label_outvoted
    "Nothing to say"   []                  kept            (no label, on purpose)
    "Nothing at all"   ["", " "]           label_missing
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from bertray.data.readers import GROUP, map_values
from bertray.schema import LABEL, LABELS, TEXT

_KEPT = ""
MAX_CONFLICTS_LISTED = 100
_EXCERPT_CHARS = 200


@dataclass
class Cleaned:
    """Rows that stay, how many went for which reason, and texts that stood with several labels."""

    rows: pa.Table
    rows_out: Counter[str] = field(default_factory=Counter)
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    num_conflicts: int = 0


def clean(rows: pa.Table) -> Cleaned:
    """Take out unusable rows and merge equal texts; labels come back trimmed, lists of them sorted, each label once.

    Reasons: `text_missing` (null), `text_empty` (empty or white space), `label_missing` (null, empty or white space;
    of a list: null, or blanks alone), `duplicate` (an earlier row has the same text and label), `label_outvoted` (most
    rows of this text have another label), `label_tied` (several labels share the lead, so none can be believed).
    In lists blanks are dropped, and "label" above means the set of them; in `conflicts` it is a JSON array.
    """
    if LABELS in rows.column_names:
        rows = _set(rows, LABELS, _label_sets(rows[LABELS]))
        labels = _as_json(rows[LABELS])
    else:
        labels = pc.utf8_trim_whitespace(rows[LABEL])
        rows = _set(rows, LABEL, labels)
    keys = comparison_keys(rows)
    reasons = np.full(rows.num_rows, _KEPT, dtype=object)
    reasons[_mask(pc.or_kleene(pc.is_null(labels), pc.equal(labels, "")))] = "label_missing"
    reasons[_mask(pc.equal(keys, ""))] = "text_empty"
    reasons[_mask(pc.is_null(keys))] = "text_missing"

    usable = np.flatnonzero(reasons == _KEPT)
    votes = pd.DataFrame({"key": _codes(keys)[usable], "label": _codes(labels)[usable], "row": usable})
    counts = votes.groupby(["key", "label"], sort=False).size().rename("votes").reset_index()
    lead = counts.groupby("key")["votes"].transform("max")
    leaders = counts[counts["votes"] == lead]
    tied_keys = leaders.loc[leaders["key"].duplicated(), "key"].unique()
    winners = leaders.drop_duplicates("key").set_index("key")["label"]

    outvoted = votes["label"] != votes["key"].map(winners)
    tied = votes["key"].isin(tied_keys)
    duplicate = votes.duplicated(["key", "label"])
    for mask, reason in ((duplicate, "duplicate"), (outvoted, "label_outvoted"), (tied, "label_tied")):
        reasons[votes.loc[mask, "row"]] = reason

    conflict_keys = counts.loc[counts["key"].duplicated(), "key"].unique()
    conflicts = [
        _describe(rows[TEXT], labels, votes[votes["key"] == key], key in tied_keys)
        for key in conflict_keys[:MAX_CONFLICTS_LISTED]
    ]
    cleaned = _take_out(rows, reasons)
    return Cleaned(cleaned.rows, cleaned.rows_out, conflicts, len(conflict_keys))


def drop_shared(rows: pa.Table, held_out: pa.Table, held_out_name: str) -> Cleaned:
    """Take out training-side rows whose text, or group, also stands in a held-out split.

    Reasons: `text_in_<name>`, `group_in_<name>`.
    """
    reasons = np.full(rows.num_rows, _KEPT, dtype=object)
    if GROUP in rows.column_names:
        groups = pc.drop_null(held_out[GROUP])
        reasons[_mask(pc.is_in(rows[GROUP], value_set=groups.combine_chunks()))] = f"group_in_{held_out_name}"
    held_out_keys = comparison_keys(held_out).combine_chunks()
    reasons[_mask(pc.is_in(comparison_keys(rows), value_set=held_out_keys))] = f"text_in_{held_out_name}"
    return _take_out(rows, reasons)


def comparison_keys(rows: pa.Table) -> pa.ChunkedArray:
    """What two texts are compared by: trimmed, in Unicode NFC."""
    return pc.utf8_normalize(pc.utf8_trim_whitespace(rows[TEXT]), form="NFC")


def _set(rows: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, column)


def _label_sets(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """Each list trimmed, sorted and without blanks and repeats; null where it had nothing but blanks."""
    sets = []
    for labels in map_values(lists, pc.utf8_trim_whitespace).to_pylist():
        named = sorted(set(labels or ()) - {"", None})
        sets.append(None if labels is None or (labels and not named) else named)
    return pa.chunked_array([pa.array(sets, lists.type)])


def _as_json(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    """One string for each list: what sets of labels are compared by."""
    texts = [None if labels is None else json.dumps(labels, ensure_ascii=False) for labels in lists.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def _take_out(rows: pa.Table, reasons: np.ndarray) -> Cleaned:
    kept = reasons == _KEPT
    return Cleaned(rows.filter(pa.array(kept)), Counter(reasons[~kept].tolist()))


def _mask(condition: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(condition.fill_null(False).to_numpy())


def _codes(strings: pa.ChunkedArray) -> np.ndarray:
    """An integer for every distinct string, -1 for null."""
    return np.asarray(strings.combine_chunks().dictionary_encode().indices.fill_null(-1))


def _describe(texts: pa.ChunkedArray, labels: pa.ChunkedArray, votes: pd.DataFrame, tied: bool) -> dict[str, Any]:
    first = int(votes["row"].iloc[0])
    counts = Counter(labels.take(pa.array(votes["row"].to_numpy())).to_pylist())
    text = str(texts[first].as_py())[:_EXCERPT_CHARS]
    return {"text": text, "labels": dict(counts.most_common()), "kept": None if tied else counts.most_common(1)[0][0]}
