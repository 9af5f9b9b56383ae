"""What a worker does with a unit of work: score its shards, each failing by itself; with a shard's parts: merge.

It knows no Ray, and no torch: who loads the model and moves units about is in `scoring.pool`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bertray.bundle.isolated import ModelSpec
from bertray.errors import RequestError, ShardChangedError, ShardError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.score_shard import STEP_BYTES, Predictor, merge_parts, score_shard
from bertray.scoring.shard_reader import opened, read_in_isolation
from bertray.scoring.units import ENGINE_FOLDER, STAGING_FOLDER, Counts, Outcome, Unit, staged_path
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import check_held
from bertray.types import Device
from bertray.versions import versions

_log = logging.getLogger(__name__)

# The run's lock is looked at before a file is put, if that has not been done for this long.
_LOCK_CHECK_INTERVAL_S = 5.0


@dataclass(frozen=True)
class Request:
    """What every process of a run must know.

    Attributes:
        config: of the run, its places absolute.
        archive: URI that the shards' paths are relative to.
        fingerprint: see `manifest.fingerprint`.
        bundle_fingerprint: of the bundle that the run began with.
        lock_number: of the run's lock, see `lock.check_held`.
        step_bytes: see `score_shard.score_shard`.
        suspects: paths of shards that may end the process which reads them, as far as is known before.
    """

    config: ScoreConfig
    archive: str
    fingerprint: str
    bundle_fingerprint: str
    lock_number: int
    step_bytes: int = STEP_BYTES["cpu"]
    suspects: frozenset[str] = frozenset()

    def model_spec(self, device: Device, num_threads: int = 0) -> ModelSpec:
        """How a process of the run is to load the model; see `ModelSpec`."""
        return ModelSpec(
            bundle=self.config.bundle,
            engine=self.config.engine,
            precision=self.config.precision,
            device=device,
            cache=str(Location.of(self.config.output) / ENGINE_FOLDER),
            num_threads=num_threads,
        )

    def read_in_isolation(self, shard: Location) -> None:
        """See `shard_reader.read_in_isolation`."""
        read_in_isolation(shard, self.config.text_column, self.config.keep_columns, self.step_bytes)


class UnitScorer:
    """Scores units of a run.

    Args:
        fatal: errors that are not a shard's own: they end the run.
    """

    def __init__(self, request: Request, fatal: tuple[type[Exception], ...] = ()) -> None:
        self._config, self._step_bytes = request.config, request.step_bytes
        self._archive, self._output = Location.of(request.archive), Location.of(request.config.output)
        self._request_fingerprint = request.fingerprint
        self._versions = json.dumps(versions())  # once: looking them up takes longer than a tiny shard
        self._lock_number, self._held_s = request.lock_number, -float("inf")
        self._fatal = fatal

    def score(
        self, unit: Unit, bundle: Predictor, before_read: Callable[[Location], None] | None = None
    ) -> list[Outcome]:
        """Score what the unit names; an outcome for each shard.

        Args:
            before_read: for what another process died over: called with each shard; a `ShardError` that it raises is
                the shard's. What that process may have half-written is removed.
        """
        part = None if unit.num_parts == 1 else unit.part
        return [self._outcome(shard, part, self._scored, bundle, unit.num_parts, before_read) for shard in unit.shards]

    def merge(self, shard: FileInfo, num_parts: int) -> Outcome:
        """Make the predictions file of a shard from its staged parts, which stay."""
        return self._outcome(shard, None, self._merged, num_parts)

    def _outcome(self, shard: FileInfo, part: int | None, work: Callable[..., Any], *arguments: Any) -> Outcome:
        try:
            counts, precision = work(shard, part, *arguments)
        except ShardError as error:
            # Whatever it looked like to the reader: a shard that is rewritten meanwhile makes no sense.
            has_changed = isinstance(error, ShardChangedError) or self._is_other(shard)
            return Outcome(shard=shard, part=part, failure=str(error), has_changed=has_changed)
        except self._fatal:
            raise
        except Exception as error:  # whatever it is, it is this shard's: it is listed, and the others go on
            _log.exception("unexpected failure of %s", shard.path)
            return Outcome(shard=shard, part=part, failure=f"{type(error).__name__}: {error}")
        return Outcome(shard=shard, part=part, counts=counts, precision=precision)

    def _scored(
        self,
        shard: FileInfo,
        part: int | None,
        bundle: Predictor,
        num_parts: int,
        before_read: Callable[[Location], None] | None,
    ) -> tuple[Counts, str]:
        place = self._archive / shard.path
        predictions = self._predictions(shard) if part is None else self._staged(shard, part, num_parts)
        if before_read is not None:
            predictions.remove_unfinished()
            before_read(place)
        counts = score_shard(
            bundle,
            place,
            predictions,
            self._config.text_column,
            list(self._config.keep_columns),
            self._step_bytes,
            part=None if part is None else (part, num_parts),
            before_put=lambda: self._check(shard),
            origin=self._origin(shard),
        )
        return counts, bundle.precision

    def _merged(self, shard: FileInfo, _: int | None, num_parts: int) -> tuple[Counts, str]:
        with opened(self._archive / shard.path) as file:
            num_rows = file.metadata.num_rows
        predictions = self._predictions(shard)
        predictions.remove_unfinished()  # this may be a second try
        return merge_parts(
            [self._staged(shard, part, num_parts) for part in range(num_parts)],
            predictions,
            num_rows,
            before_put=lambda: self._check(shard),
            origin=self._origin(shard),
        )

    def _predictions(self, shard: FileInfo) -> Location:
        return self._output / "predictions" / shard.path

    def _staged(self, shard: FileInfo, part: int, num_parts: int) -> Location:
        return self._output / STAGING_FOLDER / staged_path(shard, self._request_fingerprint, part, num_parts)

    def _origin(self, shard: FileInfo) -> dict[str, str]:
        return {
            "bertray.shard": shard.path,
            "bertray.shard_size_bytes": str(shard.size_bytes),
            "bertray.shard_version": shard.version,
            "bertray.request_fingerprint": self._request_fingerprint,
            "bertray.versions": self._versions,
        }

    def _is_other(self, listed: FileInfo) -> bool:
        try:
            now = (self._archive / listed.path).info()
        except RequestError:
            return False
        return (now.size_bytes, now.version) != (listed.size_bytes, listed.version)

    def _check(self, listed: FileInfo) -> None:
        """Before a predictions file is put: is it still wanted, and still of this shard?"""
        if time.monotonic() - self._held_s > _LOCK_CHECK_INTERVAL_S:
            check_held(self._output, self._lock_number)
            self._held_s = time.monotonic()
        try:
            now = (self._archive / listed.path).info()
        except RequestError as error:
            raise ShardError(f"it went away while it was read: {error}") from error
        if (now.size_bytes, now.version) != (listed.size_bytes, listed.version):
            raise ShardChangedError(
                f"it was rewritten while it was read: {listed.size_bytes} bytes, version {listed.version}; "
                f"now {now.size_bytes} bytes, version {now.version}"
            )


def merge(request: Request, shard: FileInfo, num_parts: int) -> Outcome:
    """`UnitScorer.merge`, as a function that another process can be given."""
    return UnitScorer(request).merge(shard, num_parts)
