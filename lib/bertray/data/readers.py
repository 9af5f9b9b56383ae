"""Labelled files of any format become one table of strings.

1. A file becomes a table:             columns of every type that the format has            [bertray.formats]
2. Text and label become strings:      text="B.Sc. in Physics"  label="1"  source="cv/a.csv"  source_row=7
   or labels a list of strings:        text="thanks, lovely!"  labels=["love", " gratitude"]  source=…

Nothing is dropped here: nulls, empty texts and blanks between separators pass through, so that cleaning counts them.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from bertray.data.config import PrepareConfig
from bertray.errors import RequestError
from bertray.formats.files import read_table
from bertray.schema import LABEL, SOURCE, SOURCE_ROW, TEXT
from bertray.storage.location import Location
from bertray.tasks.task import task_of_cells
from bertray.tokenization.columns import as_strings

GROUP = "group"

# Arrow counts the bytes of a column of strings whose rows are reordered in an int32.
_MAX_COLUMN_BYTES = 2**31 - 1


def read_labelled(files: Iterable[Location], config: PrepareConfig) -> pa.Table:
    """Read files into one table; a file that is named twice is read once, or its rows would have two votes.

    With a separator a row has several labels: a list, or one string that is split at the separator. An empty list stays
    empty; an empty string becomes a list with one empty string, so that the two can be told apart.

    Returns:
        Columns `text`, `label`, `group` if there is a group column (all string, nullable), `source` and `source_row`;
        files in their order, rows in file order. Instead of `label`: with a separator, `labels` (list of strings,
        nullable); if labels are numbers, `value` (float64, nullable).

    Raises:
        RequestError: a file cannot be parsed, a column is missing or of the wrong type, or there is
            too much text.
    """
    columns = {TEXT: config.text_column, LABEL: config.label_column}
    if config.group_column is not None:
        columns[GROUP] = config.group_column
    by_uri = {file.uri: file for file in files}
    rows = pa.concat_tables([_read_file(file, columns, config) for file in by_uri.values()])
    for name in (TEXT, SOURCE):
        num_bytes = pc.sum(pc.binary_length(rows[name])).as_py() or 0
        if num_bytes > _MAX_COLUMN_BYTES:
            raise RequestError(
                f"the {rows.num_rows:,} rows of {', '.join(by_uri)} have {num_bytes:,} bytes of {name}; at most "
                f"{_MAX_COLUMN_BYTES:,} fit into a data set: give fewer rows"
            )
    return rows


def _read_file(file: Location, columns: dict[str, str], config: PrepareConfig) -> pa.Table:
    table, task = read_table(file, columns, config.encoding), task_of_cells(config.separator, config.regression)
    strings: dict[str, pa.ChunkedArray] = {}
    for name, column in columns.items():
        what = f"column {column!r} of {file}"
        if name == LABEL:
            strings[task.column] = task.read(table[column], what, config.separator or "")
        else:
            strings[name] = as_strings(table[column], what, is_text=name == TEXT)
    strings[SOURCE] = pa.chunked_array([pa.repeat(pa.scalar(str(file)), table.num_rows)])
    strings[SOURCE_ROW] = pa.chunked_array([pa.array(range(table.num_rows), pa.int64())])
    return pa.table(strings)
