"""A run goes on after whatever happened to it, to the same weights, bit for bit; and it grows with the cluster."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT
from safetensors.torch import load_file
from test_training import dataset as dataset  # the fixture

from bertray import Bundle
from bertray.config import TrainConfig
from bertray.errors import LockedError, RequestError
from bertray.training import train

# 33 steps an epoch, of some ten milliseconds.
OPTIONS: dict[str, Any] = {
    "epochs": 24,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 32,
    "precision": "fp32",
    "checkpoint_steps": 40,
}


def command(dataset: str, output: Path, encoder: Path, **options: Any) -> list[str]:
    given = {"data": dataset, "output": output, "encoder": encoder, **OPTIONS, **options}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "jobs.train", *flags]


def step_kept(output: Path) -> int:
    commits = (output.parent / f".{output.name}.training" / "checkpoints").glob("step-*.json")
    return max((int(path.stem.removeprefix("step-")) for path in commits), default=0)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {what} in vain"
        time.sleep(0.05)


def end_driver(arguments: list[str], output: Path, sent: signal.Signals) -> tuple[int, str]:
    """Begin or go on, and end the driver when there is a checkpoint more."""
    before = step_kept(output)
    driver = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: step_kept(output) > before or driver.poll() is not None, "a checkpoint")
    driver.send_signal(sent)
    _, stderr = driver.communicate(timeout=60)
    return driver.returncode, stderr


def kill_workers() -> int:
    """kill -9 of the training workers of this process's cluster; returns how many there were."""
    own = psutil.Process().children(recursive=True)
    workers = [process for process in own if "RayTrainWorker" in "".join(process.cmdline())]
    for worker in workers:
        worker.kill()
    return len(workers)


def test_it_goes_on_after_sigterm_and_kills_bit_for_bit(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    undisturbed = train(TrainConfig(data=dataset, output=str(tmp_path / "whole"), encoder=str(tiny_encoder), **OPTIONS))
    output = tmp_path / "broken"
    arguments = command(dataset, output, tiny_encoder)
    exit_code, stderr = end_driver(arguments, output, signal.SIGTERM)
    assert exit_code == 143, stderr
    assert f"step {step_kept(output)} is kept in" in stderr
    assert step_kept(output) % 40 != 0  # written because of the signal, not because it was due
    assert not output.exists()

    exit_code, stderr = end_driver(arguments, output, signal.SIGKILL)
    assert exit_code == -signal.SIGKILL
    assert "going on with the run at" in stderr

    config = TrainConfig(data=dataset, output=str(output), encoder=str(tiny_encoder), **OPTIONS)
    with pytest.raises(RequestError, match=r"with other options: learning_rate 0\.001 -> 0\.002.*--restart"):
        train(config.model_copy(update={"learning_rate": 2e-3}))
    before, num_killed = step_kept(output), []
    killer = threading.Thread(
        target=lambda: (
            wait_for(lambda: step_kept(output) > before, "a checkpoint"),
            num_killed.append(kill_workers()),
        )
    )
    killer.start()
    summary = train(config)
    killer.join()
    assert num_killed[0] > 0
    assert summary["resumed_from_step"] >= 40
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing is left of the run
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all((expected[name] == actual[name]).all() for name in expected)
    histories = [
        [{**epoch, "wall_s": 0} for epoch in Bundle.load(str(tmp_path / name)).info.history]
        for name in ("whole", "broken")
    ]
    assert histories[0] == histories[1]
    assert summary["fingerprint"] == undisturbed["fingerprint"]


@pytest.mark.chaos
def test_a_run_grows_with_the_cluster_and_takes_the_same_steps(
    ray_nodes: Any, dataset: str, calm_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertray.training._RESIZE_INTERVAL_S", 1.0)

    def run(name: str, num_workers: str) -> list[dict[str, float]]:
        options = {**OPTIONS, "epochs": 16, "batch_size": 8, "num_workers": num_workers}
        train(TrainConfig(data=dataset, output=str(tmp_path / name), encoder=calm_encoder, **options))
        return Bundle.load(str(tmp_path / name)).info.history

    alone = run("alone", "1")
    # Nodes can be added from the main thread alone.
    with ThreadPoolExecutor(1) as driver:
        growing = driver.submit(run, "elastic", "2:3")
        wait_for(lambda: step_kept(tmp_path / "elastic") > 0 or growing.done(), "a checkpoint")
        node = ray_nodes.add_node(num_cpus=4, object_store_memory=150_000_000)
        elastic = growing.result(timeout=200)
    ray_nodes.remove_node(node)
    assert {epoch["num_workers"] for epoch in elastic} == {2, 3}
    for one, other in zip(alone, elastic, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_two_runs_do_not_make_one_bundle(ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    first = subprocess.Popen(
        command(dataset, output, tiny_encoder, epochs=1000), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: (tmp_path / ".bundle.training" / "lock").exists() or first.poll() is not None, "the first run")
        config = TrainConfig(data=dataset, output=str(output), encoder=str(tiny_encoder), **OPTIONS)
        with pytest.raises(LockedError, match=r"run .* holds .*\.bundle\.training since"):
            train(config)
    finally:
        first.send_signal(signal.SIGINT)
        _, stderr = first.communicate(timeout=60)
    assert first.returncode == 130, stderr
    assert {path.name for path in tmp_path.iterdir()} <= {
        ".bundle.training"
    }  # where a checkpoint was written, it is kept
