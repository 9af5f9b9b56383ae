"""Runs of the loop of training on made-up texts, without Ray; apart, for it needs pydantic, which not every GPU has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.gpu.part import VOCABULARY_SIZE, random_tokens
from bertray.tokenization.tokenizer import Sequences
from bertray.tokenization.windows import offsets
from bertray.training.config import TrainConfig
from bertray.training.loop import FineTuning
from bertray.training.token_files import TrainingRows
from bertray.training.tracking import StepRecord
from bertray.types import Precision


class Trained(NamedTuple):
    """Losses and norms of the gradients of all steps, the loss of validation after the last, and the median rate of
    all steps but the first quarter, in which kernels are found."""

    losses: list[float]
    norms: list[float]
    validation_loss: float
    tokens_per_s: float


class TrainingRun:
    """One epoch of so many steps.

    Args:
        model: a classifier of four labels; it is copied.
        num_texts: of a step.
        mean_length: tokens of a text.
    """

    def __init__(
        self,
        model: Any,
        device: str,
        precision: Precision,
        num_steps: int,
        *,
        num_texts: int = 16,
        mean_length: int = 40,
        num_validation_rows: int = 64,
    ) -> None:
        self._records: list[StepRecord] = []
        self._metrics: dict[str, float] = {}
        self._on_last: Callable[[], None] = lambda: None
        splits = {
            "train": made_up_rows(num_steps * num_texts, mean_length, seed=0),
            "validation": made_up_rows(num_validation_rows, mean_length, seed=1),
        }
        options = TrainConfig(
            data="unused",
            output="unused",
            epochs=1,
            batch_size=num_texts,
            max_length=512,
            learning_rate=1e-4,
            precision=precision,
        )
        self.tuning = FineTuning(
            options,
            copy.deepcopy(model),
            splits,
            np.arange(VOCABULARY_SIZE),
            "single_label_classification",
            device=torch.device(device),
            watcher=self,
            keep="last",
        )
        self.whole_budget = self.tuning.token_budget

    def run(self, before_validation: Callable[[], AbstractContextManager[None]] | None = None) -> Trained:
        """Take all steps, each looked at."""
        with ExitStack() as stack:
            if before_validation:
                self._on_last = lambda: stack.enter_context(before_validation())
            self.tuning.run()
        rates = sorted({record.step: record.tokens_per_s for record in self._records}.items())
        return Trained(
            [record.loss for record in self._records],
            [record.grad_norm for record in self._records],
            self._metrics["loss"],
            float(np.median([rate for _, rate in rates[len(rates) // 4 :]])),
        )

    def rehearse_as_on_a_gpu(self) -> None:
        """Have a CPU look for the parts of a step that fit into its memory."""
        device = self.tuning.device
        self.tuning.device = torch.device("cuda")
        try:
            self.tuning.fit_into_memory()
        finally:
            self.tuning.device = device

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        """See `Watcher`."""
        self._records += records
        if records and records[-1].step == num_steps:
            self._on_last()
        return False

    def epoch(self, metrics: dict[str, float]) -> None:
        """See `Watcher`."""
        self._metrics = metrics


def made_up_rows(num_texts: int, mean_length: int, seed: int) -> TrainingRows:
    """Texts whose first word says which of four labels they have."""
    rng = np.random.default_rng(seed)
    lengths_S = np.minimum(rng.integers(mean_length // 2, mean_length + mean_length // 2, num_texts), 512)
    tokens, label_ids = random_tokens(lengths_S), rng.integers(0, 4, num_texts).astype(np.int32)
    tokens.ids_T[tokens.offsets_S1[:-1] + 1] = 200 + label_ids
    sequences = Sequences(tokens.ids_T, tokens.offsets_S1, tokens.documents_S)
    return TrainingRows(sequences, label_ids, offsets(np.ones(num_texts, np.int64)))
