"""What a training run tells of its steps and epochs: to MLflow while it runs, to TensorBoard in the finished bundle.

train       loss, learning_rate, grad_norm, tokens_per_s            of steps
validation  loss, accuracy, f1_macro, …                             of epochs
best        the scores of the kept epoch, for MLflow's table of runs
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from bertray.storage.location import Location
from bertray.training.config import TrainConfig

# Fields of an epoch's history entry that are no scores, and those that are none of validation.
NOT_SCORES = ("step", "num_workers", "num_train_tokens", "wall_s")
_NOT_VALIDATION = ("epoch", "train_loss", *NOT_SCORES)

Rows: TypeAlias = list[tuple[int, dict[str, float]]]  # steps, and values by name


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, over all workers."""

    step: int  # from 1, over all epochs
    epoch: float  # passes over the training rows: 1.5 in the middle of the second
    loss: float  # mean over the global batch
    learning_rate: float
    grad_norm: float  # L2 norm over all weights, before clipping
    tokens_per_s: float


def of_steps(records: Iterable[StepRecord]) -> Rows:
    """What is told of steps."""
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_s")
    return [(one.step, {name: getattr(one, name) for name in names}) for one in records]


def of_epochs(history: Iterable[Mapping[str, float]]) -> Rows:
    """The validation scores of entries of the history."""
    return [
        (int(one["step"]), {name: value for name, value in one.items() if name not in _NOT_VALIDATION})
        for one in history
    ]


def options_of(config: TrainConfig) -> dict[str, object]:
    """The name of a run, and its options."""
    return {"run_name": Location.of(config.output).name, **config.model_dump(mode="json")}


def write_event_file(
    folder: Path, config: TrainConfig, records: Iterable[StepRecord], history: Iterable[Mapping[str, float]]
) -> None:
    """Write the options, steps and epochs of a run into a new folder, for TensorBoard.

    Raises:
        OSError: the disk is full. tensorboardX's SummaryWriter would wait for ever then, its RecordWriter raises.
    """
    # Here, not above: tensorboardX imports torch where there is one.
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter
    from tensorboardX.summary import text

    lines = [f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in options_of(config).items()]
    options = text("hparams/config", "\n".join(["| option | value |", "|---|---|", *lines]))
    written_s = time.time()
    events = [Event(wall_time=written_s, file_version="brain.Event:2"), Event(wall_time=written_s, summary=options)]
    for group, rows in (("train", of_steps(records)), ("validation", of_epochs(history))):
        for step, scalars in rows:
            values = [Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in scalars.items()]
            events.append(Event(wall_time=written_s, step=step, summary=Summary(value=values)))
    folder.mkdir()
    # TensorBoard finds files by the start of the name.
    file = folder / f"events.out.tfevents.{int(written_s):010}.{socket.gethostname()}"
    with closing(RecordWriter(str(file))) as writer:
        for event in events:
            writer.write(event.SerializeToString())
