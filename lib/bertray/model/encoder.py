"""A Hugging Face sequence classifier run over token columns: tokens in, logits out, sequences in input order.

A batch is a budget of tokens, sequences of like length in it; how they lie there is `bertray.model.adapter`'s.

Legend: S sequences, N rows, C classes.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import numpy as np
import torch

from bertray.model import attention, onednn
from bertray.model.adapter import Layout
from bertray.model.head import to_precision
from bertray.model.runtime import TOKEN_BUDGET, resolve_device, resolve_precision
from bertray.tokenization.tokenizer import TokenColumn
from bertray.types import Device, Precision

_log = logging.getLogger(__name__)


class Encoder:
    """A model on a device, ready to classify.

    Args:
        model: a transformers sequence classifier; it is moved to the device and converted in place.
        precision: of weights and activations; the last layer is fp32 always, for bf16 would tie close labels.
        device: auto: the GPU if there is one.

    Attributes:
        layout: how batches are laid out.
        token_budget: tokens of a batch; halved where they do not fit into the GPU's memory.
    """

    def __init__(self, model: Any, precision: Precision = "auto", device: Device = "auto") -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.token_budget = TOKEN_BUDGET[self.device.type]
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.model = model.float().cpu().eval()
        can_pack = dtype == torch.float32 or attention.kernel_works(self.device, dtype, model.config)
        self.layout = Layout(model, can_pack=can_pack)
        to_precision(self.model, self.device, dtype)
        if dtype != torch.float32 and self.device.type == "cpu" and onednn.is_available():
            onednn.prepack(self.model, self.token_budget)

    @torch.inference_mode()
    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence.

        Raises:
            torch.OutOfMemoryError: one sequence alone does not fit into the GPU's memory.
        """
        rows_done: list[np.ndarray] = []
        outputs: list[torch.Tensor] = []
        budget = self.token_budget
        batches = deque(self.layout.batches(tokens.lengths_S, budget))
        while batches:
            rows = batches.popleft()
            try:
                outputs.append(self.layout.forward(self.model, tokens, rows))
                rows_done.append(rows)
                continue
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
            # Here, where the exception no longer holds the batch's activations.
            torch.cuda.empty_cache()
            budget //= 2
            left = np.concatenate([rows, *batches])
            batches = deque(left[part] for part in self.layout.batches(tokens.lengths_S[left], budget))
        if budget < self.token_budget:
            _log.warning("out of GPU memory: batches are of %d tokens from now on, not %d", budget, self.token_budget)
            self.token_budget = budget
        logits_SC = np.empty((len(tokens.lengths_S), self.model.config.num_labels), dtype=np.float32)
        if outputs:
            # Copied at the end: the host lays out batches while the GPU is at work on earlier ones.
            logits_SC[np.concatenate(rows_done)] = torch.cat(outputs).cpu().numpy()
        return logits_SC
