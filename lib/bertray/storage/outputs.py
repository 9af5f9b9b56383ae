"""What jobs need for their outputs: the guard of bundles, the sha256 of a file, small Parquet files of records."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.storage.location import Location

# A folder that holds this file is a bundle; `bertray.bundle.info` reads it.
BUNDLE_FILE = "bundle.json"
_NUM_READERS = 16


def refuse_in_bundle(output: Location, folders: Sequence[Location] | None = None) -> None:
    """Refuse an output that lies in a bundle: writing there would alter the bundle.

    Args:
        folders: the folders to check; by default the output and every folder above it.

    Raises:
        RequestError: one of them is a bundle.
    """
    for folder in [output, *output.ancestors()] if folders is None else folders:
        # Not `exists`: an S3 policy may forbid access to the folders above the output.
        if (folder / BUNDLE_FILE).is_file():
            raise RequestError(
                f"--output {output} lies in the bundle {folder}, which no other file may enter: choose another folder"
            )


def sha256_of(path: Path) -> str:
    """The file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put_records(file: Location, records: pa.Table) -> None:
    """Write records as one Parquet file, atomically."""
    buffer = io.BytesIO()
    pq.write_table(records, buffer, compression="zstd")
    file.put(buffer.getvalue())


def read_records(files: list[Location], schema: pa.Schema) -> pa.Table:
    """All records of the files, in order. A nullable column that an older file lacks is filled with nulls."""
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        return pa.concat_tables([schema.empty_table(), *readers.map(partial(_read, schema), files)])


def _read(schema: pa.Schema, file: Location) -> pa.Table:
    # pq.read_table starts threads that may abort the interpreter (SIGABRT) if it exits soon after: apache/arrow#33975.
    with pq.ParquetFile(io.BytesIO(file.read_bytes())) as parquet:
        records = parquet.read(columns=schema.names, use_threads=False)
    for field in schema:
        if field.nullable and field.name not in records.column_names:
            records = records.append_column(field, pa.nulls(len(records), field.type))
    return records.select(schema.names).cast(schema)


def last_of_each_path(records: pa.Table) -> pa.Table:
    """Keep the last record of every `path`."""
    records = records.combine_chunks()
    codes = records["path"].combine_chunks().dictionary_encode().indices.to_numpy()
    last = np.zeros(codes.max(initial=-1) + 1, dtype=np.int64)
    last[codes] = np.arange(len(codes))  # numpy assigns in order, so the last row of a path wins
    return records.take(pa.array(last))
