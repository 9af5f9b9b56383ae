"""A run goes on after whatever happened to it, to the same weights, bit for bit; and it grows with the cluster."""

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from safetensors.torch import load_file

from bertray import Bundle
from bertray.__main__ import main
from bertray.drivers.attempt import Attempt, Task
from bertray.drivers.train import train
from bertray.drivers.train_on_ray import _reason
from bertray.drivers.workers import explained
from bertray.errors import BertrayError, LockedError, RequestError
from bertray.storage.location import Location
from bertray.training.config import TrainConfig
from bertray.training.run_folder import TrainingRun
from tests.conftest import ROOT
from tests.drivers.conftest import LONG_RUN, step_kept, stop_and_kill
from tests.kills import job, killing, titled, wait_for


@pytest.mark.chaos  # without Ray: test_train_here
def test_it_goes_on_after_sigterm_and_kills_bit_for_bit(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    undisturbed = train(
        TrainConfig(data=dataset, output=str(tmp_path / "whole"), encoder=str(tiny_encoder), **LONG_RUN)
    )
    output = tmp_path / "broken"
    command = job("train", data=dataset, output=output, encoder=tiny_encoder, **LONG_RUN)
    log = tmp_path / "stderr.log"
    stop_and_kill(command, output, log)

    config = TrainConfig(data=dataset, output=str(output), encoder=str(tiny_encoder), **LONG_RUN)
    with pytest.raises(RequestError, match=r"with other options: learning_rate 0\.001 -> 0\.002.*--restart"):
        train(config.model_copy(update={"learning_rate": 2e-3}))
    before = step_kept(output)
    with killing("RayTrainWorker", lambda: step_kept(output) > before) as killed:
        summary = train(config)
    assert killed
    assert summary.resumed_from_step >= 40
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # nothing is left of the run
    expected, actual = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all((expected[name] == actual[name]).all() for name in expected)
    histories = [
        [{**epoch, "wall_s": 0} for epoch in Bundle.load(str(tmp_path / name)).info.history]
        for name in ("whole", "broken")
    ]
    assert histories[0] == histories[1]
    assert summary.fingerprint == undisturbed.fingerprint


def history_of(output: Path, dataset: str, encoder: str, num_workers: str, epochs: int = 40) -> list[dict[str, float]]:
    """Of epochs of 17 steps, with some workers."""
    options = {**LONG_RUN, "epochs": epochs, "batch_size": 8, "num_workers": num_workers}
    train(TrainConfig(data=dataset, output=str(output), encoder=encoder, **options))
    return Bundle.load(str(output)).info.history


def assert_same_losses(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for epoch, expected in zip(one, other, strict=True):
        assert epoch["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
        assert epoch["loss"] == pytest.approx(expected["loss"], abs=1e-4)


@pytest.mark.chaos
def test_a_run_grows_with_the_cluster_and_takes_the_same_steps(
    ray_nodes: Any, dataset: str, calm_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertray.drivers.train_on_ray._RESIZE_INTERVAL_S", 1.0)
    output, epochs = tmp_path / "elastic", 120  # longer than a node takes to start, and Ray to see it
    # Nodes can be added from the main thread alone.
    with ThreadPoolExecutor(1) as driver:
        growing = driver.submit(history_of, output, dataset, calm_encoder, "2:3", epochs)
        wait_for(lambda: step_kept(output) > 0 or growing.done(), "a checkpoint")
        node = ray_nodes.add_node(num_cpus=4, object_store_memory=150_000_000)
        history = growing.result(timeout=200)
    ray_nodes.remove_node(node)
    assert {epoch["num_workers"] for epoch in history} == {2, 3}
    assert_same_losses(history, history_of(tmp_path / "alone", dataset, calm_encoder, "1", epochs))


@pytest.mark.chaos
def test_a_run_goes_on_after_the_loss_of_a_node(
    ray_nodes: Any, dataset: str, calm_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lost = ray_nodes.add_node(num_cpus=4, object_store_memory=150_000_000)
    output = tmp_path / "bereft"
    with ThreadPoolExecutor(1) as driver:
        running = driver.submit(history_of, output, dataset, calm_encoder, "3")  # one on each node
        wait_for(lambda: step_kept(output) > 0 or running.done(), "a checkpoint")
        assert not running.done()
        ray_nodes.remove_node(lost, allow_graceful=False)
        new = ray_nodes.add_node(num_cpus=4, object_store_memory=150_000_000)
        history = running.result(timeout=300)
    ray_nodes.remove_node(new)
    assert "workers were lost" in caplog.text
    assert_same_losses(history, history_of(tmp_path / "alone", dataset, calm_encoder, "1"))


def test_a_run_without_a_checkpoint_gives_way_to_other_options(tmp_path: Path) -> None:
    run = TrainingRun(Location.of(str(tmp_path / "bundle")))
    config = TrainConfig(data="data", output=str(tmp_path / "bundle"))
    other = config.model_copy(update={"learning_rate": 1e-4})
    run.begin(config, "data's fingerprint")
    (run.rows / "train.arrow").put(b"")
    assert run.can_continue(config, "data's fingerprint")
    assert not run.can_continue(other, "data's fingerprint")
    assert list((tmp_path / ".bundle.training").iterdir()) == []
    run.begin(config, "data's fingerprint")
    (run.checkpoints / "step-40.json").put(b"{}")
    with pytest.raises(RequestError, match=r"learning_rate 5e-05 -> 0\.0001"):
        run.can_continue(other, "data's fingerprint")


def test_two_runs_do_not_make_one_bundle(ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    endless = job("train", data=dataset, output=output, encoder=tiny_encoder, **{**LONG_RUN, "epochs": 1000})
    first = subprocess.Popen(endless, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        run = tmp_path / ".bundle.training"
        wait_for(lambda: (run / "run.json").exists() or first.poll() is not None, "the first run")
        config = TrainConfig(data=dataset, output=str(output), encoder=str(tiny_encoder), **LONG_RUN)
        with pytest.raises(LockedError, match=r"run .* holds .*\.bundle\.training since"):
            train(config)
        assert {path.name for path in run.iterdir()} >= {"lock", "rows", "run.json"}  # the first one's, not removed
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGINT)
        _, stderr = first.communicate(timeout=60)
    assert first.returncode == 130, stderr
    assert {path.name for path in tmp_path.iterdir()} <= {
        ".bundle.training"
    }  # where a checkpoint was written, it is kept


def test_the_error_of_a_rank_ends_all_and_is_the_message(
    ray_cluster: str,
    dataset: str,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raised = tmp_path / "raised"

    class Failing(Task):  # pickled as it is, because it is local
        def loop(self, device: Any, watcher: Any) -> Any:
            from bertray.training.loop import FineTuning

            class OddError(Exception):
                """Cannot be unpickled: that would call it with one argument."""

                def __init__(self, what: str, where: str) -> None:
                    super().__init__(f"{what} at {where}")

            take_step = FineTuning._take_step

            def failing(loop: FineTuning, step: int) -> None:
                if step == 5 and loop.rank == 1:
                    raised.touch()
                    raise OddError("rank 1 has had enough", "step 5")
                take_step(loop, step)

            FineTuning._take_step = failing  # type: ignore[method-assign]  # in the worker's process
            return super().loop(device, watcher)

    task_of = Attempt.task
    monkeypatch.setattr(Attempt, "task", lambda attempt: Failing(*task_of(attempt)))
    options = {"data": dataset, "output": tmp_path / "bundle", "encoder": tiny_encoder, **LONG_RUN, "num_workers": 2}
    assert main(["train", *job("train", **options)[3:]]) == 1
    assert time.time() - raised.stat().st_mtime < 30
    stderr = capsys.readouterr().err
    assert stderr.splitlines()[-1] == "error: worker 2 of 2 raised OddError: rank 1 has had enough at step 5"
    assert 'raise OddError("rank 1 has had enough", "step 5")' in stderr  # its stack
    assert "were lost" not in stderr  # it was not started again
    assert titled("RayTrainWorker") == []


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40585"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RayActorError(),
        LockedError("another run holds it"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_losses_and_what_is_raised_on_purpose_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explained("worker 1 of 2"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("shapes differ"), "RuntimeError: shapes differ"),
        (OSError(28, "No space left on device", "/data"), "OSError: [Errno 28] No space left on device: '/data'"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (AssertionError(), "AssertionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_errors_are_told_with_the_worker(error: Exception, said: str) -> None:
    with pytest.raises(BertrayError) as raised, explained("worker 1 of 2"):
        raise error
    assert str(raised.value) == f"worker 1 of 2 raised {said}"


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ({0: RuntimeError(GLOO), 1: WorkerHealthCheckFailedError("", RayActorError())}, "the process of worker 2 died"),
        ({0: RuntimeError(f"{GLOO}\nGLHF")}, f"RuntimeError: {GLOO}"),
        ({}, "ValueError: no worker"),
    ],
)
def test_what_was_lost_is_told_before_what_follows(failures: dict[int, Exception], said: str) -> None:
    assert _reason(failures, ValueError("no worker")) == said
