"""From a data set to a bundle: the driver of bertray train.

1. begin   check, lock and tokenise                                              [drivers.attempt]
2. run     the loop, on the workers of a Ray TorchTrainer                        [drivers.train_on_ray]
           or, with --num-workers 0, in a thread of this process;                [training.loop]
           the terminal and MLflow show its progress                             [training.tracking]
3. bundle  the best epoch's weights and all that belongs to them                 [training.export]

Until the bundle is written, the run's folder keeps everything, and the same command continues the run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from bertray.cli import JobResult
from bertray.drivers.attempt import Attempt, begun, follow, log_epoch, log_start
from bertray.progress import ProgressBar
from bertray.training.config import TrainConfig
from bertray.training.mlflow_client import MlflowRun
from bertray.training.preflight import naming_rows
from bertray.training.tracking import of_epochs, of_steps
from bertray.training.watcher import Board, News

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training run."""

    output: str  # the folder of the bundle
    best_epoch: int  # whose weights the bundle has
    num_epochs: int  # that were run
    validation: dict[str, float]  # scores of the bundle on the validation rows
    num_train_tokens: int  # this and the next: over all epochs
    train_tokens_per_s: float
    wall_s: float  # of this call; an interrupted run took longer in all
    fingerprint: str  # of the bundle; bundles with equal fingerprints predict alike
    resumed_from_step: int = 0  # that an interrupted run continued from; 0: it began here


def run(config: TrainConfig) -> JobResult:
    """The job of the command line."""
    summary = asdict(train(config))
    return JobResult({name: value for name, value in summary.items() if value or name != "resumed_from_step"})


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune, or continue an interrupted run, and write the bundle.

    Raises:
        RequestError: an option, data, encoder, output or the cluster does not fit.
        LockedError: another run works on the same output.
        BertrayError: the loss is not a number; the message names the rows.
        BertrayError: a worker raised an error, or some were lost more often than `max_failures` allows.
    """
    started_s = time.monotonic()
    with begun(config, "training") as attempt:
        from bertray.training.checkpoints import Checkpoints, Progress

        config, run = attempt.config, attempt.run
        checkpoints = Checkpoints(run.checkpoints)
        if attempt.is_continued:
            checkpoints.remove_unfinished()
        progress = checkpoints.latest() or Progress()
        first_step = progress.step
        if attempt.is_continued:
            _log.info("continuing the run at %s from step %d", run.location, first_step)
        with MlflowRun(config) as mlflow:
            if not progress.is_done:
                _fit(attempt, mlflow)
                progress = checkpoints.latest() or progress
                assert progress.is_done, "training ended without its last checkpoint"
            mlflow.log("best", of_epochs([progress.history[progress.best_epoch - 1]]))
            info = attempt.write_bundle(config, checkpoints, progress)
    history = progress.history
    num_tokens = sum(epoch["num_train_tokens"] for epoch in history)
    return TrainResult(
        output=config.output,
        best_epoch=progress.best_epoch,
        num_epochs=len(history),
        resumed_from_step=first_step,
        validation=info.metrics,
        num_train_tokens=int(num_tokens),
        train_tokens_per_s=round(num_tokens / sum(epoch["wall_s"] for epoch in history), 1),
        wall_s=round(time.monotonic() - started_s, 1),
        fingerprint=info.fingerprint(),
    )


def _fit(attempt: Attempt[TrainConfig], mlflow: MlflowRun) -> None:
    """Take the remaining steps."""
    with ProgressBar("training", 1, "steps") as bar, naming_rows(attempt.dataset):
        bar.update(0, "starting")

        def tell(news: News) -> None:
            mlflow.log("train", of_steps(news.records))
            mlflow.log("validation", of_epochs(news.epochs))
            if news.records:
                bar.update(news.records[-1].step, f"epoch {news.records[-1].epoch:.1f}", news.num_steps)
            for metrics in news.epochs:
                log_epoch(metrics, f"epoch {metrics['epoch']:.0f}", attempt.dataset.problem_type)

        if attempt.config.worker_range == (0, 0):
            _fit_here(attempt, tell)
        else:
            from bertray.drivers.train_on_ray import fit

            fit(attempt, tell)


def _fit_here(attempt: Attempt[TrainConfig], tell: Callable[[News], None]) -> None:
    """Run the loop in a thread of this process, with the same result as one Ray worker."""
    import torch

    from bertray.model.runtime import num_cpus, resolve_device

    config, num_threads, board = attempt.config, num_cpus(), Board()
    device = resolve_device(config.device)

    def work() -> None:
        if device.type == "cpu":
            torch.set_num_threads(num_threads)
        with attempt.task().loop(device, board) as loop:
            loop.run()

    share = "a GPU" if device.type == "cuda" else f"{num_threads} CPU"
    log_start(config, attempt.dataset, f"epochs: {config.epochs}; in this process,", share)
    follow(work, lambda: tell(board.news()), board.stop)
