"""Labelled files of any format become one table of strings.

1. A file becomes a table:             columns of every type that the format has            [bertray.formats]
2. Text and label become strings:      text="B.Sc. in Physics"  label="1"  source="cv/a.csv"  source_row=7
   or labels a list of strings:        text="thanks, lovely!"  labels=["love", " gratitude"]  source=…

Nothing is dropped here: nulls, empty texts and blanks between separators pass through, so that cleaning counts them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import RequestError
from bertray.formats.columnar import LIST_TYPES, list_map
from bertray.formats.files import read_table
from bertray.schema import LABEL, LABELS, SOURCE, SOURCE_ROW, TEXT
from bertray.storage.location import Location
from bertray.tokenization.columns import TEXT_TYPES, as_utf8

GROUP = "group"

# Arrow counts the bytes of a column of strings whose rows are reordered in an int32.
_MAX_COLUMN_BYTES = 2**31 - 1
_MAX_EXACT_FLOAT = 2**53


def read_labelled(
    files: Iterable[Location],
    *,
    text_column: str,
    label_column: str,
    group_column: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
) -> pa.Table:
    """Read files into one table; a file that is named twice is read once, or its rows would have two votes.

    With a `separator` a row has several labels: a list, or one string that is split at the separator. An empty list
    stays empty; an empty string becomes a list with one empty string, so that the two can be told apart.

    Returns:
        Columns `text`, `label`, `group` if there is a group column (all string, nullable), `source` and `source_row`;
        files in their order, rows in file order. With a `separator`, `labels` (list of strings, nullable) instead of
        `label`.

    Raises:
        RequestError: a file cannot be parsed, a column is missing or of the wrong type, or there is
            too much text.
    """
    columns = {TEXT: text_column, LABEL: label_column}
    if group_column is not None:
        columns[GROUP] = group_column
    by_uri = {file.uri: file for file in files}
    rows = pa.concat_tables([_read_file(file, columns, separator, encoding) for file in by_uri.values()])
    for name in (TEXT, SOURCE):
        num_bytes = pc.sum(pc.binary_length(rows[name])).as_py() or 0
        if num_bytes > _MAX_COLUMN_BYTES:
            raise RequestError(
                f"the {rows.num_rows:,} rows of {', '.join(by_uri)} have {num_bytes:,} bytes of {name}; at most "
                f"{_MAX_COLUMN_BYTES:,} fit into a data set: give fewer rows"
            )
    return rows


def _read_file(file: Location, columns: dict[str, str], separator: str | None, encoding: str | None) -> pa.Table:
    table = read_table(file, columns, encoding)
    strings: dict[str, pa.ChunkedArray] = {}
    for name, column in columns.items():
        what = f"column {column!r} of {file}"
        if name == LABEL and separator is not None:
            strings[LABELS] = _as_lists(table[column], what, separator)
        elif name == LABEL and isinstance(table[column].type, LIST_TYPES):
            strings[name] = _as_one_label(table[column], what)
        else:
            strings[name] = _as_strings(table[column], what, is_text=name == TEXT)
    strings[SOURCE] = pa.chunked_array([pa.repeat(pa.scalar(str(file)), table.num_rows)])
    strings[SOURCE_ROW] = pa.chunked_array([pa.array(range(table.num_rows), pa.int64())])
    return pa.table(strings)


def _as_lists(column: pa.ChunkedArray, what: str, separator: str) -> pa.ChunkedArray:
    """Lists of strings from a label column with lists, or with strings that have separators.

    Raises:
        RequestError: these are columns of 0 and 1, or lists that were written as text.
    """
    if isinstance(column.type, LIST_TYPES):
        lists = list_map(column, lambda values: _as_strings(values, what))
        if set(pc.unique(pc.list_flatten(lists)).to_pylist()) <= {"0", "1"} and any(
            one and len(set(one)) < len(one) for one in lists.to_pylist()
        ):
            raise RequestError(f"{what} has a 0 or 1 for each class: write the names of a row's classes instead")
        return lists
    strings = _as_strings(column, what)
    is_list = pc.match_substring_regex(strings, r"^\s*\[.*\]\s*$")
    if pc.all(is_list, min_count=1).as_py():
        raise RequestError(
            f"{what} holds lists that were written as text, as {strings.drop_null()[0].as_py()!r}: write {separator!r} "
            "between a row's labels, or save the table as JSON Lines or Parquet"
        )
    return pc.split_pattern(strings, separator)


def _as_one_label(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    """The label of each list; null of a list without one."""
    lists = _as_lists(column, what, "").combine_chunks()
    labels, rows = pc.utf8_trim_whitespace(lists.values), pc.list_parent_indices(lists).to_numpy()
    is_label = pc.fill_null(pc.not_equal(labels, ""), False)
    labels, rows = np.array(labels.filter(is_label).to_pylist(), object), rows[is_label.to_numpy(zero_copy_only=False)]
    if len(others := np.flatnonzero((rows[1:] == rows[:-1]) & (labels[1:] != labels[:-1]))):
        row = int(rows[others[0]])
        raise RequestError(
            f"row {row} of {what}, counted from 0, has the labels {', '.join(map(repr, lists[row].as_py()))}: if a row "
            "may have several labels, add --multi-label; else leave one of them"
        )
    found = np.full(len(lists), None, dtype=object)
    found[rows] = labels
    return pa.chunked_array([pa.array(found, pa.string())])


def _as_strings(column: pa.ChunkedArray, what: str, *, is_text: bool = False) -> pa.ChunkedArray:
    """Strings, or bytes of UTF-8; labels and groups may also be whole numbers, dates and booleans."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):  # a gap among numbers; a data frame's column without a value is one of floats too
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), pa.string())])
    if kind in TEXT_TYPES:
        strings, is_invalid_N = as_utf8(column)
        if row := pc.index(is_invalid_N, True).as_py() + 1:
            raise RequestError(f"row {row - 1} of {what}, counted from 0, is not valid UTF-8: write it as UTF-8")
        return pa.chunked_array([strings.cast(pa.string())])
    if is_text:
        raise RequestError(f"{what} is of type {kind}; it must hold strings")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = _as_whole_numbers(column, what)
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind)):
        raise RequestError(f"{what} is of type {kind}; it must hold strings, whole numbers, dates or booleans")
    return column.cast(pa.string())


def _as_whole_numbers(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    is_float = pa.types.is_floating(column.type)
    if is_float and pc.max(pc.abs(column)).as_py() > _MAX_EXACT_FLOAT:
        raise RequestError(
            f"{what} holds numbers above 2**53 as floats, which are no longer exact: write them as integers or strings"
        )
    try:
        return column.cast(pa.int64() if is_float else pa.decimal256(76, 0))
    except pa.ArrowInvalid as error:
        raise RequestError(f"{what} holds fractions, not classes: {error}") from error
