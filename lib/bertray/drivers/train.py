"""From a data set to a bundle: the driver's side of training.

1. check     data set, encoder, output and cluster, before any time is spent
2. tokenise  training and validation rows, once                                   [training.token_files]
3. run       `drivers.train_worker` on every worker of a Ray TorchTrainer; again from the latest checkpoint when a
             worker or a node was lost; what they report goes to the terminal, TensorBoard and MLflow
4. bundle    the best epoch's weights and all that belongs to them                 [training.export]

Until the bundle is there, all of it lies in the folder of the run, from which the same command goes on.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from bertray.data.dataset import Dataset
from bertray.drivers import cluster
from bertray.drivers.status_actors import Board, show_logged, train_on_worker
from bertray.errors import BertrayError, DivergedError
from bertray.model.pretrained import load_tokenizer
from bertray.progress import ProgressBar
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.training import mlflow_client
from bertray.training.checkpoints import Checkpoints
from bertray.training.config import TrainConfig
from bertray.training.export import write_bundle
from bertray.training.preflight import check_data, check_origin, check_output, with_absolute_places, with_rows
from bertray.training.run_folder import TrainingRun
from bertray.training.token_files import write_rows
from bertray.training.tracking import Tracker

_log = logging.getLogger(__name__)

# A step and a checkpoint of a large model; what stops a job gives it half a minute.
STOP_S = 25.0
# So long after a checkpoint was due Ray looks whether an elastic run could have more workers, to begin again from it.
_RESIZE_INTERVAL_S = 60.0


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune, or go on with fine-tuning, and write the bundle; returns the summary.

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
                with cluster.session():
                    _fit(config, dataset, checkpoints, lock.number, tracker)
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
    return {
        "output": str(output),
        "best_epoch": progress.best_epoch,
        "num_epochs": len(history),
        **({"resumed_from_step": first_step} if first_step else {}),
        "validation": info.metrics,
        "num_train_tokens": int(num_tokens),
        "train_tokens_per_s": round(num_tokens / sum(epoch["wall_s"] for epoch in history), 1),
        "wall_s": round(time.monotonic() - started_s, 1),
        "fingerprint": info.fingerprint(),
    }


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


def _fit(config: TrainConfig, dataset: Dataset, checkpoints: Checkpoints, lock_number: int, tracker: Tracker) -> None:
    """Run the workers until the last step, however often one is lost.

    Raises:
        BertrayError: what a worker raises on purpose.
        ray.train.TrainingFailedError: workers were lost `max_failures` times without a new checkpoint between.
    """
    fewest, most = config.worker_range
    placement = cluster.place(config.device, fewest, "--num-workers", most)
    _log.info(
        "fine-tuning %s on %d rows of %d labels; epochs: %d; workers: %s, each with %s",
        config.encoder,
        dataset.num_rows("train"),
        len(dataset.labels),
        config.epochs,
        config.num_workers,
        placement.share,
    )
    num_failures, last_step = 0, 0
    while True:
        board = cluster.start_board(Board)
        settings = {
            "config": config.model_dump(),
            "labels": dataset.labels,
            "problem_type": dataset.problem_type,
            "board": board,
            "lock_number": lock_number,
        }
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config=settings,
            scaling_config=ray.train.ScalingConfig(
                num_workers=fewest if fewest == most else (fewest, most),
                elastic_resize_monitor_interval_s=_resize_interval_s(config),
                use_gpu=placement.use_gpu,
                resources_per_worker={"CPU": placement.cpus_each, **({"GPU": 1} if placement.use_gpu else {})},
            ),
            run_config=_run_config(config),
        )
        try:
            with _shown(board, tracker):
                _run(trainer, board)
            return
        except ray.train.TrainingFailedError as error:
            # What a worker said on purpose is the message.
            failures = getattr(error, "worker_failures", {}).values()
            if said := next((one for one in failures if isinstance(one, BertrayError)), None):
                raise (with_rows(said, dataset) if isinstance(said, DivergedError) else said) from error
            progress = checkpoints.latest()
            step = progress.step if progress else 0
            num_failures = num_failures + 1 if step == last_step else 1
            last_step = step
            if num_failures > config.max_failures:
                raise
            reason = str(next(iter(failures), error)).strip().partition("\n")[0]
            _log.warning("warning: workers were lost (%s); going on from step %d", reason, step)


def _resize_interval_s(config: TrainConfig) -> float:
    """A run that begins again with more workers must have a checkpoint of its own since it last did.

    Of `checkpoint_steps` nobody knows how long they take: there it may cost what was done in a minute.
    """
    return _RESIZE_INTERVAL_S + (0 if config.checkpoint_steps else 60 * config.checkpoint_minutes)


def _run_config(config: TrainConfig) -> ray.train.RunConfig:
    """Where Ray keeps its own state: it is given no checkpoints, for `bertray.training.checkpoints` writes them."""
    folder = TrainingRun(Location.of(config.output)).location / "ray"
    return ray.train.RunConfig(name=uuid.uuid4().hex, **cluster.storage(folder))


def _run(trainer: TorchTrainer, board: Any) -> None:
    done = cluster.in_background(trainer.fit)
    try:
        done.result()
    except (KeyboardInterrupt, SystemExit):
        if ray.get(board.is_at_work.remote()):
            _log.info("stopping: writing a checkpoint; a second signal ends it at once")
        board.stop.remote()
        deadline_s = time.monotonic() + STOP_S
        while not done.done() and ray.get(board.is_at_work.remote()) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        raise


@contextmanager
def _shown(board: Any, tracker: Tracker) -> Iterator[None]:
    """Show, and write down, what the board has to tell while the block runs."""
    done = threading.Event()

    def show() -> None:
        with ProgressBar("training", 1, "steps") as bar:
            bar.update(0, "starting workers")
            while True:
                last_look = done.wait(0.5)
                show_logged(board)
                records, epochs, num_steps = ray.get(board.news.remote())
                tracker.steps(records)
                if records:
                    bar.update(records[-1].step, f"epoch {records[-1].epoch:.1f}", num_steps)
                for metrics in epochs:
                    tracker.epoch(int(metrics["step"]), metrics)
                    share = "accuracy" if "accuracy" in metrics else "subset_accuracy"
                    _log.info(
                        "epoch %d: train loss %.4f, validation loss %.4f, %s %.4f, macro-F1 %.4f, %.0f s",
                        *(metrics[key] for key in ("epoch", "train_loss", "loss")),
                        share.replace("_", " "),
                        *(metrics[key] for key in (share, "f1_macro", "wall_s")),
                    )
                if last_look:
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
