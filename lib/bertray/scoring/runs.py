"""The files of every scoring run, which run was announced, and the recorder of a run's outcomes.

    output/runs/<run-id>/config.json           the resolved request; no secrets
                         plan.json             what there was to do
                         shards-00000.parquet  what became of every shard; a new file every few seconds
                         summary.json          figures, failures, the gate's verdict and what it compared
                         report.html           the same for people: see `reports.run`
    output/runs/latest.json                    the run whose predictions are published; replaced last

A run that has nothing to score leaves none of these.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel

from bertray.metrics.profile import Profile
from bertray.progress import ProgressBar
from bertray.schema import NUM_LENGTH_BINS, NUM_SCORE_BINS, RECORD_SCHEMA, SHARD_REPORT_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.staging import Staging
from bertray.scoring.units import Outcome, Work
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock
from bertray.storage.outputs import put_json, put_records, read_records, readable
from bertray.storage.patience import patiently

_log = logging.getLogger(__name__)

RUNS = "runs"  # the folder of all runs
MAX_LISTED_SHARDS = MAX_REASONS = 30
NOW = "this run"  # in a summary: its own profile, beside those that the gate compared it with
# How often a shard is tried whose place failed, or that was rewritten while it was read.
_MAX_TRIES = 3
# A crash costs the work since the last record.
_RECORD_INTERVAL_S = 5.0
# The options that `manifest.fingerprint` takes in.
_IN_FINGERPRINT = ("text_column", "keep_columns", "probabilities", "engine", "precision")
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


class Published(BaseModel, frozen=True):
    """All that is in predictions/."""

    num_shards: int
    num_shards_older: int  # scored for an earlier request, or from an earlier version, because they failed since
    older: list[str]  # paths of some of them
    num_shards_without_profile: int  # published before records had one
    profile: Profile  # of all others
    # Of recorded shards that had left the archive, which the rest leaves out; null: not known.
    num_shards_gone: int | None = None
    profile_gone: Profile | None = None
    score_edges: tuple[float, ...] = tuple((np.arange(NUM_SCORE_BINS + 1) / NUM_SCORE_BINS).tolist())
    length_edges: tuple[int, ...] = tuple(2**power for power in range(NUM_LENGTH_BINS))
    labels: tuple[str, ...]  # of the bundle


class Announcement(BaseModel, frozen=True):
    """The content of latest.json."""

    run_id: str
    profile: Profile = Profile()  # of the rows that were announced with it
    # The fingerprint of the bundle from whose validation rows the archive may differ, as a person has accepted.
    accepted_bundle: str | None = None
    rate: Rate | None = None  # of the last run that was long enough
    published: Published | None = None
    request: dict[str, Any] | None = None  # see `request_of`


def request_of(config: ScoreConfig, bundle_fingerprint: str) -> dict[str, Any]:
    """What `Runs.differences` compares, by name."""
    options = {name: getattr(config, name) for name in _IN_FINGERPRINT}
    engine = "torch" if config.engine == "auto" else config.engine
    return {**options, "engine": engine, "bundle_fingerprint": bundle_fingerprint}


class Runs:
    """The runs of the folder that `bertray score --output` names."""

    def __init__(self, output: Location) -> None:
        self._folder = output / RUNS
        self._num_written = 0

    def latest(self) -> Announcement | None:
        """The last announcement."""
        file = self._folder / "latest.json"
        with readable(file, "Remove it and run bertray score again: it announces anew what has a record"):
            return Announcement.model_validate_json(file.read_bytes()) if file.exists() else None

    def begin(self, run_id: str, request: dict[str, Any], plan: dict[str, Any]) -> None:
        """Write what is to be done. An output that cannot be written fails here, before any work."""
        put_json(self._folder / run_id / "config.json", request)
        put_json(self._folder / run_id / "plan.json", plan)

    def differences(self, announced: Announcement, config: ScoreConfig) -> list[str]:
        """In what options the announced request differs, as "keep_columns: ['id'] -> []"; none if it is not known."""
        before, now = announced.request or {}, request_of(config, "")
        changed = [name for name in _IN_FINGERPRINT if before and before.get(name) != now[name]]
        return [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in changed]

    def append(self, run_id: str, outcomes: list[Outcome]) -> None:
        """Report what became of shards, in one file (none for no outcomes)."""
        rows = [{**_profile_fields(one), "path": one.shard.path, "failure": one.failure or None} for one in outcomes]
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
            folder = self._folder / run_id
            if files := [folder / info.path for info in folder.files((".parquet",))]:
                report = read_records(files, SHARD_REPORT_SCHEMA, "Remove it and run again")
                return set(report.filter(report["failure"].is_valid())["path"].to_pylist())
        return set()


def _profile_fields(outcome: Outcome) -> dict[str, Any]:
    profile = outcome.counts.profile
    return {**profile.model_dump(), "labels": [*profile.labels.items()]}


def profile_of(records: pa.Table) -> Profile:
    """The sum of the profiles of records, or of a shard report, without those that have none."""
    records = records.filter(records["scores"].is_valid())
    facts: dict[str, Any] = {}
    for name in Profile.model_fields:
        column = records[name].combine_chunks()
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

    def __init__(self, runs: Runs, run_id: str, staging: Staging, request_fingerprint: str, lock: RunLock) -> None:
        self._runs, self.run_id, self._fingerprint, self._lock = runs, run_id, request_fingerprint, lock
        self._staging = staging
        self.failures: list[dict[str, str]] = []  # path and reason of every shard that failed
        self._unrecorded: list[Outcome] = []  # of whole shards
        self._counts: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()  # rows of committed shards by the reason why they have no label
        self._precisions: set[str] = set()
        self._scoring_s = 0.0
        self._num_tries: Counter[str] = Counter()  # of shards that did not fail for good
        self._settled: set[str] = set()  # paths of the shards that are staged, or failed for good
        self._places: dict[str, tuple[int, str]] = {}  # failures that a node is at fault for: how many, and the last

    def adopt(self, pending: list[FileInfo]) -> list[FileInfo]:
        """Record what is staged and was not reported; returns the other shards."""
        found = self._staging.unrecorded(pending, self._fingerprint)
        for outcome in found:
            self._take(outcome, is_piece=False)
        self._record()
        adopted = {outcome.shard for outcome in found}
        return [shard for shard in pending if shard not in adopted]

    def left(self, shards: list[FileInfo]) -> list[FileInfo]:
        """Those of the shards that are to be scored in another pass; those that were not tried yet come first."""
        unsettled = (one for one in shards if one.path not in self._settled)
        return sorted(unsettled, key=lambda one: self._num_tries[one.path])

    def follow(self, outcomes: Iterable[Outcome], work: Work) -> set[str]:
        """Record outcomes as they arrive, and show progress. Returns the paths of shards that have been rewritten."""
        began_s = recorded_s = time.monotonic()
        num_rows = num_pieces = 0
        changed, tried = set[str](), set[str]()
        if not self._scoring_s:  # parts of an earlier run
            num_missing = sum(map(len, work.missing_parts.values()))
            self._counts["num_parts_taken_up"] = sum(work.num_parts.values()) - num_missing
        total = sum(len(unit.shards) for unit in work.units)
        with ProgressBar("scoring", total, "parts of shards" if work.num_parts else "shards") as bar:
            try:
                for outcome in outcomes:
                    path = outcome.shard.path
                    is_piece = outcome.part is not None or outcome.shard not in work.num_parts
                    num_pieces += is_piece
                    if not outcome.failure:
                        self._take(outcome, is_piece=is_piece)
                        num_rows += outcome.counts.profile.num_rows if is_piece else 0
                    elif path not in self._settled and path not in tried:
                        tried.add(path)
                        self._fail(outcome)
                        if outcome.of == "version":
                            changed.add(path)
                    bar.update(num_pieces, f"{num_rows:,} rows")
                    if time.monotonic() - recorded_s >= _RECORD_INTERVAL_S:
                        self._record()
                        recorded_s = time.monotonic()
            finally:  # also if the run is interrupted: shards in place need not be scored again
                self._record()
                self._scoring_s += time.monotonic() - began_s
        return changed - self._settled

    def _fail(self, outcome: Outcome) -> None:
        path, reason = outcome.shard.path, outcome.failure
        self._num_tries[path] += 1
        if outcome.of == "place":
            self._places[outcome.node] = self._places.get(outcome.node, (0, ""))[0] + 1, reason
        if outcome.of != "shard" and self._num_tries[path] < _MAX_TRIES:
            why = "it was rewritten" if outcome.of == "version" else f"{outcome.node} is at fault"
            _log.warning("to be tried again, %s: %s: %s", why, path, reason)
            return
        self._settled.add(path)
        self._counts["num_shards_failed"] += 1
        self.failures.append({"path": path, "reason": reason})
        self._unrecorded.append(outcome)
        _log.warning("failed: %s: %s", path, reason)

    def _take(self, outcome: Outcome, *, is_piece: bool) -> None:
        counts, profile = outcome.counts, outcome.counts.profile
        if is_piece:  # scored by this pass
            self._counts["num_tokens_scored"] += profile.num_tokens - counts.num_tokens_repeated
        if outcome.part is None:
            self._counts["num_shards_committed"] += 1
            self._settled.add(outcome.shard.path)
            self._counts.update({name: getattr(profile, name) for name in _OF_ROWS})
            self._counts.update({name: getattr(counts, name) for name in _REPEATED})
            self.errors.update(counts.errors)
            self._precisions.add(outcome.precision)
            self._unrecorded.append(outcome)

    def _record(self) -> None:
        patiently(self._lock.check)  # another run may have removed the files of this one
        patiently(partial(self._runs.append, self.run_id, self._unrecorded))
        of_all = {"fingerprint": self._fingerprint, "run_id": self.run_id, "committed_at": datetime.now(UTC)}
        records = [
            {**asdict(one.shard), **_profile_fields(one), **of_all, "precision": one.precision}
            for one in self._unrecorded
            if not one.failure
        ]
        patiently(partial(self._staging.book.append, self.run_id, pa.Table.from_pylist(records, schema=RECORD_SCHEMA)))
        self._unrecorded = []

    def rate(self, num_actors: int) -> Rate | None:
        """The rate of this run; None: it scored nothing."""
        num_tokens, wall_s = self._counts["num_tokens_scored"], self._scoring_s
        if not num_tokens:
            return None
        tokens_per_s = round(num_tokens / wall_s, 1)
        return Rate(run_id=self.run_id, tokens_per_s=tokens_per_s, num_actors=num_actors, wall_s=round(wall_s, 3))

    @property
    def precision(self) -> str | None:
        """The precision in which the model ran; None: nothing was scored."""
        return "+".join(sorted(self._precisions)) or None

    def summary(self, wall_s: float) -> dict[str, Any]:
        return {
            **{name: self._counts[name] for name in _COUNTED},
            "num_rows_model": self._counts["num_rows"]
            - self._counts["num_rows_error"]
            - self._counts["num_rows_repeated"],
            "wall_s": round(wall_s, 2),
            "rows_per_s": round(self._counts["num_rows"] / wall_s, 1),
            "tokens_per_s": round(self._counts["num_tokens_scored"] / wall_s, 1),
            "precision": self.precision,
            "sick_nodes": [
                {"node": node, "num_failures": num, "last": last} for node, (num, last) in self._places.items()
            ],
        }
