"""The manifest: which shards are published or staged, and the plan of what a run has to score.

1. The predictions of a shard are staged, under a key of the request and the shard's version:
       input/date=2026-01-05/part-0.parquet  ->  output/staging/5e/5e0c…-00000-of-00001.parquet
2. Its record is appended to output/staged/<run-id>-00000.parquet, many records a file.
3. When the gate has passed, all staged files are published (scoring.publish), and their records go to output/manifest/.

A shard is done if the last record of its path in manifest/ has its size and version, and the fingerprint of the
request; it is staged if that of staged/ has. A crash between 1 and 2 only costs the work on the shard.

The records also say in which precision a shard was scored: an output of an earlier version goes on in it.

The plan compares a listing of the archive with both. A shard is `new`, has `changed` (size or version), must be scored
`anew` (under another bundle, columns, engine or precision), is staged, is done, or is `gone` from the archive.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.guard import PrecisionDecision, decided
from bertray.bundle.info import BundleInfo
from bertray.schema import MANIFEST_SCHEMA, PREDICTIONS_VERSION, RECORD_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.units import ENGINE_FOLDER
from bertray.storage.location import FileInfo, Location
from bertray.storage.outputs import in_parallel, last_of_each_path, put_records, read_records
from bertray.types import RealPrecision

_log = logging.getLogger(__name__)


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
    if config.probabilities:  # so did this one
        request["probabilities"] = config.probabilities
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def shards_in(records: pa.Table) -> list[FileInfo]:
    """The shards that records are of, as they were when they were scored."""
    return list(map(FileInfo, *(records[name].to_pylist() for name in ("path", "size_bytes", "version"))))


# The folders of the records in an output, and what to do if a file there is damaged.
PUBLISHED, STAGED = "manifest", "staged"
_NEXT_STEP = {
    PUBLISHED: "Remove it, run bertray verify --repair, then bertray score: it scores again what has no record",
    STAGED: "Remove it and run bertray score again: it records the staged files again",
}


class Manifest:
    """The records of published or of staged shards, in a folder of the output."""

    def __init__(self, output: Location, folder: str = PUBLISHED) -> None:
        self._folder, self._next_step = output / folder, _NEXT_STEP[folder]
        self._num_written = 0

    def latest(self, schema: pa.Schema = MANIFEST_SCHEMA) -> pa.Table:
        """The last record of every path, in `schema.MANIFEST_SCHEMA`, or whole in `schema.RECORD_SCHEMA`."""
        return last_of_each_path(self.all(schema))

    def all(self, schema: pa.Schema = RECORD_SCHEMA) -> pa.Table:
        """All records, the earlier ones of a path too, by time."""
        return read_records(self._files(), schema, self._next_step).sort_by("committed_at")

    def append(self, run_id: str, records: pa.Table) -> None:
        """Add records in `schema.RECORD_SCHEMA`, in one file (none for no records). Their files must be in place."""
        if len(records):
            put_records(self._folder / f"{run_id}-{self._num_written:05d}.parquet", records)
            self._num_written += 1

    def replace(self, run_id: str, records: pa.Table) -> None:
        """Let these be all records, in one file, which is in place before the others are removed."""
        files, merged = self._files(), self._folder / f"{run_id}.parquet"
        put_records(merged, records)
        in_parallel(Location.remove, [file for file in files if file.name != merged.name])

    def remove(self) -> None:
        """Remove all records."""
        self._folder.remove()

    def _files(self) -> list[Location]:
        return [self._folder / info.path for info in self._folder.files((".parquet",))]


@dataclass(frozen=True)
class Plan:
    """The shards of the archive by what is to be done with them, in the order of the listing."""

    new: list[FileInfo] = field(default_factory=list)
    changed: list[FileInfo] = field(default_factory=list)
    anew: list[FileInfo] = field(default_factory=list)
    staged: list[FileInfo] = field(default_factory=list)
    num_done: int = 0
    gone: list[str] = field(default_factory=list)

    @cached_property
    def pending(self) -> list[FileInfo]:
        """The shards to be scored, sorted by path."""
        return sorted([*self.new, *self.changed, *self.anew], key=lambda shard: shard.path)

    @property
    def pending_bytes(self) -> int:
        return sum(shard.size_bytes for shard in self.pending)

    def counts(self) -> dict[str, int]:
        """For logs and summaries."""
        return {
            "num_shards_new": len(self.new),
            "num_shards_changed": len(self.changed),
            "num_shards_anew": len(self.anew),
            "num_shards_staged": len(self.staged),
            "num_shards_skipped": self.num_done,
            "num_shards_gone": len(self.gone),
        }


def plan(
    shards: list[FileInfo], published: pa.Table, staged: pa.Table, request_fingerprint: str, *, is_whole: bool = True
) -> Plan:
    """Compare a listing with the records.

    Args:
        published, staged: see `Manifest.latest`; only staged records whose file is there.
        is_whole: these are all shards of the archive; a published shard that is not among them is gone.
    """
    is_known_N, is_same_request_N, is_same_content_N = _compared(shards, published, request_fingerprint)
    is_staged_N = np.all(_compared(shards, staged, request_fingerprint), axis=0)
    is_done_N = is_known_N & is_same_request_N & is_same_content_N
    conditions = [is_done_N, is_staged_N, ~is_known_N, ~is_same_request_N]
    kinds = np.select(conditions, ["done", "staged", "new", "anew"], "changed")
    pending = {
        kind: [shards[index] for index in np.flatnonzero(kinds == kind).tolist()]
        for kind in ("new", "changed", "anew", "staged")
    }
    paths = pa.array([shard.path for shard in shards], pa.string())
    is_gone = pc.invert(pc.is_in(published["path"], value_set=paths))
    gone = published["path"].filter(is_gone).to_pylist() if is_whole else []
    return Plan(**pending, num_done=int((kinds == "done").sum()), gone=gone)


def _compared(
    shards: list[FileInfo], records: pa.Table, request_fingerprint: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each shard has a record, one of this request, and one of its size and version."""

    def as_numpy(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=bool)

    paths = pa.array([shard.path for shard in shards], pa.string())
    sizes = pa.array([shard.size_bytes for shard in shards], pa.int64())
    versions = pa.array([shard.version for shard in shards], pa.string())
    places = pc.index_in(paths, value_set=records["path"].combine_chunks())
    recorded = records.select(["size_bytes", "version", "fingerprint"]).take(places)
    is_same_content = pc.and_(pc.equal(recorded["size_bytes"], sizes), pc.equal(recorded["version"], versions))
    is_same_request = pc.equal(recorded["fingerprint"], request_fingerprint)
    return as_numpy(places.is_valid()), as_numpy(is_same_request), as_numpy(is_same_content)


def precision_before(output: Location, info: BundleInfo, config: ScoreConfig) -> PrecisionDecision | None:
    """What `--precision auto` is for an output: as decided, else as all shards of the request were scored.

    None: neither; or torch is not asked for auto. RequestError: see `guard.decided`.
    """
    if config.precision != "auto" or config.engine == "openvino":
        return None
    if decision := decided(output / ENGINE_FOLDER, info):
        return decision
    schema = pa.schema([RECORD_SCHEMA.field(name) for name in ("path", "fingerprint", "committed_at", "precision")])
    records = pa.concat_tables([Manifest(output, folder).latest(schema) for folder in (PUBLISHED, STAGED)])
    records = records.filter(pc.equal(records["fingerprint"], fingerprint(info, config)))
    counts = Counter(name or "an unknown precision" for name in records["precision"].to_pylist())
    said = ", ".join(f"{num:,} shards in {name}" for name, num in counts.items())
    if len(counts) == 1 and counts.keys() <= set(get_args(RealPrecision)):
        facts = {"precision": next(iter(counts)), "reason": f"scored so before: {said}"}
        return PrecisionDecision(bundle_fingerprint=info.fingerprint(), **facts)
    if counts:
        _log.warning("warning: %s has %s: --precision fp32 --rescore scores all in one precision", output, said)
    return None
