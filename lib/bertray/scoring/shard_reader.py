"""Read a shard in steps of some megabytes of text, so that memory does not grow with the shard."""

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

# Rows of one read; a step consists of reads. The text in a read is known only afterwards, because Parquet counts
# the bytes of a repeated text once.
_READ_ROWS = 1024
_READ_BYTES = 1 << 20
# A step may hold 8 times as many bytes beside its text: kept columns, and some bytes of predictions a row.
_OTHERS_A_TEXT = 8
_PREDICTED_BYTES = 64


def check_columns(schema: pa.Schema, text_column: str, keep_columns: list[str]) -> None:
    """Raise a ShardError if a column is missing or occurs twice, or the text column does not hold text."""
    for name in (text_column, *keep_columns):
        found = schema.names.count(name)
        if found != 1:
            raise ShardError(
                f"{found or 'no'} column{'s' * (found > 1)} {name!r}; the shard has {', '.join(schema.names)}"
            )
    check_text_type(schema.field(text_column).type)


@contextmanager
def opened(shard: Location) -> Iterator[pq.ParquetFile]:
    """The shard's Parquet file, open inside the block; ShardError if there is no readable one."""
    try:
        stream: Any = shard.open()
    except RequestError as error:
        raise ShardError(str(error)) from error
    with stream:
        try:
            # In small reads: otherwise Arrow holds the bytes of a whole row group while it decodes it.
            file = pq.ParquetFile(stream, pre_buffer=False, buffer_size=_READ_BYTES)
        except RequestError as error:  # of the storage, and through Arrow
            raise ShardError(str(error)) from error
        except (pa.ArrowException, OSError) as error:
            raise ShardError(f"not a readable Parquet file: {error}") from error
        yield file


def steps(
    file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int, rows: range | None = None
) -> Iterator[pa.Table]:
    """All rows, or a range, in tables of `step_bytes` of text or slightly more; of less text if other columns are long.

    Raises:
        ShardError: a page cannot be read, or the text column does not hold text.
    """
    rows = range(file.metadata.num_rows) if rows is None else rows
    held: list[pa.RecordBatch] = []
    held_bytes = 0
    for batch in _batches(file, text_column, keep_columns, step_bytes, rows):
        held.append(batch)
        kept = [batch[name] for name in keep_columns]
        kept_bytes = sum((one.indices if pa.types.is_dictionary(one.type) else one).nbytes for one in kept)
        other_bytes = kept_bytes + _PREDICTED_BYTES * len(batch)
        held_bytes += max(num_text_bytes(batch[text_column]), other_bytes // _OTHERS_A_TEXT)
        if held_bytes >= step_bytes:
            yield pa.Table.from_batches(held)
            held, held_bytes = [], 0
    if held:
        yield pa.Table.from_batches(held)


def group_edges(file: pq.ParquetFile) -> list[int]:
    """The first row of every row group, then the number of rows."""
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
    return list(itertools.accumulate(sizes, initial=0))


def _batches(
    file: pq.ParquetFile, text_column: str, keep_columns: list[str], step_bytes: int, rows: range
) -> Iterator[pa.RecordBatch]:
    columns = list(dict.fromkeys([text_column, *keep_columns]))
    for group, (first_row, end_row) in enumerate(itertools.pairwise(group_edges(file))):
        if end_row <= rows.start or first_row >= rows.stop:
            continue
        info = file.metadata.row_group(group)
        chunks = [info.column(column) for column in range(info.num_columns)]
        num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
        read_rows = min(_READ_ROWS, max(1, step_bytes * (end_row - first_row) // max(1, num_bytes)))
        # A row group at a time: Arrow keeps the bytes of all row groups of a reader until it has read the last one.
        batches = file.iter_batches(batch_size=read_rows, row_groups=[group], columns=columns)
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


def read_in_isolation(shard: Location, text_column: str, keep_columns: list[str], step_bytes: int) -> None:
    """Read a shard in a child process; raise a ShardError if the file crashes it, twice.

    Other errors are left to the next reader.
    """
    arguments = json.dumps([shard.uri, text_column, keep_columns, step_bytes])
    command = [sys.executable, "-P", "-m", "bertray.scoring.shard_reader", arguments]
    for _ in range(2):  # something else may have killed the first one
        code = subprocess.run(command, check=False).returncode
        if code >= 0:
            return
    raise ShardError(f"the process that read it was ended by {signal.Signals(-code).name}")


def main() -> None:
    """The child process of `read_in_isolation`."""
    uri, text_column, keep_columns, step_bytes = json.loads(sys.argv[1])
    with opened(Location.of(uri)) as file:
        for _ in steps(file, text_column, keep_columns, step_bytes):
            pass


if __name__ == "__main__":
    main()
