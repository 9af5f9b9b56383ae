"""Records of shards in small Parquet files: the manifest's, and those of what became of shards in a run."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertray.storage.location import Location

_NUM_READERS = 16


def read_records(files: list[Location], schema: pa.Schema) -> pa.Table:
    """All records of some files, in their order; a nullable column that a file is older than is null."""
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        return pa.concat_tables([schema.empty_table(), *readers.map(partial(_read, schema), files)])


def _read(schema: pa.Schema, file: Location) -> pa.Table:
    # Not by pq.read_table, whose threads may end the interpreter with SIGABRT when it exits soon after:
    # apache/arrow#33975.
    with pq.ParquetFile(io.BytesIO(file.read_bytes())) as parquet:
        records = parquet.read(columns=schema.names, use_threads=False)
    for field in schema:
        if field.nullable and field.name not in records.column_names:
            records = records.append_column(field, pa.nulls(len(records), field.type))
    return records.select(schema.names).cast(schema)


def put_records(file: Location, records: pa.Table) -> None:
    """Write records as one file, in one atomic step."""
    buffer = io.BytesIO()
    pq.write_table(records, buffer, compression="zstd")
    file.put(buffer.getvalue())


def last_of_each_path(records: pa.Table) -> pa.Table:
    """Of the rows that share a path, the last one."""
    records = records.combine_chunks()
    codes = records["path"].combine_chunks().dictionary_encode().indices.to_numpy()
    last = np.zeros(codes.max(initial=-1) + 1, dtype=np.int64)
    last[codes] = np.arange(len(codes))  # of a repeated path, the latest is assigned last
    return records.take(pa.array(last))
