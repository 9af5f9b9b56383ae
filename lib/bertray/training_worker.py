"""What every worker of a Ray Train run executes: between Ray and `bertray.finetuning`, which does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray
import ray.train.torch
import torch

from bertray import cluster, training_rows
from bertray.checkpoints import Checkpoints
from bertray.choices import ProblemType
from bertray.finetuning import FineTuning, Watcher
from bertray.pretrained import load_classifier
from bertray.process import keep_freed_memory
from bertray.run_lock import check_held
from bertray.storage import Location
from bertray.tracking import StepRecord
from bertray.training_config import TrainConfig
from bertray.training_run import TrainingRun
from bertray.worker_log import log_to


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
    with fine_tuning(
        config,
        place.rows,
        settings["labels"],
        settings["problem_type"],
        device=device,
        watcher=_BoardWatcher(settings["board"]),
        checkpoints=Checkpoints(
            place.checkpoints, config.keep_checkpoints, partial(check_held, place.location, settings["lock_number"])
        ),
    ) as loop:
        if not loop.run():  # of several ranks the others wait for this one's next step, for ever
            ray.get(settings["board"].stopped.remote())


@contextmanager
def fine_tuning(
    config: TrainConfig,
    rows: Location,
    labels: Sequence[str],
    problem_type: ProblemType,
    *,
    device: torch.device,
    watcher: Watcher,
    checkpoints: Checkpoints,
) -> Iterator[FineTuning]:
    """The loop over the token files in a folder, ready to run in this process, which was set up."""
    with training_rows.opened(rows) as (splits, vocabulary_V):
        yield FineTuning(
            config,
            load_classifier(config.encoder, labels, problem_type, config.seed),
            splits,
            vocabulary_V,
            problem_type,
            device=device,
            watcher=watcher,
            checkpoints=checkpoints,
        )


def set_up_process(device: torch.device, num_threads: int, board: Any) -> None:
    """Let this process train on the device, and tell the board what it logs.

    Args:
        num_threads: of the processor, where the device is it.
    """
    log_to(board.log.remote)
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
        keep_freed_memory()  # Ray Train and Tune run what they are given outside of the main thread


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
