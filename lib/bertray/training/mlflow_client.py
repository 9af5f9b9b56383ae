"""One training run on an MLflow server: parameters, tags, metrics by step, and how it ended.

1. check    the package is installed and the server answers, before anything starts
2. begin    a new run of the experiment with its parameters; or, to resume, the run of an earlier attempt
3. log      metrics queue up and are sent in requests of up to 1,000; if the server is away, they are sent later
4. end      FINISHED, FAILED or KILLED

After `begin` no failure of the server ends the training: the first is a warning, the queue is sent again, and values
that are lost at the end are counted in a second warning. A request whose answer was lost may be repeated, because a
server keeps one of two metrics with the same name, value, timestamp and step.

MLflow keeps every value that it is sent, so steps that are repeated after a restart must not be logged again: each
request also sets a tag with the last step of its group ("train", "validation", …).
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

# The client has no arguments for these; what the user has set stays.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # read on import, which otherwise starts a thread that reports to its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the queue is the retry; the client's own 7 would block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; a full batch takes a local server 0.2
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it is logged here
}
# The REST interface takes 1,000 metrics and tags in a request.
_BATCH_SIZE = 900
# The queue for a server that is away: some 50 MB, 50,000 steps of four metrics. Beyond it the oldest values are lost.
_MAX_WAITING = 200_000
_RETRY_INTERVAL_S = 30.0
# How long `end` tries; below the 30 s that a preempted process is given.
_END_PATIENCE_S = 10.0
_END_PAUSE_S = 1.0
_REASON_CHARS = 500
_LAST_STEP = "bertray.last_step."

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def check(uri: str) -> None:
    """Check that a tracking server takes metrics.

    Raises:
        RequestError: the package is not installed, or the server does not answer as MLflow does within 10 s.
    """
    mlflow = _mlflow()
    with _explained(uri):
        mlflow.MlflowClient(uri).search_experiments(max_results=1)


class MlflowRun:
    """A run that has begun.

    Args:
        experiment: its name; it is created if there is none.
        params: logged as text for a new run, with `tags`.
        run_id: of the run to resume.

    Raises:
        RequestError: see `check`; or the experiment or the run is deleted or does not exist.
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
        self._entities, self._uri = mlflow.entities, uri
        # Name, value, milliseconds since 1970, step: what MLflow calls a metric.
        self._waiting: deque[tuple[str, float, int, int]] = deque(maxlen=_MAX_WAITING)
        self._num_logged = self._num_sent = 0
        self._tags: dict[str, str] = {}
        self._warned = False
        self._send_again_s = 0.0  # not before this reading of the monotonic clock
        with _explained(uri):
            self._client = mlflow.MlflowClient(uri)
            if run_id is None:
                run = self._client.create_run(self._experiment_id(experiment), run_name=run_name, tags=dict(tags))
                entities = [self._entities.Param(name, str(value)) for name, value in params.items()]
                self._client.log_batch(run.info.run_id, params=entities)
            else:
                run = self._client.get_run(run_id)
                if run.info.lifecycle_stage == "deleted":
                    raise RequestError(f"run {run_id} on {uri} is deleted: restore it, or begin a new run")
                self._client.update_run(run_id, status="RUNNING")
        self.run_id: str = run.info.run_id
        steps = {name: value for name, value in run.data.tags.items() if name.startswith(_LAST_STEP)}
        self._last_steps = {name.removeprefix(_LAST_STEP): int(step) for name, step in steps.items()}
        if uri.startswith("http"):
            _log.info("MLflow: %s/#/experiments/%s/runs/%s", uri.rstrip("/"), run.info.experiment_id, self.run_id)

    def log(self, group: str, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics as GROUP/NAME at increasing steps; steps that were logged before are ignored."""
        now_ms = int(time.time() * 1000)
        for step, metrics in rows:
            if step > self._last_steps.get(group, -1):
                self._last_steps[group] = step
                self._tags[f"{_LAST_STEP}{group}"] = str(step)
                self._waiting += [(f"{group}/{name}", float(value), now_ms, step) for name, value in metrics.items()]
                self._num_logged += len(metrics)
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
        """Send the queue and say how the run ended."""
        give_up_s = time.monotonic() + _END_PATIENCE_S
        while True:
            try:
                self._send()
                self._client.set_terminated(self.run_id, status)
                break
            except _failures() as error:
                self._warn(error)
                if time.monotonic() >= give_up_s:
                    _log.warning(
                        "warning: MLflow run %s on %s could not be marked as %s", self.run_id, self._uri, status
                    )
                    break
                time.sleep(_END_PAUSE_S)
        if num_lost := self._num_logged - self._num_sent:
            _log.warning("warning: MLflow run %s on %s lacks %d values", self.run_id, self._uri, num_lost)

    def _send(self) -> None:
        while self._waiting or self._tags:
            batch = list(islice(self._waiting, _BATCH_SIZE))
            is_last = len(batch) == len(self._waiting)  # the tags name the last steps, so they go with the last values
            tags = [self._entities.RunTag(*one) for one in self._tags.items()] if is_last else []
            metrics = [self._entities.Metric(*one) for one in batch]
            self._client.log_batch(self.run_id, metrics=metrics, tags=tags)
            self._num_sent += len(batch)
            for _ in batch:
                self._waiting.popleft()
            if is_last:
                self._tags.clear()

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning(
                "warning: MLflow on %s does not take metrics: %s. Training goes on, and they are sent again later",
                self._uri,
                _reason(error),
            )
        self._warned = True

    def _experiment_id(self, name: str) -> str:
        try:
            return str(self._client.create_experiment(name))
        except _failures():
            found = self._client.get_experiment_by_name(name)
            if found is None:
                raise
        if found.lifecycle_stage == "deleted":
            raise RequestError(
                f"--mlflow-experiment {name} is deleted on {self._uri}: restore it "
                f"(mlflow experiments restore --experiment-id {found.experiment_id}), or name another"
            )
        return str(found.experiment_id)


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
    """What the client raises if a server is gone, overloaded or unwilling; requests' errors are OSErrors."""
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
