"""The pieces that pending shards are scored in, and what has become of them.

    tiny shards     up to 256 of them are a unit: a task costs more than one of them
    a shard         is a unit
    a large shard   has a unit for each of its parts, ranges of rows that are staged and, when all are there, merged

    output/staging/<path of the shard>/<key>-00003-of-00016.parquet

The key follows from the shard's version, the request and the columns: what another run has staged is taken up, or known
to be stale. How a shard is cut follows from its size and the device, so that a repeat writes the same
bytes.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict

from bertray.metrics.profile import Profile
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA
from bertray.storage.location import FileInfo

# Of a task: enough that its own cost is small, few enough that a progress bar moves.
_MAX_UNIT_SHARDS = 256
_MIN_UNITS_AN_ACTOR = 16
# A shard of less than so many parts stays whole: merging costs something, too.
_MIN_PARTS = 3

# Of the output. The second holds models that were exported for another engine than torch.
STAGING_FOLDER, ENGINE_FOLDER = "staging", "engine"


class Unit(BaseModel):
    """What one task scores: shards, each by itself, or one part of one shard."""

    model_config = ConfigDict(frozen=True)

    shards: tuple[FileInfo, ...]
    part: int = 0
    num_parts: int = 1


class Counts(BaseModel):
    """What went through. Repeated rows have a text that stands earlier in their step: they cost nothing."""

    model_config = ConfigDict(frozen=True)

    profile: Profile = Profile()
    num_rows_repeated: int = 0
    num_tokens_repeated: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            profile=self.profile + other.profile,
            num_rows_repeated=self.num_rows_repeated + other.num_rows_repeated,
            num_tokens_repeated=self.num_tokens_repeated + other.num_tokens_repeated,
        )


class Outcome(BaseModel):
    """What has become of a shard, or of a part of one."""

    model_config = ConfigDict(frozen=True)

    shard: FileInfo  # as it was listed
    part: int | None = None  # staged; None: the shard's predictions are in place
    counts: Counts = Counts()
    precision: str = ""
    failure: str = ""  # why there is nothing
    has_changed: bool = False  # the failure is that the shard is not what was listed


@dataclass(frozen=True)
class Work:
    """All units of a pass over pending shards."""

    units: list[Unit] = field(default_factory=list)
    # Of every shard that is cut: how many parts it has, and which of these nobody has staged.
    num_parts: dict[FileInfo, int] = field(default_factory=dict)
    missing_parts: dict[FileInfo, set[int]] = field(default_factory=dict)

    @property
    def num_pieces(self) -> int:
        """Shards and parts to be scored."""
        return sum(len(unit.shards) for unit in self.units)


def divide(
    shards: list[FileInfo], unit_bytes: int, num_actors: int, request_fingerprint: str, staged: set[str]
) -> Work:
    """Cut pending shards into units.

    Args:
        unit_bytes: of Parquet, that a task should have: see `score_shard.STEP_BYTES`.
        staged: what lies in the staging folder, by path.
    """
    work = Work()
    whole: list[FileInfo] = []
    for shard in shards:
        num_parts = num_pieces(shard, unit_bytes)
        if num_parts == 1:
            whole.append(shard)
            continue
        missing = {
            part for part in range(num_parts) if staged_path(shard, request_fingerprint, part, num_parts) not in staged
        }
        work.num_parts[shard], work.missing_parts[shard] = num_parts, missing
        work.units.extend(Unit(shards=(shard,), part=part, num_parts=num_parts) for part in sorted(missing))
    work.units.extend(_grouped(whole, unit_bytes, num_actors))
    return work


def num_pieces(shard: FileInfo, unit_bytes: int) -> int:
    """The parts that a shard is scored in; 1: it stays whole."""
    num_parts = -(-shard.size_bytes // unit_bytes)
    return num_parts if num_parts >= _MIN_PARTS else 1


def _grouped(shards: list[FileInfo], unit_bytes: int, num_actors: int) -> list[Unit]:
    """Consecutive shards share a unit, up to its bytes, and as far as it leaves every actor some units."""
    most_shards = max(1, min(_MAX_UNIT_SHARDS, len(shards) // (_MIN_UNITS_AN_ACTOR * num_actors)))
    groups: list[list[FileInfo]] = []
    num_bytes = 0
    for shard in shards:
        num_bytes += shard.size_bytes
        if not groups or num_bytes > unit_bytes or len(groups[-1]) == most_shards:
            groups.append([])
            num_bytes = shard.size_bytes
        groups[-1].append(shard)
    return [Unit(shards=tuple(group)) for group in groups]


def staged_path(shard: FileInfo, request_fingerprint: str, part: int, num_parts: int) -> str:
    """Where a part is staged, relative to the staging folder."""
    # The columns too: what a version with fewer has staged cannot be merged with what this one stages.
    columns = " ".join(MULTI_LABEL_PREDICTION_SCHEMA.names)
    content = f"{request_fingerprint} {columns} {shard.size_bytes} {shard.version}"
    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    return f"{shard.path}/{key}-{part:05d}-of-{num_parts:05d}.parquet"


def stale(work: Work, request_fingerprint: str, staged: set[str]) -> set[str]:
    """What lies in the staging folder and is of no use: of shards that changed, are done, or of another request."""
    useful = {
        staged_path(shard, request_fingerprint, part, num_parts)
        for shard, num_parts in work.num_parts.items()
        for part in range(num_parts)
    }
    return staged - useful


def part_rows(num_rows: int, group_edges: list[int], part: int, num_parts: int) -> range:
    """The rows of one part: each has about as many, but where an edge of a row group is near, parts meet there.

    A reader that starts within a row group must decode what stands before.

    Args:
        group_edges: the first row of every row group, and behind the last one `num_rows`.
    """

    def edge(index: int) -> int:
        even = num_rows * index // num_parts
        place = bisect.bisect(group_edges, even)
        nearest = min(group_edges[max(0, place - 1) : place + 1], key=lambda candidate: abs(candidate - even))
        return nearest if 2 * abs(nearest - even) * num_parts < num_rows else even

    return range(edge(part), edge(part + 1))
