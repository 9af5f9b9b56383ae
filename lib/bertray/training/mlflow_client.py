"""A training's run on an MLflow server: parameters, tags, metrics by step, how it ended.

1. check    the package is there and the server answers, before anything starts
2. begin    a new run of the experiment, with its parameters; or, to resume, one that an earlier attempt began
3. log      metrics wait in line and go in requests of up to 1,000; a server that cannot be reached gets them later
4. end      FINISHED, FAILED or KILLED

    {"train/loss": 0.41, "train/learning_rate": 2e-5}, step 120
        ->  POST runs/log-batch {"run_id": "8e64…", "metrics": [
                {"key": "train/loss", "value": 0.41, "timestamp": 1795266397069, "step": 120}, …]}

After `begin` nothing that the server does ends the training: the first failure is a warning, what waits is sent again,
and what is left at the end is counted in a second warning. A request whose answer was lost is safe to repeat, since a
server keeps one of two metrics of the same name, value, timestamp and step, and the timestamp is taken only once.

MLflow keeps every value that it ever gets, so a step that is done again after a restart is not logged again.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import islice
from typing import Any, Literal

from bertray.errors import RequestError, missing_extra

_log = logging.getLogger(__name__)

# Of the client, which has no arguments for them; what the user has set stays.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # read on import, which otherwise starts a thread that reports to its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # repeated here; its own 7 would hold the driver up for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; a full batch takes a local server 0.2
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it is logged here
}
# Limits of the REST interface: metrics and tags of a request, parameters of one.
_BATCH_SIZE = 1000
_MAX_PARAMS = 100
# Metrics that wait for a server that is gone: some 50 MB, 50,000 steps of four. Beyond it the oldest are lost.
_MAX_WAITING = 200_000
_RETRY_INTERVAL_S = 30.0
# At the end: how long a server is waited for, between attempts; below the 30 s that a preempted process is given.
_END_PATIENCE_S = 10.0
_END_PAUSE_S = 1.0
_REASON_CHARS = 500

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def check(uri: str) -> None:
    """See that metrics can be logged to a tracking server.

    Raises:
        RequestError: the package is not installed, or the server does not answer as MLflow does within 10 s.
    """
    mlflow = _mlflow()
    with _explained(uri):
        mlflow.MlflowClient(uri).search_experiments(max_results=1)


class MlflowRun:
    """A run that has begun.

    Args:
        uri: of the tracking server.
        experiment: its name; made where there is none.
        params: logged as text; not again for a run that is resumed, for MLflow's parameters never change.
        tags: of a new run.
        run_id: of the run to resume.

    Attributes:
        run_id: to resume it by.

    Raises:
        RequestError: see `check`; or the experiment or the run is deleted or not there.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> None:
        mlflow = _mlflow()
        self._entities = mlflow.entities
        self._uri = uri
        # Name, value, milliseconds since 1970, step: what MLflow calls a metric.
        self._waiting: deque[tuple[str, float, int, int]] = deque()
        self._tags: dict[str, str] = {}
        self._last_steps: dict[str, int] = {}  # by metric
        self._num_lost = 0
        self._warned = False
        self._send_again_s = 0.0  # not before this reading of the monotonic clock
        with _explained(uri):
            self._client = mlflow.MlflowClient(uri)
            if run_id is None:
                run = self._client.create_run(self._experiment_id(experiment), run_name=run_name, tags=dict(tags))
                self.run_id: str = run.info.run_id
                self._log_params(params)
            else:
                run = self._client.get_run(run_id)
                self.run_id = run_id
                if run.info.lifecycle_stage == "deleted":
                    raise RequestError(f"run {run_id} on {uri} is deleted: restore it, or begin a new run")
                # The answer has the step of every metric's last value, which the client hides: `data.metrics` is values
                # alone. Whole histories, which it offers, take seconds for every 10,000 steps.
                self._last_steps = {one.key: one.step for one in run.data._metric_objs}
                self._client.update_run(run_id, status="RUNNING")
        if uri.startswith("http"):
            _log.info("MLflow: %s/#/experiments/%s/runs/%s", uri.rstrip("/"), run.info.experiment_id, self.run_id)

    def log(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics by name at some steps, in increasing order; those of steps that are logged are passed over."""
        now_ms = int(time.time() * 1000)
        for step, metrics in rows:
            for name, value in metrics.items():
                if step > self._last_steps.get(name, -1):
                    self._last_steps[name] = step
                    self._waiting.append((name, float(value), now_ms, step))
        while len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft()
            self._num_lost += 1
        if time.monotonic() < self._send_again_s:
            return
        try:
            self._send()
        except _failures() as error:
            self._send_again_s = time.monotonic() + _RETRY_INTERVAL_S
            self._warn(error)

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, with the next metrics or at the end."""
        self._tags |= tags

    def end(self, status: RunStatus) -> None:
        """Send what waits and say how the run ended."""
        give_up_s = time.monotonic() + _END_PATIENCE_S
        while True:
            try:
                self._send()
                self._client.set_terminated(self.run_id, status)
                break
            except _failures() as error:
                self._warn(error)
                if time.monotonic() >= give_up_s:
                    self._num_lost += len(self._waiting)
                    _log.warning(
                        "warning: MLflow run %s on %s is left without its end, %s", self.run_id, self._uri, status
                    )
                    break
                time.sleep(_END_PAUSE_S)
        if self._num_lost:
            _log.warning("warning: MLflow run %s on %s lacks %d values", self.run_id, self._uri, self._num_lost)

    def _send(self) -> None:
        while self._waiting or self._tags:
            tags = [self._entities.RunTag(*one) for one in self._tags.items()]
            batch = list(islice(self._waiting, _BATCH_SIZE - len(tags)))
            metrics = [self._entities.Metric(*one) for one in batch]
            self._client.log_batch(self.run_id, metrics=metrics, tags=tags)
            self._tags.clear()
            for _ in batch:
                self._waiting.popleft()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning(
                "warning: MLflow on %s does not take metrics: %s. Training goes on, and they are sent again later",
                self._uri,
                _reason(error),
            )
        self._warned = True

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except _failures():
                # Another run has just made it, or it cannot be made.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            raise RequestError(
                f"--mlflow-experiment {name} is deleted on {self._uri}: restore it "
                f"(mlflow experiments restore --experiment-id {found.experiment_id}), or name another"
            )
        return str(found.experiment_id)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        entities = [self._entities.Param(name, str(value)) for name, value in params.items()]
        for start in range(0, len(entities), _MAX_PARAMS):
            self._client.log_batch(self.run_id, params=entities[start : start + _MAX_PARAMS])


def _mlflow() -> Any:
    """The package, imported when first needed: it takes a second.

    Raises:
        RequestError: it is not installed.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return import_module("mlflow")
    except ImportError as error:
        raise missing_extra(f"--mlflow-uri ({error})", "mlflow", "leave it out") from error


def _failures() -> tuple[type[Exception], ...]:
    """What a server that is gone, overloaded or unwilling makes the client raise; requests' errors are OSErrors."""
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    try:
        yield
    except _failures() as error:
        raise RequestError(
            f"--mlflow-uri {uri}: {_reason(error)}. Check that an MLflow tracking server answers there (one starts "
            "with `mlflow server`) and, if it asks for them, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN"
        ) from error


def _reason(error: Exception) -> str:
    """The error on one line: a proxy may answer with a whole page."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= _REASON_CHARS else f"{text[:_REASON_CHARS]}…"
