"""The workers of a Ray TorchTrainer that train: begun again from the latest checkpoint where one of them is lost."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from bertray.data.dataset import Dataset
from bertray.drivers import cluster
from bertray.drivers.status_actors import RunBoard, show_logged, train_on_worker
from bertray.errors import BertrayError
from bertray.storage.location import Location
from bertray.training.checkpoints import Checkpoints
from bertray.training.config import TrainConfig
from bertray.training.run_folder import TrainingRun
from bertray.training.watcher import STOP_S, News

_log = logging.getLogger(__name__)

# So long after a checkpoint was due Ray looks whether an elastic run could have more workers, to begin again from it.
_RESIZE_INTERVAL_S = 60.0


@cluster.session()
def fit(
    config: TrainConfig,
    dataset: Dataset,
    lock_number: int,
    shown: Callable[[Callable[[], News]], AbstractContextManager[None]],
) -> None:
    """Run the workers until the last step, however often one is lost.

    Args:
        lock_number: of the lock on the run's folder.
        shown: shows what workers tell, which it is given a function for, while its block runs.

    Raises:
        BertrayError: what a worker raises on purpose.
        ray.train.TrainingFailedError: workers were lost `max_failures` times without a new checkpoint between.
    """
    run = TrainingRun(Location.of(config.output))
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
    if not placement.use_gpu:
        tell_what_is_faster(fewest, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    num_failures, last_step = 0, 0
    while True:
        board = cluster.start_board(RunBoard)
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
            # Where Ray keeps its own state: it is given no checkpoints, for `training.checkpoints` writes them.
            run_config=ray.train.RunConfig(name=uuid.uuid4().hex, **cluster.storage(run.location / "ray")),
        )
        try:
            with shown(_news_of(board)):
                _run(trainer, board)
            return
        except ray.train.TrainingFailedError as error:
            # What a worker said on purpose is the message.
            failures = getattr(error, "worker_failures", {}).values()
            if said := next((one for one in failures if isinstance(one, BertrayError)), None):
                raise said from error
            progress = Checkpoints(run.checkpoints).latest()
            step = progress.step if progress else 0
            num_failures = num_failures + 1 if step == last_step else 1
            last_step = step
            if num_failures > config.max_failures:
                raise
            reason = str(next(iter(failures), error)).strip().partition("\n")[0]
            _log.warning("warning: workers were lost (%s); going on from step %d", reason, step)


def tell_what_is_faster(num_workers: int, nodes: list[dict[str, float]]) -> None:
    """Warn of CPU workers that share a machine: what they exchange takes longer than what they gain."""
    num_machines = sum(node.get("CPU", 0) > 0 for node in nodes)
    if num_workers > num_machines:
        _log.warning(
            "warning: %d workers share the CPUs of %d machines: --num-workers %d, one a machine, is faster",
            num_workers,
            num_machines,
            num_machines,
        )


def _news_of(board: Any) -> Callable[[], News]:
    def news() -> News:
        show_logged(board)
        found: News = ray.get(board.news.remote())
        return found

    return news


def _resize_interval_s(config: TrainConfig) -> float:
    """A run that begins again with more workers must have a checkpoint of its own since it last did.

    Of `checkpoint_steps` nobody knows how long they take: there it may cost what was done in a minute.
    """
    return _RESIZE_INTERVAL_S + (0 if config.checkpoint_steps else 60 * config.checkpoint_minutes)


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
