"""Which shards are done, and how one becomes done.

1. The predictions file of a shard is put in one atomic step under a name that follows from the shard's:
       input/date=2026-01-05/part-0.parquet  ->  output/predictions/date=2026-01-05/part-0.parquet
2. Its record goes into the manifest: output/manifest/<run-id>-00000.parquet, many records a file; at the end of the run
   its files become one, output/manifest/<run-id>.parquet, and from time to time those of all runs.

A shard is done when the last record of its path has its size and version, under the fingerprint of the request. A crash
between 1 and 2 costs the work of a shard and nothing else: the next run writes the same file again. Where a file is to
be replaced because the shard or the request is another one, its record is removed first: it would vouch for the wrong
file.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import BundleInfo
from bertray.schema import MANIFEST_SCHEMA, PREDICTIONS_VERSION
from bertray.scoring.config import ScoreConfig
from bertray.storage.location import Location
from bertray.storage.outputs import last_of_each_path, put_records, read_records

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
        output: the folder of `bertray score --output`.
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
            put_records(self._folder / f"{run_id}-{self._num_written:05d}.parquet", _table(records))
            self._num_written += 1

    def finish(self, run_id: str) -> None:
        """Merge what `append` wrote into one file, and where there are many files, those of all runs.

        The merged file is in place before others are removed: a crash in between leaves records that say the same.
        """
        files = self._files()
        if len(files) <= _MAX_FILES:
            # What `forget` left is one of them, under the merged file's own name.
            files = [file for file in files if file.name.startswith(run_id)]
        if files:
            self._replace(files, run_id, _latest(files))

    def forget(self, run_id: str, paths: list[str]) -> None:
        """Drop the records of shards whose predictions are to be removed or replaced."""
        files = self._files()
        records = _latest(files)
        kept = records.filter(pc.invert(pc.is_in(records["path"], value_set=pa.array(paths, pa.string()))))
        self._replace(files, run_id, kept)

    def _replace(self, files: list[Location], run_id: str, records: pa.Table) -> None:
        """Put one file in the place of others."""
        merged = self._folder / f"{run_id}.parquet"
        put_records(merged, records)
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            list(pool.map(Location.remove, (file for file in files if file.name != merged.name)))

    def _files(self) -> list[Location]:
        return [self._folder / info.path for info in self._folder.files((".parquet",))]


def _latest(files: list[Location]) -> pa.Table:
    return last_of_each_path(read_records(files, MANIFEST_SCHEMA).sort_by("committed_at"))


def _table(records: list[Committed]) -> pa.Table:
    return pa.Table.from_pylist([asdict(record) for record in records], schema=MANIFEST_SCHEMA)
