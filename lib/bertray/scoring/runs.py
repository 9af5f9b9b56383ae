"""What every scoring run leaves behind, and which of them was announced.

    output/runs/<run-id>/config.json           what was asked for, resolved; no secrets
                         plan.json             what there was to do
                         shards-00000.parquet  what became of every shard, a file every few seconds
                         summary.json          figures, failures, what the gate said
    output/runs/latest.json                    what readers of the output may rely on; replaced last

A run that dies leaves its shards behind: what is to be announced next is what became of every shard, last, in the runs
since the last that was announced.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from bertray.metrics.profile import Profile
from bertray.schema import SHARD_REPORT_SCHEMA
from bertray.scoring.units import Outcome
from bertray.storage.location import Location
from bertray.storage.outputs import last_of_each_path, put_records, read_records

_MAX_LISTED_SHARDS = 30
# In a minute of scoring the start of actors no longer counts for much.
_LONG_ENOUGH_S = 60.0


class Rate(BaseModel):
    """How fast a run was, while it scored."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    tokens_per_s: float
    num_actors: int
    wall_s: float = 0.0  # it scored so long; actors that start are part of it

    def says_more_than(self, other: Rate | None) -> bool:
        """Whether to expect it again, rather than the other: it is later, and long enough or longer."""
        return other is None or self.wall_s >= min(other.wall_s, _LONG_ENOUGH_S)


class Announcement(BaseModel):
    """What latest.json holds."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    profile: Profile = Profile()  # of what became new with it
    # A person has accepted that the archive differs from this bundle's validation rows.
    accepted_bundle: str | None = None
    rate: Rate | None = None  # of the last run that scored long enough to tell


@dataclass(frozen=True)
class Unannounced:
    """What has become of shards since the last announcement."""

    num_shards: int
    num_shards_failed: int
    profile: Profile
    shards_with_errors: list[dict[str, Any]]  # path, num_rows_error, num_rows, failure: the worst first


class Runs:
    """The runs of an output.

    Args:
        output: the folder of `bertray score --output`.
    """

    def __init__(self, output: Location) -> None:
        self._folder = output / "runs"
        self._num_written = 0

    def latest(self) -> Announcement | None:
        """What was announced last."""
        file = self._folder / "latest.json"
        return Announcement.model_validate_json(file.read_bytes()) if file.exists() else None

    def begin(self, run_id: str, request: dict[str, Any], plan: dict[str, Any]) -> None:
        """Write down what is to be done: what cannot be written is found out before any work."""
        _put_json(self._folder / run_id / "config.json", request)
        _put_json(self._folder / run_id / "plan.json", plan)

    def append(self, run_id: str, outcomes: list[Outcome]) -> None:
        """Write down what has become of shards, in one file; none: no file."""
        if not outcomes:
            return
        rows = [
            {"path": one.shard.path, "failure": one.failure or None, **one.counts.profile.model_dump()}
            for one in outcomes
        ]
        for row in rows:
            row["labels"] = list(row["labels"].items())
        file = self._folder / run_id / f"shards-{self._num_written:05d}.parquet"
        put_records(file, pa.Table.from_pylist(rows, schema=SHARD_REPORT_SCHEMA))
        self._num_written += 1

    def finish(self, run_id: str, summary: dict[str, Any]) -> None:
        _put_json(self._folder / run_id / "summary.json", summary)

    def announce(self, announcement: Announcement) -> None:
        (self._folder / "latest.json").put(announcement.model_dump_json(indent=2).encode() + b"\n")

    def failed_last(self) -> set[str]:
        """Shards that failed in the last run that had any to score."""
        for run_id in reversed(self._folder.folders()):
            folder = self._folder / run_id
            if files := [folder / info.path for info in folder.files((".parquet",))]:
                report = read_records(files, SHARD_REPORT_SCHEMA)
                return set(report.filter(report["failure"].is_valid())["path"].to_pylist())
        return set()

    def unannounced(self, after: Announcement | None, present: set[str] | None) -> Unannounced:
        """What has become of shards in the runs after one.

        Args:
            present: the shards that the archive has now, of which alone it is wanted; None: of all.
        """
        last_run_id = after.run_id if after else ""
        folders = [self._folder / run_id for run_id in self._folder.folders() if run_id > last_run_id]
        files = [folder / info.path for folder in folders for info in folder.files((".parquet",))]
        # In the order of time: run ids and numbers are sorted.
        report = last_of_each_path(read_records(files, SHARD_REPORT_SCHEMA))
        if present is not None:
            report = report.filter(pc.is_in(report["path"], value_set=pa.array(sorted(present), pa.string())))
        worst = report.filter(pc.or_(report["failure"].is_valid(), pc.greater(report["num_rows_error"], 0)))
        worst = worst.select(["path", "num_rows_error", "num_rows", "failure"]).sort_by(
            [("num_rows_error", "descending"), ("path", "ascending")]
        )
        return Unannounced(
            num_shards=len(report),
            num_shards_failed=len(report) - report["failure"].null_count,
            profile=_summed(report),
            shards_with_errors=worst[:_MAX_LISTED_SHARDS].to_pylist(),
        )


def _summed(report: pa.Table) -> Profile:
    facts: dict[str, Any] = {}
    for name in Profile.model_fields:
        column = report[name].combine_chunks()
        if name == "labels":
            labels = (
                pa.table({"label": column.keys, "rows": column.items}).group_by("label").aggregate([("rows", "sum")])
            )
            facts[name] = dict(zip(labels["label"].to_pylist(), labels["rows_sum"].to_pylist(), strict=True))
        elif pa.types.is_fixed_size_list(column.type):
            bins = column.flatten().to_numpy().reshape(-1, column.type.list_size)
            facts[name] = tuple(bins.sum(axis=0, dtype=np.int64).tolist())
        else:
            facts[name] = pc.sum(column).as_py() or 0
    return Profile(**facts)


def _put_json(file: Location, content: dict[str, Any]) -> None:
    file.put((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
