"""A Hugging Face sequence classifier run over token columns: tokens in, logits out, sequences in input order.

A batch is a budget of tokens, sequences of like length in it; how they lie there is `bertray.layout`'s.

Legend: S sequences, N rows, C classes.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Literal

import numpy as np
import torch

from bertray import attention, prepacked
from bertray.choices import Device, Precision
from bertray.errors import RequestError
from bertray.layout import MODEL_ERRORS, TOLERANCE, Layout, probe_sequences
from bertray.packing import pad
from bertray.tokenization import TokenColumn

_log = logging.getLogger(__name__)

# Tokens of one forward pass. On CPUs activations of a larger batch leave the cache; a GPU wants enough work a launch.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536}


def resolve_device(device: Device) -> torch.device:
    """What `auto` means here: the GPU if torch sees one.

    Raises:
        RequestError: cuda was asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; check nvidia-smi and torch's build"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on this device.

    Raises:
        RequestError: bf16 was asked for on a GPU without it. (A CPU without it emulates it, slowly but rightly.)
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise RequestError(f"--precision bf16: {name} has no bf16 arithmetic; use --precision fp32 or auto")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return precision


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
        if dtype != torch.float32 and self.device.type == "cpu" and prepacked.is_available():
            prepacked.prepack(self.model, self.token_budget)

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


def scale_logits(model: Any, temperature: float) -> bool:
    """Divide a classifier's logits by a temperature, in the weights and bias of its last linear layer.

    Whatever reads the model then gives calibrated scores, with no code of ours: a pipeline, an export, another engine.

    Args:
        model: a transformers sequence classifier in fp32, on any device; changed in place.
        temperature: of `calibration.fit_temperature`, above 0.

    Returns:
        Whether the logits are now divided. Where the model does more than that layer to make them, it is as it was, and
        its temperature is 1: the log says so.
    """
    assert temperature > 0, temperature
    last, was_training = _last_layer(model), model.training
    before = {name: weights.clone() for name, weights in last.state_dict().items()} if last else {}
    model.eval()
    try:
        expected = _probe_logits(model) / temperature
        for weights in last.parameters() if last else ():
            weights.data /= temperature
        difference = (_probe_logits(model) - expected).abs().max().item()
        if difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            return True
        why = f"its last linear layer alone does not divide logits by {temperature:.4g}: off by {difference:.3g}"
    except MODEL_ERRORS as error:
        why = f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    if last:
        last.load_state_dict(before)
    _log.warning("warning: %s stays uncalibrated (%s)", type(model).__name__, why)
    return False


@torch.no_grad()
def begin_with_logits(model: Any, logits_C: torch.Tensor) -> None:
    """Let a new classifier give about these logits for any text, by the bias of its last layer; the log says if not.

    A new one's bias is zero; one that was trained before keeps what it has.
    """
    last = _last_layer(model)
    if last is None or last.bias is None:
        missing = "layer that gives the logits was found" if last is None else "bias in the layer that gives the logits"
        _log.warning("warning: %s cannot begin at the labels' shares: no %s", type(model).__name__, missing)
        return
    if not last.bias.any():
        last.bias.copy_(logits_C)


@torch.no_grad()
def _probe_logits(model: Any) -> torch.Tensor:
    """Logits of random sequences in a padded batch."""
    probe = probe_sequences(model.config)
    batch = pad(probe, np.arange(len(probe.lengths_S)), model.config.pad_token_id or 0)
    input_ids_BL, mask_BL = (torch.from_numpy(array).to(model.device) for array in batch)
    logits: torch.Tensor = model(input_ids=input_ids_BL, attention_mask=mask_BL).logits
    return logits


def to_precision(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device, and the weights to a precision.

    What is no weight keeps its own: rotary frequencies, rounded to bf16, would misplace tokens that lie far apart. And
    the linear layer that gives the logits computes in fp32: 0.02 % of the work, three more digits.
    """
    for weights in model.parameters():
        weights.data = weights.data.to(dtype)
    model.to(device)
    last = _last_layer(model)
    if dtype != torch.float32 and last is not None:
        last.float()
        last.register_forward_pre_hook(lambda _layer, inputs: tuple(one.float() for one in inputs))


def _last_layer(model: Any) -> torch.nn.Linear | None:
    """The linear layer that gives the logits, as far as its shape tells."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == model.config.num_labels), None)
