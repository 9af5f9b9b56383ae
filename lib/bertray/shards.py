"""One shard of the archive becomes one predictions file.

1. read     the text column and the kept columns, some megabytes of text at a time     [Parquet]
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
from bertray.text import distinct

# Text of a step: enough for batches of like length, and for a GPU to be at work for seconds.
STEP_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}
_MIN_STEP_ROWS, _MAX_STEP_ROWS = 64, 1 << 18


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
            step_rows = _step_rows(file.metadata, text_column, step_bytes)
            for batch in _batches(file, list(dict.fromkeys([text_column, *keep_columns])), step_rows):
                texts, places = distinct(batch[text_column])
                predicted = bundle.predict_column(texts)
                table = predicted.take(places)
                rows = pa.array(np.arange(num_rows, num_rows + len(batch)))
                columns = [rows, *(batch[name] for name in keep_columns), *table.columns]
                writer.write_table(pa.table(columns, schema=schema))
                num_rows += len(batch)
                num_rows_error += len(batch) - table[ERROR].null_count
                num_tokens += (num_step_tokens := _sum(table[NUM_TOKENS]))
                num_rows_repeated += len(batch) - len(texts)
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
            file = pq.ParquetFile(stream)
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"not a readable Parquet file: {error}") from error
        yield file


def _kept_fields(schema: pa.Schema, text_column: str, keep_columns: list[str]) -> list[pa.Field]:
    for name in (text_column, *keep_columns):
        if name not in schema.names:
            raise ShardError(f"no column {name!r}; the shard has {', '.join(schema.names)}")
    return [schema.field(name) for name in keep_columns]


def _step_rows(metadata: pq.FileMetaData, text_column: str, step_bytes: int) -> int:
    """Rows that hold so much text on average."""
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
    num_rows = step_bytes * metadata.num_rows // max(1, num_bytes)
    return int(min(max(num_rows, _MIN_STEP_ROWS), _MAX_STEP_ROWS))


def _sum(column: pa.ChunkedArray) -> int:
    return sum(int(np.sum(chunk.to_numpy())) for chunk in column.chunks)


def _batches(file: pq.ParquetFile, columns: list[str], step_rows: int) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(batch_size=step_rows, columns=columns)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"cannot be read: {error}") from error
        yield batch
