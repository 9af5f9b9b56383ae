"""Labelled files of any accepted format become one table of strings.

1. A pattern becomes files:            "cv/" -> cv/a.csv, cv/b.jsonl.gz, cv/c.parquet
2. A file becomes a table:             columns of every type that the format has
3. Text and label become strings:      text="B.Sc. in Physics"  label="1"  source="cv/a.csv"  source_row=7
   or labels a list of strings:        text="thanks, lovely!"  labels=["love", " gratitude"]  source=…

Nothing is dropped here: nulls, empty texts and blanks between separators pass through, so that cleaning counts them.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.schema import LABEL, LABELS, SOURCE, SOURCE_ROW, TEXT
from bertray.storage.location import Location
from bertray.tokenization.columns import TEXT_TYPES, as_utf8

_log = logging.getLogger(__name__)

GROUP = "group"

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TEXT_FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
_SUFFIXES = (".parquet", *(text + packed for text in _TEXT_FORMATS for packed in ("", *_COMPRESSIONS)))
_FORMATS_HELP = "CSV (.csv, .tsv), JSON Lines (.jsonl, .ndjson, .json), each also .gz or .zst, and .parquet"

_QUOTING_HELP = (
    'put such a cell into quotation marks and double those within, as """Yes"", she said.", or save the table as '
    "Parquet or JSON Lines"
)
_LIST_TYPES = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)

# Arrow counts the bytes of a column of strings whose rows are reordered in an int32.
_MAX_COLUMN_BYTES = 2**31 - 1
_MAX_EXACT_FLOAT = 2**53


def read_labelled(
    patterns: list[str],
    *,
    text_column: str,
    label_column: str,
    group_column: str | None = None,
    separator: str | None = None,
) -> pa.Table:
    """Read files, folders and globs into one table.

    With a `separator` a row has several labels: a list, or one string that is split at the separator. An empty list
    stays empty; an empty string becomes a list with one empty string, so that the two can be told apart.

    Returns:
        Columns `text`, `label`, `group` if there is a group column (all string, nullable), `source` and `source_row`;
        files in sorted order, rows in file order. With a `separator`, `labels` (list of strings, nullable) instead of
        `label`.

    Raises:
        RequestError: nothing matches, a file cannot be parsed, a column is missing or of the wrong type, or there is
            too much text.
    """
    columns = {TEXT: text_column, LABEL: label_column}
    if group_column is not None:
        columns[GROUP] = group_column
    # Patterns may overlap, as `a.csv` and `*.csv`: a row that is read twice would have two votes.
    files = {file.uri: file for pattern in patterns for file in find_files(pattern)}
    rows = pa.concat_tables([_read_file(file, columns, separator) for file in files.values()])
    for name in (TEXT, SOURCE):
        num_bytes = pc.sum(pc.binary_length(rows[name])).as_py() or 0
        if num_bytes > _MAX_COLUMN_BYTES:
            raise RequestError(
                f"the {rows.num_rows:,} rows of {', '.join(patterns)} have {num_bytes:,} bytes of {name}; at most "
                f"{_MAX_COLUMN_BYTES:,} fit into a data set: give fewer rows"
            )
    return rows


def find_files(pattern: str) -> list[Location]:
    """The labelled files at a path, folder or glob, sorted.

    Raises:
        RequestError: there are none.
    """
    place = Location.of(pattern)
    files: list[Location] = []
    for found in place.glob() if glob.has_magic(place.path) and not place.exists() else [place]:
        files += [found] if found.is_file() else [found / info.path for info in found.files(_SUFFIXES)]
    if not files:
        raise RequestError(f"no labelled files at {pattern}. Give a file, a folder or a glob of {_FORMATS_HELP}")
    return files


def _read_file(file: Location, columns: dict[str, str], separator: str | None) -> pa.Table:
    try:
        table = _parse(file, columns)
        _check_names(table.column_names, columns, file)
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise RequestError(f"cannot read {file}: {error}") from error
    except UnicodeError as error:
        raise RequestError(f"cannot read {file}, which is not UTF-8: {error}. Save the file as UTF-8") from error
    strings: dict[str, pa.ChunkedArray] = {}
    for name, column in columns.items():
        what = f"column {column!r} of {file}"
        if name == LABEL and separator is not None:
            strings[LABELS] = _as_lists(table[column], what, separator)
        elif name == LABEL and isinstance(table[column].type, _LIST_TYPES):
            strings[name] = _as_one_label(table[column], what)
        else:
            strings[name] = _as_strings(table[column], what, is_text=name == TEXT)
    strings[SOURCE] = pa.chunked_array([pa.repeat(pa.scalar(str(file)), table.num_rows)])
    strings[SOURCE_ROW] = pa.chunked_array([pa.array(range(table.num_rows), pa.int64())])
    return pa.table(strings)


def _check_names(found: list[str], columns: dict[str, str], file: Location) -> None:
    """Refuse a file that does not have each wanted column exactly once."""
    for name, column in columns.items():
        num_found = found.count(column)
        if num_found != 1:
            raise RequestError(
                f"{file} has {num_found or 'no'} column{'s' * (num_found > 1)} {column!r}; it has "
                f"{', '.join(found) or 'none'}. Choose with --{name}-column"
            )


def _parse(file: Location, columns: dict[str, str]) -> pa.Table:
    """Read one file by its suffixes. Text formats give the wanted columns as they are written: 007 stays 007."""
    name = file.name.lower()
    if name.endswith(".parquet"):
        with file.open() as stream:
            return pq.ParquetFile(stream).read()
    compression = next((codec for suffix, codec in _COMPRESSIONS.items() if name.endswith(suffix)), None)
    stem = name.rsplit(".", 1)[0] if compression else name
    text_format = next((kind for suffix, kind in _TEXT_FORMATS.items() if stem.endswith(suffix)), None)
    if text_format is None:
        raise RequestError(f"{file} has no known format. Accepted are {_FORMATS_HELP}")
    content = file.read_bytes()
    if compression:
        content = pa.CompressedInputStream(pa.BufferReader(content), compression).read()
    if text_format == "json":
        return _parse_json_lines(content, file, list(columns.values()))
    return _parse_csv(content, "\t" if text_format == "tsv" else ",", columns, file)


def _parse_csv(content: bytes, delimiter: str, columns: dict[str, str], file: Location) -> pa.Table:
    """The wanted columns. Only an empty cell is null: "NA" and "None" may be labels or texts."""
    csv.field_size_limit(_MAX_COLUMN_BYTES)
    lines = list(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""))
    rows = csv.reader(lines, delimiter=delimiter)
    names = next(rows, [])
    _check_names(names, columns, file)
    positions = {name: names.index(name) for name in columns.values()}
    values: dict[str, list[str | None]] = {name: [] for name in positions}
    num_rows, end, with_lines = 1, rows.line_num, []
    for cells in rows:
        begin, end = end, rows.line_num
        if not cells:
            continue
        num_rows += 1
        where = f"row {num_rows} of {file}, counting the header,"
        if end > begin + 1 or end == len(lines):
            _check_quotes(lines[begin:end], delimiter, where)
        if len(cells) != len(names):
            raise RequestError(f"{where} has {len(cells)} cells, and the header has {len(names)}. {_QUOTING_HELP}")
        if end > begin + 1 and any("\t" in cell and "\n" in cell for cell in cells):
            with_lines.append(where)
        for name, position in positions.items():
            values[name].append(cells[position] or None)
    if delimiter == "\t" and with_lines:
        _log.warning(
            "warning: %d rows have a cell with tabs and line breaks; the first is %s. If these are rows that a "
            "quotation mark at the beginning of a cell has swallowed: %s",
            *(len(with_lines), with_lines[0].rstrip(","), _QUOTING_HELP),
        )
    return pa.table({name: pa.array(column, pa.string()) for name, column in values.items()})


def _check_quotes(lines: list[str], delimiter: str, where: str) -> None:
    """Refuse a row with a cell that begins with a quotation mark, does not end with one, and swallows lines."""
    try:
        next(csv.reader(lines, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            what = "does not end: all behind it would be one text. Is the file cut off? Else"
        elif len(lines) > 1:
            what = "has text behind the closing one, lines later: it may have swallowed the rows between:"
        else:
            return
        raise RequestError(
            f"{where} has a cell that begins with a quotation mark and {what} {_QUOTING_HELP}"
        ) from error


def _parse_json_lines(data: bytes, file: Location, wanted: list[str]) -> pa.Table:
    """The wanted members of one JSON object a line; a member that a line lacks is null there.

    Arrow's own reader would turn dates into timestamps and refuse columns of mixed type that nobody asked for.
    """
    rows: list[list[Any]] = []
    names: dict[str, None] = {}
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(f"line {number} of {file} is not JSON: {error}. Write one object a line") from error
        if not isinstance(row, dict):
            raise RequestError(f"line {number} of {file} holds a {type(row).__name__}. Write one object a line")
        names |= dict.fromkeys(row)
        rows.append([row.get(name) for name in wanted])
    columns = {name: pa.nulls(len(rows)) for name in names or wanted}
    for name, values in zip(wanted, zip(*rows, strict=True), strict=False):
        if name in columns:
            columns[name] = _as_array(values, name, file)
    return pa.table(columns)


def _as_array(values: Sequence[Any], name: str, file: Location) -> pa.Array:
    try:
        return pa.array(values)
    except OverflowError as error:
        raise RequestError(f"{name!r} of {file} holds integers beyond 64 bits: write them as strings") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"{name!r} of {file} holds text that is not Unicode (half a character): {error}") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RequestError(f"{name!r} of {file} holds values of several types: {error}") from error


def _as_lists(column: pa.ChunkedArray, what: str, separator: str) -> pa.ChunkedArray:
    """Lists of strings from a label column with lists, or with strings that have separators."""
    if not isinstance(column.type, _LIST_TYPES):
        return pc.split_pattern(_as_strings(column, what), separator)
    lists = column.combine_chunks()
    offsets = np.append(0, np.cumsum(pc.list_value_length(lists).fill_null(0))).astype(np.int32)
    values = _as_strings(pa.chunked_array([pc.list_flatten(lists)]), what).combine_chunks()
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, values, mask=lists.is_null())])


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
