"""Which shards are done, and how one becomes done.

1. The predictions file of a shard is put in one atomic step under a name that follows from the shard's:
       input/date=2026-01-05/part-0.parquet  ->  output/predictions/date=2026-01-05/part-0.parquet
2. Its record goes into the manifest: output/manifest/<run-id>-00000.parquet, many records a file; at the end of the run
   its files become one, output/manifest/<run-id>.parquet, and from time to time those of all runs.

A shard is done when the last record of its path has its size and version, under the fingerprint of the request. A crash
between 1 and 2 costs the work of a shard and nothing else: the next run writes the same file again.
"""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.bundle_folder import BundleInfo
from bertray.config import ScoreConfig
from bertray.schema import MANIFEST_SCHEMA, PREDICTIONS_VERSION
from bertray.storage import Location

# With more files than this, all are merged when a run ends: each costs the next run a round trip to the store.
_MAX_FILES = 16
_NUM_CONNECTIONS = 16


def fingerprint(info: BundleInfo, config: ScoreConfig) -> str:
    """What predictions depend on beside the shard: bundle, columns, engine, precision, the output's form."""
    request = {
        "bundle": info.fingerprint(),
        "text_column": config.text_column,
        "keep_columns": config.keep_columns,
        "precision": config.precision,
        "version": PREDICTIONS_VERSION,
    }
    if config.engine == "openvino":  # added later: what torch has scored stays scored
        request["engine"] = config.engine
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Committed:
    """The manifest's record of a shard whose predictions are in place; fields as in `schema.MANIFEST_SCHEMA`."""

    path: str
    size_bytes: int
    version: str
    fingerprint: str
    num_rows: int
    num_rows_error: int
    num_tokens: int
    run_id: str
    committed_at: datetime


class Manifest:
    """The records of an output folder.

    Args:
        output: the folder of `jobs.score --output`.
    """

    def __init__(self, output: Location) -> None:
        self._folder = output / "manifest"
        self._num_written = 0

    def latest(self) -> pa.Table:
        """The last record of every path, in `schema.MANIFEST_SCHEMA`: what its predictions file holds now."""
        return _latest(self._files())

    def append(self, run_id: str, records: list[Committed]) -> None:
        """Record shards as done, in one file; none: no file. Call after their predictions are in place."""
        if records:
            _put_records(self._folder / f"{run_id}-{self._num_written:05d}.parquet", _table(records))
            self._num_written += 1

    def finish(self, run_id: str) -> None:
        """Merge what `append` wrote into one file, and where there are many files, those of all runs.

        The merged file is in place before others are removed: a crash in between leaves records that say the same.
        """
        files = self._files()
        if len(files) <= _MAX_FILES:
            files = [file for file in files if file.name.startswith(f"{run_id}-")]
        if not files:
            return
        merged = self._folder / f"{run_id}.parquet"
        _put_records(merged, _latest(files))
        _remove([file for file in files if file.name != merged.name])

    def forget(self, run_id: str, paths: list[str]) -> None:
        """Drop the records of shards that the archive has no more."""
        files = self._files()
        records = _latest(files)
        kept = records.filter(pc.invert(pc.is_in(records["path"], value_set=pa.array(paths, pa.string()))))
        merged = self._folder / f"{run_id}.parquet"
        _put_records(merged, kept)
        _remove([file for file in files if file.name != merged.name])

    def _files(self) -> list[Location]:
        return [self._folder / info.path for info in self._folder.files((".parquet",))]


def _latest(files: list[Location]) -> pa.Table:
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as readers:
        tables = list(readers.map(partial(read_small, schema=MANIFEST_SCHEMA), files))
    return last_of_each_path(pa.concat_tables([MANIFEST_SCHEMA.empty_table(), *tables]).sort_by("committed_at"))


def last_of_each_path(records: pa.Table) -> pa.Table:
    """Of the rows that share a path, the last one."""
    records = records.combine_chunks()
    codes = records["path"].combine_chunks().dictionary_encode().indices.to_numpy()
    last = np.zeros(codes.max(initial=-1) + 1, dtype=np.int64)
    last[codes] = np.arange(len(codes))  # of a repeated path, the latest is assigned last
    return records.take(pa.array(last))


def _remove(files: list[Location]) -> None:
    with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
        list(pool.map(Location.remove, files))


def read_small(file: Location, schema: pa.Schema) -> pa.Table:
    """A Parquet file that fits into memory, in a given schema.

    Not by `pq.read_table`, whose threads may end the interpreter with SIGABRT when it exits soon after
    (apache/arrow#33975).
    """
    with pq.ParquetFile(io.BytesIO(file.read_bytes())) as parquet:
        return parquet.read(columns=schema.names, use_threads=False).cast(schema)


def _table(records: list[Committed]) -> pa.Table:
    return pa.Table.from_pylist([asdict(record) for record in records], schema=MANIFEST_SCHEMA)


def _put_records(file: Location, records: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(records, buffer, compression="zstd")
    file.put(buffer.getvalue())


def new_run_id() -> str:
    """Sortable by time, unique enough for one output: 20260105T031500.123456Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
