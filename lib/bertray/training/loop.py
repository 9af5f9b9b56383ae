"""The fine-tuning loop of one worker, or of each of several; it knows torch.distributed, but not Ray.

    resume              every rank loads the latest checkpoint
    for each epoch
      for each step     global batch of (seed, step) -> this rank's share -> parts that fit into memory
                        -> gradient of the mean loss over the global batch -> update of the weights
        look            twice a second: are losses finite, does the watcher stop the run?
        checkpoint      if one is due; rank 0 writes it
      evaluate          each rank runs its share of the validation batches, every rank gets all metrics
      checkpoint        as above

Any number of ranks takes the same steps, except that each rank draws dropout for its own share. A sequence is a text,
or a window of a long text with the text's labels; metrics are computed on texts.

Legend: N rows, S sequences, C classes, B sequences of a rank's share of a batch.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed

from bertray.errors import DivergedError, RequestError
from bertray.model.encoder import run_batches
from bertray.model.runtime import TOKEN_BUDGET, put
from bertray.tasks.task import TASKS
from bertray.tokenization.windows import aggregate
from bertray.training.batches import TrainingBatches, micro_batches
from bertray.training.checkpoints import Checkpoints, Progress
from bertray.training.config import TrainingOptions
from bertray.training.learner import Learner, least_of_ranks
from bertray.training.loss import LOSSES, validation_metrics
from bertray.training.optimizer import Optimizer, check_memory, learning_rate_factor
from bertray.training.token_files import TrainingRows
from bertray.training.tracking import StepRecord
from bertray.training.watcher import Watcher
from bertray.types import Keep, ProblemType

# Losses stay on the device until the next look: a GPU must not wait for the host at each step.
_LOOK_INTERVAL_S = 0.5
_MAX_RECORDS = 2000  # enough for a curve


class _StopError(Exception):
    """The watcher stops the run."""


class FineTuning:
    """One rank of a run.

    Args:
        model: a transformers sequence classifier, fp32, on the CPU; the same on every rank.
        splits: "train" and "validation".
        vocabulary_V: the encoder's ids of the splits' vocabulary.
        checkpoints: the run resumes from the latest and rank 0 writes new ones; None: no checkpoints.
        patience: stop after this many epochs without a better one.

    Attributes:
        progress: how far the run is.
        best: all weights of the best epoch so far (fp32, on the CPU), unless a checkpoint holds them.
        validation_logits_NC: of the last epoch; rows without tokens may be missing at the end.

    Raises:
        RequestError: device or model cannot do what the options say, or the machine has too little memory.
    """

    def __init__(
        self,
        options: TrainingOptions,
        model: Any,
        splits: dict[str, TrainingRows],
        vocabulary_V: np.ndarray,
        problem_type: ProblemType,
        *,
        device: torch.device,
        watcher: Watcher,
        checkpoints: Checkpoints | None = None,
        keep: Keep = "best",
        patience: int | None = None,
    ) -> None:
        self.rank, self.world_size = 0, 1
        if torch.distributed.is_initialized():
            self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.options, self.device = options, device
        self._keep, self._patience = keep, patience
        self._watcher, self._checkpoints = watcher, checkpoints
        self._train, self._validation = splits["train"], splits["validation"]
        self._task, self._num_classes = TASKS[problem_type], model.config.num_labels
        self._lengths_S = self._train.tokens.lengths_S
        self._objective = LOSSES[problem_type](self._train, self._num_classes, device, options)
        self._objective.begin(model)
        self.learner = Learner(model, vocabulary_V, device, options.precision, options.gradient_checkpointing)
        if device.type == "cpu":
            check_memory(model)
        self.optimizer = Optimizer(model, options, self.learner.take_exact_weights())
        if self.world_size > 1:
            self.learner.exchange_gradients()
        self.batches = TrainingBatches(self._lengths_S, options.batch_size, options.seed)
        self.num_steps = self.batches.steps_per_epoch * options.epochs
        self.token_budget = options.micro_batch_tokens or TOKEN_BUDGET[device.type]  # of a part of a step
        self.validation_budget = TOKEN_BUDGET[device.type]
        self.progress = Progress(unit=self._objective.unit)
        self.best: dict[str, torch.Tensor] | None = None
        self.validation_logits_NC = np.empty((0, self._num_classes), dtype=np.float32)
        self._unseen: list[torch.Tensor] = []  # of each step since the last look: sum of the losses, gradient norm
        self._looked_s = self._epoch_began_s = 0.0

    def run(self) -> bool:
        """Train until the run is done or the watcher stops it; returns whether it is done.

        Raises:
            DivergedError: a loss or a gradient is not finite. The latest checkpoint is from an earlier step.
        """
        self.fit_into_memory()
        self._resume()
        self._looked_s = time.monotonic()
        self._epoch_began_s = self._looked_s - self.progress.epoch_wall_s
        try:
            while not self.progress.is_done:
                self._run_epoch()
        except _StopError:  # raised on rank 0; the others wait for its next exchange until they are killed
            self._save(only_if_due=False)
        if self._checkpoints:
            self._checkpoints.wait()
        return self.progress.is_done

    def fit_into_memory(self) -> None:
        """Find out how large the parts of a step on a GPU may be, before time is spent.

        Raises:
            RequestError: one sequence alone does not fit, on this rank or another; every rank raises it.
        """
        if self.device.type == "cpu":
            return
        steps = range(1, self.batches.steps_per_epoch + 1)
        heaviest = max(map(self.batches.at, steps), key=lambda batch: self._lengths_S[batch].sum())
        rows, loss_of = self._share(heaviest), self._objective.loss_sum
        largest = self.learner.largest_part(self._train.tokens, rows, loss_of, self.token_budget)
        if not least_of_ranks(largest, self.device):
            raise RequestError(
                f"a step of one sequence of {self._lengths_S[heaviest].max()} tokens does not fit into the GPU's "
                "memory: lower --max-length, or add --gradient-checkpointing"
            )
        self.token_budget = largest

    def _resume(self) -> None:
        """Continue from the latest checkpoint, the same on every rank."""
        if self._checkpoints is None:
            return
        found = [self._checkpoints.latest() if self.rank == 0 else None]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(found, device=self.device)
        self.progress = found[0] or self.progress
        if self.progress.step and not self.progress.is_done:
            self.optimizer.load_state(self._checkpoints.load(self.progress), self.progress.step)

    def _run_epoch(self) -> None:
        """Run the rest of an epoch; like all methods below, it raises `_StopError` if the watcher stops the run."""
        last_step = self.batches.steps_per_epoch * (len(self.progress.history) + 1)
        # A run that was stopped during the evaluation has no steps left here.
        for step in range(self.progress.step + 1, last_step + 1):
            self._take_step(step)
            if step in (1, last_step) or time.monotonic() - self._looked_s >= _LOOK_INTERVAL_S:
                self._look_at_losses()
            if step < last_step:
                self._save()
        self._end_epoch()
        self._save()

    def _share(self, batch: np.ndarray) -> np.ndarray:
        """This rank's sequences of a batch; a rank without any takes the first, which another rank has too."""
        return batch[self.rank :: self.world_size] if self.rank < len(batch) else batch[:1]

    def _take_step(self, step: int) -> None:
        self.learner.model.train()
        self.learner.seed(self.options.seed, step, self.rank)
        batch = self.batches.at(step)
        parts = micro_batches(self._share(batch), self._lengths_S, self.token_budget)
        # With this factor the average of the ranks' gradients is that of the mean loss over the global batch. A rank
        # without sequences of its own only joins the exchange.
        scale = self.world_size / len(batch) if self.rank < len(batch) else 0.0
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, part in enumerate(parts, start=1):
            loss_sum += self.learner.add_gradients(
                self._train.tokens,
                part,
                lambda logits_BC, part=part: self._objective.loss_sum(logits_BC, part) * scale,
                is_last=number == len(parts),
            )
        loss_sum *= len(batch) / self.world_size
        if self.world_size > 1:
            torch.distributed.all_reduce(loss_sum)
        norm = self.optimizer.step(self._learning_rate_factor(step))
        self._unseen.append(torch.stack([loss_sum, norm.double()]))
        self.progress.step = step

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self.num_steps, round(self.num_steps * self.options.warmup_fraction))

    def _look_at_losses(self) -> None:
        """Check that the steps since the last look have not diverged, record them and tell the watcher."""
        now_s, progress = time.monotonic(), self.progress
        steps = range(progress.step + 1 - len(self._unseen), progress.step + 1)
        batches = [self.batches.at(step) for step in steps]
        tokens_per_s = sum(self._lengths_S[batch].sum() for batch in batches) / max(now_s - self._looked_s, 1e-9)
        seen = torch.stack(self._unseen).tolist()
        self._unseen.clear()
        self._looked_s = now_s
        records = []
        for step, batch, (loss_sum, norm) in zip(steps, batches, seen, strict=True):
            loss = loss_sum / len(batch)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._raise_diverged(step, loss, norm)
            progress.epoch_loss_sum += loss_sum
            learning_rate = self.options.learning_rate * self._learning_rate_factor(step)
            epoch = step / self.batches.steps_per_epoch
            records.append(StepRecord(step, epoch, loss, learning_rate, norm, float(tokens_per_s)))
        if self.rank == 0:
            progress.records = _thinned([*progress.records, *records], progress.step)
            self._tell(records)

    def _tell(self, records: list[StepRecord]) -> None:
        if self._watcher.steps(records, self.num_steps):
            raise _StopError

    def _raise_diverged(self, step: int, loss: float, norm: float) -> None:
        what = f"the norm of the gradients is {norm:g}" if math.isfinite(loss) else f"the loss is {loss:g}"
        advice = f"lower --learning-rate (now {self.options.learning_rate:g})"
        if self.learner.precision == "bf16":
            advice += " or use --precision fp32"
        rows = np.unique(self._train.tokens.documents_S[self.batches.at(step)]).tolist()
        raise DivergedError(f"{what} at epoch {len(self.progress.history) + 1}, step {step}: {advice}", step, rows)

    def _end_epoch(self) -> None:
        """Evaluate, and keep the weights if this epoch is the best so far; a stop leaves all as it was."""
        self.validation_logits_NC = self._validation_logits()
        validation, firsts = self._validation, self._validation.firsts
        targets = self._objective.targets(validation, firsts)
        logits_NC = self.validation_logits_NC[validation.tokens.documents_S[firsts]]
        progress, now_s = self.progress, time.monotonic()
        epoch = len(progress.history) + 1
        metrics = {
            "epoch": epoch,
            "train_loss": progress.epoch_loss_sum / len(self._lengths_S),
            **validation_metrics(logits_NC, targets),
            "step": progress.step,
            "num_workers": self.world_size,
            "num_train_tokens": self._train.tokens.num_tokens,
            "wall_s": now_s - self._epoch_began_s,
        }
        self._epoch_began_s = now_s
        progress.epoch_loss_sum = 0.0
        progress.history = [*progress.history, metrics]
        best_epoch = best_of(progress.history, self._task.best_metric)
        progress.best_epoch = epoch if self._keep == "last" else best_epoch
        if progress.best_epoch == epoch and self.rank == 0:
            self.best = self.learner.complete(self.optimizer.weights())
        has_run_out = self._patience is not None and epoch - best_epoch >= self._patience
        progress.is_done = progress.step == self.num_steps or has_run_out
        if self.rank == 0:
            self._watcher.epoch(metrics)
        self._looked_s = time.monotonic()  # the rate of the next steps does not include the evaluation

    @torch.inference_mode()
    def _validation_logits(self) -> np.ndarray:
        """logits_NC of all validation rows; each rank runs every world_size-th batch."""
        learner, tokens = self.learner, self._validation.tokens
        learner.model.eval()
        budget = least_of_ranks(self.validation_budget, self.device)
        batches = learner.layout.batches(tokens.lengths_S, budget)[self.rank :: self.world_size]
        outputs, self.validation_budget = run_batches(
            learner.logits, learner.layout, tokens, batches, budget, self._tell_between_batches
        )
        # One rank runs a sequence, the others leave zeros: the sum over ranks has all logits.
        logits_SC = torch.zeros(len(tokens.documents_S), self._num_classes, device=self.device)
        for rows, logits_BC in outputs:
            logits_SC[put(rows, self.device)] = logits_BC
        if self.world_size > 1:
            torch.distributed.all_reduce(logits_SC)
        num_rows = int(tokens.documents_S[-1]) + 1
        in_unit_SC, (mean, deviation) = logits_SC.cpu().numpy(), self.progress.unit
        if self._task.outputs:  # numbers, of which float32 would keep seven digits
            in_unit_SC = in_unit_SC.astype(np.float64) * deviation + mean
        return aggregate(in_unit_SC, tokens.documents_S, num_rows, self.options.long_documents)

    def _tell_between_batches(self) -> None:
        """Ask the watcher during an evaluation too, which may last longer than a stopped driver waits."""
        now_s = time.monotonic()
        if self.rank == 0 and now_s - self._looked_s >= _LOOK_INTERVAL_S:
            self._looked_s = now_s
            self._tell([])

    def _save(self, *, only_if_due: bool = True) -> None:
        """Start to write a checkpoint."""
        if self._checkpoints is None or self.rank > 0:
            return
        if only_if_due and not (self.progress.is_done or self._checkpoints.is_due(self.progress.step)):
            return
        if self._unseen:  # no checkpoint may hold a step that diverged
            self._look_at_losses()
        self.progress.epoch_wall_s = time.monotonic() - self._epoch_began_s
        state = None if self.progress.is_done else self.optimizer.state()
        self._checkpoints.save(self.progress, state, self.best)
        self.best = None


def best_of(history: list[dict[str, float]], metric: str) -> int:
    """The epoch with the highest metric on validation, the first of equals."""
    return int(max(history, key=lambda epoch: epoch[metric])["epoch"])


def _thinned(records: list[StepRecord], last_step: int) -> list[StepRecord]:
    """Leave out every second record until few enough are left; how often depends on the step alone."""
    every = 1
    while last_step // every > _MAX_RECORDS:
        every *= 2
    return [record for record in records if record.step % every == 0]
