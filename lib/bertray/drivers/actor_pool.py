"""The pool of actors that score: a row of a Ray Dataset is a unit of work, which an actor scores.

    units -> actors, each with the model in memory -> outcomes of shards
                                                   -> outcomes of parts -> all staged: a task merges them

What an actor does is in `drivers.scoring_actor`. Here neither torch nor transformers is imported: the driver runs no
model.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from bertray.drivers import cluster
from bertray.drivers.status_actors import LogBook, log_to, show
from bertray.scoring import score_unit
from bertray.scoring.config import ScoreConfig
from bertray.scoring.score_shard import STEP_BYTES
from bertray.scoring.score_unit import Request
from bertray.scoring.units import Outcome, Unit, Work, num_pieces
from bertray.storage.location import FileInfo

_log = logging.getLogger(__name__)

# The next unit waits at the actor. A restarted actor takes both to be suspects.
_MAX_UNITS_IN_FLIGHT = 2
# What a restarted actor suspects it reads and scores in processes of their own: a unit dies with its actor only where
# something else ends that.
_MAX_ACTOR_RESTARTS, _MAX_RETRIES = 100, 10


def place(config: ScoreConfig, pending: list[FileInfo]) -> cluster.Placement:
    """How many actors hold the model, no more than there are pieces to be scored, and what each is given.

    Raises:
        RequestError: this machine is too small for what was asked.
    """
    device = "cpu" if config.engine == "openvino" else config.device
    placement = cluster.place(device, config.num_actors, "--num-actors")
    unit_bytes = STEP_BYTES["cuda" if placement.use_gpu else "cpu"]
    num_units = sum(num_pieces(shard, unit_bytes) for shard in pending)
    placement = replace(placement, num_processes=min(placement.num_processes, num_units))
    _log.info("actors: %d, each with %s", placement.num_processes, placement.share)
    return placement


class ActorPool:
    """A `scoring.score_unit.Pool` of Ray actors.

    Args:
        request: of the run; its `step_bytes` are set here.
    """

    def __init__(self, request: Request, placement: cluster.Placement) -> None:
        self._placement = placement
        self._device: Literal["cpu", "cuda"] = "cuda" if placement.use_gpu else "cpu"
        self.num_processes = placement.num_processes
        self.unit_bytes = STEP_BYTES[self._device]
        self._request = replace(request, step_bytes=self.unit_bytes)

    def run(self, work: Work) -> Iterator[Outcome]:
        """See `scoring.score_unit.Pool.run`."""
        merges = _Merges(work, self._request)
        book = LogBook()
        if work.units:
            for row in self._dataset(work.units).iter_rows():
                for line in json.loads(row["log"]):
                    book.log(*line)
                show(book.logged())
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
                fn_constructor_kwargs={"device": self._device, "request": self._request},
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

    def __init__(self, work: Work, request: Request) -> None:
        self._work, self._request = work, request
        # Actors may hold every CPU, and a merge mostly waits for the storage.
        options = {"num_cpus": 0, "max_retries": _MAX_RETRIES, "scheduling_strategy": "SPREAD"}
        self._merge = ray.remote(score_unit.merge).options(**options)
        self._running: dict[Any, FileInfo] = {}
        for shard in work.complete():
            self._start(shard)

    def take(self, outcome: Outcome) -> None:
        """Take in what has become of a part."""
        if (shard := self._work.take(outcome)) is not None:
            self._start(shard)

    def _start(self, shard: FileInfo) -> None:
        merged = self._merge.remote(self._request, shard, self._work.num_parts[shard])
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
            except cluster.LOST_ERRORS as error:
                yield Outcome(shard=shard, failure=f"the process that merged its parts died: {error}")


class ScoringActor:
    """What Ray holds: an `scoring_actor.Actor`. Its imports take seconds, which the driver need not spend."""

    def __init__(self, **arguments: Any) -> None:
        self._book = LogBook()
        log_to(self._book.log)
        from bertray.drivers.scoring_actor import Actor

        self._actor = Actor(
            **arguments,
            num_threads=cluster.assigned_cpus(),
            # What the actor was at work on when it died comes first: something in it may be the cause.
            num_suspect_units=_MAX_UNITS_IN_FLIGHT if ray.get_runtime_context().was_current_actor_reconstructed else 0,
        )

    def __call__(self, rows: pa.Table) -> pa.Table:
        outcomes = self._actor.score(Unit.model_validate_json(rows["unit"][0].as_py()))
        logs = [self._book.logged() for _ in outcomes]  # the first takes all
        return pa.table(
            {"outcome": [outcome.model_dump_json() for outcome in outcomes], "log": [json.dumps(one) for one in logs]}
        )
