"""Which labelled rows stay, and why the others are taken out.

Every function takes a table of `bertray.data.readers` and returns the rows that stay and a count for every reason:
rows in = rows kept + rows out, always. Texts are compared trimmed, in Unicode NFC and without
invisible characters, but kept as they were read: the model must train on what it will meet in the archive.

    " Skills: Python"  Skills     kept
    "Skills: Python "  Skills     duplicate
    "M.Sc. Physics"    Education  kept            (2 of 3 say Education)
    "M.Sc. Physics"    Education  duplicate
    "M.Sc. Physics"    Projects   label_outvoted
    "   "              Skills     text_empty

If a row has several labels, its set of labels is compared as a whole:

    "Well done, love"  [love, admiration]  kept
    "Well done, love"  [admiration, love]  duplicate
    "Nothing to say"   []                  kept            (no label, on purpose)
    "Nothing at all"   ["", " "]           label_missing

If a row has a number, rows of equal texts are one row with the mean of their numbers:

    "The cell divides"   3.0   kept, as 3.5
    " The cell divides"  4.0   duplicate
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from bertray.data.readers import GROUP
from bertray.schema import TEXT
from bertray.tasks.task import task_of_rows
from bertray.tokenization.columns import ZERO_WIDTH, is_blank

_KEPT = ""
MAX_CONFLICTS_LISTED = 100
_EXCERPT_CHARS = 200


@dataclass
class Cleaned:
    """Rows that stay, the number taken out for each reason, and texts that occur with several labels."""

    rows: pa.Table
    rows_out: Counter[str]
    num_rows_in: int
    conflicts: list[dict[str, Any]]  # at most MAX_CONFLICTS_LISTED of them
    num_conflicts: int


def clean(rows: pa.Table, max_spread: float | None = None) -> Cleaned:
    """Take out unusable rows and merge equal texts; labels are trimmed, lists of them sorted, without repeats.

    Reasons: `text_missing` (null), `text_empty` (nothing visible: `is_blank`), `label_missing` (null, empty or white
    space; of lists: null, or nothing but blanks), `duplicate` (an earlier row has the same text and label),
    `label_outvoted` (most rows with this text have another label), `label_tied` (no label has more rows than all
    others).
    With several labels a row, "label" means the set of them, without blanks; in `conflicts` it is a JSON array.
    A number is a label, too; `value_spread` (rows with this text have numbers that differ by more than `max_spread`).
    """
    task = task_of_rows(rows)
    rows, labels = task.tidied(rows)
    keys = comparison_keys(rows)
    reasons = np.full(rows.num_rows, _KEPT, dtype=object)
    reasons[[label in (None, "") for label in labels]] = "label_missing"
    reasons[is_blank(rows[TEXT]).fill_null(False).to_numpy()] = "text_empty"
    reasons[pc.is_null(keys).to_numpy()] = "text_missing"

    key_ids = keys.combine_chunks().dictionary_encode().indices.to_pandas()
    votes = pd.DataFrame({"key": key_ids, "label": pd.Series(labels, dtype=object)})[reasons == _KEPT]
    of_votes, agreed = task.agreed(votes, max_spread)
    reasons[votes.index] = of_votes
    conflicts = []
    has_several = votes.groupby("key")["label"].transform("nunique") > 1
    conflicting = votes[has_several].groupby("key", sort=False)["label"]
    for _, of_text in islice(conflicting, MAX_CONFLICTS_LISTED):
        first = of_text.index[0]
        kept = None if pd.isna(agreed[first]) else agreed[first]
        excerpt = rows[TEXT][first].as_py()[:_EXCERPT_CHARS]
        conflicts.append({"text": excerpt, "labels": dict(Counter(of_text).most_common()), "kept": kept})
    rows = task.given_anew(rows, votes.index[has_several].to_numpy(), agreed[has_several])
    return Cleaned(*_take_out(rows, reasons), rows.num_rows, conflicts, conflicting.ngroups)


def drop_shared(rows: pa.Table, held_out: pa.Table, held_out_name: str) -> tuple[pa.Table, Counter[str]]:
    """Take out training rows whose text or group occurs in a held-out split too; return the others, and the counts.

    Reasons: `text_in_<name>`, `group_in_<name>`.
    """
    reasons = np.full(rows.num_rows, _KEPT, dtype=object)
    if GROUP in rows.column_names:
        reasons[_is_in(rows[GROUP], pc.drop_null(held_out[GROUP]))] = f"group_in_{held_out_name}"
    reasons[_is_in(comparison_keys(rows), comparison_keys(held_out))] = f"text_in_{held_out_name}"
    return _take_out(rows, reasons)


def comparison_keys(rows: pa.Table) -> pa.ChunkedArray:
    """What two texts are compared by: trimmed, in Unicode NFC, without invisible characters, any space as a blank."""
    texts = rows[TEXT].combine_chunks()
    is_other_N = pc.fill_null(pc.invert(pc.string_is_ascii(texts)), False)  # the expressions take 60 times as long
    visible = pc.replace_substring_regex(texts.filter(is_other_N), f"[{ZERO_WIDTH}]+", "")
    others = pc.replace_substring_regex(visible, r"\p{Z}+", " ")
    keys = pc.replace_with_mask(texts, is_other_N, others)
    return pa.chunked_array([pc.utf8_normalize(pc.utf8_trim_whitespace(keys), form="NFC")])


def _is_in(values: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.is_in(values, value_set=others.combine_chunks()).to_numpy())


def _take_out(rows: pa.Table, reasons: np.ndarray) -> tuple[pa.Table, Counter[str]]:
    is_kept = reasons == _KEPT
    return rows.filter(pa.array(is_kept)), Counter(reasons[~is_kept].tolist())
