"""The manifest: which shards are done, how a shard becomes done, and the plan of what a run has to score.

1. The predictions file of a shard is put atomically, under the shard's own name:
       input/date=2026-01-05/part-0.parquet  ->  output/predictions/date=2026-01-05/part-0.parquet
2. Its record is appended to the manifest: output/manifest/<run-id>-00000.parquet, many records a file. At its end the
   run merges them into output/manifest/<run-id>.parquet, and now and then the files of all runs.

A shard is done if the last record of its path has its size and version, and the fingerprint of the request. A crash
between 1 and 2 only costs the work on the shard: the next run writes the same file again. Before a file is replaced,
because the shard or the request has changed, its record is removed: it would vouch for the wrong file.

The plan compares a listing of the archive with the manifest. A shard is `new`, has `changed` (size or version), must be
scored `anew` (under another bundle, columns, engine or precision), is done, or is `gone` from the archive.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import BundleInfo
from bertray.schema import MANIFEST_SCHEMA, PREDICTIONS_VERSION
from bertray.scoring.config import ScoreConfig
from bertray.storage.location import FileInfo, Location
from bertray.storage.outputs import last_of_each_path, put_records, read_records

# A run that ends with more files than this merges all of them: each costs the next run a round trip to the storage.
_MAX_FILES = 16
_NUM_CONNECTIONS = 16


def fingerprint(info: BundleInfo, config: ScoreConfig) -> str:
    """A hash of the request: bundle, columns, engine, precision, and the version of the predictions' meaning."""
    request = {
        "bundle": info.fingerprint(),
        "text_column": config.text_column,
        "keep_columns": config.keep_columns,
        "precision": config.precision,
        "version": PREDICTIONS_VERSION,
    }
    if config.engine == "openvino":  # the option came later: what torch had scored must stay done
        request["engine"] = config.engine
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


class Manifest:
    """The records of the folder that `bertray score --output` names."""

    def __init__(self, output: Location) -> None:
        self._folder = output / "manifest"
        self._num_written = 0

    def latest(self) -> pa.Table:
        """The last record of every path, in `schema.MANIFEST_SCHEMA`."""
        return self._latest(self._files())

    def append(self, run_id: str, records: list[dict[str, Any]]) -> None:
        """Record shards as done, in one file (none for no records). Call after their predictions are in place."""
        if records:
            table = pa.Table.from_pylist(records, schema=MANIFEST_SCHEMA)
            put_records(self._folder / f"{run_id}-{self._num_written:05d}.parquet", table)
            self._num_written += 1

    def finish(self, run_id: str) -> None:
        """Merge the files that `append` wrote into one; if there are many files, merge those of all runs.

        The merged file is in place before the others are removed: a crash in between leaves records that say the same.
        """
        files = self._files()
        if len(files) <= _MAX_FILES:
            # Includes the file that `forget` wrote, which has the merged file's name.
            files = [file for file in files if file.name.startswith(run_id)]
        if files:
            self._replace(files, run_id, self._latest(files))

    def forget(self, run_id: str, paths: list[str]) -> None:
        """Drop the records of shards whose predictions will be removed or replaced."""
        files = self._files()
        records = self._latest(files)
        kept = records.filter(pc.invert(pc.is_in(records["path"], value_set=pa.array(paths, pa.string()))))
        self._replace(files, run_id, kept)

    @staticmethod
    def _latest(files: list[Location]) -> pa.Table:
        return last_of_each_path(read_records(files, MANIFEST_SCHEMA).sort_by("committed_at"))

    def _replace(self, files: list[Location], run_id: str, records: pa.Table) -> None:
        merged = self._folder / f"{run_id}.parquet"
        put_records(merged, records)
        with ThreadPoolExecutor(_NUM_CONNECTIONS) as pool:
            list(pool.map(Location.remove, (file for file in files if file.name != merged.name)))

    def _files(self) -> list[Location]:
        return [self._folder / info.path for info in self._folder.files((".parquet",))]


@dataclass(frozen=True)
class Plan:
    """The shards of the archive by what is to be done with them, in the order of the listing."""

    new: list[FileInfo] = field(default_factory=list)
    changed: list[FileInfo] = field(default_factory=list)
    anew: list[FileInfo] = field(default_factory=list)
    num_done: int = 0
    gone: list[str] = field(default_factory=list)

    @cached_property
    def pending(self) -> list[FileInfo]:
        """The shards to be scored, sorted by path."""
        return sorted([*self.new, *self.changed, *self.anew], key=lambda shard: shard.path)

    @property
    def replaced(self) -> list[str]:
        """The pending shards that have a record."""
        return [shard.path for shard in (*self.changed, *self.anew)]

    @property
    def pending_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.pending)

    def counts(self) -> dict[str, int]:
        """For logs and summaries."""
        return {
            "num_shards_new": len(self.new),
            "num_shards_changed": len(self.changed),
            "num_shards_anew": len(self.anew),
            "num_shards_skipped": self.num_done,
            "num_shards_gone": len(self.gone),
        }


def plan(shards: list[FileInfo], latest: pa.Table, request_fingerprint: str, *, is_whole: bool = True) -> Plan:
    """Compare a listing with the manifest.

    Args:
        latest: see `Manifest.latest`.
        is_whole: these are all shards of the archive; a recorded shard that is not among them is gone.
    """

    def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=bool)

    paths = pa.array([shard.path for shard in shards], pa.string())
    sizes = pa.array([shard.size_bytes for shard in shards], pa.int64())
    versions = pa.array([shard.version for shard in shards], pa.string())
    places = pc.index_in(paths, value_set=latest["path"].combine_chunks())
    recorded = latest.select(["size_bytes", "version", "fingerprint"]).take(places)
    is_same_request = as_numpy(pc.equal(recorded["fingerprint"], request_fingerprint))
    is_same_content = as_numpy(
        pc.and_(pc.equal(recorded["size_bytes"], sizes), pc.equal(recorded["version"], versions))
    )
    conditions = [~as_numpy(places.is_valid()), ~is_same_request, ~is_same_content]
    kinds = np.select(conditions, ["new", "anew", "changed"], "done")
    pending = {
        kind: [shards[index] for index in np.flatnonzero(kinds == kind).tolist()] for kind in ("new", "changed", "anew")
    }
    is_gone = pc.invert(pc.is_in(latest["path"], value_set=paths))
    gone = latest["path"].filter(is_gone).to_pylist() if is_whole else []
    return Plan(**pending, num_done=int((kinds == "done").sum()), gone=gone)
