"""A Hugging Face sequence classifier run over token columns: tokens in, logits out, sequences in input order.

A batch is a budget of tokens, sequences of like length in it; how they lie there is `bertray.model.adapter`'s.

Legend: S sequences, N rows, C classes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bertray.model import attention, onednn
from bertray.model.adapter import Layout
from bertray.model.head import to_precision
from bertray.model.runtime import TOKEN_BUDGET, is_out_of_memory, resolve_device, resolve_precision
from bertray.tokenization.tokenizer import Sequences, TokenColumn
from bertray.types import Device, Execution, TorchPrecision

_log = logging.getLogger(__name__)

# Off until a GPU has shown what it brings.
EXECUTION: Execution = "eager"


class Encoder:
    """A model on a device, ready to classify.

    Args:
        model: a transformers sequence classifier; it is moved to the device and converted in place.
        precision: of weights and activations; the last layer is fp32 always, for 16 bits would tie close labels.
        device: auto: the GPU if there is one.
        execution: where the kernel for packed rows runs; elsewhere it is eager.

    Attributes:
        layout: how batches are laid out.
        token_budget: tokens of a batch; halved where they do not fit into the GPU's memory.
    """

    def __init__(
        self,
        model: Any,
        precision: TorchPrecision = "auto",
        device: Device = "auto",
        execution: Execution = EXECUTION,
    ) -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.token_budget = TOKEN_BUDGET[self.device.type]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self.model = model.float().cpu().eval()
        can_pack = dtype == torch.float32 or attention.kernel_works(self.device, dtype, model.config)
        self.layout = Layout(model, can_pack=can_pack)
        to_precision(self.model, self.device, dtype)
        if dtype == torch.bfloat16 and self.device.type == "cpu" and onednn.is_available():
            onednn.prepack(self.model, self.token_budget)
        self._run = self.model
        if execution != "eager" and self.layout.is_packed and attention.has_kernel(self.device, dtype):
            self.layout.in_few_shapes = True
            self._run = _compiled(self.model, execution)

    @torch.inference_mode()
    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence.

        Raises:
            RuntimeError: one sequence alone does not fit into the GPU's memory: what torch says of it.
        """
        batches = self.layout.batches(tokens.lengths_S, self.token_budget)
        forward = partial(self.layout.forward, self._run)
        outputs, self.token_budget = run_batches(forward, self.layout, tokens, batches, self.token_budget)
        logits_SC = np.empty((len(tokens.lengths_S), self.model.config.num_labels), dtype=np.float32)
        if outputs:
            # Copied at the end: the host lays out batches while the GPU is at work on earlier ones.
            rows_S, found = np.concatenate([rows for rows, _ in outputs]), [logits_BC for _, logits_BC in outputs]
            logits_SC[rows_S] = torch.cat(found).cpu().numpy()
        return logits_SC


def _compiled(model: Any, execution: Execution) -> Any:
    if execution == "compiled":  # for any shape, once it has seen a second one
        return torch.compile(model)
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(model, dynamic=False, mode="reduce-overhead")


def run_batches(
    forward: Callable[[Sequences, np.ndarray], torch.Tensor],
    layout: Layout,
    tokens: Sequences,
    batches: list[np.ndarray],
    token_budget: int,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[np.ndarray, torch.Tensor]], int]:
    """Run a model over batches; where one does not fit into the GPU's memory, over smaller ones from there on.

    Args:
        forward: tokens, and the sequences of a batch -> logits_BC.
        batches: sequences of each, of at most `token_budget` tokens.
        before_each: called before each batch; what it raises ends the run.

    Returns:
        The sequences and logits_BC (on the device) of each batch that was run, and the budget that did fit.

    Raises:
        RuntimeError: one sequence alone does not fit into the GPU's memory: what torch says of it.
    """
    outputs: list[tuple[np.ndarray, torch.Tensor]] = []
    waiting, budget = deque(batches), token_budget
    while waiting:
        before_each()
        rows = waiting.popleft()
        try:
            outputs.append((rows, forward(tokens, rows)))
            continue
        except RuntimeError as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        # Here, where the exception no longer holds the batch's activations.
        torch.cuda.empty_cache()
        budget = min(budget, int(tokens.lengths_S[rows].sum())) // 2
        left = np.concatenate([rows, *waiting])
        waiting = deque(left[part] for part in layout.batches(tokens.lengths_S[left], budget))
    if budget < token_budget:
        _log.warning("out of GPU memory: batches are of %d tokens from now on, not %d", budget, token_budget)
    return outputs, budget
