"""What fine-tuned models say of training rows that they were not trained on: one model a fold, on Ray.

    fold_N [0, 1, 2, 0, 1, 2]
      1. tokenise  all rows, once; every node gets them through Ray's object store
      2. train     fold 0: on rows 1, 2, 4, 5 -> logits of rows 0 and 3
                   fold 1: on rows 0, 2, 3, 5 -> logits of rows 1 and 4, …    each in a worker process of its own
      3. join      logits_NC of all rows, each by the model that has not seen it

The last epoch counts, not the best one: an epoch chosen by the rows of the fold has seen their labels. Ray starts a
fold again if its process or node is lost.

Legend: N rows, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from transformers import PreTrainedConfig

from bertray.data.dataset import Dataset
from bertray.drivers import cluster
from bertray.drivers.attempt import LOOK_INTERVAL_S, log_epoch, log_start
from bertray.drivers.status_actors import RunBoard, news_of
from bertray.drivers.workers import BoardWatcher, explained, set_up_process
from bertray.errors import BertrayError
from bertray.model.pretrained import load_classifier, num_special_ids
from bertray.progress import ProgressBar
from bertray.schema import TEXT
from bertray.tasks.task import TASKS
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.training.config import AuditConfig
from bertray.training.loop import FineTuning
from bertray.training.token_files import TrainingRows, compact_vocabulary, sequences_of


def out_of_fold_logits(
    config: AuditConfig,
    dataset: Dataset,
    rows: pa.Table,
    fold_N: np.ndarray,
    tokenizer: ColumnTokenizer,
    encoder_config: PreTrainedConfig,
) -> np.ndarray:
    """Fine-tune a model for every fold on the other folds; needs a Ray session.

    Args:
        rows: of the data set, to train on and to judge.
        fold_N: the fold of each row, from 0 to `config.folds` - 1.

    Returns:
        logits_NC, float64; NaN for rows without tokens. The same seed gives the same logits on the same processor
        with the same number of threads a fold; on a GPU attention adds up gradients in any order.

    Raises:
        RequestError: the cluster is too small.
        DivergedError: the loss of a fold is not a number.
        BertrayError: a fold raised an error, or was lost more than `max_failures` times.
    """
    placement = cluster.place(config.device, config.num_workers, "--num-workers")
    num_at_a_time = min(placement.num_processes, config.folds)
    log_start(config, dataset, f"{config.folds} folds, {num_at_a_time} at a time, each", placement.share)
    tokens = tokenizer.encode(rows[TEXT])
    compact_V, vocabulary_V = compact_vocabulary([tokens], encoder_config.vocab_size, num_special_ids(encoder_config))
    sequences = sequences_of(tokens, TASKS[dataset.problem_type].stored(rows), compact_V)
    task = ray.remote(
        num_cpus=placement.cpus_each,
        num_gpus=1 if placement.use_gpu else 0,
        max_calls=1,  # a process a fold: what a fold leaves in memory, on a GPU too, goes with its process
        max_retries=config.max_failures,
    )(_judge)
    # Once for all folds, in Ray's object store.
    data = ray.put((config, sequences, vocabulary_V, fold_N, dataset.labels, dataset.problem_type))
    board, num_steps = cluster.start_board(RunBoard), 1
    logits_NC = np.full((len(fold_N), len(dataset.labels)), np.nan)
    waiting, num_done = iter(range(config.folds)), 0
    running: dict[Any, int] = {}
    try:
        with ProgressBar("training", 1, "steps") as bar:
            while num_done < config.folds:
                for fold in islice(waiting, num_at_a_time - len(running)):
                    running[task.remote(data, fold, board)] = fold
                done, _ = ray.wait(list(running), timeout=LOOK_INTERVAL_S)
                for one in done:
                    fold = running.pop(one)
                    logits_NC[fold_N == fold], metrics = _result(one, fold, config.max_failures)
                    log_epoch(metrics, f"fold {fold + 1} of {config.folds}", dataset.problem_type)
                    num_done += 1
                num_steps = max(num_steps, news_of(board).num_steps)
                note = f"{num_done} of {config.folds} folds done"
                bar.update(ray.get(board.num_steps_taken.remote()), note, num_steps * config.folds)
    finally:
        for one in running:
            ray.cancel(one, force=True)
    return logits_NC


def _result(done: Any, fold: int, max_failures: int) -> tuple[np.ndarray, dict[str, float]]:
    try:
        result: tuple[np.ndarray, dict[str, float]] = ray.get(done)
        return result
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, BertrayError) else error) from None
    except cluster.LOST_ERRORS as error:
        raise BertrayError(
            f"fold {fold + 1} was lost {max_failures + 1} times, more often than --max-failures {max_failures} allows: "
            f"{error}. Is there enough memory? --micro-batch-tokens and --gradient-checkpointing need less"
        ) from error


def _judge(data: tuple[Any, ...], fold: int, board: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Train on the other folds, in a Ray task.

    Returns:
        The logits of this fold's rows [M, C]; metrics of the last epoch, with the `wall_s` of all epochs.
    """
    device = set_up_process(board)
    with explained(f"fold {fold + 1}"):
        config, sequences, vocabulary_V, fold_N, labels, problem_type = data
        is_judged_S = fold_N[sequences["document"].to_numpy()] == fold
        tuning = FineTuning(
            config,
            load_classifier(config.encoder, labels, problem_type, config.seed),
            {
                "train": TrainingRows.of(sequences.filter(pa.array(~is_judged_S))),
                "validation": TrainingRows.of(sequences.filter(pa.array(is_judged_S))),
            },
            vocabulary_V,
            problem_type,
            device=device,
            watcher=BoardWatcher(board, fold),
            keep="last",
        )
        tuning.run()
        history = tuning.progress.history
        logits_NC = np.full((len(fold_N), len(labels)), np.nan)
        known_NC = tuning.validation_logits_NC  # ends with the fold's last row that has tokens
        logits_NC[: len(known_NC)] = known_NC
        return logits_NC[fold_N == fold], {**history[-1], "wall_s": sum(epoch["wall_s"] for epoch in history)}
