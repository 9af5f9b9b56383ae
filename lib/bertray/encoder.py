"""A Hugging Face sequence classifier run over token columns: tokens in, logits out, rows in input order.

Legend: N documents, C classes, B documents of a batch, L tokens of its longest.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from bertray.config import Device, Precision
from bertray.errors import RequestError
from bertray.packing import budget_batches, pad
from bertray.tokenization import TokenColumn

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
    """

    def __init__(self, model: Any, precision: Precision = "auto", device: Device = "auto") -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.model = model.to(device=self.device, dtype=dtype).eval()
        if dtype != torch.float32:
            _keep_last_layer_fp32(self.model)
        self.pad_id = model.config.pad_token_id or 0

    @torch.inference_mode()
    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_NC (float32), NaN for rows without tokens."""
        logits_NC = np.full((len(tokens.lengths_N), self.model.config.num_labels), np.nan, dtype=np.float32)
        for rows in budget_batches(tokens.lengths_N, TOKEN_BUDGET[self.device.type]):
            input_ids_BL, mask_BL = (torch.from_numpy(array) for array in pad(tokens, rows, self.pad_id))
            output = self.model(input_ids=input_ids_BL.to(self.device), attention_mask=mask_BL.to(self.device))
            logits_NC[rows] = output.logits.float().cpu().numpy()
        return logits_NC


def _keep_last_layer_fp32(model: Any) -> None:
    """Let the linear layer that gives the logits compute in fp32: 0.02 % of the work, three more digits."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    last = next((layer for layer in reversed(layers) if layer.out_features == model.config.num_labels), None)
    if last is not None:
        last.float()
        last.register_forward_pre_hook(lambda _layer, inputs: tuple(one.float() for one in inputs))


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Probabilities of each row, float32; NaN rows stay NaN."""
    odds_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return np.asarray(odds_NC / odds_NC.sum(axis=1, keepdims=True), dtype=np.float32)
