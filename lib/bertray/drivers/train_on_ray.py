"""Training on the workers of a Ray TorchTrainer, which restart from the latest checkpoint when one of them is lost."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from bertray.drivers import cluster
from bertray.drivers.attempt import Attempt, follow, log_start
from bertray.drivers.status_actors import RunBoard, news_of, train_on_worker
from bertray.errors import BertrayError
from bertray.training.checkpoints import Checkpoints, Progress
from bertray.training.config import TrainConfig
from bertray.training.watcher import News

_log = logging.getLogger(__name__)

# Ray checks this long after a checkpoint was due whether an elastic run can have more workers, which restarts it.
_RESIZE_INTERVAL_S = 60.0


@cluster.session()
def fit(attempt: Attempt[TrainConfig], tell: Callable[[News], None]) -> None:
    """Run workers until the last step, and `tell` what they report; restart them when one is lost.

    Raises:
        BertrayError: a worker raised an error, or some were lost more often than `max_failures` allows.
    """
    config, run = attempt.config, attempt.run
    fewest, most = config.worker_range
    placement = cluster.place(config.device, fewest, "--num-workers", most)
    log_start(config, attempt.dataset, f"epochs: {config.epochs}; workers: {config.num_workers}, each", placement.share)
    if not placement.use_gpu:
        warn_of_shared_machines(fewest, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    # An elastic restart must not lose steps. How long --checkpoint-steps take is unknown: it may lose a minute.
    interval_s = _RESIZE_INTERVAL_S + (0 if config.checkpoint_steps else 60 * config.checkpoint_minutes)
    num_failures, last_step = 0, 0
    while True:
        board = cluster.start_board(RunBoard)
        trainer = TorchTrainer(
            train_on_worker,
            train_loop_config={"task": attempt.task(), "board": board},
            scaling_config=ray.train.ScalingConfig(
                num_workers=fewest if fewest == most else (fewest, most),
                elastic_resize_monitor_interval_s=interval_s,
                use_gpu=placement.use_gpu,
                resources_per_worker={"CPU": placement.cpus_each},
            ),
            # Ray keeps only its own state here; `training.checkpoints` writes the checkpoints.
            run_config=ray.train.RunConfig(name=uuid.uuid4().hex, **cluster.storage(run.location / "ray")),
        )
        try:
            _run(trainer, board, tell)
            return
        except ray.train.TrainingFailedError as error:
            failures: dict[int, Exception] = getattr(error, "worker_failures", {})
            if raised := next((one for one in failures.values() if isinstance(one, BertrayError)), None):
                raise raised from error
            step = (Checkpoints(run.checkpoints).latest() or Progress()).step
            num_failures = num_failures + 1 if step == last_step else 1
            last_step = step
            reason = _reason(failures, error)
            if num_failures > config.max_failures:
                raise BertrayError(
                    f"workers were lost {num_failures} times without a new checkpoint, more often than --max-failures "
                    f"{config.max_failures} allows: {reason}. Is there enough memory? --micro-batch-tokens and "
                    "--gradient-checkpointing need less"
                ) from error
            _log.warning("warning: workers were lost (%s); restarting from step %d", reason, step)


def _run(trainer: TorchTrainer, board: Any, tell: Callable[[News], None]) -> None:
    follow(trainer.fit, lambda: tell(news_of(board)), board.stop.remote, lambda: len(ray.get(board.at_work.remote())))


def _reason(failures: dict[int, Exception], error: Exception) -> str:
    """What was lost, by rank; what other ranks say of their connections to it follows from that."""
    died = [f"worker {rank + 1}" for rank, one in failures.items() if hasattr(one, "health_check_failure")]
    first = next(iter(failures.values()), error)
    said = f"{type(first).__name__}: {str(first).strip().partition(chr(10))[0]}"
    return f"the process of {' and of '.join(died)} died" if died else said


def warn_of_shared_machines(num_workers: int, nodes: list[dict[str, float]]) -> None:
    """Warn if CPU workers share a machine: exchanging gradients then costs more time than the workers save."""
    num_machines = sum(node.get("CPU", 0) > 0 for node in nodes)
    if num_workers > num_machines:
        _log.warning(
            "warning: %d workers share the CPUs of %d machines: --num-workers %d, one a machine, is faster",
            *(num_workers, num_machines, num_machines),
        )
