"""From a data set to a bundle: the driver of bertray train.

1. check     data set, encoder, output, before any time is spent                   [training.preflight]
2. tokenise  training and validation rows, once                                    [training.token_files]
3. run       the loop, on the workers of a Ray TorchTrainer                        [drivers.train_on_ray]
             or, with --num-workers 0, in a thread of this process;                [training.loop]
             what it reports goes to the terminal, TensorBoard and MLflow          [training.tracking]
4. bundle    the best epoch's weights and all that belongs to them                 [training.export]

Until the bundle is there, all of it lies in the folder of the run, from which the same command goes on. Torch and Ray
are imported after the checks: a request that cannot be carried out is refused without them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertray.cli import JobResult, keep_ray_on_loopback
from bertray.data.dataset import Dataset
from bertray.errors import DivergedError
from bertray.model.sources import encoder_folder
from bertray.progress import ProgressBar
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.training import mlflow_client
from bertray.training.config import TrainConfig
from bertray.training.preflight import (
    check_data,
    check_origin,
    check_output,
    with_absolute_places,
    with_rows,
)
from bertray.training.run_folder import TrainingRun
from bertray.training.tracking import Tracker
from bertray.training.watcher import STOP_S, Board, News

if TYPE_CHECKING:
    from bertray.training.checkpoints import Checkpoints

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        output: the bundle's place.
        best_epoch, num_epochs: which epoch's weights it has, of so many.
        validation: the scores of that epoch on the validation rows.
        num_train_tokens, train_tokens_per_s: over all epochs.
        wall_s: of this call; a run that was gone on with took longer.
        fingerprint: of the bundle; bundles of equal fingerprints predict alike.
        resumed_from_step: of a run that was interrupted; 0: it began here.
    """

    output: str
    best_epoch: int
    num_epochs: int
    validation: dict[str, float]
    num_train_tokens: int
    train_tokens_per_s: float
    wall_s: float
    fingerprint: str
    resumed_from_step: int = 0


def run(config: TrainConfig) -> JobResult:
    """The job of the command line."""
    summary = asdict(train(config))
    if not summary["resumed_from_step"]:
        del summary["resumed_from_step"]
    return JobResult(summary)


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune, or go on with fine-tuning, and write the bundle.

    Raises:
        RequestError: something about data, encoder, output or cluster does not fit; nothing was started.
        LockedError: another run is at work on the same output.
        BertrayError: the loss is not a number; the message names the rows.
        ray.train.TrainingFailedError: workers were lost more than `max_failures` times without a new checkpoint.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    run = TrainingRun(output)
    check_output(output, config, run)
    dataset = Dataset.open(config.data)
    check_data(dataset, config)
    if config.mlflow_uri:
        mlflow_client.check(config.mlflow_uri)
    encoder_folder(config.encoder)  # is there; it may have to be downloaded
    # From here on torch and transformers, which take seconds to import.
    from bertray.model.pretrained import load_tokenizer
    from bertray.tokenization.tokenizer import ColumnTokenizer
    from bertray.training.checkpoints import Checkpoints
    from bertray.training.export import write_bundle
    from bertray.training.token_files import write_rows

    tokenizer, encoder_config = load_tokenizer(config.encoder, config.max_length, config.overlap)
    config = with_absolute_places(config, dataset, output)

    checkpoints = Checkpoints(run.checkpoints, config.keep_checkpoints)
    with RunLock(run.location, new_run_id()).held() as lock, _told_what_is_left(run, checkpoints, lock):
        column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
        data_fingerprint = dataset.fingerprint()
        if run.can_go_on(config, data_fingerprint):
            first_step = _go_on(run, checkpoints)
        else:
            check_origin(config.encoder, data_fingerprint)
            first_step = 0
            write_rows(run.rows, dataset, column_tokenizer, encoder_config)
            run.begin(config, data_fingerprint)
        with run.event_files() as events, _tracked(config, run, events) as tracker:
            progress = checkpoints.latest()
            if progress is None or not progress.is_done:
                _fit(config, dataset, lock.number, tracker)
                progress = checkpoints.latest()
                assert progress is not None and progress.is_done, "training ended without its last checkpoint"
            tracker.finish(progress.history[progress.best_epoch - 1], str(output))
            best = checkpoints.load_best(progress)
            lock.check()
            check_output(output, config, run)  # once more: hours have passed
            run.begin_bundle()
            info = write_bundle(config, dataset, data_fingerprint, output, progress, best, events)
        lock.remove_output()
    history = progress.history
    num_tokens = sum(epoch["num_train_tokens"] for epoch in history)
    return TrainResult(
        output=str(output),
        best_epoch=progress.best_epoch,
        num_epochs=len(history),
        resumed_from_step=first_step,
        validation=info.metrics,
        num_train_tokens=int(num_tokens),
        train_tokens_per_s=round(num_tokens / sum(epoch["wall_s"] for epoch in history), 1),
        wall_s=round(time.monotonic() - started_s, 1),
        fingerprint=info.fingerprint(),
    )


@contextmanager
def _tracked(config: TrainConfig, run: TrainingRun, events: Path) -> Iterator[Tracker]:
    """A tracker that goes on with what earlier attempts of the run have written."""
    name = Location.of(config.output).name
    options = config.model_dump(mode="json")
    tracker = Tracker(
        events,
        config.mlflow_uri,
        config.mlflow_experiment,
        name,
        options,
        mlflow_run_id=run.mlflow_run_id(config.mlflow_uri),
    )
    with tracker:
        run.keep_mlflow_run_id(config.mlflow_uri, tracker.mlflow_run_id)
        yield tracker


def _go_on(run: TrainingRun, checkpoints: Checkpoints) -> int:
    """The step that a run goes on from."""
    checkpoints.remove_unfinished()
    progress = checkpoints.latest()
    step = progress.step if progress else 0
    _log.info("going on with the run at %s, from step %d", run.location, step)
    return step


@contextmanager
def _told_what_is_left(run: TrainingRun, checkpoints: Checkpoints, lock: RunLock) -> Iterator[None]:
    """Where the block is left early, say where the checkpoints are. Without any there is nothing to keep."""
    try:
        yield
    except BaseException:  # also Ctrl-C
        progress = checkpoints.latest()
        if progress is None:
            lock.remove_output()
        else:
            _log.info("step %d is kept in %s: the same command goes on from there", progress.step, run.location)
        raise


def _fit(config: TrainConfig, dataset: Dataset, lock_number: int, tracker: Tracker) -> None:
    """Take the steps that are left, wherever `config` says.

    Raises:
        BertrayError: the loss is not a number; the message names the rows.
    """
    try:
        if config.worker_range == (0, 0):
            _fit_here(config, dataset, lock_number, tracker)
        else:
            keep_ray_on_loopback()
            from bertray.drivers.train_on_ray import fit

            fit(config, dataset, lock_number, lambda news: shown(news, tracker))
    except DivergedError as error:
        raise with_rows(error, dataset) from error


def _fit_here(config: TrainConfig, dataset: Dataset, lock_number: int, tracker: Tracker) -> None:
    """Run the loop in a thread of this process, as one worker of Ray would run it in one of its own."""
    import torch

    from bertray.model.runtime import model_thread, num_cpus, resolve_device
    from bertray.training.checkpoints import checkpoints_of
    from bertray.training.loop import opened

    run, board, device = TrainingRun(Location.of(config.output)), Board(), resolve_device(config.device)
    num_threads = num_cpus()

    def work() -> None:
        if device.type == "cpu":
            torch.set_num_threads(num_threads)
        checkpoints = checkpoints_of(config, run.checkpoints, run.location, lock_number)
        problem_type, labels = dataset.problem_type, dataset.labels
        with opened(
            config, run.rows, labels, problem_type, device=device, watcher=board, checkpoints=checkpoints
        ) as loop:
            loop.run()

    _log.info(
        "fine-tuning %s on %d rows of %d labels; epochs: %d; in this process, with %s",
        config.encoder,
        dataset.num_rows("train"),
        len(dataset.labels),
        config.epochs,
        "a GPU" if device.type == "cuda" else f"{num_threads} CPU",
    )
    done = model_thread().submit(work)
    try:
        with shown(board.news, tracker):
            done.result()
    except (KeyboardInterrupt, SystemExit):
        _log.info("stopping: writing a checkpoint; a second signal ends it at once")
        board.stop()
        wait([done], timeout=STOP_S)
        if done.done() and (error := done.exception()):
            _log.warning("warning: the checkpoint could not be written: %s", error)
        raise


@contextmanager
def shown(news: Callable[[], News], tracker: Tracker) -> Iterator[None]:
    """Show, and write down, what a run has to tell while the block runs.

    Args:
        news: called twice a second, in another thread.
    """
    done = threading.Event()

    def show() -> None:
        with ProgressBar("training", 1, "steps") as bar:
            bar.update(0, "starting")
            while True:
                last_look = done.wait(0.5)
                records, epochs, num_steps = news()
                tracker.steps(records)
                if records:
                    bar.update(records[-1].step, f"epoch {records[-1].epoch:.1f}", num_steps)
                for metrics in epochs:
                    tracker.epoch(int(metrics["step"]), metrics)
                    _log_epoch(metrics)
                if last_look:
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _log_epoch(metrics: dict[str, Any]) -> None:
    share = "accuracy" if "accuracy" in metrics else "subset_accuracy"
    _log.info(
        "epoch %d: train loss %.4f, validation loss %.4f, %s %.4f, macro-F1 %.4f, %.0f s",
        *(metrics[key] for key in ("epoch", "train_loss", "loss")),
        share.replace("_", " "),
        *(metrics[key] for key in (share, "f1_macro", "wall_s")),
    )
