"""A shard of the archive, read as steps of some megabytes of text: what is in memory does not grow with the shard."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bertray.errors import RequestError, ShardError
from bertray.storage.location import Location
from bertray.tokenization.columns import check_text_type, num_text_bytes

# Rows read at a time, of which steps are put together: how much text they hold is known only then, for Parquet counts
# the bytes of a repeated text once.
_READ_ROWS = 1024
_READ_BYTES = 1 << 20
_ROWS_A_GROUP_READER = 16 * _READ_ROWS
# Of a step, beside its text: a row without text may have long kept columns.
_OTHERS_A_TEXT = 8
_PREDICTED_BYTES = 64


def read_schema(shard: Location) -> pa.Schema:
    """Columns of a shard, from its footer.

    Raises:
        ShardError: it is not a readable Parquet file.
    """
    with opened(shard) as file:
        return file.schema_arrow


def check_columns(schema: pa.Schema, text_column: str, keep_columns: list[str]) -> None:
    """See that a shard has the columns.

    Raises:
        ShardError: one is missing, or there twice, or the text column holds no text.
    """
    for name in (text_column, *keep_columns):
        found = schema.names.count(name)
        if found != 1:
            raise ShardError(
                f"{found or 'no'} column{'s' * (found > 1)} {name!r}; the shard has {', '.join(schema.names)}"
            )
    check_text_type(schema.field(text_column).type)


@contextmanager
def opened(shard: Location) -> Iterator[pq.ParquetFile]:
    """The shard's file inside the block.

    Raises:
        ShardError: it is not there, or not a readable Parquet file.
    """
    try:
        stream: Any = shard.open()
    except RequestError as error:
        raise ShardError(str(error)) from error
    with stream:
        try:
            # A piece at a time: else the bytes of a whole row group are held while it is read.
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BYTES)
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"not a readable Parquet file: {error}") from error
        yield file


def steps(
    file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int, rows: range | None = None
) -> Iterator[pa.Table]:
    """The rows in order, or a range of them, in tables of so much text, or of one read; of less where rows hold more.

    Raises:
        ShardError: a page cannot be read, or the text column holds no text.
    """
    rows = range(file.metadata.num_rows) if rows is None else rows
    held: list[pa.RecordBatch] = []
    held_bytes = 0
    for batch in _batches(file, text_column, keep_columns, step_bytes, rows):
        held.append(batch)
        held_bytes += max(num_text_bytes(batch[text_column]), _num_other_bytes(batch, keep_columns) // _OTHERS_A_TEXT)
        if held_bytes >= step_bytes:
            yield pa.Table.from_batches(held)
            held, held_bytes = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _num_other_bytes(batch: pa.RecordBatch, keep_columns: list[str]) -> int:
    """What rows take beside their text: kept columns, and what is predicted."""
    kept = (batch[name] for name in keep_columns)
    arrays = (column.indices if pa.types.is_dictionary(column.type) else column for column in kept)
    return int(sum(array.nbytes for array in arrays)) + _PREDICTED_BYTES * len(batch)


def group_edges(file: pq.ParquetFile) -> list[int]:
    """The first row of every row group, and behind the last one the number of rows."""
    metadata = file.metadata
    sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def _batches(
    file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int, rows: range
) -> Iterator[pa.RecordBatch]:
    columns = list(dict.fromkeys([text_column, *keep_columns]))
    edges = group_edges(file)
    for groups in _group_runs(edges, rows):
        num_bytes = _num_bytes(file.metadata, groups, text_column)
        first_row, end_row = edges[groups[0]], edges[groups[-1] + 1]
        read_rows = min(_READ_ROWS, max(1, step_bytes * (end_row - first_row) // max(1, num_bytes)))
        batches = file.iter_batches(batch_size=read_rows, row_groups=groups, columns=columns)
        while first_row < rows.stop:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except (pa.ArrowException, OSError) as error:
                raise ShardError(f"cannot be read: {error}") from error
            wanted = batch[max(0, rows.start - first_row) : max(0, rows.stop - first_row)]
            first_row += len(batch)
            if len(wanted):
                yield wanted


def _group_runs(edges: list[int], rows: range) -> Iterator[list[int]]:
    """Row groups to read together. Arrow's reader keeps the bytes of a row group until it has read its last one."""
    groups: list[int] = []
    num_rows = 0
    for group, (first_row, end_row) in enumerate(itertools.pairwise(edges)):
        if end_row <= rows.start or first_row >= rows.stop:
            continue
        groups.append(group)
        num_rows += end_row - first_row
        if num_rows >= _ROWS_A_GROUP_READER:
            yield groups
            groups, num_rows = [], 0
    if groups:
        yield groups


def _num_bytes(metadata: pq.FileMetaData, groups: list[int], text_column: str) -> int:
    """Bytes of the text of some row groups, as it is encoded."""
    infos = [metadata.row_group(group) for group in groups]
    chunks = [info.column(column) for info in infos for column in range(info.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)


def read_in_isolation(shard: Location, text_column: str, keep_columns: list[str], step_bytes: int) -> None:
    """Read a shard through in a process of its own, for a file that may end the process that reads it.

    What else is wrong with the shard is left to whoever reads it next.

    Raises:
        ShardError: it has ended two processes.
    """
    arguments = json.dumps([shard.uri, text_column, list(keep_columns), step_bytes])
    for _ in range(2):  # whatever killed the first one from outside does not do it twice
        code = subprocess.run(
            [sys.executable, "-P", "-m", "bertray.scoring.shard_reader", arguments], check=False
        ).returncode
        if code >= 0:
            return
    raise ShardError(f"the process that read it was ended by {signal.Signals(-code).name}")


def main() -> None:
    """Read a shard to its end, for `read_in_isolation`."""
    uri, text_column, keep_columns, step_bytes = json.loads(sys.argv[1])
    with opened(Location.of(uri)) as file:
        for _ in steps(file, text_column, keep_columns, step_bytes):
            pass


if __name__ == "__main__":
    main()
