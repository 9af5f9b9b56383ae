"""A shard of the archive, read as steps of some megabytes of text: what is in memory does not grow with the shard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bertray.errors import RequestError, ShardError
from bertray.storage import Location
from bertray.text import num_text_bytes

# Rows read at a time, of which steps are put together: how much text they hold is known only then, for Parquet counts
# the bytes of a repeated text once.
_READ_ROWS = 1024
_READ_BYTES = 1 << 20
_ROWS_A_GROUP_READER = 16 * _READ_ROWS


def read_schema(shard: Location) -> pa.Schema:
    """Columns of a shard, from its footer.

    Raises:
        ShardError: it is not a readable Parquet file.
    """
    with opened(shard) as file:
        return file.schema_arrow


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


def steps(file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int) -> Iterator[pa.Table]:
    """The rows in order, in tables of so much text, or of one read.

    Raises:
        ShardError: a page cannot be read, or the text column holds no text.
    """
    held: list[pa.RecordBatch] = []
    held_bytes = 0
    for batch in _batches(file, text_column, keep_columns, step_bytes):
        held.append(batch)
        held_bytes += num_text_bytes(batch[text_column])
        if held_bytes >= step_bytes:
            yield pa.Table.from_batches(held)
            held, held_bytes = [], 0
    if held:
        yield pa.Table.from_batches(held)


def _batches(
    file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int
) -> Iterator[pa.RecordBatch]:
    columns = list(dict.fromkeys([text_column, *keep_columns]))
    for groups in _group_runs(file.metadata):
        num_rows, num_bytes = _size(file.metadata, groups, text_column)
        read_rows = min(_READ_ROWS, max(1, step_bytes * num_rows // max(1, num_bytes)))
        batches = file.iter_batches(batch_size=read_rows, row_groups=groups, columns=columns)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except (pa.ArrowException, OSError) as error:
                raise ShardError(f"cannot be read: {error}") from error
            yield batch


def _group_runs(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """Row groups to read together. Arrow's reader keeps the bytes of a row group until it has read its last one."""
    groups: list[int] = []
    num_rows = 0
    for group in range(metadata.num_row_groups):
        groups.append(group)
        num_rows += metadata.row_group(group).num_rows
        if num_rows >= _ROWS_A_GROUP_READER:
            yield groups
            groups, num_rows = [], 0
    if groups:
        yield groups


def _size(metadata: pq.FileMetaData, groups: list[int], text_column: str) -> tuple[int, int]:
    """Rows of some row groups, and bytes of their text as it is encoded."""
    infos = [metadata.row_group(group) for group in groups]
    chunks = [info.column(column) for info in infos for column in range(info.num_columns)]
    num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
    return sum(info.num_rows for info in infos), num_bytes
