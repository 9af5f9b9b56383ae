"""One shard of the archive becomes one predictions file.

1. read     the text column and the kept columns, a step of some megabytes of text     [Parquet]
2. predict  label, score, num_tokens, truncated, error of every distinct text of these  [Bundle]
3. write    row, kept columns, predictions, in the shard's order, to a staged file
4. put      the file in one atomic step

Memory is bounded by the text of a step, not by the shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertray.bundle import Bundle
from bertray.errors import RequestError, ShardError
from bertray.schema import ERROR, NUM_TOKENS, predictions_schema
from bertray.storage import Location
from bertray.text import distinct, num_text_bytes

# Text of a step: enough for batches of like length, and for a GPU to be at work for seconds.
STEP_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
# Rows read at a time, of which steps are put together: how much text they hold is known only then, for Parquet counts
# the bytes of a repeated text once.
_READ_ROWS = 1024
_READ_BYTES = 1 << 20
_ROWS_A_GROUP_READER = 16 * _READ_ROWS


@dataclass(frozen=True)
class ShardCounts:
    """What went through a shard. Repeated rows have a text that stands earlier in their step: they cost nothing."""

    num_rows: int
    num_rows_error: int
    num_rows_repeated: int
    num_tokens: int  # of all rows
    num_tokens_repeated: int


def score_shard(
    bundle: Bundle,
    shard: Location,
    predictions: Location,
    text_column: str,
    keep_columns: list[str],
    step_bytes: int = STEP_BYTES["cpu"],
) -> ShardCounts:
    """Score one shard and put its predictions file.

    Args:
        step_bytes: text that is read, and scored in batches of like length, at a time.

    Raises:
        ShardError: the shard cannot be read, or lacks a column; no predictions file is written.
    """
    num_rows = num_rows_error = num_rows_repeated = num_tokens = num_tokens_repeated = 0
    with _opened(shard) as file:
        kept = _kept_fields(file.schema_arrow, text_column, keep_columns)
        schema = predictions_schema(kept)
        with predictions.staged() as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for step in _steps(file, text_column, keep_columns, step_bytes):
                texts, places = distinct(step[text_column])
                predicted = bundle.predict_column(texts)
                table = predicted.take(places)
                rows = pa.array(np.arange(num_rows, num_rows + len(step)))
                columns = [rows, *(step[name] for name in keep_columns), *table.columns]
                writer.write_table(pa.table(columns, schema=schema))
                num_rows += len(step)
                num_rows_error += len(step) - table[ERROR].null_count
                num_tokens += (num_step_tokens := _sum(table[NUM_TOKENS]))
                num_rows_repeated += len(step) - len(texts)
                num_tokens_repeated += num_step_tokens - _sum(predicted[NUM_TOKENS])
            if num_rows != file.metadata.num_rows:
                raise ShardError(f"{num_rows} rows were read, the file's footer says {file.metadata.num_rows}")
    return ShardCounts(num_rows, num_rows_error, num_rows_repeated, num_tokens, num_tokens_repeated)


def read_schema(shard: Location) -> pa.Schema:
    """Columns of a shard, from its footer.

    Raises:
        ShardError: it is not a readable Parquet file.
    """
    with _opened(shard) as file:
        return file.schema_arrow


@contextmanager
def _opened(shard: Location) -> Iterator[pq.ParquetFile]:
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


def _kept_fields(schema: pa.Schema, text_column: str, keep_columns: list[str]) -> list[pa.Field]:
    for name in (text_column, *keep_columns):
        if name not in schema.names:
            raise ShardError(f"no column {name!r}; the shard has {', '.join(schema.names)}")
    return [schema.field(name) for name in keep_columns]


def _sum(column: pa.ChunkedArray) -> int:
    return sum(int(np.sum(chunk.to_numpy())) for chunk in column.chunks)


def _steps(file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int) -> Iterator[pa.Table]:
    """The rows in order, in tables of so much text, or of one read."""
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
