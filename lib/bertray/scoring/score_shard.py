"""Score one shard, or a part of it, into one predictions file; merge the parts of a large shard.

1. read     text column and kept columns, some megabytes of text (a step) at a time       [Parquet]
2. predict  every distinct text of the step, see bertray.schema                           [Bundle]
3. write    row, kept columns and predictions to a staged file, in the shard's order
4. put      the file atomically

Memory is bounded by a step, not by the shard.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.bundle.isolated import Predictor, begin
from bertray.errors import ShardError
from bertray.metrics.profile import Profile
from bertray.schema import ERROR, LABELS_KEY, NUM_TOKENS, OTHER_IDS, ROW, predictions_schema
from bertray.scoring.shard_reader import check_columns, divided, group_edges, opened, steps
from bertray.scoring.units import Counts, part_rows
from bertray.storage.location import FileInfo, Location
from bertray.tokenization.columns import distinct

_log = logging.getLogger(__name__)

# Text of a step: enough for batches of texts of similar length, and for seconds of work on a GPU.
STEP_BYTES = {"cpu": 2 << 20, "cuda": 64 << 20}

# While the model has one, the next one is read.
STEPS_AT_ONCE = 2

# Keys in the metadata of a staged file.
_COUNTS, _PRECISION = b"bertray.counts", b"bertray.precision"

# A step that the model has: kept columns, the place of each row's text, the predictions of the texts.
_Begun = tuple[pa.Table, pa.Array, Callable[[], pa.Table]]


class _OtherIdsError(Exception):
    """Earlier steps may have been given other token ids than the reference tokenizer's."""


def _predicted(
    bundle: Predictor, read: Iterator[pa.Table], text_column: str, keep_columns: list[str]
) -> Generator[tuple[pa.Table, pa.Table, Counts], None, None]:
    """The kept columns, predictions and counts of each step; while the model has one, the next one is read."""
    # Of several shards the model takes the first one's steps: its end is written while others have the model.
    began_s, begun = time.monotonic(), deque[_Begun]()

    def ended() -> tuple[pa.Table, pa.Table, Counts]:
        kept, places, predict = begun.popleft()
        of_texts = predict()
        table = of_texts.take(places)
        profile, num_tokens_scored = Profile.of(table), pc.sum(of_texts[NUM_TOKENS]).as_py() or 0
        counts = Counts(
            profile=profile,
            num_rows_repeated=profile.num_rows_scored - of_texts[ERROR].null_count,
            num_tokens_repeated=profile.num_tokens - num_tokens_scored,
            errors=Counter(table[ERROR].drop_null().to_pylist()),
        )
        return kept, table, counts

    try:
        for step in read:
            texts, places = distinct(step[text_column])
            # The text itself goes, unless it is kept.
            begun.append((step.select(keep_columns), places, begin(bundle, texts, began_s)))
            if len(begun) == STEPS_AT_ONCE:
                yield ended()
        while begun:
            yield ended()
    finally:  # shards that fail, one after the other, would fill the memory with what the model has
        for *_, predict in begun:
            with suppress(Exception):  # the shard has failed before
                predict()


def score_shard(
    bundle: Predictor,
    shard: Location,
    predictions: Location,
    text_column: str,
    keep_columns: list[str],
    step_bytes: int = STEP_BYTES["cpu"],
    *,
    part: tuple[int, int] = (0, 1),
    before_put: Callable[[], None] = lambda: None,
    origin: dict[str, str] | None = None,
) -> Counts:
    """Score one shard, or a part of it, and put its predictions file.

    Args:
        step_bytes: bytes of text to read and score at a time.
        part: which part, of how many; its file will be merged with the others.
        before_put: called when all rows are scored; an error that it raises keeps the file from being put.
        origin: metadata of the predictions file.

    Raises:
        ShardError: the shard cannot be read, or lacks a column; no predictions file is written.
    """

    def attempt() -> Counts:
        counts = Counts()
        with opened(shard) as file:
            own, of_folders = divided(keep_columns, file.schema_arrow, shard)
            check_columns(file.schema_arrow, text_column, own)
            fields = {name: file.schema_arrow.field(name) for name in own}
            kept = [fields.get(name, pa.field(name, pa.string())) for name in keep_columns]
            facts = {**(bundle.schema.metadata or {}), **(origin or {})}
            schema = predictions_schema(kept, bundle.schema).with_metadata(facts)
            rows = part_rows(group_edges(file), *part)
            next_row, had_other_ids = rows.start, False
            read = steps(file, text_column, own, step_bytes, rows)
            with predictions.staged() as path, closing(_predicted(bundle, read, text_column, own)) as scored:
                with pq.ParquetWriter(path, schema, compression="zstd") as writer:
                    for kept_of_step, table, of_step in scored:
                        has_other_ids = OTHER_IDS in (table.schema.metadata or {})
                        if next_row > rows.start and has_other_ids != had_other_ids:
                            raise _OtherIdsError
                        had_other_ids = has_other_ids
                        for name, value in of_folders.items():
                            column = pa.repeat(pa.scalar(value, pa.string()), len(table))
                            kept_of_step = kept_of_step.append_column(name, column)
                        row_numbers = pa.array(np.arange(next_row, next_row + len(table)))
                        columns = [row_numbers, *(kept_of_step[name] for name in keep_columns), *table.columns]
                        writer.write_table(pa.table(columns, schema=schema))
                        next_row += len(table)
                        counts += of_step
                    writer.add_key_value_metadata({_COUNTS: counts.model_dump_json(), _PRECISION: bundle.precision})
                if next_row != rows.stop:
                    raise ShardError(
                        f"rows {rows.start} to {next_row} were read, the file's footer says to {rows.stop}"
                    )
                before_put()
        return counts

    try:
        return attempt()
    except _OtherIdsError:
        _log.warning("warning: %s is scored again, by the reference tokenizer alone", shard)
        return attempt()


def merge_parts(
    parts: Sequence[Location],
    predictions: Location,
    num_rows: int,
    *,
    before_put: Callable[[], None] = lambda: None,
    origin: dict[str, str] | None = None,
) -> tuple[Counts, str]:
    """Merge all parts of a shard of `num_rows` into one file; returns the counts and the precision.

    Raises:
        ShardError: a part is missing or cannot be read, or the parts do not have the shard's rows.
    """
    counts, precisions, next_row = Counts(), set(), 0
    with predictions.staged() as path:
        with opened(parts[0]) as first:
            labels = {key: value for key, value in first.metadata.metadata.items() if key == LABELS_KEY}
            schema = first.schema_arrow.with_metadata({**labels, **(origin or {})})
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for part in parts:
                with opened(part) as file:
                    for group in range(file.metadata.num_row_groups):
                        table = file.read_row_group(group, use_threads=False)
                        expected = np.arange(next_row, next_row + len(table))
                        if not np.array_equal(table[ROW].to_numpy(), expected):
                            raise ShardError(f"{part} does not go on at row {next_row}; remove it and run again")
                        writer.write_table(table)
                        next_row += len(table)
                    of_part, precision = _counts_of(file)
                    counts += of_part
                    precisions.add(precision)
            precision = "+".join(sorted(precisions))
            writer.add_key_value_metadata({_COUNTS: counts.model_dump_json(), _PRECISION: precision})
        if next_row != num_rows:
            raise ShardError(f"its parts have {next_row} rows, the file's footer says {num_rows}")
        before_put()
    return counts, precision


def origin_of(shard: FileInfo, request_fingerprint: str) -> dict[str, str]:
    """What the metadata of a predictions file say of where they come from."""
    return {
        "bertray.shard": shard.path,
        "bertray.shard_size_bytes": str(shard.size_bytes),
        "bertray.shard_version": shard.version,
        "bertray.request_fingerprint": request_fingerprint,
    }


def misfit(file: pq.ParquetFile, shard: FileInfo, request_fingerprint: str) -> str:
    """In what the file's metadata are not those of the shard's predictions for a request; empty: in nothing."""
    facts = {name.decode(): value.decode() for name, value in (file.metadata.metadata or {}).items()}
    found = ((name, facts.get(name), value) for name, value in origin_of(shard, request_fingerprint).items())
    return next((f"{name} is {fact!r}, its record says {value!r}" for name, fact, value in found if fact != value), "")


def read_counts(staged: Location) -> tuple[Counts, str]:
    """The counts of a staged file, and the precision in which the model ran."""
    with opened(staged) as file:
        return _counts_of(file)


def _counts_of(file: pq.ParquetFile) -> tuple[Counts, str]:
    facts = file.metadata.metadata
    return Counts.model_validate_json(facts[_COUNTS]), facts[_PRECISION].decode()
