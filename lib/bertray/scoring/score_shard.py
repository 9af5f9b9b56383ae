"""One shard of the archive becomes one predictions file, whole or from parts.

1. read     the text column and the kept columns, a step of some megabytes of text     [Parquet]
2. predict  what the model says of every distinct text of these, see bertray.schema     [Bundle]
3. write    row, kept columns, predictions, in the shard's order, to a staged file
4. put      the file in one atomic step
5. merge    of a shard that was scored in parts: their files, into one

Memory is bounded by what a step holds, not by the shard.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import ShardError
from bertray.metrics.profile import Profile
from bertray.schema import NUM_TOKENS, OTHER_IDS, ROW, predictions_schema
from bertray.scoring.shard_reader import check_columns, group_edges, opened, steps
from bertray.scoring.units import Counts, part_rows
from bertray.storage.location import Location
from bertray.tokenization.columns import distinct

_log = logging.getLogger(__name__)

# Text of a step: enough for batches of like length, and for a GPU to be at work for seconds.
STEP_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}

# In the metadata of a staged part.
_COUNTS, _PRECISION = b"bertray.counts", b"bertray.precision"


class _OtherIdsError(Exception):
    """Steps before this one may have been given other ids than the reference tokenizer's."""


class Predictor(Protocol):
    """A `Bundle`, or one in a process of its own."""

    @property
    def precision(self) -> str:
        """What the model is really run in."""

    @property
    def schema(self) -> pa.Schema:
        """Of what `predict_column` gives: a `schema.prediction_schema`."""

    def predict_column(self, texts: pa.Array) -> pa.Table:
        """Classify texts; a table in `schema`."""


def score_shard(
    bundle: Predictor,
    shard: Location,
    predictions: Location,
    text_column: str,
    keep_columns: list[str],
    step_bytes: int = STEP_BYTES["cpu"],
    *,
    part: tuple[int, int] | None = None,
    before_put: Callable[[], None] = lambda: None,
    origin: dict[str, str] | None = None,
) -> Counts:
    """Score one shard, or a part of it, and put its predictions file.

    Args:
        step_bytes: text that is read, and scored in batches of like length, at a time.
        part: its number and how many there are; such a file is to be merged with the others.
        before_put: called when all has been read and scored; what it raises keeps the file from being put.
        origin: written into the predictions file's own metadata.

    Raises:
        ShardError: the shard cannot be read, or lacks a column; no predictions file is written.
    """
    columns = text_column, keep_columns
    try:
        return _score_shard(bundle, shard, predictions, *columns, step_bytes, part, before_put, origin)
    except _OtherIdsError:
        _log.warning("warning: %s is scored again, by the reference tokenizer alone", shard)
        return _score_shard(bundle, shard, predictions, *columns, step_bytes, part, before_put, origin)


def _score_shard(
    bundle: Predictor,
    shard: Location,
    predictions: Location,
    text_column: str,
    keep_columns: list[str],
    step_bytes: int,
    part: tuple[int, int] | None,
    before_put: Callable[[], None],
    origin: dict[str, str] | None,
) -> Counts:
    counts = Counts()
    with opened(shard) as file:
        check_columns(file.schema_arrow, text_column, keep_columns)
        kept = [file.schema_arrow.field(name) for name in keep_columns]
        schema = predictions_schema(kept, bundle.schema).with_metadata(origin)
        num_rows = file.metadata.num_rows
        rows = part_rows(num_rows, group_edges(file), *part) if part else range(num_rows)
        next_row = rows.start
        with predictions.staged() as path:
            with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                for step in steps(file, text_column, keep_columns, step_bytes, rows):
                    texts, places = distinct(step[text_column])
                    predicted = bundle.predict_column(texts)
                    if OTHER_IDS in (predicted.schema.metadata or {}) and next_row > rows.start:
                        raise _OtherIdsError
                    table = predicted.take(places)
                    row = pa.array(np.arange(next_row, next_row + len(step)))
                    columns = [row, *(step[name] for name in keep_columns), *table.columns]
                    writer.write_table(pa.table(columns, schema=schema))
                    next_row += len(step)
                    counts += Counts(
                        profile=Profile.of(table),
                        num_rows_repeated=len(step) - len(texts),
                        num_tokens_repeated=_sum(table[NUM_TOKENS]) - _sum(predicted[NUM_TOKENS]),
                    )
                if part:
                    writer.add_key_value_metadata({_COUNTS: counts.model_dump_json(), _PRECISION: bundle.precision})
            if next_row != rows.stop:
                raise ShardError(f"rows {rows.start} to {next_row} were read, the file's footer says to {rows.stop}")
            before_put()
    return counts


def merge_parts(
    parts: Sequence[Location],
    predictions: Location,
    num_rows: int,
    *,
    before_put: Callable[[], None] = lambda: None,
    origin: dict[str, str] | None = None,
) -> tuple[Counts, str]:
    """Put the predictions file of a shard together from all of its parts; what went through, and the precision.

    Args:
        num_rows: of the shard.

    Raises:
        ShardError: a part is not there or cannot be read, or the parts are not the shard's rows.
    """
    counts, precisions = Counts(), set()
    next_row = 0
    with predictions.staged() as path:
        with opened(parts[0]) as first:
            schema = first.schema_arrow.with_metadata(origin)
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for part in parts:
                with opened(part) as file:
                    for group in range(file.metadata.num_row_groups):
                        table = file.read_row_group(group)
                        expected = np.arange(next_row, next_row + len(table))
                        if not np.array_equal(table[ROW].to_numpy(), expected):
                            raise ShardError(f"{part} does not go on at row {next_row}; remove it and run again")
                        writer.write_table(table)
                        next_row += len(table)
                    counts += Counts.model_validate_json(file.metadata.metadata[_COUNTS])
                    precisions.add(file.metadata.metadata[_PRECISION].decode())
        if next_row != num_rows:
            raise ShardError(f"its parts have {next_row} rows, the file's footer says {num_rows}")
        before_put()
    return counts, "+".join(sorted(precisions))


def _sum(column: pa.ChunkedArray) -> int:
    return pc.sum(column).as_py() or 0
