"""The pool of actors that score: a row of a Ray Dataset is a unit of work, which an actor scores.

    units -> actors, each with the model in memory -> outcomes of shards
                                                   -> outcomes of parts -> all staged: a task merges them

What the driver needs before there is anything to score is in `bertray.scoring`; this module takes seconds to import.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
import torch
from ray.util.annotations import RayDeprecationWarning

from bertray import cluster, scorer
from bertray.bundle import Bundle
from bertray.bundle_folder import BundleInfo
from bertray.config import ScoreConfig
from bertray.errors import BundleError
from bertray.isolated import IsolatedBundle, ModelSpec, read_in_isolation
from bertray.ledger import fingerprint
from bertray.openvino_engine import prepare
from bertray.process import ModelThread
from bertray.scorer import UnitScorer
from bertray.shards import STEP_BYTES
from bertray.storage import FileInfo, Location
from bertray.work import Outcome, Unit, Work, divide

_log = logging.getLogger(__name__)

# Of the output: models that were exported for another engine than torch.
ENGINE_FOLDER = "engine"
# The next unit waits at the actor. A restarted actor takes both to be suspects.
_MAX_UNITS_IN_FLIGHT = 2
# What a restarted actor suspects it reads and scores in processes of their own: a unit dies with its actor only where
# something else ends that.
_MAX_ACTOR_RESTARTS, _MAX_RETRIES = 100, 10


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


class Pool:
    """The actors of a run, ready to be given work.

    Args:
        config: of the run, its places absolute.
        archive: what the shards' paths are relative to.
        lock_number: of the run's lock, see `run_lock.check_held`.
    """

    def __init__(
        self, config: ScoreConfig, info: BundleInfo, archive: Location, placement: cluster.Placement, lock_number: int
    ) -> None:
        self._placement = placement
        self._device: Literal["cpu", "cuda"] = "cuda" if placement.use_gpu else "cpu"
        self._config, self._bundle_fingerprint = config, info.fingerprint()
        self._request_fingerprint = fingerprint(info, config)
        self._arguments: dict[str, Any] = {
            "config": config,
            "archive": str(archive),
            "request_fingerprint": self._request_fingerprint,
            "lock_number": lock_number,
            "step_bytes": STEP_BYTES[self._device],
        }

    def divide(self, shards: list[FileInfo], staged: set[str]) -> Work:
        """Cut shards into units that fit the actors; see `work.divide`."""
        unit_bytes, num_actors = STEP_BYTES[self._device], self._placement.num_processes
        return divide(shards, unit_bytes, num_actors, self._request_fingerprint, staged)

    def outcomes(self, work: Work) -> Iterator[Outcome]:
        """Run the units; yields outcomes of shards and parts as they finish, and of shards when they are merged."""
        merges = _Merges(work, self._arguments)
        if work.units:
            for row in self._dataset(work.units).iter_rows():
                outcome = Outcome.model_validate_json(row["outcome"])
                yield outcome
                merges.take(outcome)
                yield from merges.finished(wait=False)
        yield from merges.finished(wait=True)

    def _dataset(self, units: list[Unit]) -> ray.data.Dataset:
        ray.data.DataContext.get_current().enable_progress_bars = False  # one bar, ours
        rows = [{"unit": unit.model_dump_json()} for unit in units]
        with warnings.catch_warnings():
            # In Ray 2.60 restarts can be bounded only through arguments that 2.64 will take in another form.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            # One row is one unit and one block: Ray neither mixes nor splits units, and a retry repeats one alone.
            return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                ScoringActor,
                fn_constructor_kwargs={
                    "device": self._device,
                    "bundle_fingerprint": self._bundle_fingerprint,
                    "arguments": self._arguments,
                },
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    size=self._placement.num_processes, max_tasks_in_flight_per_actor=_MAX_UNITS_IN_FLIGHT
                ),
                num_cpus=0 if self._placement.use_gpu else self._placement.cpus_each,
                num_gpus=1 if self._placement.use_gpu else 0,
                # By default a unit that kills its actor would be tried for ever.
                max_restarts=_MAX_ACTOR_RESTARTS,
                max_task_retries=_MAX_RETRIES,
            )


class _Merges:
    """Shards of which all parts are staged, on their way to a predictions file, each in a task of its own."""

    def __init__(self, work: Work, arguments: dict[str, Any]) -> None:
        self._num_parts, self._arguments = work.num_parts, arguments
        # Actors may hold every CPU, and a merge mostly waits for the storage.
        options = {"num_cpus": 0, "max_retries": _MAX_RETRIES, "scheduling_strategy": "SPREAD"}
        self._merge = ray.remote(scorer.merge).options(**options)
        self._missing = {shard: set(parts) for shard, parts in work.missing_parts.items()}
        self._running: dict[Any, FileInfo] = {}
        for shard in [shard for shard, parts in self._missing.items() if not parts]:
            self._start(shard)

    def take(self, outcome: Outcome) -> None:
        """Take in what has become of a part."""
        if outcome.part is None or outcome.failure:
            return
        self._missing[outcome.shard].discard(outcome.part)
        if not self._missing[outcome.shard]:
            self._start(outcome.shard)

    def _start(self, shard: FileInfo) -> None:
        merged = self._merge.remote(shard, self._num_parts[shard], **self._arguments)
        self._running[merged] = shard

    def finished(self, wait: bool) -> Iterator[Outcome]:
        """Outcomes of merges that are done, or of all."""
        while self._running:
            done, _ = ray.wait(list(self._running), timeout=None if wait else 0)
            if not done:
                return
            shard = self._running.pop(done[0])
            try:
                yield ray.get(done[0])
            except ray.exceptions.WorkerCrashedError as error:
                yield Outcome(shard=shard, failure=f"the process that merged its parts died: {error}")


class ScoringActor:
    """Holds the model; called with one unit of work at a time."""

    def __init__(self, device: Literal["cpu", "cuda"], bundle_fingerprint: str, arguments: dict[str, Any]) -> None:
        self._config: ScoreConfig = arguments["config"]
        self._step_bytes = arguments["step_bytes"]
        # A GPU that has failed once fails every later shard: those are not at fault.
        self._scorer = UnitScorer(**arguments, fatal=(torch.AcceleratorError,))
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

    def __call__(self, rows: pa.Table) -> pa.Table:
        unit = Unit.model_validate_json(rows["unit"][0].as_py())
        outcomes = self._thread.run(self._score, unit)
        return pa.table({"outcome": [outcome.model_dump_json() for outcome in outcomes]})

    def _load(self) -> Bundle:
        if self._bundle is None:
            self._bundle = self._spec.load()
            self._check_bundle(self._bundle.info)
        return self._bundle

    def _check_bundle(self, info: BundleInfo) -> None:
        if info.fingerprint() != self._bundle_fingerprint:
            raise BundleError(f"the bundle {self._config.bundle} was replaced while the job ran. Run it again")

    def _score(self, unit: Unit) -> list[Outcome]:
        if not self._num_suspect_units:
            return self._scorer.score(unit, self._load())
        self._num_suspect_units -= 1
        _log.warning("the actor died before; %d shards go through processes of their own", len(unit.shards))
        isolated = IsolatedBundle(self._spec)
        try:
            self._check_bundle(isolated.info)
            return self._scorer.score(unit, isolated, before_read=self._read_in_isolation)
        finally:
            isolated.close()

    def _read_in_isolation(self, shard: Location) -> None:
        read_in_isolation(shard, self._config.text_column, self._config.keep_columns, self._step_bytes)
