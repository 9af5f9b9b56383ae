"""What every process of a search executes: one trial, between Ray Tune and `training.loop`, which does the work.

    trial 3  --- {"number": 3, "history": [epoch 1, epoch 2], "is_done": false} --->  Tune: go on, or be pruned
             <--- stop? ------------------------------------------------- StopBoard <--- stop ---  driver

A trial goes on from its own checkpoints, whoever starts it again: Tune after a lost node, or the next command.
"""

from __future__ import annotations

import threading
from typing import Any

import ray
import torch
from ray import tune

from bertray.drivers.train_worker import Answers, set_up_process
from bertray.errors import DivergedError, RequestError, UnavailableError
from bertray.storage.location import Location
from bertray.training.checkpoints import Progress, checkpoints_of
from bertray.training.config import TrainConfig
from bertray.training.loop import FineTuning, opened
from bertray.training.run_folder import TrainingRun
from bertray.training.tracking import StepRecord


def run_trial(space: dict[str, int], settings: dict[str, Any], board: Any) -> None:
    """Entry point of a trial; a plain function for Tune.

    Args:
        space: `number`, of the trial.
        settings: `configs`, a `TrainConfig` as a dict for every number; `labels`, `problem_type`, `lock_number` as in
            `train_worker.run`; `use_gpu` and `num_threads`.
        board: the `status_actors.StopBoard`.
    """
    number = space["number"]
    config = TrainConfig.model_construct(**settings["configs"][number])
    run = TrainingRun(Location.of(config.output), "tuning")
    checkpoints = checkpoints_of(config, run.trial_checkpoints(number), run.location, settings["lock_number"])
    watcher = _TrialWatcher(number, board)
    device = torch.device("cuda" if settings["use_gpu"] else "cpu")
    set_up_process(device, settings["num_threads"], board)
    try:
        with opened(
            config,
            run.rows,
            settings["labels"],
            settings["problem_type"],
            device=device,
            watcher=watcher,
            checkpoints=checkpoints,
        ) as loop:
            watcher.loop = loop
            try:
                is_done = loop.run()
            except (DivergedError, torch.OutOfMemoryError) as error:
                # A result, not an accident: the same options would end the same again.
                report(number, loop.progress, failure=str(error).partition("\n")[0])
                return
    except UnavailableError:  # another attempt may reach it
        raise
    except RequestError as error:
        ray.get(board.refuse.remote(str(error)))  # and the driver ends the search
        return
    if not is_done:
        # The driver ends this process; to Tune a trial that returns is done.
        ray.get(board.saved.remote(number))
        threading.Event().wait()
    # Once more what the last epoch told: of a run that was done before, no epoch tells it.
    report(number, loop.progress)


def report(number: int, progress: Progress, failure: str | None = None) -> None:
    """Tell Tune how far a trial is; returns when Tune has decided that it goes on."""
    last = progress.history[-1] if progress.history else {"epoch": 0, "f1_macro": 0.0}
    tune.report(
        {
            "number": number,
            "epoch": last["epoch"],
            "f1_macro": last["f1_macro"],
            # All epochs: what was told before may be lost with a driver that died.
            "history": progress.history,
            "best_epoch": progress.best_epoch,
            "is_done": progress.is_done,
            "failure": failure,
        }
    )


class _TrialWatcher:
    """Reports epochs to Tune; asks the board whether to stop."""

    def __init__(self, number: int, board: Any) -> None:
        self._number, self._board, self._answers = number, board, Answers()
        self.loop: FineTuning | None = None

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        return self._answers.shall_stop(self._board.shall_stop.remote(self._number))

    def epoch(self, metrics: dict[str, float]) -> None:
        assert self.loop is not None
        report(self._number, self.loop.progress)
