"""The last linear layer of a classifier, which gives the logits: in fp32, its temperature, its first bias."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from bertray.model.adapter import MODEL_ERRORS, TOLERANCE, probe_sequences
from bertray.tokenization.batching import pad

_log = logging.getLogger(__name__)


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
