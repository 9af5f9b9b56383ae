"""A training run on an MLflow server: options, tags, metrics by step, and how it ended.

1. check    the package is installed and the server answers, before anything starts
2. begin    a new run of the experiment, for each attempt
3. log      metrics wait in a list and are sent; if the server is away, they are sent later
4. end      FINISHED, FAILED, or KILLED (Ctrl-C, SIGTERM)

After `begin` no failure of the server ends the training: the first is a warning, and values that are lost at the end
are counted in a second one. A request whose answer was lost may be repeated, because a server keeps one of two metrics
with the same name, value, timestamp and step.
"""

from __future__ import annotations

import logging
import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Self

from bertray.errors import RequestError, missing_extra
from bertray.training.config import TrainConfig
from bertray.training.tracking import Rows, options_of
from bertray.versions import versions

_log = logging.getLogger(__name__)

# The client has no arguments for these; what the user has set stays.
_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",  # read on import, which otherwise starts a thread that reports to its makers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # what waits is sent again; the client's own 7 would block for minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; a full batch takes a local server 0.2
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it is logged here
}
_RETRY_INTERVAL_S = 30.0
_REASON_CHARS = 500


def check(uri: str) -> None:
    """Check that a tracking server takes metrics.

    Raises:
        RequestError: the package is not installed, or the server does not answer as MLflow does within 10 s.
    """
    mlflow = _mlflow()
    with _explained(uri):
        mlflow.MlflowClient(uri).search_experiments(max_results=1)


class MlflowRun:
    """The run of an attempt with these options, a context manager; without an mlflow_uri it does nothing.

    Raises:
        RequestError: on entry: see `check`; or the experiment is deleted.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config, self._uri = config, config.mlflow_uri
        self._client: Any = None
        # Name, value, milliseconds since 1970, step: what MLflow calls a metric.
        self._waiting: list[tuple[str, float, int, int]] = []
        self._last_steps: dict[str, int] = {}  # of each group: workers that restart repeat steps
        self._send_again_s = 0.0  # not before this reading of the monotonic clock; 0: nothing has failed yet

    def __enter__(self) -> Self:
        if self._uri is None:
            return self
        mlflow, options = _mlflow(), options_of(self._config)
        tags = {f"version.{package}": version for package, version in versions().items()}
        with _explained(self._uri):
            client = mlflow.MlflowClient(self._uri)
            found = client.get_experiment_by_name(name := self._config.mlflow_experiment)
            experiment = found.experiment_id if found else client.create_experiment(name)
            run = client.create_run(experiment, run_name=options.pop("run_name"), tags=tags)
            params = [mlflow.entities.Param(option, str(value)) for option, value in options.items()]
            client.log_batch(run.info.run_id, params=params)
        self._client, self._metric, self._run_id = client, mlflow.entities.Metric, run.info.run_id
        _log.info("MLflow: %s/#/experiments/%s/runs/%s", self._uri.rstrip("/"), experiment, self._run_id)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._client is None:
            return
        # bertray.cli turns SIGTERM into SystemExit; both are stopped from outside.
        status = "KILLED" if kind and issubclass(kind, KeyboardInterrupt | SystemExit) else "FAILED"
        try:
            self._send()
            self._client.set_terminated(self._run_id, status if kind else "FINISHED")
        except _failures() as error:
            _log.warning(
                "warning: MLflow run %s on %s has not been told that the training has ended, and lacks %d values: %s",
                *(self._run_id, self._uri, len(self._waiting), _reason(error)),
            )

    def log(self, group: str, rows: Rows) -> None:
        """Log metrics as GROUP/NAME at increasing steps, and what waits; steps that were logged before are ignored."""
        if self._client is None:
            return
        now_ms = int(time.time() * 1000)
        for step, metrics in rows:
            if step > self._last_steps.get(group, -1):
                self._last_steps[group] = step
                self._waiting += [(f"{group}/{name}", float(value), now_ms, step) for name, value in metrics.items()]
        if time.monotonic() < self._send_again_s:
            return
        try:
            self._send()
        except _failures() as error:
            if not self._send_again_s:
                _log.warning(
                    "warning: MLflow on %s does not take metrics: %s. Training goes on, and they are sent again later",
                    *(self._uri, _reason(error)),
                )
            self._send_again_s = time.monotonic() + _RETRY_INTERVAL_S

    def _send(self) -> None:
        self._client.log_batch(self._run_id, metrics=[self._metric(*one) for one in self._waiting])
        self._waiting.clear()


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
    return textwrap.shorten(str(error), _REASON_CHARS, placeholder=" …").rstrip(".")
