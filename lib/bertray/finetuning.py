"""The loop that every training worker runs.

1. Every worker reads and tokenises the data set; the batches of an epoch follow from seed and epoch alone.
2. A step: each rank takes every world_size-th sequence of the global batch; the loss is the mean over the global batch.
3. After each epoch every rank evaluates its share of the validation rows; all ranks see the metrics of all rows.
4. Rank 0 reports metrics and, as checkpoint, a Hugging Face model folder.

A sequence is a text, or a window of a long one with the text's label; metrics are of texts.

Legend: N rows, S sequences, C classes, B sequences of a rank's share of a batch.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup
from transformers.utils import logging as transformers_logging

from bertray.bundle import predictions
from bertray.config import TrainConfig
from bertray.dataset import Dataset
from bertray.encoder import TOKEN_BUDGET, resolve_precision
from bertray.errors import BertrayError
from bertray.metrics import summary_metrics
from bertray.packing import epoch_batches, pad, padded_batches
from bertray.pretrained import encoder_folder, load_tokenizer
from bertray.profile import Profile
from bertray.schema import LABEL_ID, TEXT
from bertray.tokenization import ColumnTokenizer, TokenColumn
from bertray.windows import aggregate, training_weights

_log = logging.getLogger(__name__)

_REPORT_INTERVAL_S = 0.5
# Beside the model in a checkpoint: what it says of the validation rows.
PROFILE_FILE = "validation_profile.json"


def train_on_worker(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker.

    Args:
        settings: `config`, a `TrainConfig` as a dict, and `board`, the progress actor.
    """
    Worker(TrainConfig.model_construct(**settings["config"]), settings["board"]).run()


class Worker:
    """One rank of a data-parallel run."""

    def __init__(self, config: TrainConfig, board: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.config, self.board = config, board
        self.device = ray.train.torch.get_device()
        self.bf16 = resolve_precision(config.precision, self.device) == "bf16"
        if self.device.type == "cpu":
            assigned = ray.get_runtime_context().get_assigned_resources()
            torch.set_num_threads(max(1, int(assigned.get("CPU", 1))))
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

        dataset = Dataset.open(config.data)
        tokenizer, _ = load_tokenizer(config.encoder, config.max_length, config.overlap)
        column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
        self.train = _Rows(dataset.split("train"), column_tokenizer)
        self.validation = _Rows(dataset.split("validation"), column_tokenizer)
        self.labels = dataset.labels

        torch.manual_seed(config.seed)  # the new head is the same on every rank and in every run
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder_folder(config.encoder),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={label: index for index, label in enumerate(self.labels)},
            problem_type="single_label_classification",
        )
        self.pad_id = model.config.pad_token_id or 0
        # DDP exchanges gradients in backward; validation must go past it, for its forward is a collective too and
        # ranks validate unequal numbers of batches.
        self.ddp_model = ray.train.torch.prepare_model(model)
        self.model = self.ddp_model.module if self.world_size > 1 else self.ddp_model
        self.steps_per_epoch = math.ceil(len(self.train.labels_S) / config.batch_size)
        self.num_steps = self.steps_per_epoch * config.epochs
        self.optimizer = _optimizer(self.model, config)
        self.scheduler = get_linear_schedule_with_warmup(
            self.optimizer, round(self.num_steps * config.warmup_fraction), self.num_steps
        )
        torch.manual_seed(config.seed + 1 + self.rank)  # dropout differs between ranks
        self._posted_s = 0.0

    def run(self) -> None:
        for epoch in range(1, self.config.epochs + 1):
            started_s = time.monotonic()
            train_loss = self._train_epoch(epoch)
            validation, profile = self._validate()
            metrics = {"epoch": epoch, "train_loss": train_loss, **validation}
            metrics["num_train_tokens"] = self.train.tokens.num_tokens
            metrics["wall_s"] = time.monotonic() - started_s
            self._report(metrics, profile)

    def _train_epoch(self, epoch: int) -> float:
        """One pass over the training rows; returns the mean loss of a row, which is the mean of its windows'."""
        self.model.train()
        losses: list[torch.Tensor] = []
        batches = epoch_batches(self.train.tokens.lengths_S, self.config.batch_size, self.config.seed, epoch)
        for step, batch in enumerate(batches, start=1):
            rows = batch[self.rank :: self.world_size]
            # A last batch of fewer rows than ranks: the others join the gradient exchange with a loss of zero.
            weight = 1.0 if len(rows) else 0.0
            rows = rows if len(rows) else batch[:1]
            logits_BC = self._logits(self.ddp_model, self.train.tokens, rows)
            targets_B, weights_B = (
                torch.from_numpy(values_S[rows]).to(self.device)
                for values_S in (self.train.labels_S, self.train.weights_S)
            )
            loss_sum = weight * (weights_B * cross_entropy(logits_BC, targets_B, reduction="none")).sum()
            # DDP averages gradients over ranks; scaled so, the average is the gradient of the global batch's mean.
            (loss_sum * (self.world_size / len(batch))).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad(set_to_none=True)
            losses.append(loss_sum.detach())
            self._post_progress(epoch, step, losses)
        return self._sum_over_ranks(torch.stack(losses).sum().item()) / len(self.train.labels_S)

    def _logits(self, model: torch.nn.Module, tokens: TokenColumn, rows: np.ndarray) -> torch.Tensor:
        """logits_BC (float32) of some rows, under the run's precision."""
        input_ids_BL, mask_BL = (torch.from_numpy(array).to(self.device) for array in pad(tokens, rows, self.pad_id))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            output = model(input_ids=input_ids_BL, attention_mask=mask_BL)
        logits_BC: torch.Tensor = output.logits.float()
        return logits_BC

    @torch.inference_mode()
    def _validate(self) -> tuple[dict[str, float], Profile]:
        """Loss, metrics and profile over all validation rows; each rank runs every world_size-th batch."""
        self.model.eval()
        tokens = self.validation.tokens
        # A sequence is run by one rank, and is zero on the others: the sum over ranks is the whole.
        logits_SC = torch.zeros(len(tokens.documents_S), len(self.labels))
        batches = padded_batches(tokens.lengths_S, TOKEN_BUDGET[self.device.type])
        for rows in batches[self.rank :: self.world_size]:
            logits_SC[rows] = self._logits(self.model, tokens, rows).cpu()
        if self.world_size > 1:
            logits_SC = logits_SC.to(self.device)
            torch.distributed.all_reduce(logits_SC)
            logits_SC = logits_SC.cpu()
        num_rows = len(self.validation.labels_N)
        logits_NC = aggregate(logits_SC.numpy(), tokens.documents_S, num_rows, self.config.long_documents)
        profile = Profile.of(predictions(tokens, logits_NC, self.labels, "single_label_classification"))
        read = np.unique(tokens.documents_S)  # a text without tokens has no logits
        labels_N, logits_NC = self.validation.labels_N[read], logits_NC[read]
        loss = cross_entropy(torch.from_numpy(logits_NC).double(), torch.from_numpy(labels_N)).item()
        return {"loss": loss, **summary_metrics(labels_N, logits_NC.argmax(axis=1), len(self.labels))}, profile

    def _sum_over_ranks(self, value: float) -> float:
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return total.item()

    def _post_progress(self, epoch: int, step: int, losses: list[torch.Tensor]) -> None:
        now_s = time.monotonic()
        if self.rank or (now_s - self._posted_s < _REPORT_INTERVAL_S and step < self.steps_per_epoch):
            return
        self._posted_s = now_s
        loss = losses[-1].item()
        if not math.isfinite(loss):
            raise BertrayError(
                f"the loss is {loss} at epoch {epoch}, step {step}: lower --learning-rate (now "
                f"{self.config.learning_rate:g}) or use --precision fp32"
            )
        step_of_all = (epoch - 1) * self.steps_per_epoch + step
        self.board.post.remote(step_of_all, self.num_steps, f"epoch {epoch}/{self.config.epochs}")

    def _report(self, metrics: dict[str, Any], profile: Profile) -> None:
        if self.rank:
            ray.train.report(metrics)
            return
        self.board.post_epoch.remote(metrics)
        with tempfile.TemporaryDirectory(prefix="bertray-") as folder:
            self.model.save_pretrained(folder)
            (Path(folder) / PROFILE_FILE).write_text(profile.model_dump_json())
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


class _Rows:
    """A split in memory: tokens and label ids, and what a sequence counts in the loss."""

    def __init__(self, table: pa.Table, tokenizer: ColumnTokenizer) -> None:
        self.tokens = tokenizer.encode(table[TEXT])
        self.labels_N = table[LABEL_ID].to_numpy().astype(np.int64)
        self.labels_S = self.labels_N[self.tokens.documents_S]
        self.weights_S = training_weights(self.tokens.documents_S)


def _optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices alone: biases and norms are the vectors."""
    decayed = [weights for weights in model.parameters() if weights.requires_grad and weights.ndim > 1]
    exempt = [weights for weights in model.parameters() if weights.requires_grad and weights.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
