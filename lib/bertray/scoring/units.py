"""Units of work: the pieces in which pending shards are scored, and what became of them.

    tiny shards     up to 256 of them are one unit: a task costs more than a tiny shard
    a shard         is a unit
    a large shard   has a unit for each of its parts (row ranges), which are merged when all are there

    output/staging/5e/5e0c…-00003-of-00016.parquet     a part; its key is 5e0c…
                      5e0c…-00000-of-00001.parquet     the whole, ready to be published

The key follows from the shard's path and version, the request and the columns, so a run can tell the files that it can
use from stale ones. How a shard is cut follows from its size and the device, so a repeated run writes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from bertray.metrics.profile import Profile
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA
from bertray.storage.location import FileInfo

# Shards of a unit: enough that the cost of a task is small, few enough that the progress bar moves.
_MAX_UNIT_SHARDS = 256
_MIN_UNITS_AN_ACTOR = 16
# A shard of fewer parts stays whole, because merging has a cost, too.
_MIN_PARTS = 3

# Whose failure it is: the shard's; the place's, so that the shard may succeed elsewhere; or that of the listed version,
# for the shard has been rewritten.
Blame = Literal["shard", "place", "version"]

# Folders of the output: staged parts, and models exported for another engine than torch.
STAGING_FOLDER, ENGINE_FOLDER = "staging", "engine"


class Unit(BaseModel, frozen=True):
    """The work of one task: some shards, or one part of one shard."""

    shards: tuple[FileInfo, ...]
    part: int = 0
    num_parts: int = 1


class Counts(BaseModel, frozen=True):
    """Sums over rows. A repeated row has the label of a row before it in its step, with the same text."""

    profile: Profile = Profile()
    num_rows_repeated: int = 0
    num_tokens_repeated: int = 0
    errors: Counter[str] = Counter()  # rows by the reason why they have no label

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in Counts.model_fields})


class Outcome(BaseModel, frozen=True):
    """What became of a shard, or of a part of one."""

    shard: FileInfo  # as it was listed
    part: int | None = None  # the part that is staged; None: the predictions of the whole shard are
    counts: Counts = Counts()
    precision: str = ""
    failure: str = ""  # the reason if there are no predictions
    of: Blame = "shard"
    node: str = ""  # where it failed


@dataclass(frozen=True)
class Work:
    """The units of one pass over pending shards."""

    units: list[Unit] = field(default_factory=list)
    num_parts: dict[FileInfo, int] = field(default_factory=dict)  # of every shard that is cut
    missing_parts: dict[FileInfo, set[int]] = field(default_factory=dict)  # those of it that are not staged yet

    def complete(self) -> list[FileInfo]:
        """Shards whose parts are all staged."""
        return [shard for shard, parts in self.missing_parts.items() if not parts]

    def take(self, outcome: Outcome) -> FileInfo | None:
        """Note that a part is staged; returns its shard if this was the last missing part."""
        if outcome.part is None or outcome.failure:
            return None
        missing = self.missing_parts[outcome.shard]
        missing.discard(outcome.part)
        return None if missing else outcome.shard


def divide(
    shards: list[FileInfo], unit_bytes: int, num_actors: int, request_fingerprint: str, staged: set[str]
) -> Work:
    """Cut pending shards into units.

    Args:
        unit_bytes: Parquet bytes of a unit; see `score_shard.STEP_BYTES`.
        staged: the paths in the staging folder.
    """
    work, whole = Work(), list[FileInfo]()
    for shard in shards:
        num_parts = num_pieces(shard, unit_bytes)
        if num_parts == 1:
            whole.append(shard)
            continue
        paths = [staged_path(shard, request_fingerprint, part, num_parts) for part in range(num_parts)]
        missing = [part for part, path in enumerate(paths) if path not in staged]
        work.num_parts[shard], work.missing_parts[shard] = num_parts, set(missing)
        work.units.extend(Unit(shards=(shard,), part=part, num_parts=num_parts) for part in missing)
    work.units.extend(_grouped(whole, unit_bytes, num_actors))
    return work


def num_pieces(shard: FileInfo, unit_bytes: int) -> int:
    """The number of parts in which a shard is scored; 1: it stays whole."""
    num_parts = -(-shard.size_bytes // unit_bytes)
    return num_parts if num_parts >= _MIN_PARTS else 1


def _grouped(shards: list[FileInfo], unit_bytes: int, num_actors: int) -> list[Unit]:
    """Put consecutive shards into one unit, up to `unit_bytes`, but leave enough units for every actor."""
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


def staged_path(shard: FileInfo, request_fingerprint: str, part: int = 0, num_parts: int = 1) -> str:
    """The path of a staged file, relative to the staging folder."""
    # With the columns: a part of a version that wrote fewer columns cannot be merged with a new one.
    columns = " ".join(MULTI_LABEL_PREDICTION_SCHEMA.names)
    content = f"{request_fingerprint} {columns} {shard.size_bytes} {shard.version} {shard.path}"
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    return f"{key[:2]}/{key}-{part:05d}-of-{num_parts:05d}.parquet"


def staged_key(path: str) -> str:
    """What a staged file and the parts that it is merged from have in common in their paths."""
    return path.rpartition("/")[2].partition("-")[0]


def part_rows(group_edges: list[int], part: int, num_parts: int) -> range:
    """The rows of one part. Parts have about as many rows each, and meet at the edge of a row group if one is near.

    A reader that starts inside a row group must decode the rows before.

    Args:
        group_edges: the first row of every row group, then the number of rows.
    """
    num_rows = group_edges[-1]

    def edge(index: int) -> int:
        even = num_rows * index // num_parts
        nearest = min(group_edges, key=lambda candidate: abs(candidate - even))
        return nearest if 2 * abs(nearest - even) * num_parts < num_rows else even

    return range(edge(part), edge(part + 1))
