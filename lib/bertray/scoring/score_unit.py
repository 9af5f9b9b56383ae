"""Score units: a shard that fails does not stop the others; when all parts of a shard are staged, they are merged.

A failure is the shard's if it cannot be read where others can, or if the model fails on it and not on a harmless text.
Else it is the place's: a full disk, keys that have expired, a GPU that is gone. Then the shard is tried elsewhere.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bertray.bundle.isolated import ModelSpec, Predictor, blamed
from bertray.errors import (
    RequestError,
    ShardChangedError,
    ShardError,
    ShardRefusedError,
    UnavailableError,
)
from bertray.scoring.config import ScoreConfig
from bertray.scoring.score_shard import STEP_BYTES, merge_parts, origin_of, read_counts, score_shard
from bertray.scoring.shard_reader import opened, read_in_isolation
from bertray.scoring.units import ENGINE_FOLDER, STAGING_FOLDER, Blame, Counts, Outcome, Unit, staged_path
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import check_held
from bertray.storage.outputs import in_parallel
from bertray.storage.patience import alive, patiently
from bertray.types import Device
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Before a file is put, the run's lock is checked if the last check is older than this.
_LOCK_CHECK_INTERVAL_S = 5.0
# A process gives up when its place has failed for so many different shards without a success in between.
MAX_FAILURES_OF_PLACE = 3


@dataclass(frozen=True)
class Request:
    """What every process of a run must know."""

    config: ScoreConfig  # its places are absolute
    archive: str  # URI that the shards' paths are relative to
    fingerprint: str  # see `manifest.fingerprint`
    bundle_fingerprint: str  # of the bundle as it was when the run began
    lock_number: int  # see `lock.check_held`
    step_bytes: int = STEP_BYTES["cpu"]  # see `score_shard.score_shard`
    suspects: frozenset[str] = frozenset()  # paths of shards that may crash the process that reads them
    samples: tuple[str, ...] = ()  # paths of some shards: whether a process can read any tells whose fault a refusal is

    def model_spec(self, device: Device, num_threads: int = 0) -> ModelSpec:
        """How a process of the run loads the model."""
        config, cache = self.config, str(Location.of(self.config.output) / ENGINE_FOLDER)
        how = config.engine, config.precision, device, cache, num_threads, config.unit_timeout
        return ModelSpec(config.bundle, *how, config.probabilities)


class UnitScorer:
    """Scores units of a run, in any number of threads. It raises `fatal` errors; all others become outcomes.

    Attributes:
        gives_up: the last reason, if this place has failed too often.
        is_ended: nobody waits for outcomes any more.
    """

    def __init__(self, request: Request, fatal: tuple[type[Exception], ...] = ()) -> None:
        self._request, self._config, self._fatal = request, request.config, fatal
        self.gives_up = ""
        self.is_ended = threading.Event()
        self._failed_here: set[str] = set()  # paths of shards for which the place is at fault, since the last success
        self._counting = threading.Lock()
        self._archive, self._output = Location.of(request.archive), Location.of(request.config.output)
        self._versions = json.dumps(versions())  # once: the look-up takes longer than a tiny shard
        self._checked_s = -float("inf")

    def score(
        self, unit: Unit, bundle: Predictor, *, is_suspect: bool = False, run: Callable[..., Iterator[Any]] = map
    ) -> list[Outcome]:
        """Score the shards of a unit, or its part; an outcome for each, until the place has failed too often.

        If a process died over the unit (`is_suspect`), first remove what it left half-written, and read every shard in
        a child process, to find one that crashes its reader.

        Args:
            run: `map`, or that of an executor, for shards side by side.
        """
        part = unit.part if unit.num_parts > 1 else None

        def outcome(shard: FileInfo) -> Outcome | None:
            if self.gives_up or self.is_ended.is_set():
                return None
            alive()
            return self._outcome(shard, part, partial(self._scored, shard, unit, bundle, is_suspect), bundle)

        return [one for one in run(outcome, unit.shards) if one]

    def not_begun(self, unit: Unit, error: Exception, *, gives_up: bool = False) -> list[Outcome]:
        """The outcome of a unit that this place cannot score, and maybe no other."""
        part = unit.part if unit.num_parts > 1 else None
        outcome = self._failed(unit.shards[0], part, f"{type(error).__name__}: {error}", "place", at_once=gives_up)
        return [outcome] if outcome else []

    def merge(self, shard: FileInfo, num_parts: int) -> Outcome | None:
        """Merge the staged parts of a shard into one staged file. None: the place has given up."""
        return self._outcome(shard, None, partial(self._merged, shard, num_parts))

    def _outcome(
        self,
        shard: FileInfo,
        part: int | None,
        work: Callable[[], tuple[Counts, str]],
        predictor: Predictor | None = None,
    ) -> Outcome | None:
        at_once = False
        try:
            counts, precision = patiently(work, self.is_ended)
        except self._fatal:
            raise
        except Exception as error:  # the others go on
            found = error
            if not isinstance(error, ShardError | UnavailableError):
                _log.exception("unexpected failure of %s", shard.path)
                found = blamed(error, predictor)
            # Any error may have this cause: a shard that is rewritten while it is read makes no sense.
            if isinstance(found, ShardChangedError) or self._has_changed(shard):
                of: Blame = "version"
            elif isinstance(found, UnavailableError):
                of = "place"
                at_once = found.why == "away"  # it has been waited for
            elif isinstance(found, ShardRefusedError) and not self._reads_others(shard):
                of = "place"
            else:
                of = "shard"
            return self._failed(shard, part, str(found), of, at_once=at_once)
        self._failed_here.clear()
        return Outcome(shard=shard, part=part, counts=counts, precision=precision)

    def _failed(
        self, shard: FileInfo, part: int | None, reason: str, of: Blame, *, at_once: bool = False
    ) -> Outcome | None:
        """None: others have failed meanwhile, and the place has given up; this shard loses no try."""
        if of == "place":
            with self._counting:
                if self.gives_up:
                    return None
                self._failed_here.add(shard.path)
                if at_once or len(self._failed_here) >= MAX_FAILURES_OF_PLACE:
                    self.gives_up = reason
        return Outcome(shard=shard, part=part, failure=reason, of=of, node=socket.gethostname())

    def _reads_others(self, shard: FileInfo) -> bool:
        """Whether another shard of the archive can be read here, now."""
        for path in set(self._request.samples) - {shard.path}:
            with suppress(ShardError, UnavailableError), opened(self._archive / path):
                return True
        return False

    def _scored(self, shard: FileInfo, unit: Unit, bundle: Predictor, is_suspect: bool) -> tuple[Counts, str]:
        part = unit.part, unit.num_parts
        source, target = self._archive / shard.path, self._target(shard, *part)
        how = self._config.text_column, self._config.keep_columns, self._request.step_bytes
        if is_suspect:
            target.remove_unfinished()
            read_in_isolation(source, *how, self._config.unit_timeout)
        return score_shard(bundle, source, target, *how, part=part, **self._put_options(shard)), bundle.precision

    def _merged(self, shard: FileInfo, num_parts: int) -> tuple[Counts, str]:
        with opened(self._archive / shard.path) as file:
            num_rows = file.metadata.num_rows
        parts, target = [self._target(shard, part, num_parts) for part in range(num_parts)], self._target(shard)
        target.remove_unfinished()  # an earlier attempt may have died
        remove_parts = partial(in_parallel, partial(Location.remove, is_file=True), parts)
        try:
            merged = merge_parts(parts, target, num_rows, **self._put_options(shard))
        except ShardRefusedError:
            with suppress(ShardError):  # an earlier attempt had merged them, and died while it removed them
                return read_counts(target)
            raise
        except ShardError as error:  # the next run scores them again
            remove_parts()
            raise type(error)(f"its staged parts cannot be merged, and are removed: {error}") from error
        remove_parts()
        return merged

    def _target(self, shard: FileInfo, part: int = 0, num_parts: int = 1) -> Location:
        return self._output / STAGING_FOLDER / staged_path(shard, self._request.fingerprint, part, num_parts)

    def _put_options(self, shard: FileInfo) -> dict[str, Any]:
        origin = {**origin_of(shard, self._request.fingerprint), "bertray.versions": self._versions}
        return {"before_put": partial(self._check, shard), "origin": origin}

    def _check(self, listed: FileInfo) -> None:
        """Check before a predictions file is put: does the run hold its lock, and is the shard still the same?"""
        if time.monotonic() - self._checked_s > _LOCK_CHECK_INTERVAL_S:
            check_held(self._output, self._request.lock_number)
            self._checked_s = time.monotonic()
        try:
            now = self._current(listed)
        except UnavailableError as error:
            if error.why != "missing":
                raise
            raise ShardRefusedError(f"it went away while it was read: {error}") from error
        if now != listed:
            raise ShardChangedError(
                f"it was rewritten while it was read: {listed.size_bytes} bytes, version {listed.version}; "
                f"now {now.size_bytes} bytes, version {now.version}"
            )

    def _has_changed(self, listed: FileInfo) -> bool:
        try:
            return self._current(listed) != listed
        except RequestError:
            return False

    def _current(self, listed: FileInfo) -> FileInfo:
        return replace((self._archive / listed.path).info(), path=listed.path)
