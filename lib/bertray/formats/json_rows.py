"""JSON as people write rows: an object a line, objects over several lines, or one array of objects.

Arrow's own reader would turn dates into timestamps and refuse columns of mixed type that nobody asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from bertray.errors import RequestError
from bertray.storage.location import Location

# A bare NaN is what data frames write for a missing cell.
_DECODER = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
_START = re.compile(r"[^ \t\r\n]")
_HELP = (
    'write JSON Lines: one flat object a line, as {"text": "…", "label": "…"}, with no comma behind it. A data frame '
    "writes them by to_json(FILE, orient='records', lines=True)"
)


def parse_json(text: str, file: Location, columns: list[str], check: Callable[[list[str]], None]) -> pa.Table:
    """The wanted members of each object; one that an object lacks is null there. `check` is called with all names.

    Raises:
        RequestError: this is not JSON, not objects, or not a row an object; or a column has values of several types.
    """
    rows: list[list[Any]] = []
    names: dict[str, None] = {}
    row: dict[str, Any] = {}
    for row in _objects(text, file):
        names |= dict.fromkeys(row)
        rows.append([row.get(name) for name in columns])
    wanted = [row[name] for name in columns if name in row]
    if len(rows) == 1 and wanted and all(isinstance(one, dict | list) for one in wanted):
        raise RequestError(f"{file} is one object with the rows by column: {_HELP}")
    try:
        check(list(names or columns))
    except RequestError as error:
        raise RequestError(f"{error}, or if the values lie deeper: {_HELP}") from error
    found = zip(columns, zip(*rows, strict=True) if rows else [()] * len(columns), strict=True)
    return pa.table({name: _as_array(values, name, file) for name, values in found if name in (names or columns)})


def is_stray(head: bytes, columns: list[str]) -> bool:
    """Whether a JSON file, of which this is the beginning, holds no rows: an object without the columns, or none."""
    text = head.decode(errors="ignore").lstrip("\ufeff \t\r\n")
    try:
        first, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return False
    if isinstance(first, dict):
        return not set(columns) & set(first) and not text[end:].strip()
    return not (isinstance(first, list) and any(isinstance(one, dict) for one in first))


def _objects(text: str, file: Location) -> Iterator[dict[str, Any]]:
    end = 0
    while start := _START.search(text, end):
        try:
            found, stop = _DECODER.raw_decode(text, start.start())
            is_array = isinstance(found, list) and not text[:end].strip()
            for number, one in enumerate(found if is_array else [found]):
                if not isinstance(one, dict):
                    raise ValueError(f"value {number} from here is a {type(one).__name__}, not an object")
                yield one
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, start.start()) + 1
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise RequestError(
                f"line {line} of {file} is not JSON of rows: {reason}. {_HELP[0].upper()}{_HELP[1:]}"
            ) from error
        end = stop


def _as_array(values: Sequence[Any], name: str, file: Location) -> pa.Array:
    try:
        return pa.array(values)
    except OverflowError as error:
        raise RequestError(f"{name!r} of {file} holds integers beyond 64 bits: write them as strings") from error
    except UnicodeEncodeError as error:
        raise RequestError(f"{name!r} of {file} holds text that is not Unicode (half a character): {error}") from error
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        rows = {type(one).__name__: row for row, one in reversed([*enumerate(values)]) if one is not None}
        raise RequestError(
            f"{name!r} of {file} holds values of several types, as in rows {rows}, counted from 0: write one type"
        ) from error
