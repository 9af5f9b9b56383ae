"""One shard of the archive becomes one predictions file.

1. read     the text column and the kept columns, a step of some megabytes of text     [Parquet]
2. predict  label, score, num_tokens, truncated, error of every distinct text of these  [Bundle]
3. write    row, kept columns, predictions, in the shard's order, to a staged file
4. put      the file in one atomic step

Memory is bounded by the text of a step, not by the shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertray.errors import ShardError
from bertray.schema import ERROR, NUM_TOKENS, predictions_schema
from bertray.shard_reader import opened, steps
from bertray.storage import Location
from bertray.text import distinct

# Text of a step: enough for batches of like length, and for a GPU to be at work for seconds.
STEP_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}


@dataclass(frozen=True)
class ShardCounts:
    """What went through a shard. Repeated rows have a text that stands earlier in their step: they cost nothing."""

    num_rows: int
    num_rows_error: int
    num_rows_repeated: int
    num_tokens: int  # of all rows
    num_tokens_repeated: int


class Predictor(Protocol):
    """A `Bundle`, or one in a process of its own."""

    def predict_column(self, texts: pa.Array) -> pa.Table:
        """Classify texts; a table in `schema.PREDICTION_SCHEMA`."""


def score_shard(
    bundle: Predictor,
    shard: Location,
    predictions: Location,
    text_column: str,
    keep_columns: list[str],
    step_bytes: int = STEP_BYTES["cpu"],
    *,
    before_put: Callable[[], None] = lambda: None,
    origin: dict[str, str] | None = None,
) -> ShardCounts:
    """Score one shard and put its predictions file.

    Args:
        step_bytes: text that is read, and scored in batches of like length, at a time.
        before_put: called when all of the shard has been read and scored; what it raises keeps the file from being put.
        origin: written into the predictions file's own metadata.

    Raises:
        ShardError: the shard cannot be read, or lacks a column; no predictions file is written.
    """
    num_rows = num_rows_error = num_rows_repeated = num_tokens = num_tokens_repeated = 0
    with opened(shard) as file:
        kept = _kept_fields(file.schema_arrow, text_column, keep_columns)
        schema = predictions_schema(kept).with_metadata(origin)
        with predictions.staged() as path:
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for step in steps(file, text_column, keep_columns, step_bytes):
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
            before_put()
    return ShardCounts(num_rows, num_rows_error, num_rows_repeated, num_tokens, num_tokens_repeated)


def _kept_fields(schema: pa.Schema, text_column: str, keep_columns: list[str]) -> list[pa.Field]:
    for name in (text_column, *keep_columns):
        if name not in schema.names:
            raise ShardError(f"no column {name!r}; the shard has {', '.join(schema.names)}")
    return [schema.field(name) for name in keep_columns]


def _sum(column: pa.ChunkedArray) -> int:
    return sum(int(np.sum(chunk.to_numpy())) for chunk in column.chunks)
