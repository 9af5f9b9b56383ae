"""The pool of actors that score: a row of a Ray Dataset is a unit of pending shards, each made a predictions file.

What the driver needs before there is anything to score is in `bertray.scoring`; this module takes seconds to import.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
import torch
from ray.util.annotations import RayDeprecationWarning

from bertray import cluster
from bertray.bundle import Bundle
from bertray.bundle_folder import BundleInfo
from bertray.config import ScoreConfig
from bertray.errors import BundleError, RequestError, ShardChangedError, ShardError
from bertray.isolated import IsolatedBundle, ModelSpec
from bertray.ledger import fingerprint
from bertray.openvino_engine import prepare
from bertray.process import ModelThread
from bertray.run_lock import check_held
from bertray.shards import STEP_BYTES, ShardCounts, score_shard
from bertray.storage import FileInfo, Location
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Of the output: models that were exported for another engine than torch.
ENGINE_FOLDER = "engine"
# The next unit waits at the actor. A restarted actor takes both to be suspects.
_MAX_UNITS_IN_FLIGHT = 2
# A deadly text costs one restart, for the second time it meets a process of its own. A unit that ends its actor
# nevertheless (a file that ends the Parquet reader) ends the run.
_MAX_ACTOR_RESTARTS, _MAX_UNIT_RETRIES = 100, 3
# Of a task: enough that its own cost is small, few enough that a progress bar moves.
_MAX_UNIT_SHARDS = 256
_MIN_UNITS_AN_ACTOR = 16
# Of a shard that is rewritten while it is read.
_MAX_READS = 3
# An actor looks at the run's lock before it puts a file, if it has not done so for this long.
_LOCK_CHECK_INTERVAL_S = 5.0


def prepare_engine(config: ScoreConfig, output: Location) -> dict[str, Any]:
    """Do once what every actor would do, and say what the summary should of the engine.

    Raises:
        RequestError: the engine is not installed, or cannot run the model.
    """
    if config.engine != "openvino":
        return {"engine": "torch"}
    # Beside the predictions, where actors on other nodes find it, and the next run.
    return prepare(config.bundle, config.precision, output / ENGINE_FOLDER).summary()


def place(config: ScoreConfig, num_shards: int) -> cluster.Placement:
    """How many actors hold the model, and what each is given.

    Raises:
        RequestError: this machine is too small for what was asked.
    """
    device = "cpu" if config.engine == "openvino" else config.device
    placement = cluster.place(device, config.num_actors, "--num-actors")
    placement = replace(placement, num_processes=min(placement.num_processes, num_shards))
    _log.info("actors: %d, each with %s", placement.num_processes, placement.share)
    return placement


def outcomes(
    config: ScoreConfig,
    info: BundleInfo,
    archive: Location,
    output: Location,
    shards: list[FileInfo],
    placement: cluster.Placement,
    lock_number: int,
) -> Iterator[dict[str, Any]]:
    """Run the actor pool over the shards; yields one outcome a shard, as they finish."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one bar, ours
    device: Literal["cpu", "cuda"] = "cuda" if placement.use_gpu else "cpu"
    units = [
        {
            "paths": [shard.path for shard in unit],
            "sizes_bytes": [shard.size_bytes for shard in unit],
            "versions": [shard.version for shard in unit],
        }
        for unit in units_of(shards, STEP_BYTES[device], placement.num_processes)
    ]
    with warnings.catch_warnings():
        # In Ray 2.60 restarts can be bounded only through arguments that 2.64 will take in another form.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # One row is one unit and one block: Ray neither mixes nor splits units, and a retry repeats one alone.
        dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            ScoringActor,
            fn_constructor_kwargs={
                "config": config.model_dump(),
                "device": device,
                "archive": str(archive),
                "bundle_fingerprint": info.fingerprint(),
                "request_fingerprint": fingerprint(info, config),
                "lock_number": lock_number,
            },
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=placement.num_processes, max_tasks_in_flight_per_actor=_MAX_UNITS_IN_FLIGHT
            ),
            num_cpus=0 if placement.use_gpu else placement.cpus_each,
            num_gpus=1 if placement.use_gpu else 0,
            # By default a unit that kills its actor would be tried for ever.
            max_restarts=_MAX_ACTOR_RESTARTS,
            max_task_retries=_MAX_UNIT_RETRIES,
        )
    yield from dataset.iter_rows()


def units_of(shards: list[FileInfo], unit_bytes: int, num_actors: int) -> list[list[FileInfo]]:
    """Consecutive shards that one task scores, each of them by itself: a task costs more than a tiny shard.

    A unit has no more than so many bytes, unless one shard has, and no more shards than leave every actor some units.
    """
    most_shards = max(1, min(_MAX_UNIT_SHARDS, len(shards) // (_MIN_UNITS_AN_ACTOR * num_actors)))
    units: list[list[FileInfo]] = []
    num_bytes = 0
    for shard in shards:
        num_bytes += shard.size_bytes
        if not units or num_bytes > unit_bytes or len(units[-1]) == most_shards:
            units.append([])
            num_bytes = shard.size_bytes
        units[-1].append(shard)
    return units


class ScoringActor:
    """Holds the model; called with one unit of work at a time."""

    def __init__(
        self,
        config: dict[str, Any],
        device: Literal["cpu", "cuda"],
        bundle_fingerprint: str,
        request_fingerprint: str,
        lock_number: int,
        archive: str,
    ) -> None:
        self._config = ScoreConfig.model_construct(**config)
        self._archive = Location.of(archive)
        # Once: looking versions up takes longer than a tiny shard.
        self._origin = {
            "bertray.request_fingerprint": request_fingerprint,
            "bertray.versions": json.dumps(versions()),
        }
        self._lock_number, self._held_s = lock_number, -float("inf")
        self._step_bytes = STEP_BYTES[device]
        context = ray.get_runtime_context()
        self._spec = ModelSpec(
            bundle=self._config.bundle,
            engine=self._config.engine,
            precision=self._config.precision,
            device=device,
            cache=str(Location.of(self._config.output) / ENGINE_FOLDER),
            num_threads=max(1, int(context.get_assigned_resources().get("CPU", 1))),
        )
        self._bundle_fingerprint = bundle_fingerprint
        self._bundle: Bundle | None = None
        self._thread = ModelThread()
        # What the actor was at work on when it died comes first: one of its texts may be the cause.
        self._num_suspect_units = _MAX_UNITS_IN_FLIGHT if context.was_current_actor_reconstructed else 0
        if not self._num_suspect_units:
            self._thread.run(self._load)

    def __call__(self, unit: pa.Table) -> pa.Table:
        columns = (unit[name][0].as_py() for name in ("paths", "sizes_bytes", "versions"))
        shards = [FileInfo(*facts) for facts in zip(*columns, strict=True)]
        return pa.Table.from_pylist(self._thread.run(self._score_unit, shards))

    def _load(self) -> Bundle:
        if self._bundle is None:
            self._bundle = self._spec.load()
            self._check_bundle(self._bundle.info)
        return self._bundle

    def _check_bundle(self, info: BundleInfo) -> None:
        if info.fingerprint() != self._bundle_fingerprint:
            raise BundleError(f"the bundle {self._config.bundle} was replaced while the job ran. Run it again")

    def _score_unit(self, shards: list[FileInfo]) -> list[dict[str, Any]]:
        if not self._num_suspect_units:
            bundle = self._load()
            return [self._score(shard, bundle) for shard in shards]
        self._num_suspect_units -= 1
        _log.warning("the actor died before; %d shards go through a process of their own", len(shards))
        isolated = IsolatedBundle(self._spec)
        try:
            self._check_bundle(isolated.info)
            return [self._score(shard, isolated) for shard in shards]
        finally:
            isolated.close()

    def _score(self, shard: FileInfo, bundle: Bundle | IsolatedBundle) -> dict[str, Any]:
        """What has become of one shard."""
        outcome: dict[str, Any] = {
            "path": shard.path,
            "size_bytes": shard.size_bytes,
            "version": shard.version,
            "num_rows": 0,
            "num_rows_error": 0,
            "num_rows_repeated": 0,
            "num_tokens": 0,
            "num_tokens_repeated": 0,
            "precision": bundle.precision,
            "failure": "",
        }
        try:
            predictions = Location.of(self._config.output) / "predictions" / shard.path
            listed, counts = self._score_shard(bundle, shard, self._archive / shard.path, predictions)
            outcome |= {"size_bytes": listed.size_bytes, "version": listed.version, **vars(counts)}
            outcome["precision"] = bundle.precision
        except ShardError as error:
            outcome["failure"] = str(error)
        except torch.AcceleratorError:
            raise  # a GPU that has failed once fails every later shard: those are not at fault
        except Exception as error:  # whatever it is, it is this shard's: it is listed, and the others go on
            _log.exception("unexpected failure of %s", outcome["path"])
            outcome["failure"] = f"{type(error).__name__}: {error}"
        return outcome

    def _score_shard(
        self, bundle: Bundle | IsolatedBundle, listed: FileInfo, shard: Location, predictions: Location
    ) -> tuple[FileInfo, ShardCounts]:
        """Score a shard, anew if it is rewritten meanwhile; returns it as it was when all of it was read."""
        for attempt in range(1, _MAX_READS + 1):
            origin = {
                "bertray.shard": listed.path,
                "bertray.shard_size_bytes": str(listed.size_bytes),
                "bertray.shard_version": listed.version,
                **self._origin,
            }
            try:
                return listed, score_shard(
                    bundle,
                    shard,
                    predictions,
                    self._config.text_column,
                    list(self._config.keep_columns),
                    self._step_bytes,
                    before_put=partial(self._check, shard, listed),
                    origin=origin,
                )
            except ShardChangedError as error:
                if attempt == _MAX_READS:
                    raise
                _log.warning("%s: %s; reading it again", listed.path, error)
                now = shard.info()
                listed = FileInfo(listed.path, now.size_bytes, now.version)
        raise AssertionError("unreachable")

    def _check(self, shard: Location, listed: FileInfo) -> None:
        """Before a predictions file is put: is it still wanted, and still of this shard?"""
        if time.monotonic() - self._held_s > _LOCK_CHECK_INTERVAL_S:
            check_held(Location.of(self._config.output), self._lock_number)
            self._held_s = time.monotonic()
        try:
            now = shard.info()
        except RequestError as error:
            raise ShardError(f"it went away while it was read: {error}") from error
        if (now.size_bytes, now.version) != (listed.size_bytes, listed.version):
            raise ShardChangedError(
                f"it was rewritten while it was read: {listed.size_bytes} bytes, version {listed.version}; "
                f"now {now.size_bytes} bytes, version {now.version}"
            )
