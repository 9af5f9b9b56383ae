"""The pool of actors and an actor of it, in this process: what of Ray they use says what a cluster would.

A real cluster with a sick node is in test_sick_nodes.py.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch

from bertray.bundle.info import BundleInfo, read_info
from bertray.bundle.isolated import LOAD_TIMEOUT_S, ModelSpec
from bertray.drivers import actor_pool, cluster
from bertray.drivers.actor_pool import ActorPool, ScoringActor
from bertray.errors import BundleError, UnavailableError
from bertray.scoring import score_unit
from bertray.scoring.config import ScoreConfig
from bertray.scoring.score_unit import Request
from bertray.scoring.units import Counts, Outcome, Unit, Work
from bertray.storage import patience
from bertray.storage.location import FileInfo, Location
from tests.conftest import write_shard
from tests.stub_pool import Stub


@pytest.fixture
def info(tiny_bundle: Path) -> BundleInfo:
    return read_info(Location.of(str(tiny_bundle)))


@pytest.fixture
def shards(tmp_path: Path) -> list[FileInfo]:
    names = [f"{number}.parquet" for number in range(4)]
    for name in names:
        write_shard(tmp_path / "archive" / name, ["a text"])
    return [Location.of(str(tmp_path / "archive" / name)).info() for name in names]


@pytest.fixture
def request_(tiny_bundle: Path, info: BundleInfo, tmp_path: Path) -> Request:
    archive = str(tmp_path / "archive")
    config = ScoreConfig(
        bundle=str(tiny_bundle), input=archive, output=str(tmp_path / "scored"), num_actors=1, unit_timeout=7.0
    )
    return Request(config, archive, "request", info.fingerprint(), 0)


# An actor.


class EndedError(BaseException):
    """The process ends here."""


class Model(Stub):
    """In the place of a bundle, and of one in a child process."""

    def __init__(self, info: BundleInfo, error: Exception | None = None) -> None:
        self.info, self.error = info, error

    def predict_column(self, texts: pa.Array) -> pa.Table:
        if self.error:
            raise self.error
        return super().predict_column(texts)

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def start(request_: Request, info: BundleInfo, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScoringActor]:
    """Starts an actor of node n1; `load` gives it its model, and `isolate` one in a child process."""

    def end(code: int) -> None:
        raise EndedError(code)

    def start(
        *,
        load: Callable[[], Model] = lambda: Model(info),
        isolate: Callable[[], Model] = lambda: Model(info),
        is_restarted: bool = False,
    ) -> ScoringActor:
        class Child(Model):
            def __init__(self, _: ModelSpec) -> None:
                made = isolate()
                super().__init__(made.info, made.error)

        context = SimpleNamespace(
            get_node_id=lambda: "n1",
            was_current_actor_reconstructed=is_restarted,
            get_assigned_resources=lambda: {"CPU": 1},
        )
        monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(actor_pool, "log_to", lambda _: None)  # it would take the handlers of this process away
        monkeypatch.setattr(actor_pool, "IsolatedBundle", Child)
        monkeypatch.setattr(score_unit, "read_in_isolation", lambda *_: None)
        monkeypatch.setattr(ModelSpec, "load", lambda _: load())
        monkeypatch.setattr(os, "_exit", end)
        return ScoringActor("cpu", request_, 1)

    return start


def answer(actor: ScoringActor, *shards: FileInfo) -> tuple[list[Outcome], dict[str, Any]]:
    """The outcomes, and the whole answer."""
    (row,) = actor(pa.table({"unit": [Unit(shards=shards).model_dump_json()]})).to_pylist()
    return [*map(Outcome.model_validate_json, row["outcomes"])], row


def raises(error: Exception) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


GPU_IS_GONE = torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")


def test_a_gpu_error_ends_an_actor_and_the_next_one_gives_up(
    start: Callable[..., ScoringActor], info: BundleInfo, shards: list[FileInfo]
) -> None:
    """The next one first looks whether the unit is at fault."""
    with pytest.raises(EndedError):
        answer(start(load=lambda: Model(info, GPU_IS_GONE)), shards[0])
    restarted = start(load=raises(GPU_IS_GONE), is_restarted=True)
    for shard in shards[:2]:
        assert [one.failure for one in answer(restarted, shard)[0]] == [""]
    (outcome,), row = answer(restarted, shards[2])
    assert (outcome.of, row["gives_up"], row["node_id"]) == ("place", outcome.failure, "n1")
    assert outcome.failure.startswith("AcceleratorError: CUDA error: uncorrectable ECC error")
    with pytest.raises(EndedError):  # Ray starts another one
        answer(restarted, shards[3])


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_bundle_that_a_node_cannot_load_is_the_nodes_fault(
    is_restarted: bool,
    start: Callable[..., ScoringActor],
    make_bundle: Callable[..., Path],
    shards: list[FileInfo],
) -> None:
    missing = raises(BundleError("it is no model bundle: it has no bundle.json"))
    (outcome,), _ = answer(start(load=missing, isolate=missing, is_restarted=is_restarted), shards[0])
    assert (outcome.of, outcome.failure) == ("place", "BundleError: it is no model bundle: it has no bundle.json")
    other = read_info(Location.of(str(make_bundle(seed=1))))
    actor = start(load=lambda: Model(other), isolate=lambda: Model(other), is_restarted=is_restarted)
    for shard in shards[:3]:
        (outcome,), row = answer(actor, shard)
        assert outcome.of == "place" and "was replaced while the job ran. Run it again" in outcome.failure
    assert row["gives_up"] == outcome.failure


@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_bundle_whose_storage_is_away_is_waited_for(
    is_restarted: bool,
    start: Callable[..., ScoringActor],
    info: BundleInfo,
    shards: list[FileInfo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits = list[float]()
    monkeypatch.setattr(patience.time, "sleep", waits.append)

    def model() -> Model:
        if not waits:
            raise UnavailableError.because("away", "cannot reach s3://bucket")
        return Model(info)

    actor = start(load=model, isolate=model, is_restarted=is_restarted)
    assert [one.failure for one in answer(actor, shards[0])[0]] == [""]
    assert waits == [1.0]


def test_loading_and_scoring_are_watched(
    start: Callable[..., ScoringActor], info: BundleInfo, shards: list[FileInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[Any]()

    @contextmanager
    def watched(timeout_s: float) -> Iterator[None]:
        done.append(timeout_s)
        yield
        done.append("ended")

    class Noting(Model):
        def predict_column(self, texts: pa.Array) -> pa.Table:
            done.append("predicted")
            return super().predict_column(texts)

    def model() -> Model:
        done.append("loaded")
        return Noting(info)

    monkeypatch.setattr(actor_pool, "watched", watched)
    answer(start(load=model), shards[0])
    assert done == [LOAD_TIMEOUT_S, "loaded", "ended", 7.0, "predicted", "ended"]
    done.clear()
    answer(start(isolate=model, is_restarted=True), shards[1])
    assert done == [LOAD_TIMEOUT_S, "loaded", "ended"]  # the child is watched by itself


# The pool.


class Cluster:
    """Three nodes, which answer as they are told; it notes where a pass may run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[dict[str, Any]] = []
        self.selectors: dict[str, list[Any]] = {"units": [], "merges": []}
        self.merge: Callable[[], Any] = lambda: None
        nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in ("n1", "n2", "n3")]
        ray.data.DataContext.get_current()  # which imports what is made with the real ray.remote
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        monkeypatch.setattr(ray, "remote", self._remote)
        monkeypatch.setattr(ray, "wait", lambda tasks, **_: (tasks[:1], tasks[1:]))
        monkeypatch.setattr(ray, "get", lambda _: self.merge())
        monkeypatch.setattr(ray.data, "read_datasource", self._read)

    def _remote(self, **options: Any) -> Callable[..., Any]:
        self.selectors["merges"].append(options["label_selector"])
        return lambda _: SimpleNamespace(remote=lambda *_: object())

    def _read(self, *_: Any, label_selector: Any, **__: Any) -> Any:
        self.selectors["units"].append(label_selector)
        return SimpleNamespace(context=SimpleNamespace(), map_batches=self._map_batches)

    def _map_batches(self, *_: Any, label_selector: Any, **__: Any) -> Any:
        assert label_selector == self.selectors["units"][-1]
        return SimpleNamespace(iter_rows=lambda: (row for row in self.answers))


def row(node: str, shard: FileInfo, failure: str = "", *, gives_up: bool = False) -> dict[str, Any]:
    outcome = Outcome(shard=shard, failure=failure, of="place" if failure else "shard", node=f"{node}.example")
    return {
        "outcomes": [outcome.model_dump_json()],
        "log": "[]",
        "node": outcome.node,
        "node_id": node,
        "gives_up": failure if gives_up else "",
    }


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


@pytest.fixture
def pool(nodes: Cluster, request_: Request, shards: list[FileInfo]) -> ActorPool:
    return ActorPool(request_, shards)


def passed(pool: ActorPool, nodes: Cluster, shards: list[FileInfo], *answers: dict[str, Any]) -> list[Outcome]:
    nodes.answers = [*answers]
    return list(pool.run(Work([Unit(shards=(shard,)) for shard in shards])))


def without(*nodes: str) -> list[str]:
    return [f"!in({one})" for one in (",".join(nodes), ",".join(reversed(nodes)))]


def test_what_has_failed_on_a_node_is_tried_on_each_other_one_first(
    pool: ActorPool, nodes: Cluster, shards: list[FileInfo]
) -> None:
    for node in ("n1", "n2", "n3"):
        (outcome,) = passed(pool, nodes, shards[:1], row(node, shards[0], "no space left"))
        assert (outcome.of, outcome.node) == ("place", f"{node}.example")
    passed(pool, nodes, shards[:1], row("n1", shards[0]))
    first, second, third, fourth = nodes.selectors["units"]
    assert first is None and fourth is None  # all have failed
    assert second["ray.io/node-id"] == "!in(n1)" and third["ray.io/node-id"] in without("n1", "n2")
    assert nodes.selectors["merges"] == nodes.selectors["units"]  # merges keep off them as well


def test_a_node_whose_actors_give_up_three_times_is_left_out_and_the_last_one_ends_the_run(
    pool: ActorPool, nodes: Cluster, shards: list[FileInfo], caplog: pytest.LogCaptureFixture
) -> None:
    for node in ("n1", "n2", "n3"):
        answers = [row(node, shard, f"{node} is sick", gives_up=True) for shard in shards]
        assert len(passed(pool, nodes, shards, *answers)) == 3  # the pass ends with the third
        assert f"node {node}.example is left out from now on: {node} is sick" in caplog.text
    said = r"no machine is left that can score\. n1\.example: n1 is sick; n2\.example: n2 is sick; n3\.example: n3 is"
    with pytest.raises(UnavailableError, match=said):
        passed(pool, nodes, shards)


def test_a_merge_whose_process_dies_is_tried_again(pool: ActorPool, nodes: Cluster, shards: list[FileInfo]) -> None:
    nodes.merge = raises(cluster.LOST_ERRORS[0]())
    work = Work(num_parts={shards[0]: 3}, missing_parts={shards[0]: set()})
    (outcome,) = pool.run(work)
    assert (outcome.shard, outcome.part, outcome.of) == (shards[0], None, "place")
    assert outcome.failure.startswith("the process that merged its parts died: ")
    nodes.merge = lambda: Outcome(shard=shards[0], counts=Counts())
    assert [one.failure for one in pool.run(work)] == [""]
