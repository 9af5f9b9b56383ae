"""AdamW over 32-bit weights, whatever the model computes in, and the schedule of its learning rate.

Without 32-bit weights an update of less than 1/256 of a weight would be lost in bf16.

Legend: W weights that lie end to end.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from bertray.errors import RequestError
from bertray.training.adamw import adamw_of
from bertray.training.flat_weights import MOMENTS, FlatWeights

_LAYER_NUMBER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")


def learning_rate_factor(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Of the peak, at a step that counts from 1: a linear rise to 1, then a linear fall, to 0 after the last step."""
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    return (num_steps - step + 1) / (num_steps - num_warmup_steps + 1)


def check_memory(model: Any, *, keeps_average: bool) -> None:
    """See that weights, moments and gradients fit into what is free on this machine.

    Raises:
        RequestError: they do not.
    """
    num_weights = num_bytes = 0
    for weights in model.parameters():
        if weights.requires_grad:
            num_weights += weights.numel()
            num_bytes += weights.numel() * _bytes_per_weight(weights.element_size(), keeps_average)
    available = psutil.virtual_memory().available
    if num_bytes > available:
        raise RequestError(
            f"training {num_weights:,} weights takes {num_bytes / 2**30:.1f} GiB beside what a step needs, and "
            f"{available / 2**30:.1f} GiB are free: use a smaller --encoder, or have fewer workers on a machine"
        )


def _bytes_per_weight(width: int, keeps_average: bool) -> int:
    """Of a weight on CPUs that is so many bytes wide to the model."""
    # 32 bits each: the weight and two moments; beside them its 16 bits, or the sum of its gradients.
    held = 12 + (2 if width == 2 else 4) + (4 if keeps_average else 0)
    return held + width  # of its gradient


class Optimizer:
    """Trains a model's weights.

    Args:
        model: each of its weights has a gradient before a step, and is written in it.
        learning_rate: the peak, of the topmost layer.
        weight_decay: of matrices; biases and norms, which are vectors, have none.
        layer_decay: a layer's learning rate is this share of that of the layer above it (Howard and Ruder 2018,
            https://arxiv.org/abs/1801.06146); embeddings are below all, the head above all.
        max_grad_norm: gradients are scaled down to this norm.
        average_decay: keep a running mean of the weights too, an average step's weights counting 1 - average_decay;
            None: no.
        exact: by name, in 32 bits, what the model's weights were rounded from.
    """

    def __init__(
        self,
        model: Any,
        *,
        learning_rate: float,
        weight_decay: float,
        max_grad_norm: float,
        layer_decay: float = 1.0,
        average_decay: float | None = None,
        exact: dict[str, torch.Tensor] | None = None,
    ) -> None:
        named = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
        self._names = [name for name, _ in named]
        self._max_grad_norm, self._learning_rate = max_grad_norm, learning_rate
        depths = _depths(self._names, model.base_model_prefix)
        alike: dict[tuple[float, bool, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
        for depth, (name, weights) in zip(depths, named, strict=True):
            factor = layer_decay ** (max(depths) - depth)
            alike.setdefault((factor, weights.ndim > 1, weights.dtype), []).append((name, weights))
        self._flats = [FlatWeights(weights) for weights in alike.values()]
        self._factors = [factor for factor, _, _ in alike]
        self._adamws = [
            adamw_of(flat, weight_decay if is_matrix else 0.0)
            for flat, (_, is_matrix, _) in zip(self._flats, alike, strict=True)
        ]
        if exact:
            for flat in self._flats:
                for name, view in flat.views(flat.master_W).items():
                    view.copy_(exact[name])
        self._average_decay, self._num_averaged = average_decay, 0
        self._averages = [] if average_decay is None else [flat.copy(flat.master_W) for flat in self._flats]

    def step(self, factor: float) -> torch.Tensor:
        """Take one step and forget the gradients.

        Args:
            factor: of the learning rate, as `learning_rate_factor` gives it.

        Returns:
            The norm of the gradients before they were scaled; a scalar on the device.
        """
        for flat in self._flats:
            flat.take_gradients()
        norm = torch.stack([adamw.square_of_gradients() for adamw in self._adamws]).sum().sqrt()
        scale = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for adamw, layer_factor in zip(self._adamws, self._factors, strict=True):
            adamw.step(self._learning_rate * factor * layer_factor, scale)
        if self._average_decay is not None:
            # A running mean of few steps must not remember where training began.
            self._num_averaged += 1
            decay = min(self._average_decay, (1 + self._num_averaged) / (10 + self._num_averaged))
            torch._foreach_lerp_(self._averages, [flat.master_W for flat in self._flats], 1 - decay)
        return norm.float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model computes with the running mean of its weights, if one is kept."""
        if not self._averages:
            yield
            return
        trained = [flat.model_W.clone() for flat in self._flats]
        self._publish(self._averages)
        try:
            yield
        finally:
            for flat, held_W in zip(self._flats, trained, strict=True):
                flat.model_W.copy_(held_W)

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of the 32-bit weights by name; of their running mean if one is kept."""
        return self._copies(self._averages or [flat.master_W for flat in self._flats])

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of all that a later run needs to go on from here."""
        return {
            f"{kind}/{name}": held
            for kind, of_flats in self._state().items()
            for name, held in self._copies(of_flats).items()
        }

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], num_steps: int) -> None:
        """Go on from where `state` was called, after so many steps."""
        for adamw in self._adamws:
            adamw.begin(num_steps)
        for kind, of_flats in self._state().items():
            for flat, held_W in zip(self._flats, of_flats, strict=True):
                for name, view in flat.views(held_W).items():
                    view.copy_(tensors[f"{kind}/{name}"])
        self._num_averaged = num_steps
        self._publish([flat.master_W for flat in self._flats])

    def _state(self) -> dict[str, list[torch.Tensor]]:
        """Of every kind of state, the tensors of all."""
        state = {"weights": [flat.master_W for flat in self._flats]}
        state |= {name: [flat.moments[name] for flat in self._flats] for name in MOMENTS}
        return {**state, "average": self._averages} if self._averages else state

    def _copies(self, of_flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """By name, in the model's order."""
        views: dict[str, torch.Tensor] = {}
        for flat, held_W in zip(self._flats, of_flats, strict=True):
            views |= flat.views(held_W)
        return {name: views[name].detach().to("cpu", copy=True) for name in self._names}

    @torch.no_grad()
    def _publish(self, of_flats: list[torch.Tensor]) -> None:
        """Let the model compute with these weights."""
        for flat, held_W in zip(self._flats, of_flats, strict=True):
            flat.publish(held_W)


def _depths(names: list[str], encoder: str) -> list[int]:
    """0 of embeddings, 1 … of layers, and one more of all that stands above them."""
    numbers = [_LAYER_NUMBER.search(name) for name in names]
    top = max((int(number[1]) for number in numbers if number), default=-1) + 2
    return [
        int(number[1]) + 1 if number else 0 if name.startswith(f"{encoder}.embeddings") else top
        for name, number in zip(names, numbers, strict=True)
    ]
