"""One label for what is one label, however files spell it; and labels that may still be meant alike.

    "Sante\\u0301", "Santé\\u200b"  ->  "Santé"           composed (NFC), without invisible characters
    "société\\u00a0 civile"         ->  "société civile"  any space is a space, several are one
    1, 1.0, "1", "1.00", "+1"      ->  "1"               if every label of all files is a whole number
    "007", "1e3"                   ->  as they are       a leading zero or an exponent tells of codes, not of numbers

Joiners and variation selectors decide how words of Persian or Hindi and emoji look, and people type them or not: labels
are compared without them, and the most frequent spelling is kept.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from bertray.data.readers import GROUP
from bertray.errors import listed
from bertray.formats.columnar import list_map
from bertray.metrics.profile import given_labels
from bertray.schema import LABEL, LABELS
from bertray.tokenization.columns import JOINERS, one_line

_WHOLE_NUMBER = re.compile(r"\+?(-?)(0|[1-9][0-9]*)(\.0+)?")
_NUMBER = re.compile(r"\+?(-?)0*([0-9]+)(\.0*)?")
_JOINER = re.compile(f"[{JOINERS}]")
_MAX_LISTED = 5


def one_spelling(
    tables: Mapping[str, pa.Table], oos_label: str | None = None
) -> tuple[dict[str, pa.Table], str | None]:
    """Spell equal labels of all tables alike, and groups if all are whole numbers; a label without a sign is "".

    Args:
        tables: of `readers.read_labelled`.
        oos_label: the label of no class; it need not be a number where the others are.

    Returns:
        The tables, and the out-of-scope label as they spell it.
    """
    num_rows = Counter({} if oos_label is None else {oos_label: 0})
    groups: set[str] = set()
    for table in tables.values():
        num_rows.update(_counts(given_labels(table)))
        groups |= set(_counts(table[GROUP])) if GROUP in table.column_names else set()
    forms: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by what they are compared by
    key_of: dict[str, str] = {}
    for label, count in num_rows.items():
        cleaned = one_line(label)
        key_of[label] = key = _JOINER.sub("", cleaned)
        forms[key][cleaned if key else ""] += count
    kept = {key: max(sorted(spellings), key=spellings.__getitem__) for key, spellings in forms.items()}
    classes = {label for key, label in kept.items() if oos_label is None or key != key_of[oos_label]}
    are_numbers = _are_whole_numbers(classes)
    spelling = {label: _shortest(kept[key]) if are_numbers else kept[key] for label, key in key_of.items()}
    group_spelling = {group: _shortest(group) for group in groups} if _are_whole_numbers(groups) else {}
    return (
        {name: _respelt(table, spelling, group_spelling) for name, table in tables.items()},
        None if oos_label is None else spelling[oos_label],
    )


def warn_of_alike(num_rows: Mapping[str, int]) -> list[str]:
    """A warning that lists the labels which differ only in case or punctuation; none if there are none.

    Args:
        num_rows: by label.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted(num_rows):
        groups[_likeness(label)].append(label)
    alike = [labels for labels in groups.values() if len(labels) > 1]
    named = [" and ".join(f"{label!r} ({num_rows[label]} rows)" for label in labels[:_MAX_LISTED]) for labels in alike]
    warning = (
        "labels differ only in case, punctuation or how a number is written, and are different classes: "
        f"{listed(named, _MAX_LISTED)}. If they are meant alike, spell them alike in the files and prepare again"
    )
    return [warning] if alike else []


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Rows by value, without nulls."""
    return {one["values"]: one["counts"] for one in pc.value_counts(column.drop_null()).to_pylist()}


def _are_whole_numbers(labels: Iterable[str]) -> bool:
    return all(_WHOLE_NUMBER.fullmatch(label) for label in labels if label)


def _shortest(label: str) -> str:
    """A whole number without plus sign and decimals; anything else as it is."""
    found = _WHOLE_NUMBER.fullmatch(label)
    return label if found is None else "0" if found[2] == "0" else found[1] + found[2]


def _likeness(label: str) -> str:
    """What labels have in common that differ only in case or punctuation, or as numbers in zeros before or behind."""
    if found := _NUMBER.fullmatch(label):
        return found[1] + found[2]
    folded = unicodedata.normalize("NFKC", label).casefold()
    return "".join(one for one in folded if unicodedata.category(one)[0] not in "PZ") or label


def _respelt(table: pa.Table, spelling: dict[str, str], group_spelling: dict[str, str]) -> pa.Table:
    changed = {GROUP: lambda column: _mapped(column, group_spelling)} if group_spelling else {}
    changed[LABEL] = lambda column: _mapped(column, spelling)
    changed[LABELS] = lambda column: list_map(column, changed[LABEL])
    columns = {name: changed[name](table[name]) if name in changed else table[name] for name in table.column_names}
    return pa.table(columns)


def _mapped(column: pa.ChunkedArray, spelling: dict[str, str]) -> pa.ChunkedArray:
    encoded = column.combine_chunks().dictionary_encode()
    spelt = pa.array([spelling[one] for one in encoded.dictionary.to_pylist()], pa.string())
    return pa.chunked_array([spelt.take(encoded.indices)])
