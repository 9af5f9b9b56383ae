"""The pool of actors that score: a row of a Ray Dataset is a pending shard, which an actor makes a predictions file.

What the driver needs before there is anything to score is in `bertray.scoring`; this module takes seconds to import.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import ray
import ray.data
import torch
from ray.util.annotations import RayDeprecationWarning

from bertray import cluster
from bertray.bundle import Bundle
from bertray.bundle_folder import BundleInfo
from bertray.config import ScoreConfig
from bertray.errors import BundleError, RequestError, ShardChangedError, ShardError
from bertray.ledger import fingerprint
from bertray.openvino_engine import load_prepared, prepare
from bertray.process import ModelThread
from bertray.run_lock import check_held
from bertray.shards import STEP_BYTES, ShardCounts, score_shard
from bertray.storage import FileInfo, Location
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Of the output: models that were exported for another engine than torch.
ENGINE_FOLDER = "engine"
_MAX_ACTOR_RESTARTS = 3
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


def outcomes(
    config: ScoreConfig, info: BundleInfo, archive: Location, output: Location, shards: list[FileInfo], lock_number: int
) -> Iterator[dict[str, Any]]:
    """Run the actor pool over the shards; yields one outcome a shard, as they finish."""
    device = "cpu" if config.engine == "openvino" else config.device
    placement = cluster.place(device, config.num_actors, "--num-actors")
    num_actors = min(placement.num_processes, len(shards))
    _log.info("actors: %d, each with %s", num_actors, placement.share)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one bar, ours
    units = [
        {
            "path": shard.path,
            "size_bytes": shard.size_bytes,
            "version": shard.version,
            "shard": str(archive / shard.path),
            "predictions": str(output / "predictions" / shard.path),
        }
        for shard in shards
    ]
    with warnings.catch_warnings():
        # In Ray 2.60 restarts can be bounded only through arguments that 2.64 will take in another form.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # One row is one shard and one block: Ray neither mixes nor splits shards, and a retry repeats one alone.
        dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            ScoringActor,
            fn_constructor_kwargs={
                "config": config.model_dump(),
                "device": "cuda" if placement.use_gpu else "cpu",
                "bundle_fingerprint": info.fingerprint(),
                "request_fingerprint": fingerprint(info, config),
                "lock_number": lock_number,
            },
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=2),
            num_cpus=0 if placement.use_gpu else placement.cpus_each,
            num_gpus=1 if placement.use_gpu else 0,
            # By default a shard that kills its actor would be tried for ever.
            max_restarts=_MAX_ACTOR_RESTARTS,
            max_task_retries=_MAX_ACTOR_RESTARTS,
        )
    yield from dataset.iter_rows()


class ScoringActor:
    """Holds the model; called with one unit of work at a time."""

    def __init__(
        self,
        config: dict[str, Any],
        device: Literal["cpu", "cuda"],
        bundle_fingerprint: str,
        request_fingerprint: str,
        lock_number: int,
    ) -> None:
        self._request_fingerprint = request_fingerprint
        self._lock_number, self._held_s = lock_number, -float("inf")
        self._thread = ModelThread()
        self._thread.run(self._load, config, device, bundle_fingerprint)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._thread.run(self._score, batch)

    def _load(self, config: dict[str, Any], device: Literal["cpu", "cuda"], bundle_fingerprint: str) -> None:
        self._config = ScoreConfig.model_construct(**config)
        self._step_bytes = STEP_BYTES[device]
        assigned = ray.get_runtime_context().get_assigned_resources()
        num_threads = max(1, int(assigned.get("CPU", 1)))
        if device == "cpu":
            torch.set_num_threads(num_threads)
        if self._config.engine == "openvino":
            cache = Location.of(self._config.output) / ENGINE_FOLDER
            self._bundle = load_prepared(self._config.bundle, self._config.precision, cache, num_threads)
        else:
            assert self._config.precision != "int8"  # bertray.config has checked it
            self._bundle = Bundle.load(self._config.bundle, self._config.precision, device)
        if self._bundle.info.fingerprint() != bundle_fingerprint:
            raise BundleError(f"the bundle {self._config.bundle} was replaced while the job ran. Run it again")

    def _score(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = {name: values[0] for name, values in batch.items()}
        outcome: dict[str, Any] = {
            "path": str(unit["path"]),
            "size_bytes": int(unit["size_bytes"]),
            "version": str(unit["version"]),
            "num_rows": 0,
            "num_rows_error": 0,
            "num_rows_repeated": 0,
            "num_tokens": 0,
            "num_tokens_repeated": 0,
            "precision": self._bundle.encoder.precision,
            "failure": "",
        }
        try:
            listed, counts = self._score_shard(
                FileInfo(outcome["path"], outcome["size_bytes"], outcome["version"]),
                Location.of(str(unit["shard"])),
                Location.of(str(unit["predictions"])),
            )
            outcome |= {"size_bytes": listed.size_bytes, "version": listed.version, **vars(counts)}
        except ShardError as error:
            outcome["failure"] = str(error)
        except torch.AcceleratorError:
            raise  # a GPU that has failed once fails every later shard: those are not at fault
        except Exception as error:  # whatever it is, it is this shard's: it is listed, and the others go on
            _log.exception("unexpected failure of %s", outcome["path"])
            outcome["failure"] = f"{type(error).__name__}: {error}"
        return {name: [value] for name, value in outcome.items()}

    def _score_shard(self, listed: FileInfo, shard: Location, predictions: Location) -> tuple[FileInfo, ShardCounts]:
        """Score a shard, anew if it is rewritten meanwhile; returns it as it was when all of it was read."""
        for attempt in range(1, _MAX_READS + 1):
            origin = {
                "bertray.shard": listed.path,
                "bertray.shard_size_bytes": str(listed.size_bytes),
                "bertray.shard_version": listed.version,
                "bertray.request_fingerprint": self._request_fingerprint,
                "bertray.versions": json.dumps(versions()),
            }
            try:
                return listed, score_shard(
                    self._bundle,
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
