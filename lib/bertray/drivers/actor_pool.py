"""The pool of Ray actors that score. A row of a Ray Dataset is a unit of work; an actor scores it.

    units -> actors, each with the model in memory -> outcomes of shards
                                                   -> outcomes of parts -> when all are staged, a task merges them

An actor whose place has failed for `MAX_FAILURES_OF_PLACE` different shards in a row ends, and Ray starts another. When
that has happened `_MAX_ENDS` times on a node, the pass ends, and later passes leave the node out.

The driver imports this module and runs no model, so torch is imported in the actors only.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from bertray.bundle.info import BundleInfo, was_replaced
from bertray.bundle.isolated import LOAD_TIMEOUT_S, IsolatedBundle, Predictor
from bertray.drivers import cluster
from bertray.drivers.status_actors import LogBook, log_to, show
from bertray.errors import BundleError
from bertray.scoring import score_unit
from bertray.scoring.score_shard import STEP_BYTES
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Outcome, Unit, Work, num_pieces
from bertray.storage.location import FileInfo
from bertray.storage.patience import patiently, watched

if TYPE_CHECKING:
    from bertray.bundle.bundle import Bundle

_log = logging.getLogger(__name__)

# One unit is scored and the next one waits. A restarted actor suspects both.
_MAX_UNITS_IN_FLIGHT = 2
# Without limits, Ray would retry a unit that kills its actor forever.
_MAX_ACTOR_RESTARTS, _MAX_RETRIES = 100, 10
# Actors of one node that have given up.
_MAX_ENDS = 3


class ActorPool:
    """A `score_unit.Pool` of Ray actors, no more than there are pieces to score; it sets the request's `step_bytes`.

    Raises:
        RequestError: this machine is too small for the request.
    """

    def __init__(self, request: Request, pending: list[FileInfo]) -> None:
        config = request.config
        device = "cpu" if config.engine == "openvino" else config.device
        self._placement = cluster.place(device, config.num_actors, "--num-actors")
        self._device: Literal["cpu", "cuda"] = "cuda" if self._placement.use_gpu else "cpu"
        self.unit_bytes = STEP_BYTES[self._device]
        self._request = replace(request, step_bytes=self.unit_bytes)
        num_units = sum(num_pieces(shard, self.unit_bytes) for shard in pending)
        self.num_processes = min(self._placement.num_processes, num_units)
        self._left_out: dict[str, tuple[str, str]] = {}  # by node id: its name, and why it is left out
        self._have_failed: set[str] = set()  # ids of nodes that were at fault for something
        _log.info("actors: %d, each with %s", self.num_processes, self._placement.share)

    def run(self, work: Work) -> Iterator[Outcome]:
        """See `score_unit.Pool.run`."""
        without = _without(self._nodes_out())
        # A merge needs no CPU of its own: actors may hold all of them, and it mostly waits for the storage.
        options = {"num_cpus": 0, "max_retries": _MAX_RETRIES, "scheduling_strategy": "SPREAD"}
        merge = ray.remote(**options, label_selector=without)(score_unit.merge)
        merging: dict[Any, FileInfo] = {}

        def start_merge(shard: FileInfo) -> None:
            merging[merge.remote(self._request, shard, work.num_parts[shard])] = shard

        book = LogBook()
        for shard in work.complete():
            start_merge(shard)
        if work.units:
            ends = Counter[str]()
            with closing(iter(self._dataset(work.units, without).iter_rows())) as rows:
                for row in rows:
                    for line in json.loads(row["log"]):
                        book.log(*line)
                    show(book.logged())
                    if row["fatal"]:
                        raise BundleError(row["fatal"])
                    outcome = Outcome.model_validate_json(row["outcome"])
                    yield outcome
                    if (ready := work.take(outcome)) is not None:
                        start_merge(ready)
                    yield from _merged(merging, timeout_s=0)
                    if outcome.of == "place":
                        self._have_failed.add(row["node_id"])
                    ends[row["node_id"]] += row["gives_up"]
                    if ends[row["node_id"]] == _MAX_ENDS:
                        self._left_out[row["node_id"]] = outcome.node, outcome.failure
                        _log.warning("warning: node %s is left out from now on: %s", outcome.node, outcome.failure)
                        break
        yield from _merged(merging, timeout_s=None)

    def _nodes_out(self) -> set[str]:
        """The nodes that a pass does without; UnavailableError if no other is left."""
        kind = "GPU" if self._placement.use_gpu else "CPU"
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind)}
        left = nodes - self._left_out.keys()
        if self._left_out and not left:
            raise score_unit.none_is_left(dict(self._left_out.values()))
        if not left - self._have_failed:  # what has failed there cannot be tried elsewhere
            self._have_failed.clear()
        return self._left_out.keys() | self._have_failed

    def _dataset(self, units: list[Unit], without: dict[str, str] | None) -> ray.data.Dataset:
        ray.data.DataContext.get_current().enable_progress_bars = False  # bertray shows its own
        rows = [{"unit": unit.model_dump_json()} for unit in units]
        with warnings.catch_warnings():
            # Ray 2.60 limits restarts only by these arguments, and announces another form for 2.64.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            # One unit per row and block: Ray neither mixes nor splits units, and a retry repeats a single unit.
            return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                ScoringActor,
                fn_constructor_kwargs={"device": self._device, "request": self._request},
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    size=self.num_processes, max_tasks_in_flight_per_actor=_MAX_UNITS_IN_FLIGHT
                ),
                num_cpus=0 if self._placement.use_gpu else self._placement.cpus_each,
                num_gpus=1 if self._placement.use_gpu else 0,
                label_selector=without,
                max_restarts=_MAX_ACTOR_RESTARTS,
                max_task_retries=_MAX_RETRIES,
            )


def _without(node_ids: set[str]) -> dict[str, str] | None:
    """The label selector of all other nodes."""
    return {"ray.io/node-id": f"!in({','.join(node_ids)})"} if node_ids else None


def _merged(merging: dict[Any, FileInfo], timeout_s: float | None) -> Iterator[Outcome]:
    """Take out the merges that end within the timeout; None: all."""
    while merging:
        done, _ = ray.wait(list(merging), timeout=timeout_s)
        if not done:
            return
        shard = merging.pop(done[0])
        try:
            yield ray.get(done[0])
        except cluster.LOST_ERRORS as error:
            reason = f"the process that merged its parts died: {error}"
            yield Outcome(shard=shard, failure=reason, of="place", node="a node that merges")


class _ReplacedError(Exception):
    """The bundle is another one than when the run began, on every node."""


class ScoringActor:
    """Holds the model and scores one unit per call.

    If an actor dies, one of its units may be the cause. So a restarted actor first scores as many units as were in
    flight in child processes, which find the text that crashes the process. Only then does it load the model itself.

    A row of an answer is an outcome, or `fatal`: the bundle was replaced since the run began.
    """

    def __init__(self, device: Literal["cpu", "cuda"], request: Request) -> None:
        self._book = LogBook()
        log_to(self._book.log)
        import torch

        from bertray.model.runtime import model_thread

        self._request = request
        # A GPU that has failed once fails every later shard, which is not the shards' fault.
        self._fatal = (torch.AcceleratorError,)
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        self._scorer = UnitScorer(request, self._fatal)
        self._spec = request.model_spec(device, cluster.assigned_cpus())
        self._bundle: Bundle | None = None
        self._thread = model_thread()
        self._is_restarted = context.was_current_actor_reconstructed
        self._num_suspect_units = _MAX_UNITS_IN_FLIGHT if self._is_restarted else 0

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self._scorer.gives_up:  # the driver has the outcomes that say why
            os._exit(1)
        unit = Unit.model_validate_json(rows["unit"][0].as_py())
        try:
            outcomes = self._thread.submit(self._score, unit).result()
        except self._fatal as error:
            traceback.print_exc()
            if not self._is_restarted:  # the next actor finds out whether the unit is at fault
                os._exit(1)
            outcomes = self._scorer.not_begun(unit, error, gives_up=True)
        except _ReplacedError as error:  # an exception would reach the driver as a text of Ray's
            return self._answer([""], fatal=str(error))
        return self._answer([one.model_dump_json() for one in outcomes])

    def _answer(self, outcomes: list[str], fatal: str = "") -> pa.Table:
        # The first row gets all log lines, the last one the end.
        rows = [
            {
                "outcome": outcome,
                "log": json.dumps(self._book.logged()),
                "node_id": self._node_id,
                "gives_up": self._scorer.gives_up and number == len(outcomes),
                "fatal": fatal,
            }
            for number, outcome in enumerate(outcomes, 1)
        ]
        return pa.Table.from_pylist(rows)

    def _score(self, unit: Unit) -> list[Outcome]:
        is_suspect = self._num_suspect_units > 0
        try:
            with watched(LOAD_TIMEOUT_S):
                bundle: Predictor = patiently(self._isolated) if is_suspect else patiently(self._load)
        except (_ReplacedError, *self._fatal):
            raise
        except Exception as error:  # such as a driver that is too old for torch
            _log.exception("the model cannot be loaded on this node")
            return self._scorer.not_begun(unit, error)
        if isinstance(bundle, IsolatedBundle):  # it watches its child
            self._num_suspect_units -= 1
            _log.warning("an actor died; scoring its unit (shards: %d) in a child process", len(unit.shards))
            with bundle:
                return self._scorer.score(unit, bundle, is_suspect=True)
        with watched(self._request.config.unit_timeout):
            return self._scorer.score(unit, bundle)

    def _isolated(self) -> IsolatedBundle:
        isolated = IsolatedBundle(self._spec)
        self._check(isolated.info)
        return isolated

    def _load(self) -> Bundle:
        if self._bundle is None:
            self._bundle = self._spec.load()
            self._check(self._bundle.info)
        return self._bundle

    def _check(self, info: BundleInfo) -> None:
        if info.fingerprint() != self._request.bundle_fingerprint:
            raise _ReplacedError(str(was_replaced(self._request.config.bundle)))
