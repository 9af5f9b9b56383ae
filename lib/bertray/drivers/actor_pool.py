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
import socket
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, Literal

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.annotations import RayDeprecationWarning

from bertray.bundle.info import BundleInfo, was_replaced
from bertray.bundle.isolated import LOAD_TIMEOUT_S, IsolatedBundle
from bertray.drivers import cluster
from bertray.drivers.status_actors import LogBook, log_to, show
from bertray.scoring.pipeline import UNITS_AT_ONCE, Pipeline, shards_at_once
from bertray.scoring.pool import none_is_left
from bertray.scoring.score_shard import STEP_BYTES
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Outcome, Unit, Work, num_pieces
from bertray.storage.location import FileInfo
from bertray.storage.patience import patiently, watched

_log = logging.getLogger(__name__)

# Without limits, Ray would retry a unit that kills its actor forever.
_MAX_ACTOR_RESTARTS, _MAX_RETRIES = 100, 10
_UNITS_A_READ = 1000
# Until an answer has left the process.
_ANSWER_S = 1.0
# Actors of one node that have given up.
_MAX_ENDS = 3
# At once: each holds a row group, and a process of Ray.
_MERGES_A_NODE = 4
_TEXTS = ("log", "node", "node_id", "gives_up")
_ANSWER = pa.schema([("outcomes", pa.list_(pa.string())), *((name, pa.string()) for name in _TEXTS)])


class ActorPool:
    """A `pool.Pool` of Ray actors, no more than there are pieces to score; it sets the request's `step_bytes`.

    Raises:
        RequestError: this machine is too small for the request.
    """

    def __init__(self, request: Request, pending: list[FileInfo]) -> None:
        config = request.config
        device = "cpu" if config.engine == "openvino" else config.device
        self._placement = cluster.place(device, config.num_actors, "--num-actors", a_gpu=config.actors_per_gpu)
        self._device: Literal["cpu", "cuda"] = "cuda" if self._placement.use_gpu else "cpu"
        self.unit_bytes = STEP_BYTES[self._device]
        self._request = replace(request, step_bytes=self.unit_bytes)
        num_units = sum(num_pieces(shard, self.unit_bytes) for shard in pending)
        self.num_processes = min(self._placement.num_processes, num_units)
        self._left_out: dict[str, tuple[str, str]] = {}  # by node id: its name, and why it is left out
        self._have_failed: set[str] = set()  # ids of nodes that were at fault for something
        _log.info("actors: %d, each with %s", self.num_processes, self._placement.share)

    def run(self, work: Work) -> Generator[Outcome, None, None]:
        """See `pool.Pool.run`."""
        nodes_out = self._nodes_out()
        without = {"ray.io/node-id": f"!in({','.join(nodes_out)})"} if nodes_out else None
        merges = _Merges(self._request, work, without)
        book = LogBook()
        if work.units:
            ends = Counter[str]()
            with closing(iter(self._dataset(work.units, without).iter_rows())) as rows:
                for row in rows:
                    for line in json.loads(row["log"]):
                        book.log(*line)
                    show(book.logged())
                    for outcome in map(Outcome.model_validate_json, row["outcomes"]):
                        yield outcome
                        if (ready := work.take(outcome)) is not None:
                            merges.begin(ready)
                        if outcome.of == "place":
                            self._have_failed.add(row["node_id"])
                    yield from merges.ended(timeout_s=0)
                    ends[row["node_id"]] += bool(row["gives_up"])
                    if ends[row["node_id"]] == _MAX_ENDS:
                        self._left_out[row["node_id"]] = row["node"], row["gives_up"]
                        _log.warning("warning: node %s is left out from now on: %s", row["node"], row["gives_up"])
                        break
        yield from merges.ended(timeout_s=None)

    def _nodes_out(self) -> set[str]:
        """The nodes that a pass does without; UnavailableError if no other is left."""
        kind = "GPU" if self._placement.use_gpu else "CPU"
        nodes = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get(kind)}
        left = nodes - self._left_out.keys()
        if self._left_out and not left:
            raise none_is_left(dict(self._left_out.values()))
        if not left - self._have_failed:  # what has failed there cannot be tried elsewhere
            self._have_failed.clear()
        return self._left_out.keys() | self._have_failed

    def _dataset(self, units: list[Unit], without: dict[str, str] | None) -> ray.data.Dataset:
        ray.data.DataContext.get_current().enable_progress_bars = False  # bertray shows its own
        with warnings.catch_warnings():
            # Ray 2.60 limits restarts only by these arguments, and announces another form for 2.64.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            # One at a time: a task without a CPU would be started for each of its blocks at once.
            units_of = ray.data.read_datasource(_Units(units), num_cpus=0, concurrency=1, label_selector=without)
            units_of.context.target_max_block_size = 1  # a unit a block: Ray neither mixes nor splits units
            return units_of.map_batches(
                ScoringActor,
                fn_constructor_args=(self._device, self._request, self.num_processes),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(
                    size=min(self.num_processes, len(units)),  # a later pass has few
                    max_tasks_in_flight_per_actor=UNITS_AT_ONCE,
                    max_concurrent_calls_per_actor=UNITS_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                num_cpus=0 if self._placement.use_gpu else self._placement.cpus_each,
                num_gpus=1 / self._placement.a_gpu if self._placement.use_gpu else 0,
                label_selector=without,
                max_restarts=_MAX_ACTOR_RESTARTS,
                max_task_retries=_MAX_RETRIES,
            )


class _Units(Datasource):
    """Units as rows, some at a time: the first ones are scored while a million others wait to be handed over."""

    def __init__(self, units: list[Unit]) -> None:
        self._units = units

    def estimate_inmemory_data_size(self) -> None:
        """Unknown, and nobody needs it."""

    def get_read_tasks(self, *_: object, **__: object) -> list[ReadTask]:
        some = (self._units[start : start + _UNITS_A_READ] for start in range(0, len(self._units), _UNITS_A_READ))
        return [_read_task([unit.model_dump_json() for unit in units]) for units in some]


def _read_task(units: list[str]) -> ReadTask:
    facts = BlockMetadata(num_rows=len(units), size_bytes=None, input_files=None, exec_stats=None)
    return ReadTask(lambda: (pa.table({"unit": [unit]}) for unit in units), facts)


class _Merges:
    """Merges of shards whose parts are all staged, each in a task of Ray."""

    def __init__(self, request: Request, work: Work, without: dict[str, str] | None) -> None:
        # A merge needs no CPU of its own: actors may hold all of them, and it mostly waits for the storage.
        options = {"num_cpus": 0, "max_retries": _MAX_RETRIES, "scheduling_strategy": "SPREAD"}
        self._merge = ray.remote(**options, label_selector=without)(lambda *shard: UnitScorer(request).merge(*shard))
        self._num_parts = work.num_parts
        self._most = _MERGES_A_NODE * sum(node["Alive"] for node in ray.nodes())
        self._running: dict[Any, FileInfo] = {}
        self._waiting = deque(work.complete())

    def begin(self, shard: FileInfo) -> None:
        self._waiting.append(shard)

    def ended(self, timeout_s: float | None) -> Iterator[Outcome]:
        """Outcomes of the merges that end within the timeout; None: of all."""
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self._most:
                shard = self._waiting.popleft()
                self._running[self._merge.remote(shard, self._num_parts[shard])] = shard
            done, _ = ray.wait(list(self._running), timeout=timeout_s)
            if not done:
                return
            shard = self._running.pop(done[0])
            try:
                yield ray.get(done[0])
            except cluster.LOST_ERRORS as error:
                reason = f"the process that merged its parts died: {error}"
                yield Outcome(shard=shard, failure=reason, of="place", node="a node that merges")


class ScoringActor:
    """Holds the model and scores one unit per call, in `UNITS_AT_ONCE` threads of Ray.

    If an actor dies, one of its units may be the cause. So a restarted actor first scores as many units as were in
    flight in child processes, which find the text that crashes the process. Only then does it load the model itself.

    An answer is a row: the unit's outcomes; `gives_up`, said once, why this actor ends. Answers of other units come
    before an end.
    """

    def __init__(self, device: Literal["cpu", "cuda"], request: Request, num_actors: int) -> None:
        self._shards_at_once = shards_at_once(num_actors)
        self._book = LogBook()
        log_to(self._book.log)
        import torch

        # Its imports take seconds: an actor that is ready has them behind it.
        import bertray.bundle.bundle  # noqa: F401
        from bertray.model.runtime import ModelThread

        self._request = request
        # A GPU that has failed once fails every later shard, which is not the shards' fault.
        self._fatal = (torch.AcceleratorError,)
        context = ray.get_runtime_context()
        self._node_id = context.get_node_id()
        self._scorer = UnitScorer(request, self._fatal)
        self._spec = request.model_spec(device, cluster.assigned_cpus())
        self._pipeline: Pipeline | None = None
        self._beginning, self._ending = threading.Lock(), threading.Lock()
        self._at_work = threading.Semaphore(UNITS_AT_ONCE)
        self._has_said = False
        self._thread = ModelThread()
        self._is_restarted = context.was_current_actor_reconstructed
        self._num_suspect_units = UNITS_AT_ONCE if self._is_restarted else 0

    def __call__(self, rows: pa.Table) -> pa.Table:
        if self._scorer.gives_up:
            with self._ending:
                for _ in range(UNITS_AT_ONCE):
                    self._at_work.acquire()
                time.sleep(_ANSWER_S)
                os._exit(1)
        with self._at_work:
            return self._answer(Unit.model_validate_json(rows["unit"][0].as_py()))

    def _answer(self, unit: Unit) -> pa.Table:
        try:
            outcomes = self._score(unit)
        except self._fatal as error:
            traceback.print_exc()
            if not self._is_restarted:  # the next actor finds out whether the unit is at fault
                os._exit(1)
            outcomes = self._scorer.not_begun(unit, error, gives_up=True)
        with self._beginning:
            gives_up, self._has_said = "" if self._has_said else self._scorer.gives_up, bool(self._scorer.gives_up)
        row = {
            "outcomes": [one.model_dump_json() for one in outcomes],
            "log": json.dumps(self._book.logged()),
            "node": socket.gethostname(),
            "node_id": self._node_id,
            "gives_up": gives_up,
        }
        return pa.Table.from_pylist([row], schema=_ANSWER)

    def _score(self, unit: Unit) -> list[Outcome]:
        with self._beginning:
            isolated: IsolatedBundle | None = None
            try:
                if self._num_suspect_units or self._pipeline is None:
                    with watched(LOAD_TIMEOUT_S):
                        isolated = patiently(self._isolated if self._num_suspect_units else self._begin)
            except self._fatal:
                raise
            except Exception as error:  # such as a driver that is too old for torch
                _log.exception("the model cannot be loaded on this node")
                return self._scorer.not_begun(unit, error)
            if isolated:  # one after the other, to tell which is at fault
                self._num_suspect_units -= 1
                _log.warning("an actor died; scoring its unit (shards: %d) in a child process", len(unit.shards))
                with isolated:  # it watches its child
                    return self._scorer.score(unit, isolated, is_suspect=True)
        assert self._pipeline
        with watched(self._request.config.unit_timeout):
            return self._pipeline.submit(unit).result()

    def _isolated(self) -> IsolatedBundle:
        isolated = IsolatedBundle(self._spec)
        self._check(isolated.info)
        return isolated

    def _begin(self) -> None:
        bundle = self._thread.submit(self._spec.load).result()
        self._check(bundle.info)
        bundle.model_thread = self._thread
        self._pipeline = Pipeline(self._scorer, bundle, self._request.step_bytes, self._shards_at_once)

    def _check(self, info: BundleInfo) -> None:
        if info.fingerprint() != self._request.bundle_fingerprint:
            raise was_replaced(self._request.config.bundle)
