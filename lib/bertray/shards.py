"""One shard of the archive becomes one predictions file.

1. read     the text column and the kept columns, a few thousand rows at a time        [Parquet]
2. predict  label, score, num_tokens, truncated, error: one row for every row read     [Bundle]
3. write    row, kept columns, predictions, in the shard's order, to a staged file
4. put      the file in one atomic step

Memory is bounded by the rows of a step, not by the shard.
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

# Rows of a step: enough for batches of like length, few enough that texts of a megabyte still fit in memory.
_STEP_ROWS = 4096


@dataclass(frozen=True)
class ShardCounts:
    """What went through a shard."""

    num_rows: int
    num_rows_error: int
    num_tokens: int


def score_shard(
    bundle: Bundle, shard: Location, predictions: Location, text_column: str, keep_columns: list[str]
) -> ShardCounts:
    """Score one shard and put its predictions file.

    Raises:
        ShardError: the shard cannot be read, or lacks a column; no predictions file is written.
    """
    num_rows = num_rows_error = num_tokens = 0
    with _opened(shard) as file:
        kept = _kept_fields(file.schema_arrow, text_column, keep_columns)
        schema = predictions_schema(kept)
        with predictions.staged() as path, pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in _batches(file, shard, list(dict.fromkeys([text_column, *keep_columns]))):
                table = bundle.predict_column(batch[text_column])
                rows = pa.array(np.arange(num_rows, num_rows + len(batch)))
                columns = [rows, *(batch[name] for name in keep_columns), *table.columns]
                writer.write_table(pa.table(columns, schema=schema))
                num_rows += len(batch)
                num_rows_error += len(batch) - table[ERROR].null_count
                num_tokens += int(np.sum(table[NUM_TOKENS].to_numpy()))
            if num_rows != file.metadata.num_rows:
                raise ShardError(f"{num_rows} rows were read, the file's footer says {file.metadata.num_rows}")
    return ShardCounts(num_rows, num_rows_error, num_tokens)


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


def _batches(file: pq.ParquetFile, shard: Location, columns: list[str]) -> Iterator[pa.RecordBatch]:
    batches = file.iter_batches(batch_size=_STEP_ROWS, columns=columns)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"cannot be read: {error}") from error
        yield batch
