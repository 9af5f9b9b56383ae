"""Run a Hugging Face sequence classifier over token columns: tokens in, logits out, in the order of the sequences.

A batch has a budget of tokens and holds sequences of similar length; `bertray.model.adapter` lays it out.

Legend: S sequences, C classes, B sequences of a batch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from bertray.model import attention
from bertray.model.adapter import Layout, replace_layers, to_precision
from bertray.model.runtime import TOKEN_BUDGET, is_out_of_memory, resolve_device, resolve_precision
from bertray.storage.patience import alive
from bertray.tokenization.tokenizer import Sequences, TokenColumn
from bertray.types import Device, TorchPrecision

_log = logging.getLogger(__name__)


class Encoder:
    """A model on a device, ready to classify.

    Args:
        model: a transformers sequence classifier; it is moved to the device and converted in place.
        precision: of weights and activations. The last layer is always fp32: in 16 bits close labels would tie.
    """

    def __init__(self, model: Any, precision: TorchPrecision = "auto", device: Device = "auto") -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.token_budget = TOKEN_BUDGET[self.device.type]  # halved when a batch does not fit into the GPU's memory
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]
        self.model = model.float().cpu().eval()
        can_pack = dtype == torch.float32 or attention.kernel_works(self.device, dtype, model.config)
        self.layout = Layout(model, can_pack=can_pack)
        to_precision(self.model, self.device, dtype)
        if dtype == torch.bfloat16 and self.device.type == "cpu" and _has_onednn():
            replace_layers(self.model, torch.nn.Linear, lambda layer: _prepacked(layer, self.token_budget))

    @torch.inference_mode()
    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence.

        Raises:
            RuntimeError: a single sequence does not fit into the GPU's memory.
        """
        batches = self.layout.batches(tokens.lengths_S, self.token_budget)
        forward = partial(self.layout.forward, self.model)
        outputs, self.token_budget = run_batches(forward, self.layout, tokens, batches, self.token_budget)
        logits_SC = np.empty((len(tokens.lengths_S), self.model.config.num_labels), dtype=np.float32)
        if outputs:
            # Copied at the end, so that the host lays out batches while the GPU computes earlier ones.
            rows_S, found = np.concatenate([rows for rows, _ in outputs]), [logits_BC for _, logits_BC in outputs]
            logits_SC[rows_S] = torch.cat(found).cpu().numpy()
        return logits_SC


def run_batches(
    forward: Callable[[Sequences, np.ndarray], torch.Tensor],
    layout: Layout,
    tokens: Sequences,
    batches: list[np.ndarray],
    token_budget: int,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[tuple[np.ndarray, torch.Tensor]], int]:
    """Run a model over batches; when one does not fit into the GPU's memory, continue with smaller ones.

    Args:
        forward: tokens, and the sequences of a batch -> logits_BC.
        batches: the sequences of each, with at most `token_budget` tokens.
        before_each: called before each batch; an exception that it raises ends the run.

    Returns:
        The sequences and logits_BC (on the device) of each batch, and the budget that fits.
    """
    outputs: list[tuple[np.ndarray, torch.Tensor]] = []
    waiting, budget = deque(batches), token_budget
    while waiting:
        alive()
        before_each()
        rows = waiting.popleft()
        try:
            outputs.append((rows, forward(tokens, rows)))
            continue
        except RuntimeError as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, because the exception holds the batch's activations.
        torch.cuda.empty_cache()
        budget = min(budget, int(tokens.lengths_S[rows].sum())) // 2
        left = np.concatenate([rows, *waiting])
        waiting = deque(left[part] for part in layout.batches(tokens.lengths_S[left], budget))
    if budget < token_budget:
        _log.warning("out of GPU memory: batches have %d tokens from now on, not %d", budget, token_budget)
    return outputs, budget


def _has_onednn() -> bool:
    """Whether this build of torch has oneDNN and the operators of `PrepackedLinear`, and the processor has bf16."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def _prepacked(layer: Any, num_tokens: int) -> torch.nn.Module:
    return PrepackedLinear(layer, num_tokens) if layer.weight.dtype == torch.bfloat16 else layer


class PrepackedLinear(torch.nn.Module):
    """A frozen copy of a bf16 linear layer, for inference only, in the best layout for inputs of `num_tokens` rows.

    torch's own layer passes plain weights, which oneDNN reorders in each call. torch's compiler emits the operators
    used here for a frozen model; calling them directly needs no compilation.
    """

    def __init__(self, linear: torch.nn.Linear, num_tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_tokens)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return outputs
