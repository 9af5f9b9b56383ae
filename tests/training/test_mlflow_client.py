"""What MLflow's own server holds of a run, also of one whose server is gone for a while, or for good."""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bertray.errors import RequestError
from bertray.training import mlflow_client
from bertray.training.config import TrainConfig
from bertray.training.mlflow_client import MlflowRun, check
from bertray.training.tracking import Rows, StepRecord, of_epochs, of_steps
from tests.conftest import ROOT
from tests.faults.s3_proxy import FaultyProxy


def records(first: int, last: int, loss: float = 1.0) -> Rows:
    return of_steps(StepRecord(step, step / 10, loss / step, 1e-5, 2.0, 1000.0) for step in range(first, last + 1))


def config(uri: str) -> TrainConfig:
    return TrainConfig(data="data", output="to/a run", mlflow_uri=uri, mlflow_experiment="an experiment")


def epochs(step: int, **scores: float) -> Rows:
    return of_epochs([{"step": step, **scores}])


def stored(uri: str, run: MlflowRun) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri).get_run(run._run_id)


def history(uri: str, run: MlflowRun, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return sorted((one.step, one.value) for one in MlflowClient(uri).get_metric_history(run._run_id, name))


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


def test_a_run_from_beginning_to_end(mlflow_server: str) -> None:
    check(mlflow_server)
    with MlflowRun(config(mlflow_server)) as run:
        assert stored(mlflow_server, run).info.status == "RUNNING"
        run.log("train", records(1, 300))  # 1,200 values: more than a request takes
        run.log("validation", epochs(300, epoch=1, train_loss=1.0, loss=0.5, accuracy=0.9, wall_s=9.0))
        run.log("best", epochs(300, loss=0.5, f1_macro=0.8))
    found = stored(mlflow_server, run)
    assert found.info.run_name == "a run"
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        name: str(value) for name, value in config(mlflow_server).model_dump(mode="json").items()
    }
    assert found.data.tags["version.bertray"]
    assert history(mlflow_server, run, "train/loss") == [(step, 1 / step) for step in range(1, 301)]
    assert history(mlflow_server, run, "validation/accuracy") == [(300, 0.9)]
    assert history(mlflow_server, run, "best/f1_macro") == [(300, 0.8)]
    assert not [name for name in found.data.metrics if name.endswith(("/epoch", "/wall_s", "/train_loss"))]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_that_does_not_come_to_its_end(mlflow_server: str, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), MlflowRun(config(mlflow_server)) as run:
        run.log("train", records(1, 2))
        raise error
    assert stored(mlflow_server, run).info.status == status
    assert len(history(mlflow_server, run, "train/loss")) == 2


def test_workers_that_restart_log_no_step_twice(mlflow_server: str) -> None:
    with MlflowRun(config(mlflow_server)) as run:
        run.log("train", records(1, 12))
        run.log("validation", epochs(10, loss=1.0))
        run.log("train", records(6, 14, loss=2.0))
        run.log("validation", epochs(10, loss=2.0))
    expected = [(step, (1.0 if step <= 12 else 2.0) / step) for step in range(1, 15)]
    assert history(mlflow_server, run, "train/loss") == expected
    assert history(mlflow_server, run, "validation/loss") == [(10, 1.0)]


def test_without_a_server_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with MlflowRun(TrainConfig(data="data", output="run")) as run:
        run.log("train", records(1, 2))


def test_a_server_that_is_gone_for_a_while_misses_nothing(
    proxy: FaultyProxy, mlflow_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    with MlflowRun(config(proxy.endpoint)) as run:
        run.log("train", records(1, 5))
        proxy.share = 1.0
        for step in range(6, 11):
            run.log("train", records(step, step))
        assert proxy.counts["reset"] == 1  # it is left alone for a while
        proxy.share = 0.0
        run.log("train", records(11, 11))
        assert len(history(mlflow_server, run, "train/loss")) == 5
        run._send_again_s = 1e-9  # half a minute later
        proxy.plan[:] = ["internal_error"]
        run.log("train", records(12, 12))
        assert len(history(mlflow_server, run, "train/loss")) == 5
        run._send_again_s = 1e-9
        run.log("train", records(13, 13))
        assert len(history(mlflow_server, run, "train/loss")) == 13
        run._send_again_s = time.monotonic() + 30
        run.log("train", records(14, 14))
    assert history(mlflow_server, run, "train/loss") == [(step, 1 / step) for step in range(1, 15)]
    assert stored(mlflow_server, run).info.status == "FINISHED"
    (warning,) = warnings(caplog)
    assert f"MLflow on {proxy.endpoint} does not take metrics: " in warning
    assert "Training goes on" in warning


def test_a_request_whose_answer_is_lost_counts_once(proxy: FaultyProxy, mlflow_server: str) -> None:
    with MlflowRun(config(proxy.endpoint)) as run:
        proxy.plan[:] = ["lost_answer"]
        run.log("train", records(1, 4))
        assert len(history(mlflow_server, run, "train/loss")) == 4
    assert proxy.counts["lost_answer"] == 1
    assert [step for step, _ in history(mlflow_server, run, "train/loss")] == [1, 2, 3, 4]


def test_a_server_that_stays_away_ends_no_training(proxy: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    with MlflowRun(config(proxy.endpoint)) as run:
        proxy.share = 1.0
        run.log("train", records(1, 10))
        run.log("best", epochs(10, f1_macro=0.8))
    first, second = warnings(caplog)
    assert "does not take metrics" in first
    assert f"run {run._run_id} on {proxy.endpoint} has not been told that the training has ended" in second
    assert "lacks 41 values" in second


def test_a_server_that_is_not_there_is_refused_at_once(
    proxy: FaultyProxy, s3_server: str, monkeypatch: pytest.MonkeyPatch
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
    with pytest.raises(RequestError, match=r"--mlflow-uri "), MlflowRun(config(proxy.endpoint)):
        pass


def test_an_experiment_that_is_deleted_is_refused(mlflow_server: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(mlflow_server)
    client.delete_experiment(client.create_experiment("passing"))
    options = config(mlflow_server).model_copy(update={"mlflow_experiment": "passing"})
    with pytest.raises(RequestError, match=r"--mlflow-uri .*'active' state.*deleted"), MlflowRun(options):
        pass


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(RequestError, match=r"needs the extra 'mlflow'\. On every node: pip install '.*leave it out"):
        check("http://127.0.0.1:9")


def test_nothing_is_reported_to_anyone_else(mlflow_server: str) -> None:
    """In a process that the client does not take for a test's or CI's, where it would say nothing anyway."""
    code = f"""
import sys, threading
places = set()
def note(event, arguments):
    if event == "socket.connect":
        places.add(arguments[1][:2])
    if event == "socket.getaddrinfo":
        places.add(arguments[:2])
sys.addaudithook(note)
from bertray.training.config import TrainConfig
from bertray.training.mlflow_client import MlflowRun
options = TrainConfig(data="data", output="a run", mlflow_uri={mlflow_server!r})
with MlflowRun(options) as run:
    run.log("validation", [(1, {{"loss": 1.0}})])
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
