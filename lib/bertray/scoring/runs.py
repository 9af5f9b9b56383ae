"""The files of every scoring run, which run was announced, and the recorder of a run's outcomes.

    output/runs/<run-id>/config.json           the resolved request; no secrets
                         plan.json             what there was to do
                         shards-00000.parquet  what became of every shard; a new file every few seconds
                         summary.json          figures, failures, the gate's verdict
    output/runs/latest.json                    the run that readers may rely on; replaced last

A run that dies has reported shards, too. So the next announcement covers the last report of every shard in all runs
since the last announcement.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from bertray.metrics.profile import Profile
from bertray.progress import ProgressBar
from bertray.schema import SHARD_REPORT_SCHEMA
from bertray.scoring.archive import Archive
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest
from bertray.scoring.units import STAGING_FOLDER, Outcome, Work, staged_folder, stale
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock
from bertray.storage.outputs import last_of_each_path, put_json, put_records, read_records

_log = logging.getLogger(__name__)

_MAX_LISTED_SHARDS = 30
# In a minute of scoring, the start of the actors no longer counts for much.
_LONG_ENOUGH_S = 60.0
# A crash costs the work since the last record.
_RECORD_INTERVAL_S = 5.0
# The options that `manifest.fingerprint` takes in.
_IN_FINGERPRINT = ("text_column", "keep_columns", "engine", "precision")
# The counts of a summary, in its order; docs/glossary.md explains them.
_OF_ROWS = ("num_rows", "num_rows_error", "num_rows_review", "num_tokens")
_REPEATED = ("num_rows_repeated", "num_tokens_repeated")
_COUNTED = ("num_shards_committed", "num_shards_failed", "num_parts_taken_up", *_OF_ROWS, *_REPEATED)


class Rate(BaseModel, frozen=True):
    """How fast a run scored."""

    run_id: str
    tokens_per_s: float
    num_actors: int
    wall_s: float = 0.0  # time spent scoring, the start of actors included

    def says_more_than(self, other: Rate | None) -> bool:
        """Whether this rate, of a later run, is the better forecast: the run was long enough, or the longer one."""
        return other is None or self.wall_s >= min(other.wall_s, _LONG_ENOUGH_S)


class Announcement(BaseModel, frozen=True):
    """The content of latest.json."""

    run_id: str
    profile: Profile = Profile()  # of the rows that were announced with it
    # The fingerprint of the bundle from whose validation rows the archive may differ, as a person has accepted.
    accepted_bundle: str | None = None
    rate: Rate | None = None  # of the last run that was long enough


@dataclass(frozen=True)
class Unannounced:
    """What became of shards since the last announcement."""

    num_shards: int
    num_shards_failed: int
    profile: Profile
    shards_with_errors: list[dict[str, Any]]  # path, num_rows_error, num_rows and failure; most errors first


class Runs:
    """The runs of the folder that `bertray score --output` names."""

    def __init__(self, output: Location) -> None:
        self._folder = output / "runs"
        self._num_written = 0

    def latest(self) -> Announcement | None:
        """The last announcement."""
        file = self._folder / "latest.json"
        return Announcement.model_validate_json(file.read_bytes()) if file.exists() else None

    def begin(self, run_id: str, request: dict[str, Any], plan: dict[str, Any]) -> None:
        """Write what is to be done. An output that cannot be written fails here, before any work."""
        put_json(self._folder / run_id / "config.json", request)
        put_json(self._folder / run_id / "plan.json", plan)

    def differences(self, run_id: str, config: ScoreConfig, bundle_fingerprint: str) -> list[str]:
        """In what the request of an earlier run differs, as "keep_columns: ['id'] -> []"; empty if it is not known."""
        file = self._folder / run_id / "config.json"
        if not file.exists():
            return []
        before = json.loads(file.read_bytes())
        changes = [(name, before["config"].get(name), getattr(config, name)) for name in _IN_FINGERPRINT]
        found = [f"{name}: {old!r} -> {new!r}" for name, old, new in changes if old != new]
        return [*found, *(["another bundle"] if before["bundle_fingerprint"] != bundle_fingerprint else [])]

    def append(self, run_id: str, outcomes: list[Outcome]) -> None:
        """Report what became of shards, in one file (none for no outcomes)."""
        rows = [
            {**profile.model_dump(), "labels": [*profile.labels.items()], "path": path, "failure": failure or None}
            for profile, path, failure in ((one.counts.profile, one.shard.path, one.failure) for one in outcomes)
        ]
        if rows:
            file = self._folder / run_id / f"shards-{self._num_written:05d}.parquet"
            put_records(file, pa.Table.from_pylist(rows, schema=SHARD_REPORT_SCHEMA))
            self._num_written += 1

    def finish(self, run_id: str, summary: dict[str, Any]) -> None:
        put_json(self._folder / run_id / "summary.json", summary)

    def announce(self, announcement: Announcement) -> None:
        (self._folder / "latest.json").put(announcement.model_dump_json(indent=2).encode() + b"\n")

    def failed_last(self, until: Announcement | None = None) -> set[str]:
        """The shards that failed in the last run that had any to score, of all runs or of those up to `until`."""
        for run_id in reversed(self._folder.folders()):
            if until and run_id > until.run_id:
                continue
            if files := self._reports(run_id):
                report = read_records(files, SHARD_REPORT_SCHEMA)
                return set(report.filter(report["failure"].is_valid())["path"].to_pylist())
        return set()

    def unannounced(self, after: Announcement | None, present: set[str] | None) -> Unannounced:
        """What became of shards in the runs after an announcement, without those that failed before it and since.

        Args:
            present: the shards that are in the archive now: others are left out; None: leave none out.
        """
        last_run_id = after.run_id if after else ""
        # Run ids and file numbers sort by time.
        files = [file for run_id in self._folder.folders() if run_id > last_run_id for file in self._reports(run_id)]
        report = last_of_each_path(read_records(files, SHARD_REPORT_SCHEMA))
        if after:
            is_old = pc.is_in(report["path"], value_set=pa.array(sorted(self.failed_last(after)), pa.string()))
            report = report.filter(pc.invert(pc.and_(report["failure"].is_valid(), is_old)))
        if present is not None:
            report = report.filter(pc.is_in(report["path"], value_set=pa.array(sorted(present), pa.string())))
        worst = report.filter(pc.or_(report["failure"].is_valid(), pc.greater(report["num_rows_error"], 0)))
        worst = worst.sort_by([("num_rows_error", "descending"), ("path", "ascending")])[:_MAX_LISTED_SHARDS]
        return Unannounced(
            num_shards=len(report),
            num_shards_failed=len(report) - report["failure"].null_count,
            profile=_summed(report),
            shards_with_errors=worst.select(["path", "num_rows_error", "num_rows", "failure"]).to_pylist(),
        )

    def _reports(self, run_id: str) -> list[Location]:
        folder = self._folder / run_id
        return [folder / info.path for info in folder.files((".parquet",))]


def _summed(report: pa.Table) -> Profile:
    facts: dict[str, Any] = {}
    for name in Profile.model_fields:
        column = report[name].combine_chunks()
        if name == "labels":
            rows = pa.table({"label": column.keys, "rows": column.items}).group_by("label").aggregate([("rows", "sum")])
            facts[name] = dict(zip(rows["label"].to_pylist(), rows["rows_sum"].to_pylist(), strict=True))
        elif pa.types.is_fixed_size_list(column.type):
            bins = column.flatten().to_numpy().reshape(-1, column.type.list_size)
            facts[name] = bins.sum(axis=0, dtype=np.int64).tolist()
        else:
            facts[name] = pc.sum(column).as_py() or 0
    return Profile(**facts)


class Recorder:
    """What became of the shards of one run so far."""

    def __init__(
        self, manifest: Manifest, runs: Runs, run_id: str, output: Location, request_fingerprint: str, lock: RunLock
    ) -> None:
        self._manifest, self._runs, self._run_id, self._fingerprint = manifest, runs, run_id, request_fingerprint
        self._staging = output / STAGING_FOLDER
        self._lock = lock
        self.failures: list[dict[str, str]] = []  # path and reason of every shard that failed
        self._unrecorded: list[Outcome] = []  # of whole shards
        self._merged: list[FileInfo] = []  # the unrecorded shards that were merged from parts
        self._counts: Counter[str] = Counter()
        self._precisions: set[str] = set()
        self._scoring_s = 0.0

    def begin(self, replaced: list[str]) -> None:
        """Remove the records of files that will be replaced. Call when all is ready to score.

        A run that dies leaves files of both requests. Only those with a record count as done, whatever is asked next.
        """
        if replaced:
            self._manifest.forget(self._run_id, replaced)

    def staged(self) -> set[str]:
        """The paths of staged parts, also those of earlier runs."""
        return {info.path for info in self._staging.files((".parquet",))}

    def remove_stale(self, work: Work, archive: Archive) -> None:
        """Remove staged parts that nothing will be merged from. If `archive` is a part of it, only its own shards'."""
        listed = set(map(staged_folder, archive.paths()))
        for path in stale(work, self._fingerprint, self.staged()):
            if archive.is_whole or path.rpartition("/")[0] in listed:
                (self._staging / path).remove()

    def follow(self, outcomes: Iterable[Outcome], work: Work, *, is_last_pass: bool) -> list[str]:
        """Record outcomes as they arrive, and show progress. Returns the paths of shards to score in another pass."""
        began_s = recorded_s = time.monotonic()
        num_rows = num_pieces = 0
        changed: set[str] = set()
        failed: set[str] = set()
        self._counts["num_parts_taken_up"] += sum(work.num_parts.values()) - sum(map(len, work.missing_parts.values()))
        total = sum(len(unit.shards) for unit in work.units)
        with ProgressBar("scoring", total, "parts of shards" if work.num_parts else "shards") as bar:
            try:
                for outcome in outcomes:
                    path = outcome.shard.path
                    is_piece = outcome.part is not None or outcome.shard not in work.num_parts
                    num_pieces += is_piece
                    if not outcome.failure:
                        self._take(outcome, is_piece)
                        num_rows += outcome.counts.profile.num_rows if is_piece else 0
                    elif outcome.has_changed and not is_last_pass:
                        changed.add(path)
                    elif path not in failed and path not in changed:
                        failed.add(path)
                        self._counts["num_shards_failed"] += 1
                        self.failures.append({"path": path, "reason": outcome.failure})
                        self._unrecorded.append(outcome)
                        _log.warning("failed: %s: %s", path, outcome.failure)
                    bar.update(num_pieces, f"{num_rows:,} rows")
                    if time.monotonic() - recorded_s >= _RECORD_INTERVAL_S:
                        self._record()
                        recorded_s = time.monotonic()
            finally:  # also if the run is interrupted: shards in place need not be scored again
                self._record()
                self._scoring_s += time.monotonic() - began_s
        for path in changed:
            (self._staging / staged_folder(path)).remove()
        return sorted(changed)

    def finish(self) -> None:
        """Call after the last pass."""
        self._manifest.finish(self._run_id)
        if not self.staged():
            self._staging.remove()  # empty folders

    def _take(self, outcome: Outcome, is_piece: bool) -> None:
        counts, profile = outcome.counts, outcome.counts.profile
        if is_piece:  # scored by this run
            self._counts["num_tokens_scored"] += profile.num_tokens - counts.num_tokens_repeated
            self._counts.update({name: getattr(counts, name) for name in _REPEATED})
        else:
            self._merged.append(outcome.shard)
        if outcome.part is None:
            self._counts["num_shards_committed"] += 1
            self._counts.update({name: getattr(profile, name) for name in _OF_ROWS})
            self._precisions.add(outcome.precision)
            self._unrecorded.append(outcome)

    def _record(self) -> None:
        self._lock.check()  # another run may have replaced the files of this one
        # The report first: what the manifest calls done must be in it. The parts last: if the run dies before there is
        # a record, they are merged again.
        self._runs.append(self._run_id, self._unrecorded)
        of_all = {"fingerprint": self._fingerprint, "run_id": self._run_id, "committed_at": datetime.now(UTC)}
        records = [
            {**asdict(one.shard), **one.counts.profile.model_dump(), **of_all}
            for one in self._unrecorded
            if not one.failure
        ]
        self._manifest.append(self._run_id, records)
        for shard in self._merged:
            (self._staging / staged_folder(shard.path)).remove()
        self._unrecorded, self._merged = [], []

    def rate(self, num_actors: int) -> Rate | None:
        """The rate of this run; None: it scored nothing."""
        num_tokens, wall_s = self._counts["num_tokens_scored"], self._scoring_s
        if not num_tokens:
            return None
        tokens_per_s = round(num_tokens / wall_s, 1)
        return Rate(run_id=self._run_id, tokens_per_s=tokens_per_s, num_actors=num_actors, wall_s=round(wall_s, 3))

    @property
    def precision(self) -> str | None:
        """The precision in which the model ran; None: nothing was scored."""
        return "+".join(sorted(self._precisions)) or None

    def summary(self, wall_s: float) -> dict[str, Any]:
        return {
            **{name: self._counts[name] for name in _COUNTED},
            "wall_s": round(wall_s, 2),
            "rows_per_s": round(self._counts["num_rows"] / wall_s, 1),
            "tokens_per_s": round(self._counts["num_tokens_scored"] / wall_s, 1),
            "precision": self.precision,
        }
