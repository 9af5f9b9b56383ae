"""What every worker of a Ray Train run executes: between Ray and `bertray.finetuning`, which does the work.

rank 0  --- steps, epochs --->  Board, an actor  <--- state ---  driver
        <--- stop? -----------                   <--- stop ----
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
import ray.train.torch
import torch
from transformers.utils import logging as transformers_logging

from bertray import training_rows
from bertray.checkpoints import Checkpoints
from bertray.config import TrainConfig
from bertray.finetuning import FineTuning, StepRecord
from bertray.pretrained import load_classifier
from bertray.run_lock import check_held
from bertray.storage import Location
from bertray.training_run import TrainingRun


def train_on_worker(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: `config`, a `TrainConfig` as a dict; `labels` and `problem_type`; `board`, the actor; and
            `lock_number`, of the run's lock, without which a worker that outlives its driver must not write.
    """
    config = TrainConfig.model_construct(**settings["config"])
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    run = TrainingRun(Location.of(config.output))
    with training_rows.opened(run.rows) as (splits, vocabulary_V):
        FineTuning(
            config,
            load_classifier(config.encoder, settings["labels"], settings["problem_type"], config.seed),
            splits,
            vocabulary_V,
            settings["problem_type"],
            device=device,
            watcher=_BoardWatcher(settings["board"]),
            checkpoints=Checkpoints(
                run.checkpoints, config.keep_checkpoints, partial(check_held, run.location, settings["lock_number"])
            ),
        ).run()


class Board:
    """Where rank 0 says how far it is and the driver looks; a Ray actor."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []
        self._epochs: list[dict[str, float]] = []
        self._num_steps, self._shall_stop = 0, False

    def post(self, records: list[StepRecord], num_steps: int) -> bool:
        """New steps, of so many in all; returns whether the run shall end."""
        self._records += records
        self._num_steps = num_steps
        return self._shall_stop

    def post_epoch(self, metrics: dict[str, float]) -> None:
        self._epochs.append(metrics)

    def stop(self) -> None:
        """Let the run write a checkpoint and end."""
        self._shall_stop = True

    def news(self) -> tuple[list[StepRecord], list[dict[str, float]], int]:
        """Steps and epochs since the last call, and the number of steps of the run."""
        news = self._records, self._epochs, self._num_steps
        self._records, self._epochs = [], []
        return news


class _BoardWatcher:
    """Tells the board, and does not wait for its answer: that of the post before is looked at."""

    def __init__(self, board: Any) -> None:
        self._board, self._answer, self._shall_stop = board, None, False

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._shall_stop, self._answer = ray.get(self._answer), None
        answer = self._board.post.remote(records, num_steps)
        if self._answer is None:
            self._answer = answer
        return self._shall_stop

    def epoch(self, metrics: dict[str, float]) -> None:
        self._board.post_epoch.remote(metrics)
