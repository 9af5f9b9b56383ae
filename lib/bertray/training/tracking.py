"""Logs a training run for TensorBoard and MLflow, step by step; the driver does this while workers train.

    with Tracker(config, folder) as tracker:
        tracker.steps([StepRecord(step=1, epoch=0.01, loss=1.39, learning_rate=2e-6, grad_norm=5.1, tokens_per_s=9e3)])
        tracker.epoch(100, {"loss": 0.41, "accuracy": 0.87, "f1_macro": 0.85})
        tracker.finish({"loss": 0.41, "accuracy": 0.87, "f1_macro": 0.85}, bundle="s3://bucket/bundle")

1. steps    train/loss, train/learning_rate, train/grad_norm, train/tokens_per_s
2. epoch    validation/loss, validation/accuracy, validation/f1_macro, …
3. finish   best/…: the scores of the kept epoch, because MLflow's table of runs shows the last value of each metric
4. exit     the run's status on MLflow: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED (any other exception)

Event files are always written; MLflow is used if there is a server (`training.mlflow_client`). Neither can end a
training run: a full disk or a lost server causes one warning.

After a restart the steps since the last checkpoint are repeated. TensorBoard then shows the new values: the event
SessionLog.START makes it forget that step and all later ones. MLflow cannot forget and keeps the old values.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.training.config import TrainConfig
from bertray.training.mlflow_client import MlflowRun, RunStatus
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Fields of an epoch's history entry that are no scores, and those that are none of validation.
NOT_SCORES = ("step", "num_workers", "num_train_tokens", "wall_s")
_NOT_VALIDATION = ("epoch", "train_loss", *NOT_SCORES)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, over all workers."""

    step: int  # from 1, over all epochs
    epoch: float  # passes over the training rows: 1.5 in the middle of the second
    loss: float  # mean over the global batch
    learning_rate: float
    grad_norm: float  # L2 norm over all weights, before clipping
    tokens_per_s: float


class Tracker:
    """Logs a run with these options, which it shows as text and as MLflow's parameters; a context manager.

    Args:
        folder: the local folder of event files; files of earlier attempts stay and are continued.
        mlflow_run_id: the MLflow run of an earlier attempt, to continue it.

    Raises:
        RequestError: on entry: the folder cannot be written, or see `bertray.training.mlflow_client`.
    """

    def __init__(self, config: TrainConfig, folder: Path, mlflow_run_id: str | None = None) -> None:
        self._config, self._folder, self._mlflow_run_id = config, folder, mlflow_run_id
        self._mlflow: MlflowRun | None = None
        self._last_step = 0

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run, which a later attempt needs; None without a server."""
        return self._mlflow.run_id if self._mlflow else self._mlflow_run_id

    def __enter__(self) -> Self:
        config, options = self._config, self._config.model_dump(mode="json")
        name = Location.of(config.output).name
        self._events = _EventFile(self._folder)
        self._events.put_text("hparams/config", _as_table({"run_name": name, **options}))
        if config.mlflow_uri:
            tags = {f"version.{package}": version for package, version in versions().items()}
            try:
                self._mlflow = MlflowRun(
                    config.mlflow_uri, config.mlflow_experiment, name, options, tags, self._mlflow_run_id
                )
            except BaseException:
                self._events.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._events.close()
        if self._mlflow:
            self._mlflow.end(status_of(kind))

    def steps(self, records: Sequence[StepRecord]) -> None:
        """Log steps in increasing order; call this about once a second."""
        names = ("loss", "learning_rate", "grad_norm", "tokens_per_s")
        self._write("train", [(record.step, {name: getattr(record, name) for name in names}) for record in records])

    def epoch(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log validation scores after a step.

        Args:
            metrics: an entry of the history; fields that are no validation scores are left out.
        """
        self._write("validation", [(step, _scores(metrics))])

    def finish(self, metrics: Mapping[str, float], bundle: str) -> None:
        """Tell MLflow the result, and close the event files, which may then be copied.

        Args:
            metrics: the history entry of the kept epoch.
            bundle: its path or URI.
        """
        if self._mlflow:
            self._mlflow.tag({"bundle": bundle})
            self._mlflow.log("best", [(self._last_step, _scores(metrics))])
        self._events.close()

    def _write(self, group: str, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self._last_step = max([self._last_step, *(step for step, _ in rows)])
        self._events.put(
            [(step, {f"{group}/{name}": value for name, value in of_step.items()}) for step, of_step in rows]
        )
        if self._mlflow:
            self._mlflow.log(group, rows)


class _EventFile:
    """The event file of one attempt, in TensorBoard's format.

    tensorboardX's SummaryWriter writes in a thread: on a full disk the thread dies and the caller waits forever. Its
    RecordWriter, used here, raises.
    """

    def __init__(self, folder: Path) -> None:
        # Here, not above: tensorboardX imports torch where there is one.
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.record_writer import RecordWriter

        self._event, self._session_log, self._summary = Event, SessionLog, Summary
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            num_attempts = sum(1 for _ in folder.glob("events.out.tfevents.*"))
            # TensorBoard finds files by the start of the name and reads them in the order of names.
            name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{num_attempts:04}"
            self._writer: Any = RecordWriter(str(folder / name))
        except OSError as error:
            raise RequestError(f"cannot write event files to {folder}: {error}. Check its mode and owner") from error
        # The last step of each metric. At first that of unknown metrics is infinite, so that every file begins with a
        # START: TensorBoard ignores the first one of a run and obeys all later ones.
        self._last_steps: dict[str, float] = {}
        self._last_step_of_others = math.inf
        self._append([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def put_text(self, tag: str, markdown: str) -> None:
        """Show a text of this attempt."""
        from tensorboardX.summary import text

        self._append([self._event(wall_time=time.time(), step=0, summary=text(tag, markdown))])

    def put(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Append scalars by tag and step; a repeated step replaces the old one and all later ones."""
        events = []
        for step, scalars in rows:
            if any(step <= self._last_steps.get(tag, self._last_step_of_others) for tag in scalars):
                restart = self._session_log(status=self._session_log.START)
                events.append(self._event(wall_time=time.time(), step=step, session_log=restart))
                self._last_step_of_others = -math.inf
                self._last_steps = {tag: last for tag, last in self._last_steps.items() if last < step}
            values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
            events.append(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))
            self._last_steps |= dict.fromkeys(scalars, step)
        self._append(events)

    def close(self) -> None:
        """Close the file; later calls write nothing."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._warn(error)

    def _append(self, events: Sequence[Any]) -> None:
        if self._writer is None:
            return
        try:
            for event in events:
                self._writer.write(event.SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._warn(error)
            with suppress(OSError):  # the warning is out already
                self._writer.close()
            self._writer = None

    def _warn(self, error: OSError) -> None:
        _log.warning("warning: event files in %s end here, training goes on: %s", self._folder, error)


def _scores(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name not in _NOT_VALIDATION}


def _as_table(config: Mapping[str, Any]) -> str:
    """The options as a Markdown table."""
    rows = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in config.items()]
    return "\n".join(["| option | value |", "|---|---|", *rows])


def status_of(error: type[BaseException] | None) -> RunStatus:
    """MLflow's status of a run that ended with this exception, or with none."""
    if error is None:
        return "FINISHED"
    # bertray.cli turns SIGTERM into SystemExit; both are stopped from outside.
    return "KILLED" if issubclass(error, KeyboardInterrupt | SystemExit) else "FAILED"
