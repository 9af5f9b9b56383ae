"""What a scoring run has to do, and why: one listing of the archive held against the manifest.

new       the manifest does not know the shard
changed   its size or version is another one than when it was scored
anew      it was scored under another request: another bundle, column, engine or precision
done      nothing of that
gone      the manifest knows it, the archive has it no more
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.storage.location import FileInfo


@dataclass(frozen=True)
class Plan:
    """The shards of the archive by what is to be done with them, in the listing's order."""

    new: list[FileInfo] = field(default_factory=list)
    changed: list[FileInfo] = field(default_factory=list)
    anew: list[FileInfo] = field(default_factory=list)
    num_done: int = 0
    gone: list[str] = field(default_factory=list)

    @cached_property
    def pending(self) -> list[FileInfo]:
        """What is to be scored, sorted by path."""
        return sorted([*self.new, *self.changed, *self.anew], key=lambda shard: shard.path)

    @property
    def replaced(self) -> list[str]:
        """The pending shards of which a predictions file is recorded."""
        return [shard.path for shard in (*self.changed, *self.anew)]

    @property
    def pending_bytes(self) -> int:
        return sum(shard.size_bytes for shards in (self.new, self.changed, self.anew) for shard in shards)

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
    """Hold a listing against the manifest.

    Args:
        shards: of the archive, each path once.
        latest: the manifest's last record of every path, as `manifest.Manifest.latest` gives it.
        request_fingerprint: of this run, see `manifest.fingerprint`.
        is_whole: shards that are not among these have left the archive.
    """
    paths = pa.array([shard.path for shard in shards], pa.string())
    places = pc.index_in(paths, value_set=latest["path"].combine_chunks())
    recorded = latest.select(["size_bytes", "version", "fingerprint"]).take(places)
    same_size = pc.equal(recorded["size_bytes"], pa.array([shard.size_bytes for shard in shards], pa.int64()))
    same_version = pc.equal(recorded["version"], pa.array([shard.version for shard in shards], pa.string()))
    is_same_content = _no_nulls(pc.and_(same_size, same_version))
    is_same_request = _no_nulls(pc.equal(recorded["fingerprint"], request_fingerprint))
    is_known = places.is_valid().to_numpy(zero_copy_only=False)

    def chosen(where: np.ndarray) -> list[FileInfo]:
        return [shards[index] for index in np.flatnonzero(where).tolist()]

    return Plan(
        new=chosen(~is_known),
        changed=chosen(is_known & is_same_request & ~is_same_content),
        anew=chosen(is_known & ~is_same_request),
        num_done=int((is_known & is_same_request & is_same_content).sum()),
        gone=latest["path"].filter(pc.invert(pc.is_in(latest["path"], value_set=paths))).to_pylist()
        if is_whole
        else [],
    )


def _no_nulls(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=bool)
