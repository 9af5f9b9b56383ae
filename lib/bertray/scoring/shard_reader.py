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

from bertray.errors import RequestError, ShardError, ShardRefusedError, UnavailableError
from bertray.formats.files import folder_columns
from bertray.storage.location import Location
from bertray.storage.patience import alive, watched
from bertray.tokenization.columns import check_text_type, num_text_bytes

# Rows of one read; a step consists of reads. The text in a read is known only afterwards, because Parquet counts
# the bytes of a repeated text once.
_READ_ROWS = 1024
_READ_BYTES = 1 << 20
# A few bytes of Parquet may stand for any number of long values. A read holds no more than this, or a row. A row group
# that grows to more, and beyond a thousand times the bytes that it is stored in, is not read to its end.
_MAX_READ_BYTES = 256 << 20
_MAX_GROWTH = 1000
# A step may hold 8 times as many bytes beside its text: kept columns, and some bytes of predictions a row.
_OTHERS_A_TEXT = 8
# The exit code of a child that reads and has met an error; 1 is that of the watchdog.
_FAILED = 3
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


class ShardFile(pq.ParquetFile):
    """A Parquet file, and the stream that it is read from.

    Arrow's own threads read no Parquet here: one that still holds the stream while the interpreter shuts down aborts
    the process, whose work is done, or has it hang (apache/arrow#34314, #50482; on a busy machine 4 of 110 times).
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        # In small reads: otherwise Arrow holds the bytes of a whole row group while it decodes it.
        super().__init__(stream, pre_buffer=False, buffer_size=_READ_BYTES)


def divided(columns: list[str], schema: pa.Schema, shard: Location) -> tuple[list[str], dict[str, str | None]]:
    """Columns that the shard has or lacks; and those that its folders are instead, as `day=2026-01-05/`, by name."""
    of_folders = {name: value for name, value in folder_columns(shard).items() if name in columns}
    own = [name for name in columns if name in schema.names or name not in of_folders]
    return own, {name: value for name, value in of_folders.items() if name not in own}


@contextmanager
def opened(shard: Location) -> Iterator[ShardFile]:
    """The shard's Parquet file, open inside the block.

    Raises:
        ShardError: it is no Parquet. ShardRefusedError: there is no file, or the storage refuses to read it.
        UnavailableError: the storage does not answer for now; or there is no memory.
    """
    try:
        stream: Any = shard.open()
    except RequestError as error:
        raise _unreadable("", error) from error
    with stream:
        try:
            file = ShardFile(stream)
        except (RequestError, pa.ArrowException, OSError) as error:
            raise _unreadable("not a readable Parquet file: ", error) from error
        yield file


def _unreadable(what: str, error: Exception) -> ShardError | UnavailableError:
    if isinstance(error, UnavailableError):  # of the storage, and through Arrow
        if error.why == "away":
            return UnavailableError.because("away", str(error))
        return ShardRefusedError(str(error))
    if isinstance(error, MemoryError):  # Arrow's is one, too
        return UnavailableError(f"{what}{error}")
    is_of_disk = isinstance(error, OSError) and error.errno
    return (ShardRefusedError if is_of_disk else ShardError)(f"{what}{error}")


def steps(
    file: ShardFile, text_column: str, keep_columns: list[str], step_bytes: int, rows: range | None = None
) -> Iterator[pa.Table]:
    """All rows, or a range, in tables of `step_bytes` of text or slightly more; of less text if other columns are long.

    Raises:
        ShardError: a page cannot be read or grows too much, or the text column does not hold text.
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
    file: ShardFile, text_column: str, keep_columns: list[str], step_bytes: int, rows: range
) -> Iterator[pa.RecordBatch]:
    columns = list(dict.fromkeys([text_column, *keep_columns]))
    for group, (first_row, end_row) in enumerate(itertools.pairwise(group_edges(file))):
        if end_row <= rows.start or first_row >= rows.stop:
            continue
        info = file.metadata.row_group(group)
        chunks = [info.column(column) for column in range(info.num_columns)]
        num_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
        read_rows = min(_READ_ROWS, max(1, step_bytes * (end_row - first_row) // max(1, num_bytes)))
        # The columns of a list or struct are `name.…`, and a name may have a dot itself.
        read = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(tuple(f"{one}." for one in columns))]
        value_bytes = sum(_value_bytes(file.stream, chunk) for chunk in read)
        read_rows = min(read_rows, max(1, _MAX_READ_BYTES // max(1, value_bytes)))
        stored_bytes = sum(chunk.total_compressed_size for chunk in chunks)
        _check_growth(sum(chunk.total_uncompressed_size for chunk in read), stored_bytes)
        grown_bytes = 0
        # A row group at a time: Arrow keeps the bytes of all row groups of a reader until it has read the last one.
        batches = file.iter_batches(read_rows, row_groups=[group], columns=columns, use_threads=False)
        while first_row < rows.stop:
            try:
                batch = next(batches)
            except StopIteration:
                break
            except (RequestError, pa.ArrowException, OSError) as error:
                raise _unreadable("cannot be read: ", error) from error
            decoded = (column for column in batch.columns if not pa.types.is_dictionary(column.type))
            grown_bytes += sum(column.nbytes for column in decoded)
            _check_growth(grown_bytes, stored_bytes)
            wanted = batch[max(0, rows.start - first_row) : max(0, rows.stop - first_row)]
            first_row += len(batch)
            if len(wanted):
                yield wanted


def _check_growth(num_bytes: int, stored_bytes: int) -> None:
    if num_bytes > max(_MAX_READ_BYTES, _MAX_GROWTH * stored_bytes):
        raise ShardError(
            f"a row group of {stored_bytes:,} bytes grows to {num_bytes:,} or more when it is read; the limit is "
            f"{_MAX_GROWTH:,} times as many. If its texts are meant to be so, write it with smaller row groups"
        )


def _value_bytes(stream: Any, chunk: pq.ColumnChunkMetaData) -> int:
    """The most bytes that a value of a column can take though it is stored in few; 0: all values are stored in full."""
    if "DELTA_BYTE_ARRAY" in chunk.encodings:  # a value may repeat the one before
        return int(chunk.total_uncompressed_size)
    starts = chunk.dictionary_page_offset, chunk.data_page_offset
    stream.seek(min((start for start in starts if start), default=0))
    header = stream.read(20)  # Thrift: field 1, the type of the page, and field 2, its size, both as varints
    if header[:3] != b"\x15\x04\x15":  # no dictionary
        return 0
    num_bytes = next((place for place, byte in enumerate(header[3:], 1) if byte < 0x80), 0)
    return int(sum((byte & 0x7F) << 7 * place for place, byte in enumerate(header[3 : 3 + num_bytes]))) >> 1  # zigzag


def read_in_isolation(
    shard: Location, text_column: str, keep_columns: list[str], step_bytes: int, timeout_s: float = 600.0
) -> None:
    """Read a shard in a child process; raise a ShardError if the file crashes it, or it makes no progress, twice.

    Other errors are left to the next reader.
    """
    arguments = json.dumps([shard.uri, text_column, keep_columns, step_bytes, timeout_s])
    command = [sys.executable, "-P", "-m", "bertray.scoring.shard_reader", arguments]
    for _ in range(2):  # something else may have killed the first one
        code = subprocess.run(command, check=False).returncode
        if code in (0, _FAILED):
            return
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"made no progress for {timeout_s:.0f} s"
    raise ShardError(f"the process that read it {how}")


def main() -> None:
    """The child process of `read_in_isolation`."""
    uri, text_column, keep_columns, step_bytes, timeout_s = json.loads(sys.argv[1])
    try:
        with watched(timeout_s), opened(Location.of(uri)) as file:
            own_columns = divided(keep_columns, file.schema_arrow, Location.of(uri))[0]
            check_columns(file.schema_arrow, text_column, own_columns)
            for _ in steps(file, text_column, own_columns, step_bytes):
                alive()
    except Exception:  # the next reader reports it
        sys.exit(_FAILED)


if __name__ == "__main__":
    main()
