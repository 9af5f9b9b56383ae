"""What MLflow's own server holds of a run, also of one whose server is gone for a while, or for good."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.training import mlflow_client
from bertray.training.config import TrainConfig
from bertray.training.mlflow_client import MlflowRun, check
from bertray.training.run_folder import TrainingRun
from bertray.training.tracking import StepRecord, Tracker
from tests.conftest import ROOT
from tests.faults.s3_proxy import FaultyProxy


def records(first: int, last: int, loss: float = 1.0) -> list[StepRecord]:
    return [StepRecord(step, step / 10, loss / step, 1e-5, 2.0, 1000.0) for step in range(first, last + 1)]


def config(uri: str) -> TrainConfig:
    return TrainConfig(data="data", output="to/a run", mlflow_uri=uri, mlflow_experiment="an experiment")


def tracker(uri: str, folder: Path, run_id: str | None = None) -> Tracker:
    return Tracker(config(uri), folder, run_id)


def stored(uri: str, run_id: str | None) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri).get_run(run_id)


def history(uri: str, run_id: str | None, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((one.step, one.value) for one in MlflowClient(uri).get_metric_history(run_id, name))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING and one.name.startswith("bertray")
    ]


@pytest.fixture
def proxy(mlflow_server: str) -> Iterator[FaultyProxy]:
    """Stands before the server; `plan` and `share` say what requests meet."""
    proxy = FaultyProxy(mlflow_server, kinds=["reset"]).start()
    yield proxy
    proxy.close()


def test_a_run_from_beginning_to_end(mlflow_server: str, tmp_path: Path) -> None:
    check(mlflow_server)
    with tracker(mlflow_server, tmp_path) as run:
        assert stored(mlflow_server, run.mlflow_run_id).info.status == "RUNNING"
        run.steps(records(1, 300))  # 1,200 values: more than a request takes
        run.epoch(300, {"epoch": 1, "train_loss": 1.0, "loss": 0.5, "accuracy": 0.9, "wall_s": 9.0})
        run.finish({"loss": 0.5, "f1_macro": 0.8}, bundle="s3://bucket/bundle")
    found = stored(mlflow_server, run.mlflow_run_id)
    assert found.info.run_name == "a run"
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        name: str(value) for name, value in config(mlflow_server).model_dump(mode="json").items()
    }
    assert found.data.tags["bundle"] == "s3://bucket/bundle"
    assert found.data.tags["version.bertray"]
    assert history(mlflow_server, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 301)]
    assert history(mlflow_server, run.mlflow_run_id, "validation/accuracy") == [(300, 0.9)]
    assert history(mlflow_server, run.mlflow_run_id, "best/f1_macro") == [(300, 0.8)]
    assert not [name for name in found.data.metrics if name.endswith(("/epoch", "/wall_s", "/train_loss"))]


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (SystemExit, "KILLED")])
def test_a_run_that_does_not_come_to_its_end(
    mlflow_server: str, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), tracker(mlflow_server, tmp_path) as run:
        run.steps(records(1, 2))
        raise error
    assert stored(mlflow_server, run.mlflow_run_id).info.status == status
    assert len(history(mlflow_server, run.mlflow_run_id, "train/loss")) == 2


def test_a_resumed_run_has_no_step_twice(mlflow_server: str, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), tracker(mlflow_server, tmp_path) as first:
        first.steps(records(1, 12))
        first.epoch(10, {"loss": 1.0})
        raise KeyboardInterrupt
    with tracker(mlflow_server, tmp_path, first.mlflow_run_id) as second:
        assert second.mlflow_run_id == first.mlflow_run_id
        assert stored(mlflow_server, first.mlflow_run_id).info.status == "RUNNING"
        second.steps(records(6, 14, loss=2.0))
        second.epoch(10, {"loss": 2.0})
        second.steps(records(11, 15, loss=3.0))  # workers that restart
    assert stored(mlflow_server, first.mlflow_run_id).info.status == "FINISHED"
    expected = [(step, (1.0 if step <= 12 else 2.0 if step <= 14 else 3.0) / step) for step in range(1, 16)]
    assert history(mlflow_server, first.mlflow_run_id, "train/loss") == expected
    assert history(mlflow_server, first.mlflow_run_id, "validation/loss") == [(10, 1.0)]


def test_a_server_that_is_gone_for_a_while_misses_nothing(
    proxy: FaultyProxy, mlflow_server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tracker(proxy.endpoint, tmp_path) as run:
        run.steps(records(1, 5))
        proxy.share = 1.0
        for step in range(6, 11):
            run.steps(records(step, step))
        assert proxy.counts["reset"] == 1  # it is left alone for a while
        proxy.share = 0.0
        run.steps(records(11, 11))
        assert len(history(mlflow_server, run.mlflow_run_id, "train/loss")) == 5
        run._mlflow._send_again_s = 0.0  # half a minute later
        run.steps(records(12, 12))
        assert len(history(mlflow_server, run.mlflow_run_id, "train/loss")) == 12
        proxy.plan[:] = ["", "reset", "internal_error"]  # at the end it is waited for
        run.steps(records(13, 13))
    assert history(mlflow_server, run.mlflow_run_id, "train/loss") == [(step, 1 / step) for step in range(1, 14)]
    assert stored(mlflow_server, run.mlflow_run_id).info.status == "FINISHED"
    (warning,) = warnings(caplog)
    assert f"MLflow on {proxy.endpoint} does not take metrics: " in warning
    assert "Training goes on" in warning


def test_a_request_whose_answer_is_lost_counts_once(proxy: FaultyProxy, mlflow_server: str, tmp_path: Path) -> None:
    with tracker(proxy.endpoint, tmp_path) as run:
        proxy.plan[:] = ["lost_answer"]
        run.steps(records(1, 4))
        assert len(history(mlflow_server, run.mlflow_run_id, "train/loss")) == 4
    assert proxy.counts["lost_answer"] == 1
    assert [step for step, _ in history(mlflow_server, run.mlflow_run_id, "train/loss")] == [1, 2, 3, 4]


def test_a_server_that_stays_away_ends_no_training(
    proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_client, "_END_PATIENCE_S", 0.0)
    monkeypatch.setattr(mlflow_client, "_MAX_WAITING", 30)
    with tracker(proxy.endpoint, tmp_path) as run:
        proxy.share = 1.0
        run.steps(records(1, 10))  # 40 values: 10 too many
        run.finish({"f1_macro": 0.8}, bundle="bundle")
    first, second, third = warnings(caplog)
    assert "does not take metrics" in first
    assert f"run {run.mlflow_run_id} on {proxy.endpoint} could not be marked as FINISHED" in second
    assert third.endswith("lacks 41 values")


def test_a_server_that_is_not_there_is_refused_at_once(
    proxy: FaultyProxy, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_s = time.monotonic()
    with pytest.raises(
        RequestError, match=r"--mlflow-uri http://127\.0\.0\.1:9: .*Connection refused.*`mlflow server`"
    ):
        check("http://127.0.0.1:9")
    with pytest.raises(RequestError, match=r"--mlflow-uri http://127\.0\.0\.1:\d+: .*500 error responses"):
        check(s3_server)
    with pytest.raises(RequestError, match=r"--mlflow-uri gopher://x: "):
        check("gopher://x")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.plan[:] = ["hang"]
    with pytest.raises(RequestError, match=r"[Tt]imed out"):
        check(proxy.endpoint)
    proxy.plan[:] = ["access_denied"]
    with pytest.raises(RequestError, match=r"Access Denied.*MLFLOW_TRACKING_PASSWORD"):
        check(proxy.endpoint)
    assert time.monotonic() - started_s < 20
    proxy.plan[:] = ["reset", "reset"]
    with pytest.raises(RequestError, match=r"--mlflow-uri "), tracker(proxy.endpoint, tmp_path):
        pass


def test_what_is_deleted_or_unknown_is_refused(mlflow_server: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server)
    with (
        pytest.raises(RequestError, match=r"Run with id=unknown not found"),
        tracker(mlflow_server, tmp_path, "unknown"),
    ):
        pass
    run = MlflowRun(mlflow_server, "passing", "a run", {}, {})
    client.delete_run(run.run_id)
    with pytest.raises(RequestError, match=rf"run {run.run_id} on .* is deleted"):
        MlflowRun(mlflow_server, "passing", "a run", {}, {}, run.run_id)
    client.delete_experiment(stored(mlflow_server, run.run_id).info.experiment_id)
    with pytest.raises(RequestError, match=r"--mlflow-experiment passing is deleted on .*restore --experiment-id \d+"):
        MlflowRun(mlflow_server, "passing", "a run", {}, {})


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RequestError, match=r"needs the extra 'mlflow'\. On every node: pip install '.*leave it out"):
        check("http://127.0.0.1:9")


def test_nothing_is_reported_to_anyone_else(mlflow_server: str, tmp_path: Path) -> None:
    """In a process that the client does not take for a test's or CI's, where it would say nothing anyway."""
    code = f"""
import sys, threading
from pathlib import Path
places = set()
def note(event, arguments):
    if event == "socket.connect":
        places.add(arguments[1][:2])
    if event == "socket.getaddrinfo":
        places.add(arguments[:2])
sys.addaudithook(note)
from bertray.training.config import TrainConfig
from bertray.training.tracking import Tracker
options = TrainConfig(data="data", output="a run", mlflow_uri={mlflow_server!r})
with Tracker(options, Path({str(tmp_path)!r})) as run:
    run.epoch(1, {{"loss": 1.0}})
import mlflow.telemetry.client, mlflow.telemetry.utils
print(mlflow.telemetry.utils._IS_IN_CI_ENV_OR_TESTING, mlflow.telemetry.client.get_telemetry_client(), places,
      [one.name for one in threading.enumerate()])
"""
    of_ci = {"CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", *mlflow_client._SETTINGS}
    environment = {name: value for name, value in os.environ.items() if name not in of_ci}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    port = mlflow_server.rpartition(":")[2]
    assert finished.stdout.strip() == f"False None {{('127.0.0.1', {port})}} ['MainThread']"


def test_a_run_that_goes_on_with_another_server_begins_there_anew(tmp_path: Path) -> None:
    run = TrainingRun(Location.of(str(tmp_path / "bundle")))
    assert run.mlflow_run_id("http://one:5000") is None
    run.keep_mlflow_run_id("http://one:5000", "0123")
    assert run.mlflow_run_id("http://one:5000") == "0123"
    assert run.mlflow_run_id("http://other:5000") is None
    assert run.mlflow_run_id(None) is None
