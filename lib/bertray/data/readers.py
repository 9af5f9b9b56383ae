"""Labelled files of any accepted format become one table of strings.

1. A pattern becomes files:            "cv/" -> cv/a.csv, cv/b.jsonl.gz, cv/c.parquet
2. A file becomes a table:             columns of every type that the format has
3. Text and label become strings:      text="B.Sc. in Physics"  label="1"  source="cv/a.csv"  source_row=7
   or labels a list of strings:        text="thanks, lovely!"  labels=["love", " gratitude"]  source=…

Nothing is cleaned or dropped here: nulls, empty texts and blanks between separators pass through, so that cleaning can
count them.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.schema import LABEL, LABELS, SOURCE, SOURCE_ROW, TEXT
from bertray.storage.location import Location

_log = logging.getLogger(__name__)

GROUP = "group"

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TEXT_FORMATS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "json", ".ndjson": "json", ".json": "json"}
_SUFFIXES = (".parquet", *(text + packed for text in _TEXT_FORMATS for packed in ("", *_COMPRESSIONS)))
_FORMATS_HELP = "CSV (.csv, .tsv), JSON Lines (.jsonl, .ndjson, .json), each also .gz or .zst, and .parquet"

_QUOTING_HELP = (
    'put such a cell into quotation marks, and double those within, as """Yes"", she said.", or save the table as '
    "Parquet or JSON Lines"
)

# Arrow counts bytes in an int32: a block's, and one block a file lets a row be as long as the file; and those of a
# column of strings whose rows are put into another order.
_MAX_BLOCK_BYTES = _MAX_COLUMN_BYTES = 2**31 - 1


def read_labelled(
    patterns: list[str],
    *,
    text_column: str,
    label_column: str,
    group_column: str | None = None,
    separator: str | None = None,
) -> pa.Table:
    """Read files, folders and globs into one table.

    With a `separator` a row has several labels: a list, or one string that is split at it. An empty list stays one; an
    empty string becomes a list of one empty string, so that the two can be told apart.

    Returns:
        Columns `text`, `label`, with a group column `group` (all string, nullable), `source` and `source_row`;
        files in sorted order, rows in file order. With a `separator`, `labels` (list of strings, nullable) for `label`.

    Raises:
        RequestError: nothing matches, a file cannot be parsed, a column is missing or of a type without labels, or
            there is more text than fits.
    """
    columns = {TEXT: text_column, LABEL: label_column}
    if group_column is not None:
        columns[GROUP] = group_column
    # Patterns may meet, as `a.csv` and `*.csv`: a row that is read twice would have two votes.
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
        RequestError: there is none.
    """
    place = Location.of(pattern)
    is_pattern = glob.has_magic(place.path) and not place.exists()
    places = place.glob() if is_pattern else [place]
    files: list[Location] = []
    for found in places:
        files += [found] if found.is_file() else [found / info.path for info in found.files(_SUFFIXES)]
    if not files:
        raise RequestError(f"no labelled files at {pattern}. Give a file, a folder or a glob of {_FORMATS_HELP}")
    return files


def _read_file(file: Location, columns: dict[str, str], separator: str | None) -> pa.Table:
    try:
        table = _parse(file, columns)
        _check_names(table.column_names, columns, file)
    except (pa.ArrowException, OSError) as error:
        raise RequestError(f"cannot read {file}: {error}") from error
    except UnicodeError as error:
        raise RequestError(f"the name of a column of {file} is no Unicode: {error}. Save the file as UTF-8") from error
    strings: dict[str, pa.ChunkedArray] = {}
    for name, column in columns.items():
        if name == LABEL and separator is not None:
            strings[LABELS] = _as_lists(table[column], column, file, separator)
        elif name == LABEL and _is_list(table[column].type):
            raise RequestError(
                f"column {column!r} of {file} is of type {table[column].type}: if a row may have several labels, add "
                "--multi-label"
            )
        else:
            strings[name] = _as_strings(table[column], column, file, numbers=name != TEXT)
    strings[SOURCE] = pa.chunked_array([pa.repeat(pa.scalar(str(file)), table.num_rows)])
    strings[SOURCE_ROW] = pa.chunked_array([pa.array(range(table.num_rows), pa.int64())])
    return pa.table(strings)


def _check_names(found: list[str], columns: dict[str, str], file: Location) -> None:
    """Refuse a file that does not have each column once."""
    for name, column in columns.items():
        num_found = found.count(column)
        if num_found != 1:
            raise RequestError(
                f"{file} has {num_found or 'no'} column{'s' * (num_found > 1)} {column!r}; it has "
                f"{', '.join(found) or 'none'}. Choose with --{name}-column"
            )


def _parse(file: Location, columns: dict[str, str]) -> pa.Table:
    """Read one file by its name's endings. Text formats give the wanted columns as they are written: 007 stays 007."""
    name, wanted = file.name.lower(), list(columns.values())
    if name.endswith(".parquet"):
        with file.open() as stream:
            return pq.ParquetFile(stream).read()
    compression = next((codec for suffix, codec in _COMPRESSIONS.items() if name.endswith(suffix)), None)
    stem = name.rsplit(".", 1)[0] if compression else name
    text_format = next((kind for suffix, kind in _TEXT_FORMATS.items() if stem.endswith(suffix)), None)
    if text_format is None:
        raise RequestError(f"{file} is of no known format. Accepted are {_FORMATS_HELP}")
    content = file.read_bytes()
    if compression:
        content = pa.CompressedInputStream(pa.BufferReader(content), compression).read()
    if text_format == "json":
        return _parse_json_lines(content, file, wanted)
    delimiter = "\t" if text_format == "tsv" else ","
    _check_quotes(content, delimiter, columns, file)
    table = pa.csv.read_csv(
        pa.BufferReader(content),
        read_options=pa.csv.ReadOptions(block_size=min(len(content) + 1, _MAX_BLOCK_BYTES)),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        # Only an empty cell is null: "NA" and "None" may be labels or texts.
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    if text_format == "tsv":
        _check_cells(table.select([name for name in wanted if table.column_names.count(name) == 1]), file)
    return table


def _check_quotes(content: bytes, delimiter: str, columns: dict[str, str], file: Location) -> None:
    """Refuse a cell that begins with a quotation mark and does not end with one, where it swallows rows behind it."""
    if b'"' not in content:
        return
    limit_before = csv.field_size_limit(len(content) + 1)
    text = io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", "replace", newline="")
    names = next(csv.reader(text, delimiter=delimiter))
    text.seek(0)
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    num_rows = num_lines = 0
    try:
        while True:
            try:
                next(rows)
            except csv.Error as error:
                _check_names(names, columns, file)  # first: another delimiter may be meant
                what = "has text behind the closing one, lines later: it may have swallowed the rows between:"
                if is_open := "unexpected end of data" in str(error):
                    what = "does not end: all behind it would be one text. Is the file cut off? Else"
                if is_open or rows.line_num > num_lines + 1:
                    raise RequestError(
                        f"row {num_rows + 1} of {file}, counting the header, has a cell that begins with a quotation "
                        f"mark and {what} {_QUOTING_HELP}"
                    ) from error
            num_rows, num_lines = num_rows + 1, rows.line_num
    except StopIteration:
        return
    finally:
        csv.field_size_limit(limit_before)


def _check_cells(table: pa.Table, file: Location) -> None:
    """Tell of cells with tabs and line breaks in them, which may be rows between two quotation marks of texts."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        is_swallowed = pc.and_(pc.match_substring(column, "\t"), pc.match_substring(column, "\n"))
        num_swallowed = pc.sum(is_swallowed).as_py() or 0
        if num_swallowed:
            _log.warning(
                "warning: %r of %d rows of %s holds tabs and line breaks, first in row %d, counting the header. If "
                "these are rows that a quotation mark at the beginning of a text has swallowed: %s",
                name,
                num_swallowed,
                file,
                pc.index(is_swallowed, True).as_py() + 2,
                _QUOTING_HELP,
            )


def _parse_json_lines(data: bytes, file: Location, wanted: list[str]) -> pa.Table:
    """The wanted members of one JSON object a line; a member that a line lacks is null there.

    Arrow's own reader would turn dates into timestamps and refuse columns of mixed type that nobody asked for.
    """
    values: dict[str, list[Any]] = {}
    others: dict[str, None] = {}
    num_rows = 0
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(f"line {number} of {file} is not JSON: {error}. Write one object a line") from error
        if not isinstance(row, dict):
            raise RequestError(f"line {number} of {file} holds a {type(row).__name__}. Write one object a line")
        others |= dict.fromkeys(row)
        for name in wanted:
            if name in row and name not in values:
                values[name] = [None] * num_rows
        for name, column in values.items():
            column.append(row.get(name))
        num_rows += 1
    if not num_rows:
        others = dict.fromkeys(wanted)
    columns = {name: _as_array(column, name, file) for name, column in values.items()}
    return pa.table({**columns, **{name: pa.nulls(num_rows) for name in others if name not in columns}})


def _as_array(values: list[Any], name: str, file: Location) -> pa.Array:
    try:
        try:
            return pa.array(values)
        except OverflowError:  # integers of more than 64 bits, as of users or hashes
            return pa.array(_spelt_out(values))
    except OverflowError as error:
        raise RequestError(f"{name!r} of {file} holds integers of more than 64 bits in objects: {error}") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"{name!r} of {file} holds text that is no Unicode (half a character): {error}") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise RequestError(f"{name!r} of {file} holds values of several types: {error}") from error


def _spelt_out(values: Any) -> Any:
    """Integers, in lists too, as strings."""
    if isinstance(values, list):
        return [_spelt_out(one) for one in values]
    return str(values) if isinstance(values, int) else values


def map_values(lists: pa.ChunkedArray, function: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.ChunkedArray:
    """The same lists with `function` applied to the values of all at once; a null list stays null."""
    array = lists.combine_chunks()
    offsets = np.zeros(len(array) + 1, dtype=np.int32)
    np.cumsum(pc.list_value_length(array).fill_null(0), out=offsets[1:])
    values = function(pa.chunked_array([pc.list_flatten(array)])).combine_chunks()
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, values, mask=array.is_null())])


def _as_lists(column: pa.ChunkedArray, name: str, file: Location, separator: str) -> pa.ChunkedArray:
    """Lists of strings of a label column that holds lists, or strings with separators."""
    if _is_list(column.type):
        return map_values(column, lambda values: _as_strings(values, name, file, numbers=True))
    return pc.split_pattern(_as_strings(column, name, file, numbers=True), separator)


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def _as_strings(column: pa.ChunkedArray, name: str, file: Location, *, numbers: bool) -> pa.ChunkedArray:
    """Strings of a text, label or group column. Labels can be whole numbers (also as floats: 1.0), dates, booleans."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if numbers and pa.types.is_floating(kind):
        try:
            column = column.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise RequestError(f"column {name!r} of {file} holds fractions, not classes: {error}") from error
    elif not (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_null(kind)
        or (numbers and (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind)))
    ):
        allowed = "strings, whole numbers, dates or booleans" if numbers else "strings"
        raise RequestError(f"column {name!r} of {file} is of type {kind}; it must hold {allowed}")
    strings = column.cast(pa.string())
    try:
        strings.validate(full=True)
    except pa.ArrowInvalid as error:
        raise RequestError(f"column {name!r} of {file} is not valid UTF-8: {error}") from error
    return strings
