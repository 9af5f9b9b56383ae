"""What jobs need for their outputs: guards, sha256, files of JSON and of records."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.storage.location import Location

# A folder that holds this file is a bundle; `bertray.bundle.info` reads it.
BUNDLE_FILE = "bundle.json"
PAGE_FILE = "report.html"  # of most outputs: see `reports.pages`
_NUM_AT_A_TIME = 32

Item = TypeVar("Item")
Result = TypeVar("Result")


def refuse_in_bundle(output: Location, folders: Sequence[Location] | None = None) -> None:
    """Raise a RequestError if one of the folders (by default the output and all above it) is a bundle."""
    for folder in [output, *output.ancestors()] if folders is None else folders:
        # Not `exists`: an S3 policy may forbid access to the folders above the output.
        if (folder / BUNDLE_FILE).is_file():
            raise RequestError(
                f"--output {output} lies in the bundle {folder}, which no other file may enter: choose another folder"
            )


def refuse_to_replace(output: Location, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise a RequestError if the output is a file, or has one of these files and --overwrite was not given."""
    if output.is_file():
        raise RequestError(f"--output {output} is a file: give a folder")
    for name in () if overwrite else names:
        if (output / name).is_file():
            raise RequestError(f"--output {output} has a {name}: choose another folder, or replace it with --overwrite")


def sha256_of(path: Path) -> str:
    """The file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def readable(file: Location, next_step: str) -> Iterator[None]:
    """Turn what is wrong with the content of a file of an output into a RequestError that says the next step."""
    try:
        yield
    except RequestError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise RequestError(f"{file} is damaged, or no file of bertray's. {next_step}") from error


def put_json(file: Location, content: Any) -> None:
    """Write content as one JSON file, indented for people, atomically."""
    file.put((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def put_records(file: Location, records: pa.Table) -> None:
    """Write records as one Parquet file, atomically."""
    buffer = io.BytesIO()
    pq.write_table(records, buffer, compression="zstd")
    file.put(buffer.getvalue())


def read_json(file: Location, next_step: str) -> dict[str, Any]:
    """A JSON object. RequestError: the file is damaged; with the next step."""
    with readable(file, next_step):
        return dict(json.loads(file.read_bytes()))


def read_rows(file: Location, next_step: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file. RequestError: it is damaged; with the next step."""
    # Without Arrow's threads: see `scoring.shard_reader.ShardFile`.
    with readable(file, next_step), pq.ParquetFile(io.BytesIO(file.read_bytes())) as parquet:
        return parquet.read(columns=columns, use_threads=False)


def read_records(files: list[Location], schema: pa.Schema, next_step: str) -> pa.Table:
    """All records of the files, in order. A nullable column that an older file lacks is filled with nulls.

    Raises:
        RequestError: a file is damaged; with the next step.
    """

    def read(file: Location) -> pa.Table:
        table = read_rows(file, next_step, schema.names)
        with readable(file, next_step):
            return pa.concat_tables([schema.empty_table(), table], promote_options="default").cast(schema)

    return pa.concat_tables([schema.empty_table(), *in_parallel(read, files)])


def in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results, in order, of work that mostly waits for the storage."""
    with ThreadPoolExecutor(_NUM_AT_A_TIME) as pool:
        return list(pool.map(work, items))


def without_paths(records: pa.Table, paths: Iterable[str]) -> pa.Table:
    """The records of other paths."""
    return records.filter(pc.invert(pc.is_in(records["path"], value_set=pa.array(paths, pa.string()))))


def last_of_each_path(records: pa.Table) -> pa.Table:
    """Keep the last record of every `path`."""
    rows = pa.table({"path": records["path"], "row": pa.array(np.arange(len(records)))})
    last = rows.group_by("path", use_threads=False).aggregate([("row", "max")])["row_max"]
    return records.combine_chunks().take(last.combine_chunks())
