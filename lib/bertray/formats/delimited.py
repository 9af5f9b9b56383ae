"""CSV and TSV, with the delimiter that the header tells, and no text that is not as it was.

    sep=;  or the header  text;label   ->  the delimiter under which most wanted columns are found
    label, text                        ->  blanks behind each delimiter of the header: they are no part of any cell
    x, "a, b"                          ->  nor is a blank beside a quotation mark
    "He said \\"yes\\"",x                ->  refused: is the backslash a sign of its own?

Python's reader, strictly, since it never takes a row apart in silence; pyarrow, DuckDB and polars each altered some
texts (benchmarks/readers.py). Only an empty cell is null: "NA" and "None" may be labels or texts.
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from bertray.errors import RequestError
from bertray.storage.location import Location

_log = logging.getLogger(__name__)

_DELIMITERS = (",", ";", "\t", "|")
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
_QUOTING_HELP = (
    'put such a cell into quotation marks and double those within, as """Yes"", she said.", or save the table as '
    "Parquet or JSON Lines"
)
_BACKSLASH_HELP = "which has two readings; in Spark set option('escape', '\"'), in pandas doublequote=True, or"


def parse_delimited(
    lines: list[str], default: str, file: Location, columns: list[str], check: Callable[[list[str]], None]
) -> pa.Table:
    """The wanted columns as they are written: 007 stays 007. `check` is called with the header's names first.

    Args:
        lines: with their ends.
        default: the delimiter of this ending, if the header tells no other.

    Raises:
        RequestError: a row has more or fewer cells than the header, or a cell whose end is not certain.
    """
    csv.field_size_limit(2**31 - 1)
    first = next((number for number, line in enumerate(lines) if line.strip()), 0)
    candidates = [default, *(one for one in _DELIMITERS if one != default)]
    if lines and (found := _SEPARATOR_LINE.fullmatch(lines[first])):
        first, candidates = first + 1, [found[1]]
    headers = {one: next(csv.reader(lines[first : first + 100], delimiter=one), []) for one in candidates}
    stripped = {one: [name.strip() for name in header] for one, header in headers.items()}
    delimiter = max(candidates, key=lambda one: (len(set(stripped[one]) & set(columns)), len(headers[one])))
    names = stripped[delimiter]
    check(names)
    skips_blanks = len(names) > 1 and all(name.startswith(" ") for name in headers[delimiter][1:])
    positions = {name: names.index(name) for name in columns if name in names}
    values: dict[str, list[str | None]] = {name: [] for name in positions}
    num_rows, with_lines = 0, list[int]()
    for begin, end, cells in _rows(lines, first, delimiter, skips_blanks):
        num_rows += bool(cells)
        if not cells or num_rows == 1:  # a blank line, the header
            continue
        is_sound = isinstance(cells, list) and len(cells) == len(names)
        row = lines[begin] if end == begin + 1 else "".join(lines[begin:end])
        if not is_sound or (' "' in row and any(cell[:1] == " " for cell in cells)):
            split = _split_with_blanks(row, delimiter, skips_blanks)
            if split is None or len(split) != len(names):
                what = _trouble(row, cells, len(names), end - begin)
                raise RequestError(f"row {num_rows} of {file}, counting the header, {what}")
            cells = split
        if cells[-1] == names[-1] and [cell.strip("\ufeff ") for cell in cells] == names:
            raise RequestError(f"row {num_rows} of {file} is the header again: were files joined? Take it out")
        if end > begin + 1 and delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
            with_lines.append(num_rows)
        for name, position in positions.items():
            values[name].append(cells[position] or None)
    if with_lines:
        _log.warning(
            "warning: %d rows have a cell with tabs and line breaks; the first is row %d of %s, counting the header. "
            "If these are rows that a quotation mark at the beginning of a cell has swallowed: %s",
            *(len(with_lines), with_lines[0], file, _QUOTING_HELP),
        )
    return pa.table({name: pa.array(column, pa.string()) for name, column in values.items()})


def _rows(lines: list[str], first: int, delimiter: str, skips_blanks: bool) -> Iterator[tuple[int, int, Any]]:
    """First line, line behind the last, and cells of each row; instead of these an error if they are not certain."""
    feed, begin = iter(lines[first:] if first else lines), first
    while begin < len(lines):
        reader, base = csv.reader(feed, delimiter=delimiter, skipinitialspace=skips_blanks, strict=True), begin
        try:
            for cells in reader:
                end = base + reader.line_num
                yield begin, end, cells
                begin = end
        except csv.Error as error:  # the reader has taken the lines of this row, and another goes on behind them
            yield begin, base + reader.line_num, error
            begin = base + reader.line_num


def _split_with_blanks(row: str, delimiter: str, skips_blanks: bool) -> list[str] | None:
    """The cells of a row whose quotation marks may have blanks beside them; None if they have anything else there."""
    d = re.escape(delimiter)
    lead = " *" if skips_blanks else ""
    cell = re.compile(rf'(?: *"((?:[^"]|"")*)" *|{lead}((?! *")[^{d}\r\n]*))({d}|[\r\n]*\Z)')
    cells, end = list[str](), 0
    while found := cell.match(row, end):
        cells.append(found[2] if found[1] is None else found[1].replace('""', '"'))
        if found[3] != delimiter:
            return cells
        end = found.end()
    return None


def _trouble(row: str, cells: list[str] | csv.Error, num_names: int, num_lines: int) -> str:
    if '\\"' in row:
        return f"has a backslash before a quotation mark, {_BACKSLASH_HELP} {_QUOTING_HELP}"
    if isinstance(cells, list) and len(cells) < num_names:
        return f"has {len(cells)} cells, and the header has {num_names}. Is the row cut off, or of another table?"
    if isinstance(cells, list) and len(cells) > num_names:
        return f"has {len(cells)} cells, and the header has {num_names}. If one has a delimiter in it, {_QUOTING_HELP}"
    what = "has text behind the closing one"
    if "unexpected end of data" in str(cells):
        what = "does not end: all behind it would be one text, unless the file is cut off"
    elif num_lines > 1:
        what = "has text behind the closing one, lines later: it may have swallowed the rows between"
    return f"has a cell that begins with a quotation mark and {what}. To mend it, {_QUOTING_HELP}"
