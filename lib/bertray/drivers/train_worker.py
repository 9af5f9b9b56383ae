"""What every worker of a Ray Train run executes: between Ray and `bertray.training.loop`, which does the work."""

from __future__ import annotations

from typing import Any

import ray
import ray.train.torch
import torch

from bertray.drivers import cluster
from bertray.drivers.status_actors import log_to
from bertray.model.runtime import keep_freed_memory
from bertray.storage.location import Location
from bertray.training.checkpoints import checkpoints_of
from bertray.training.config import TrainConfig
from bertray.training.loop import opened
from bertray.training.run_folder import TrainingRun
from bertray.training.tracking import StepRecord

# A board answers in a few milliseconds; a step may take longer than what stops the job waits.
_ANSWER_S = 0.1


def run(settings: dict[str, Any]) -> None:
    """Take part in a run.

    Args:
        settings: `config`, a `TrainConfig` as a dict; `labels` and `problem_type`; `board`, the actor; and
            `lock_number`, of the run's lock, without which a worker that outlives its driver must not write.
    """
    config = TrainConfig.model_construct(**settings["config"])
    place = TrainingRun(Location.of(config.output))
    device = ray.train.torch.get_device()
    set_up_process(device, cluster.assigned_cpus(), settings["board"])
    with opened(
        config,
        place.rows,
        settings["labels"],
        settings["problem_type"],
        device=device,
        watcher=_BoardWatcher(settings["board"]),
        checkpoints=checkpoints_of(config, place.checkpoints, place.location, settings["lock_number"]),
    ) as loop:
        if not loop.run():  # of several ranks the others wait for this one's next step, for ever
            ray.get(settings["board"].stopped.remote())


def set_up_process(device: torch.device, num_threads: int, board: Any) -> None:
    """Let this process train on the device, and tell the board what it logs.

    Args:
        num_threads: of the processor, where the device is it.
    """
    log_to(board.log.remote)
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
        keep_freed_memory()  # Ray Train and Tune run what they are given outside of the main thread


class Answers:
    """Of a board that is asked again and again whether to stop; a late one is looked at the next time."""

    def __init__(self) -> None:
        self._pending: list[ray.ObjectRef[bool]] = []
        self._shall_stop = False

    def shall_stop(self, answer: ray.ObjectRef[bool]) -> bool:
        """What was answered so far, this last one too unless it takes long."""
        self._pending.append(answer)
        there, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=_ANSWER_S)
        self._shall_stop |= any(ray.get(there))
        return self._shall_stop


class _BoardWatcher:
    """Tells the board."""

    def __init__(self, board: Any) -> None:
        self._board, self._answers = board, Answers()

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        return self._answers.shall_stop(self._board.steps.remote(records, num_steps))

    def epoch(self, metrics: dict[str, float]) -> None:
        self._board.epoch.remote(metrics)
