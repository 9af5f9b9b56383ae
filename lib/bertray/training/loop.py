"""The loop of fine-tuning, of one worker or of each of several; knows torch.distributed, but not Ray.

1. A step reads a global batch, which follows from (seed, step); each rank takes its share, in parts that fit into
   memory. The loss is the mean over the global batch, so that any number of ranks takes the same steps, but
   for dropout, which each draws for its share.
2. After each epoch every rank evaluates its share of the validation rows; all ranks see the metrics of all rows.
3. Rank 0 writes checkpoints; every rank begins with the latest.

A sequence is a text, or a window of a long one with the text's labels; metrics are of texts.

Legend: N rows, S sequences, C classes, B sequences of a rank's share of a batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed

from bertray.errors import DivergedError, RequestError
from bertray.model.adapter import begin_with_logits
from bertray.model.encoder import run_batches
from bertray.model.pretrained import load_classifier
from bertray.model.runtime import TOKEN_BUDGET, put
from bertray.storage.location import Location
from bertray.tokenization.windows import aggregate
from bertray.training import token_files
from bertray.training.batches import TrainingBatches, micro_batches, share
from bertray.training.checkpoints import Best, Checkpoints, Progress
from bertray.training.config import TrainConfig, TrainingOptions
from bertray.training.learner import Learner
from bertray.training.loss import Objective, sampling_probabilities, validation_metrics
from bertray.training.optimizer import Optimizer, check_memory, learning_rate_factor
from bertray.training.ranks import least_of_ranks, on_all_ranks, rank_and_world_size
from bertray.training.token_files import TrainingRows
from bertray.training.tracking import StepRecord
from bertray.training.watcher import Watcher
from bertray.types import Keep, ProblemType

_log = logging.getLogger(__name__)

# Losses stay on the device until someone looks: a GPU must not wait for the host at each step.
_LOOK_INTERVAL_S = 0.5
_MAX_STEPS_LOOKED_AT = 1000
# So many steps make a curve; of a longer run every second one is left out, however often it takes.
_MAX_RECORDS = 2000


class _StopError(Exception):
    """The watcher wants the run to end, amid an evaluation."""


class _Step(NamedTuple):
    """A step whose loss nobody has looked at yet."""

    step: int
    num_sequences: int
    loss_sum: torch.Tensor  # float64, on the device; of all ranks once the exchange is over
    exchange: torch.distributed.Work | None
    norm: torch.Tensor


class FineTuning:
    """One rank of a run.

    Args:
        options: of the job; what they say of places is the caller's.
        model: a transformers sequence classifier, fp32, on the CPU; the same on every rank.
        splits: "train" and "validation".
        vocabulary_V: the encoder's ids of the splits' vocabulary.
        checkpoints: where the run goes on from, and rank 0 writes to; None: nowhere.
        keep: which epoch's weights are kept.
        patience: the run ends after so many epochs without a better one.

    Raises:
        RequestError: the device or the model cannot do what the configuration says, or a CPU's memory is too small.
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
        self.rank, self.world_size = rank_and_world_size()
        self.options, self.device = options, device
        self._keep, self._patience = keep, patience
        self._watcher, self._checkpoints = watcher, checkpoints
        self._train, self._validation = splits["train"], splits["validation"]
        self._problem_type, self._num_classes = problem_type, model.config.num_labels
        self._lengths_S = self._train.tokens.lengths_S
        self._objective = Objective(
            self._train,
            self._num_classes,
            problem_type,
            device,
            label_smoothing=options.label_smoothing,
            class_weights=options.class_weights,
            is_sampled=options.sampling == "balanced",
        )
        if problem_type == "multi_label_classification":
            begin_with_logits(model, self._objective.logits_of_any_text_C())
        self.learner = Learner(
            model,
            vocabulary_V,
            device,
            options.precision,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        if device.type == "cpu":
            check_memory(model, keeps_average=options.average_decay is not None)
        self.optimizer = Optimizer(
            model,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            layer_decay=options.layer_decay,
            average_decay=options.average_decay,
            exact=self.learner.take_exact_weights(),
        )
        self.learner.exchange_gradients()
        probabilities_S = None
        if options.sampling == "balanced":
            probabilities_S = sampling_probabilities(self._train, self._num_classes)
        self.batches = TrainingBatches(self._lengths_S, options.batch_size, options.seed, probabilities_S)
        self.num_steps = self.batches.steps_per_epoch * options.epochs
        self.token_budget = options.micro_batch_tokens or TOKEN_BUDGET[device.type]
        self.step_budget = self.token_budget
        self.validation_budget = self.token_budget  # tokens; ranks agree on it before each use
        self._progress = Progress()
        self._best: Best | None = None  # until a checkpoint holds it
        self._unseen: list[_Step] = []
        self._loss_sum = 0.0  # over the sequences of the epoch's steps that were looked at
        self._looked_s = self._epoch_began_s = 0.0
        self._num_tokens = 0  # since the last look
        self._records: list[StepRecord] = []
        self._record_every = 1

    def run(self) -> bool:
        """Take the steps that are left; returns whether the run is done, rather than told to end.

        Raises:
            DivergedError: the loss is not a number. The latest checkpoint is from before.
        """
        self.fit_into_memory()
        # What fits with gradients fits without.
        self.validation_budget = min(self.token_budget, TOKEN_BUDGET[self.device.type])
        self._resume()
        self._looked_s = now_s = time.monotonic()
        self._epoch_began_s = now_s - self._progress.epoch_wall_s
        self._loss_sum = self._progress.epoch_loss_sum
        step = self._progress.step
        while not self._progress.is_done:
            last_of_epoch = self.batches.steps_per_epoch * (len(self._progress.history) + 1)
            shall_end = False
            if step < last_of_epoch:  # else the run was told to end before the epoch's evaluation was done
                step += 1
                self._step(step)
                shall_end = self._look(step, step == last_of_epoch)
            if step == last_of_epoch and not shall_end:
                try:
                    self._end_epoch(step)
                    self._loss_sum = 0.0
                except _StopError:
                    shall_end = True
                self._looked_s = time.monotonic()  # what lies between epochs does not count
            if self._is_checkpoint_due(step, shall_end):
                self._save(step)
            if shall_end and not self._progress.is_done:
                break
        if self._checkpoints:
            self._checkpoints.wait()
        return self._progress.is_done

    @property
    def progress(self) -> Progress:
        """How far the run is, as of the last epoch or checkpoint."""
        return self._progress

    @property
    def best(self) -> Best:
        """The best epoch, where there are no checkpoints to hold it."""
        assert self._best is not None, "no epoch has ended, or a checkpoint holds the best one"
        return self._best

    def fit_into_memory(self) -> None:
        """Find out, before time is spent, how large the parts of a step on a GPU may be.

        Raises:
            RequestError: not even one sequence fits, on this rank or on another, which would not come to the next
                exchange: all raise it.
        """
        if self.device.type == "cpu":
            return
        steps = range(1, min(self.batches.steps_per_epoch, _MAX_STEPS_LOOKED_AT) + 1)
        heaviest = self.batches.at(max(steps, key=lambda step: self._lengths_S[self.batches.at(step)].sum()))
        rows = share(heaviest, self.rank, self.world_size)
        room = self.learner.room_for(self._train.tokens, rows, self._objective.loss_sum, self.token_budget)
        if not on_all_ranks(room is not None, self.device):
            raise RequestError(
                f"a step of one sequence of {self._lengths_S[heaviest].max()} tokens does not fit into the GPU's "
                "memory: lower --max-length, or say --gradient-checkpointing"
            )
        assert room is not None
        self.token_budget, self.step_budget = room

    def _step(self, step: int) -> None:
        """Take one step."""
        self.learner.model.train()
        self.learner.seed(self.options.seed, step, self.rank)  # dropout differs between ranks
        batch = self.batches.at(step)
        rows = share(batch, self.rank, self.world_size)
        # A batch of fewer rows than ranks: the others join the exchange of gradients with a loss of zero.
        weight = 1.0 if len(rows) else 0.0
        parts = micro_batches(rows if len(rows) else batch[:1], self._lengths_S, self.step_budget)
        # Scaled so, what becomes of the ranks' gradients, a sum or an average, is that of the global batch's mean.
        scale = weight * self.learner.num_averaged / len(batch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, part in enumerate(parts, start=1):
            loss_sum += self.learner.add_gradients(
                self._train.tokens,
                part,
                lambda logits_BC, part=part: self._objective.loss_sum(logits_BC, part) * scale,
                is_last=number == len(parts),
            )
        loss_sum *= len(batch) / self.learner.num_averaged
        # Nobody waits for the sum before the loss is looked at.
        exchange = torch.distributed.all_reduce(loss_sum, async_op=True) if self.world_size > 1 else None
        norm = self.optimizer.step(self._learning_rate_factor(step))
        self._unseen.append(_Step(step, len(batch), loss_sum, exchange, norm))
        self._num_tokens += int(self._lengths_S[batch].sum())

    def _learning_rate_factor(self, step: int) -> float:
        return learning_rate_factor(step, self.num_steps, round(self.num_steps * self.options.warmup_fraction))

    def _look(self, step: int, is_due: bool) -> bool:
        """Now and then, look whether losses are numbers and tell the watcher; returns whether the run shall end."""
        now_s = time.monotonic()
        if not is_due and step > 1 and now_s - self._looked_s < _LOOK_INTERVAL_S:
            return False
        for seen in self._unseen:
            if seen.exchange:
                seen.exchange.wait()
        loss_sums, norms = ([getattr(seen, name) for seen in self._unseen] for name in ("loss_sum", "norm"))
        found_2S = torch.stack([torch.stack(loss_sums), torch.stack(norms).double()]).cpu().numpy()
        counts = [(seen.step, seen.num_sequences) for seen in self._unseen]
        self._unseen.clear()
        rate = self._num_tokens / max(now_s - self._looked_s, 1e-9)
        self._looked_s, self._num_tokens = now_s, 0
        records = []
        for (at, num_sequences), loss_sum, norm in zip(counts, *found_2S.tolist(), strict=True):
            self._loss_sum += loss_sum
            loss = loss_sum / num_sequences
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._raise_diverged(at, loss, norm)
            learning_rate = self.options.learning_rate * self._learning_rate_factor(at)
            records.append(StepRecord(at, at / self.batches.steps_per_epoch, loss, learning_rate, norm, rate))
        if self.rank:
            return False
        self._records += [record for record in records if record.step % self._record_every == 0]
        # A function of the step: a run that goes on thins its curve out as an undisturbed one does.
        while step // self._record_every > _MAX_RECORDS:
            self._record_every *= 2
            self._records = [record for record in self._records if record.step % self._record_every == 0]
        return self._watcher.steps(records, self.num_steps)

    def _go_on_unless_told_to_end(self) -> None:
        """Now and then, where no steps are taken, ask the watcher; an evaluation may last longer than a stop waits.

        Raises:
            _StopError: the watcher wants the run to end.
        """
        now_s = time.monotonic()
        if self.rank == 0 and now_s - self._looked_s >= _LOOK_INTERVAL_S:
            self._looked_s = now_s
            if self._watcher.steps([], self.num_steps):
                raise _StopError

    def _raise_diverged(self, step: int, loss: float, norm: float) -> None:
        rows = np.unique(self._train.tokens.documents_S[self.batches.at(step)]).tolist()
        epoch = self.batches.epoch(step)
        which = f"the loss is {loss:g}" if not math.isfinite(loss) else f"the norm of the gradients is {norm:g}"
        precision = " or use --precision fp32" if self.learner.precision == "bf16" else ""
        raise DivergedError(
            f"{which} at epoch {epoch}, step {step}: lower --learning-rate (now {self.options.learning_rate:g})"
            f"{precision}",
            step,
            rows,
        )

    def _end_epoch(self, step: int) -> None:
        """Evaluate, and keep the weights if no epoch before was better.

        Raises:
            _StopError: nothing has changed; on other ranks nothing is raised, and they wait.
        """
        epoch = self.batches.epoch(step)
        with self.optimizer.averaged():
            logits_NC = self._validation_logits()
        metrics = {
            "epoch": epoch,
            "train_loss": self._loss_sum / len(self._lengths_S),
            **validation_metrics(logits_NC, self._validation, self._problem_type, self._num_classes),
        }
        metrics |= {"step": step, "num_workers": self.world_size}
        metrics["num_train_tokens"] = self._train.tokens.num_tokens
        metrics["wall_s"] = time.monotonic() - self._epoch_began_s
        self._epoch_began_s = time.monotonic()
        history = [*self._progress.history, metrics]
        best_epoch = epoch if self._keep == "last" else best_of(history)
        if best_epoch == epoch and self.rank == 0:
            self._best = Best(self.learner.complete(self.optimizer.weights()), logits_NC)
        has_run_out = self._patience is not None and epoch - best_of(history) >= self._patience
        is_done = step == self.num_steps or has_run_out
        self._progress = Progress(
            step=step, history=history, records=list(self._records), best_epoch=best_epoch, is_done=is_done
        )
        if self.rank == 0:
            self._watcher.epoch(metrics)

    @torch.inference_mode()
    def _validation_logits(self) -> np.ndarray:
        """logits_NC of all validation rows; each rank runs every world_size-th batch."""
        learner, tokens = self.learner, self._validation.tokens
        learner.model.eval()
        budget = self.validation_budget = least_of_ranks(self.validation_budget, self.device)
        batches = learner.layout.batches(tokens.lengths_S, budget)[self.rank :: self.world_size]
        outputs, self.validation_budget = run_batches(
            learner.logits, learner.layout, tokens, batches, budget, self._go_on_unless_told_to_end
        )
        # A sequence is run by one rank, and is zero on the others: the sum over ranks is the whole.
        logits_SC = torch.zeros(len(tokens.documents_S), self._num_classes, device=self.device)
        if outputs:
            rows_S = put(np.concatenate([rows for rows, _ in outputs]), self.device)
            logits_SC[rows_S] = torch.cat([logits_BC for _, logits_BC in outputs])
        if self.world_size > 1:
            torch.distributed.all_reduce(logits_SC)
        num_rows = int(tokens.documents_S[-1]) + 1
        return aggregate(logits_SC.cpu().numpy(), tokens.documents_S, num_rows, self.options.long_documents)

    def _is_checkpoint_due(self, step: int, shall_end: bool) -> bool:
        if self.rank or self._checkpoints is None:
            return False
        return shall_end or self._progress.is_done or self._checkpoints.is_due(step)

    def _save(self, step: int) -> None:
        """Hand a checkpoint over to be written."""
        assert self._checkpoints is not None
        if self._unseen:
            self._look(step, True)  # what is written is known to be sound
        is_done = self._progress.is_done
        self._progress = self._progress.model_copy(
            update={
                "step": step,
                "epoch_loss_sum": self._loss_sum,
                "epoch_wall_s": time.monotonic() - self._epoch_began_s,
                "records": list(self._records),
            }
        )
        self._checkpoints.save(self._progress, None if is_done else self.optimizer.state(), self._best)
        self._best = None

    def _resume(self) -> None:
        """Go on from the latest checkpoint, the same on every rank."""
        if self._checkpoints is None:
            return
        found = [self._checkpoints.latest() if self.rank == 0 else None]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(found, device=self.device)
        if found[0] is None:
            return
        self._progress = found[0]
        self._records = list(self._progress.records)
        if not self._progress.is_done:
            self.optimizer.load_state(self._checkpoints.load(self._progress), self._progress.step)


def best_of(history: list[dict[str, float]]) -> int:
    """The epoch with the best macro-F1 on validation, the first of equals."""
    return int(max(history, key=lambda epoch: epoch["f1_macro"])["epoch"])


@contextmanager
def opened(
    config: TrainConfig,
    rows: Location,
    labels: Sequence[str],
    problem_type: ProblemType,
    *,
    device: torch.device,
    watcher: Watcher,
    checkpoints: Checkpoints,
) -> Iterator[FineTuning]:
    """The loop over the token files in a folder, ready to run in this process, which was set up."""
    with token_files.opened(rows) as (splits, vocabulary_V):
        yield FineTuning(
            config,
            load_classifier(config.encoder, labels, problem_type, config.seed),
            splits,
            vocabulary_V,
            problem_type,
            device=device,
            watcher=watcher,
            checkpoints=checkpoints,
            keep=config.keep,
            patience=config.patience,
        )
