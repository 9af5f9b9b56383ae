"""What Ray runs in processes that train: workers of a run and trials of a search. `training.loop` does the work.

    trial 3  --- {"number": 3, "history": [epoch 1, epoch 2], "is_done": false} --->  Tune: continue or prune
             <--- stop? ------------------------------------------------- RunBoard <--- stop ---  driver

A trial continues from its own checkpoints, whether Tune restarts it after a lost node or the next command does.
What a process raises ends the work of all, for it would come again; what was lost is started again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.train.torch
import torch
from ray import tune

from bertray.drivers import cluster
from bertray.drivers.attempt import Task
from bertray.drivers.status_actors import log_to
from bertray.errors import BertrayError, DivergedError, UnavailableError
from bertray.model.runtime import keep_freed_memory
from bertray.tasks.task import TASKS
from bertray.training.checkpoints import Progress
from bertray.training.loop import FineTuning
from bertray.training.tracking import StepRecord

_log = logging.getLogger(__name__)

# What a process raises because another one, a node or its own GPU was lost.
_LOSSES = (torch.distributed.DistError, torch.AcceleratorError, ray.exceptions.RayError)
# A board answers in a few milliseconds. If it does not, the answer is read at the next step.
_ANSWER_S = 0.1


def set_up_process(board: Any, device: torch.device | None = None) -> torch.device:
    """Prepare this Ray worker to train on `device`, or on the GPU or CPUs assigned to it; the board gets its log."""
    device = device or torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    log_to(board.log.remote)
    if device.type == "cpu":
        torch.set_num_threads(cluster.assigned_cpus())
        keep_freed_memory()  # Ray Train and Tune do not run this in the main thread
    return device


@contextmanager
def explained(who: str) -> Iterator[None]:
    """Make what this process raises, but for losses, a BertrayError that names it, and can be unpickled."""
    try:
        yield
    except (BertrayError, *_LOSSES):
        raise
    except Exception as error:
        if "/gloo/" in str(error):  # gloo raises RuntimeError, with the path of its source file
            raise
        _log.exception("%s raised an error that bertray does not expect", who)
        raise BertrayError(f"{who} raised {type(error).__name__}: {error}".removesuffix(": ")) from error


class BoardWatcher:
    """A `Watcher` that tells a `RunBoard`."""

    def __init__(self, board: Any, number: int = 0) -> None:
        self._board, self._number = board, number
        self._pending: list[ray.ObjectRef[bool]] = []
        self._shall_stop = False

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        """See `Watcher`."""
        self._pending.append(self._board.steps.remote(records, num_steps, self._number))
        answers, self._pending = ray.wait(self._pending, num_returns=len(self._pending), timeout=_ANSWER_S)
        self._shall_stop |= any(ray.get(answers))
        return self._shall_stop

    def epoch(self, metrics: dict[str, float]) -> None:
        """See `Watcher`."""
        self._board.epoch.remote(metrics)


def run(task: Task, board: Any) -> None:
    """Take part in a run, as a worker of Ray Train."""
    device = set_up_process(board, ray.train.torch.get_device())
    context = ray.train.get_context()
    who = f"worker {context.get_world_rank() + 1} of {context.get_world_size()}"
    with explained(who), task.loop(device, BoardWatcher(board)) as loop:
        if not loop.run():  # only rank 0 learns of a stop; the others wait for its next step for ever
            ray.get(board.saved.remote(0))


def run_trial(space: dict[str, int], tasks: dict[int, Task], board: Any) -> None:
    """Run the trial whose `number` is in the space; a plain function for Tune."""
    number = space["number"]
    watcher = _TrialWatcher(board, number)
    device = set_up_process(board)
    try:
        with explained(f"trial {number}"), tasks[number].loop(device, watcher) as loop:
            watcher.loop = loop
            try:
                is_done = loop.run()
            except (DivergedError, torch.OutOfMemoryError) as error:
                # A result: the same options would end the same way again.
                report(number, loop.progress, failure=str(error).partition("\n")[0])
                return
    except UnavailableError:  # another attempt may succeed
        raise
    except BertrayError as error:
        report(number, Progress(), refusal=error)
        return
    if not is_done:
        # If this returned, Tune would take the trial for done. The driver ends the process.
        ray.get(board.saved.remote(number))
        threading.Event().wait()
    # The last epoch again: a trial that was done before this attempt has reported nothing.
    report(number, loop.progress)


def report(number: int, progress: Progress, failure: str | None = None, refusal: BertrayError | None = None) -> None:
    """Report a trial's progress to Tune; returns when Tune lets the trial continue."""
    last = progress.history[-1] if progress.history else {"epoch": 0, **{one.best_metric: 0 for one in TASKS.values()}}
    tune.report(
        {
            "number": number,
            **last,
            # All epochs: a driver that died may have lost earlier reports.
            "history": progress.history,
            "best_epoch": progress.best_epoch,
            "is_done": progress.is_done,
            "failure": failure,  # why these options cannot be trained
            "refusal": refusal,  # ends the search
        }
    )


class _TrialWatcher(BoardWatcher):
    """Reports epochs to Tune."""

    loop: FineTuning

    def epoch(self, metrics: dict[str, float]) -> None:
        report(self._number, self.loop.progress)
