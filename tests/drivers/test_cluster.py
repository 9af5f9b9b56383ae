"""How a cluster is divided among processes that hold a model."""

import subprocess
import sys
from pathlib import Path

import pytest
import ray
import torch

from bertray.drivers import cluster
from bertray.drivers.cluster import Placement, place
from bertray.errors import RequestError
from tests.kills import wait_for


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": one} for one in resources])


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_cpus_are_shared_so_that_all_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8}, {"CPU": 4}, {})
    assert place("auto", 3, "--n") == Placement(3, False, 4)
    assert place("auto", 1, "--n") == Placement(1, False, 8)
    assert place("auto", 12, "--n") == Placement(12, False, 1)
    assert place("auto", 1, "--n", 8) == Placement(
        1, False, 4
    )  # the smaller node has one, and is all if the other goes
    assert place("cpu", None, "--n") == Placement(3, False, 4)


def test_gpus_are_taken_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8}, {"CPU": 8, "GPU": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place("auto", None, "--n") == Placement(2, True, 1)
    assert place("cpu", None, "--n") == Placement(4, False, 4)


def test_processes_may_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8, "GPU": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place("auto", None, "--n", a_gpu=3) == Placement(6, True, 1, 3)
    assert (place("cuda", 5, "--n", a_gpu=3).share, place("cuda", 1, "--n").share) == ("1/3 GPU", "1 GPU")
    with pytest.raises(RequestError, match="--n 7 needs 3 GPUs; there are 2"):
        place("auto", 7, "--n", a_gpu=3)
    with pytest.raises(RequestError, match="--actors-per-gpu 3: no GPU is used"):
        place("cpu", None, "--n", a_gpu=3)


def test_a_gpu_that_torch_cannot_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 8, "GPU": 1})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place("auto", None, "--n") == Placement(2, False, 4)
    with pytest.raises(RequestError, match="sees no GPU here"):
        place("cuda", None, "--n")


def test_a_small_laptop_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 2})
    assert place("auto", None, "--n") == Placement(1, False, 2)


def test_half_a_cpu_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, object] = {}
    monkeypatch.setattr("ray._private.utils._get_docker_cpus", lambda: 0.5)  # of a quota of 50000 in 100000
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster.session():
        assert started["num_cpus"] == 1


def test_a_folder_that_ray_cannot_write_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "/tmp/ray")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RequestError, match=r"Ray does not start: .*/tmp/ray.*RAY_TMPDIR"), cluster.session():
        pass


def test_a_machine_that_cannot_grow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 2})
    with pytest.raises(RequestError, match=r"--num-workers 8 needs 8 CPUs; there are 2\. Lower --num-workers"):
        place("auto", 8, "--num-workers")
    with pytest.raises(RequestError, match="needs 1 GPUs; there are 0"):
        place("cuda", 1, "--num-workers")


def test_a_cluster_may_grow(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    nodes(monkeypatch, {"CPU": 2})
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with caplog.at_level("WARNING", logger="bertray"):
        assert place("cuda", 4, "--num-workers") == Placement(4, True, 1)
        assert place("cpu", 4, "--num-workers") == Placement(4, False, 4)
    assert "waiting for the cluster to grow" in caplog.text


def test_a_standing_connection_is_left_standing(ray_cluster: str) -> None:
    with cluster.session():
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.services
def test_what_is_stopped_as_ray_starts_leaves_no_process() -> None:
    code = """
import os, ray
from bertray.drivers import cluster

init = ray.init

def stopped(**options):
    init(**options)
    node = ray._private.worker._global_node
    print(*(info.process.pid for infos in node.all_processes.values() for info in infos), flush=True)
    raise KeyboardInterrupt  # as from a signal, at the last moment before the job begins

ray.init = stopped
try:
    with cluster.session():
        pass
except KeyboardInterrupt:
    print(ray.is_initialized())
os._exit(0)  # as bertray.cli leaves: no atexit handler ends what is left
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    pids, is_initialized = ended.stdout.split("\n")[:2]
    assert is_initialized == "False"
    assert len(pids.split()) > 1
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids.split()), "Ray's processes to end")
