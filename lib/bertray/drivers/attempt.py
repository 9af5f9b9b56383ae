"""One attempt at a run of bertray train or bertray tune; an interrupted run takes several attempts.

1. check     data set, encoder and output, before any time is spent                [training.preflight]
2. lock      the run's folder                                                      [training.run_folder]
3. tokenise  training and validation rows, unless an earlier attempt has           [training.token_files]
4. follow    the work, which another thread or the cluster does: show its progress, stop it on a signal
5. bundle    write it with its page, then remove the run's folder                                [training.export]

Torch and transformers take seconds to import, so this happens after the checks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from bertray.bundle.info import BundleInfo
from bertray.data.dataset import Dataset
from bertray.drivers import ray_address
from bertray.errors import BertrayError
from bertray.reports.pages import add_page
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, check_held, new_run_id
from bertray.tasks.task import TASKS
from bertray.training import mlflow_client
from bertray.training.config import TrainConfig, TrainingOptions
from bertray.training.preflight import check_origin, check_output, open_data, with_absolute_paths
from bertray.training.run_folder import Kind, TrainingRun
from bertray.training.watcher import STOP_S, Watcher
from bertray.types import ProblemType

if TYPE_CHECKING:
    import torch

    from bertray.training.checkpoints import Checkpoints, Progress
    from bertray.training.loop import FineTuning

_log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 0.5
# How long Ray's controller, which loads this module too, lets workers leave their group before it kills them: after an
# error some never do.
os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")

Config = TypeVar("Config", bound=TrainConfig)
Result = TypeVar("Result")


class Attempt(NamedTuple, Generic[Config]):
    """What the steps of an attempt need."""

    config: Config  # with absolute paths
    dataset: Dataset
    data_fingerprint: str  # when the attempt began
    run: TrainingRun
    lock: RunLock
    is_continued: bool  # an earlier attempt wrote the token files, and maybe checkpoints

    def task(self, config: TrainConfig | None = None, trial: int | None = None) -> Task:
        """The task of every worker of the run, or of one trial, which has options of its own."""
        return Task(config or self.config, self.dataset.labels, self.dataset.problem_type, self.lock.number, trial)

    def write_bundle(
        self,
        config: TrainConfig,
        checkpoints: Checkpoints,
        progress: Progress,
        add_files: Callable[[Path], None] = lambda _: None,
    ) -> BundleInfo:
        """`export.write_bundle` of the best epoch, if the lock, the output and the data set are as they were."""
        from bertray.training.export import write_bundle

        def check() -> None:
            self.lock.check()
            check_output(self.config, self.run)  # again: time has passed
            self.run.begin_bundle()

        def finish(folder: Path) -> None:
            add_page(Location.of(str(folder)), place=output)
            check()

        check()
        weights, output = checkpoints.load_best(progress), Location.of(self.config.output)
        return write_bundle(config, self.dataset, self.data_fingerprint, output, progress, weights, add_files, finish)


class Task(NamedTuple):
    """What a process needs to train; on a cluster every worker gets it."""

    config: TrainConfig
    labels: tuple[str, ...]
    problem_type: ProblemType
    lock_number: int  # without this lock on the run's folder, a worker that outlives its driver must not write
    trial: int | None = None  # its number in a search

    @contextmanager
    def loop(self, device: torch.device, watcher: Watcher) -> Iterator[FineTuning]:
        """The loop over the run's token files, which starts from the run's latest checkpoint."""
        from bertray.model.pretrained import load_classifier
        from bertray.training import token_files
        from bertray.training.checkpoints import Checkpoints
        from bertray.training.loop import FineTuning

        config = self.config
        run = TrainingRun(Location.of(config.output), "training" if self.trial is None else "tuning")
        checkpoints = Checkpoints(
            run.checkpoints if self.trial is None else run.trial_checkpoints(self.trial),
            partial(check_held, run.location, self.lock_number),
            every_minutes=config.checkpoint_minutes,
            every_steps=config.checkpoint_steps,
        )
        model = load_classifier(config.encoder, self.labels, self.problem_type, config.seed)
        settings: dict[str, Any] = {"device": device, "watcher": watcher, "checkpoints": checkpoints}
        settings |= {"keep": config.keep, "patience": config.patience}
        with token_files.opened(run.rows) as (splits, vocabulary_V):
            yield FineTuning(config, model, splits, vocabulary_V, self.problem_type, **settings)


@contextmanager
def begun(config: Config, kind: Kind) -> Iterator[Attempt[Config]]:
    """Check everything, take the lock and tokenise; remove the run's folder when the block has made the bundle.

    If the block fails, the folder stays for the next attempt, unless there is no checkpoint yet.

    Raises:
        RequestError: an option, data, encoder, output, storage or RAY_ADDRESS does not fit.
        LockedError: another process works on the same output.
    """
    run = TrainingRun(Location.of(config.output), kind)
    check_output(config, run)  # first: opening the data may download the encoder
    if config.worker_range != (0, 0):
        ray_address.prepare()
    dataset = open_data(config)
    if config.mlflow_uri:
        mlflow_client.check(config.mlflow_uri)
    from bertray.model.pretrained import classifier_and_head, load_tokenizer
    from bertray.tokenization.tokenizer import ColumnTokenizer
    from bertray.training.token_files import write_rows

    tokenizer, encoder_config = load_tokenizer(config.encoder, config.max_length, config.overlap)
    # Loaded once to see that it can be.
    _log.info("%s", classifier_and_head(config.encoder, dataset.labels, dataset.problem_type, config.seed)[1])
    config = with_absolute_paths(config, dataset)
    with RunLock(run.location, new_run_id()).held() as lock:
        data_fingerprint = dataset.fingerprint()
        is_continued = run.can_continue(config, data_fingerprint)
        try:
            if not is_continued:
                check_origin(config.encoder, data_fingerprint)
                column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
                write_rows(run.rows, dataset, column_tokenizer, encoder_config)
                run.begin(config, data_fingerprint)
            yield Attempt(config, dataset, data_fingerprint, run, lock, is_continued)
        except BaseException:  # also Ctrl-C
            if kept := run.what_is_kept():
                _log.info("%s in %s: the same command continues from there", kept, run.location)
            else:
                lock.remove_output()
            raise
        lock.remove_output()


def follow(
    work: Callable[[], Result],
    look: Callable[[], None],
    stop: Callable[[], object],
    num_at_work: Callable[[], int] = lambda: 1,
) -> Result:
    """Do work in a thread, look at it twice a second, and once when it has ended; returns its result.

    Args:
        work: not for the main thread, in which Ray Train and Tune would handle SIGINT themselves and exit silently.
        look: runs in another thread, so that a signal does not interrupt it. If it raises, the work is stopped.
        stop: has the work write its checkpoints, after Ctrl-C or SIGTERM too; they have `STOP_S` for that.
        num_at_work: how many checkpoints there are to wait for.
    """
    from bertray.model.runtime import ModelThread

    done = ModelThread().submit(work)
    with ThreadPoolExecutor(1) as looker:
        try:
            while not wait([done], timeout=LOOK_INTERVAL_S).done:
                looker.submit(look).result()
        except (KeyboardInterrupt, SystemExit, BertrayError):
            if num_at_work():
                _log.info("stopping: writing a checkpoint; a second signal ends it at once")
            stop()
            deadline_s = time.monotonic() + STOP_S
            while not done.done() and num_at_work() and time.monotonic() < deadline_s:
                wait([done], timeout=0.1)
            if done.done() and (error := done.exception()):
                _log.warning("warning: the checkpoint could not be written: %s", error)
            raise
        finally:
            looker.submit(look).result()
    return done.result()


def log_start(config: TrainingOptions, dataset: Dataset, workers: str, share: str) -> None:
    """Log what is trained on which data, by which workers, and their share of the cluster or machine."""
    of = "with numbers" if TASKS[dataset.problem_type].outputs else f"of {len(dataset.labels)} labels"
    message = "fine-tuning %s on %d rows %s; %s with %s"
    _log.info(message, config.encoder, dataset.num_rows("train"), of, workers, share)


def log_epoch(metrics: Mapping[str, float], name: str, problem_type: ProblemType) -> None:
    """Log the metrics of an epoch."""
    names = {"train_loss": "train loss", "loss": "validation loss", **TASKS[problem_type].metric_names}
    shown = ", ".join(f"{words} {metrics[key]:.4f}" for key, words in names.items())
    _log.info("%s: %s, %.0f s", name, shown, metrics["wall_s"])
