"""What a fine-tuned model says of training rows that it was not trained on: one model a fold, on Ray.

    fold_N [0, 1, 2, 0, 1, 2]
      1. tokenise  all rows, once; every node gets them through Ray's object store
      2. train     fold 0: on rows 1, 2, 4, 5 -> logits of rows 0 and 3
                   fold 1: on rows 0, 2, 3, 5 -> logits of rows 1 and 4, …    each in a worker process of its own
      3. join      logits_NC of all rows, each by the model that has not seen it

The last epoch counts, whatever the rows of the fold say of it: an epoch that is chosen by them has seen their labels.
A fold whose process or node is lost is begun again, by Ray.

Legend: N rows, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from transformers import PreTrainedConfig

from bertray.data.dataset import Dataset
from bertray.drivers import cluster
from bertray.drivers.status_actors import FoldBoard, show_logged
from bertray.drivers.train_worker import set_up_process
from bertray.errors import BertrayError
from bertray.model.pretrained import load_classifier, num_special_ids
from bertray.progress import ProgressBar
from bertray.schema import TEXT
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.training.config import AuditConfig
from bertray.training.loop import FineTuning
from bertray.training.token_files import TrainingRows, compact_vocabulary, label_id_lists, sequences_of
from bertray.training.tracking import StepRecord
from bertray.types import ProblemType

_log = logging.getLogger(__name__)

_LOOK_INTERVAL_S = 0.5


class _Shared(NamedTuple):
    """What all folds need; lies in Ray's object store."""

    config: AuditConfig
    sequences: pa.RecordBatch
    vocabulary_V: np.ndarray
    fold_N: np.ndarray
    labels: tuple[str, ...]
    problem_type: ProblemType


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
        config: of the job; its encoder is one that every node can read.
        dataset: of which the rows are.
        rows: to train on and to judge.
        fold_N: the fold of each, from 0 to `config.folds` - 1.
        tokenizer, encoder_config: of the encoder.

    Returns:
        logits_NC, float32; NaN of rows without tokens. The same seed gives the same on the same processor with the
        same number of threads a fold; a GPU's attention adds up gradients in any order.

    Raises:
        RequestError: the cluster is too small.
        DivergedError: the loss of a fold is not a number.
        BertrayError: a fold was lost more than `max_failures` times.
    """
    placement = cluster.place(config.device, config.num_workers, "--num-workers")
    placement = replace(placement, num_processes=min(placement.num_processes, config.folds))
    _log.info(
        "fine-tuning %s for each of %d folds of %d rows; at a time: %d, each with %s",
        config.encoder,
        config.folds,
        len(fold_N),
        placement.num_processes,
        placement.share,
    )
    tokens = tokenizer.encode(rows[TEXT])
    compact_V, vocabulary_V = compact_vocabulary([tokens], encoder_config.vocab_size, num_special_ids(encoder_config))
    shared = _Shared(
        config,
        sequences_of(tokens, label_id_lists(rows, dataset.problem_type), compact_V),
        vocabulary_V,
        fold_N,
        dataset.labels,
        dataset.problem_type,
    )
    logits_NC = np.full((len(fold_N), len(dataset.labels)), np.nan, dtype=np.float32)
    for fold, found_MC in _run_folds(config, placement, ray.put(shared)).items():
        logits_NC[fold_N == fold] = found_MC
    return logits_NC


def _run_folds(config: AuditConfig, placement: cluster.Placement, shared: Any) -> dict[int, np.ndarray]:
    """The logits of every fold's rows, from tasks of which so many run at a time as the placement says."""
    board = cluster.start_board(FoldBoard)
    task = ray.remote(
        num_cpus=placement.cpus_each,
        num_gpus=1 if placement.use_gpu else 0,
        max_calls=1,  # a process a fold: what one leaves in memory, on a GPU too, is gone
        max_retries=config.max_failures,
    )(_judge)
    waiting = deque(range(config.folds))
    running: dict[Any, int] = {}
    found: dict[int, np.ndarray] = {}
    try:
        with ProgressBar("training", 1, "steps") as bar:
            while waiting or running:
                while waiting and len(running) < placement.num_processes:
                    fold = waiting.popleft()
                    running[task.remote(shared, fold, board)] = fold
                done, _ = ray.wait(list(running), timeout=_LOOK_INTERVAL_S)
                show_logged(board)
                num_steps, num_steps_a_fold = ray.get(board.steps.remote())
                bar.update(num_steps, f"{len(found)} of {config.folds} folds done", num_steps_a_fold * config.folds)
                for one in done:
                    fold = running.pop(one)
                    found[fold], metrics = _result(one, fold, config.max_failures)
                    _log.info(
                        "fold %d of %d: macro-F1 %.4f on its %d rows, %.0f s in training",
                        fold + 1,
                        config.folds,
                        metrics["f1_macro"],
                        len(found[fold]),
                        metrics["wall_s"],
                    )
    finally:
        for one in running:
            ray.cancel(one, force=True)
    return found


def _result(done: Any, fold: int, max_failures: int) -> tuple[np.ndarray, dict[str, float]]:
    try:
        result: tuple[np.ndarray, dict[str, float]] = ray.get(done)
        return result
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, BertrayError):
            raise error.cause from None
        raise
    except cluster.LOST_ERRORS as error:
        raise BertrayError(
            f"fold {fold + 1} was lost {max_failures + 1} times, more often than --max-failures {max_failures} allows: "
            f"{error}. Is there enough memory? --micro-batch-tokens and --gradient-checkpointing need less"
        ) from error


def _judge(shared: _Shared, fold: int, board: Any) -> tuple[np.ndarray, dict[str, float]]:
    """Train on the other folds; returns the logits of this one's rows [M, C], and metrics of the last epoch.

    `wall_s` of these is of all epochs. Runs in a Ray task.
    """
    config, fold_N = shared.config, shared.fold_N
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    set_up_process(device, cluster.assigned_cpus(), board)
    is_judged_S = fold_N[shared.sequences["document"].to_numpy()] == fold
    tuning = FineTuning(
        config,
        load_classifier(config.encoder, shared.labels, shared.problem_type, config.seed),
        {
            "train": TrainingRows.of(shared.sequences.filter(pa.array(~is_judged_S))),
            "validation": TrainingRows.of(shared.sequences.filter(pa.array(is_judged_S))),
        },
        shared.vocabulary_V,
        shared.problem_type,
        device=device,
        watcher=_Watcher(board, fold),
        keep="last",
    )
    tuning.run()
    history = tuning.progress.history
    logits_NC = np.full((len(fold_N), len(shared.labels)), np.nan, dtype=np.float32)
    assert tuning.best is not None
    known_NC = tuning.best.validation_logits_NC
    logits_NC[: len(known_NC)] = known_NC  # which end with the fold's last row that has tokens
    return logits_NC[fold_N == fold], {**history[-1], "wall_s": sum(epoch["wall_s"] for epoch in history)}


class _Watcher:
    """Tells the board of a fold's steps."""

    def __init__(self, board: Any, fold: int) -> None:
        self._board, self._fold = board, fold

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        if records:
            self._board.post.remote(self._fold, records[-1].step, num_steps)
        return False

    def epoch(self, metrics: dict[str, float]) -> None:
        """The driver shows the last one's, which the fold returns."""
