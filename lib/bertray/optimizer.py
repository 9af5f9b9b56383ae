"""AdamW over 32-bit weights, whatever the model computes in, and the schedule of its learning rate.

1. gradients  of the model's weights, cast to 32 bits if they are not, scaled down to a norm
2. AdamW      Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; fused: one pass over memory
3. publish    the weights, rounded to the model's precision

Without 32-bit weights an update of less than 1/256 of a weight would be lost in bf16.

Legend: W weights that lie end to end; each matrix and vector begins at a multiple of `_ALIGNMENT`, after zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_LAYER_NUMBER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNMENT = 64  # weights, of 16 bits or more: what matrix products read begins on a cache line


def learning_rate_factor(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Of the peak, at a step that counts from 1: a linear rise to 1, then a linear fall, to 0 after the last step."""
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    return (num_steps - step + 1) / (num_steps - num_warmup_steps + 1)


class _FlatWeights:
    """Weights that share a learning rate and a decay, end to end: one long tensor is stepped faster than many short.

    Attributes:
        model_W: the model's weights, in its precision; they are views of it from here on.
        master_W: the same in 32 bits; what is 32 bits wide already is trained in place.
        gradient_W: 32 bits wide.
    """

    def __init__(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self._weights = dict(named)
        starts = np.cumsum([0, *(-(-weights.numel() // _ALIGNMENT) * _ALIGNMENT for _, weights in named)])
        self._starts = dict(zip(self._weights, starts.tolist(), strict=False))
        first = named[0][1]
        self.model_W = torch.zeros(int(starts[-1]), dtype=first.dtype, device=first.device)
        for name, view in self.views(self.model_W).items():
            view.copy_(self._weights[name].detach())
            self._weights[name].data = view
        self.master_W = self.model_W.float()  # itself where it is 32 bits wide
        self.gradient_W = torch.zeros_like(self.master_W)
        self._gradients = list(self.views(self.gradient_W).values())

    def views(self, held_W: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name, where the weights lie in a tensor as long as these."""
        return {
            name: held_W[start : start + self._weights[name].numel()].view_as(self._weights[name])
            for name, start in self._starts.items()
        }

    def take_gradients(self) -> None:
        """Move them out of the model."""
        given = [weights.grad for weights in self._weights.values() if weights.grad is not None]
        torch._foreach_copy_(self._gradients, given)  # which refuses lists of unequal length
        for weights in self._weights.values():
            weights.grad = None

    def publish(self, held_W: torch.Tensor) -> None:
        """Let the model compute with these weights."""
        if held_W is not self.model_W:
            self.model_W.copy_(held_W)


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
        self._flats = [_FlatWeights(weights) for weights in alike.values()]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [flat.master_W], "weight_decay": weight_decay if is_matrix else 0.0, "factor": factor}
                for flat, (factor, is_matrix, _) in zip(self._flats, alike, strict=True)
            ],
            lr=learning_rate,
            fused=True,
        )
        for flat in self._flats:
            flat.master_W.grad = flat.gradient_W
            if exact:
                for name, view in flat.views(flat.master_W).items():
                    view.detach().copy_(exact[name])
        self._average_decay, self._num_averaged = average_decay, 0
        self._averages = [] if average_decay is None else [flat.master_W.clone() for flat in self._flats]

    def step(self, factor: float) -> torch.Tensor:
        """Take one step and forget the gradients.

        Args:
            factor: of the learning rate, as `learning_rate_factor` gives it.

        Returns:
            The norm of the gradients before they were scaled; a scalar on the device.
        """
        for flat in self._flats:
            flat.take_gradients()
        norm = self._clip_gradients()
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * factor * group["factor"]
        self._adamw.step()
        for flat in self._flats:
            flat.publish(flat.master_W)
        if self._average_decay is not None:
            # A running mean of few steps must not remember where training began.
            self._num_averaged += 1
            decay = min(self._average_decay, (1 + self._num_averaged) / (10 + self._num_averaged))
            torch._foreach_lerp_(self._averages, [flat.master_W for flat in self._flats], 1 - decay)
        return norm

    @torch.no_grad()
    def _clip_gradients(self) -> torch.Tensor:
        """Scale the gradients down to a norm of at most `max_grad_norm`; returns what it was."""
        # Row by row: of one vector of 12 million numbers the norm is off by 5e-4 on CPUs, and takes twice as long.
        norms = [torch.linalg.vector_norm(flat.gradient_W.view(_ALIGNMENT, -1), dim=1) for flat in self._flats]
        norm: torch.Tensor = torch.linalg.vector_norm(torch.cat(norms))
        torch.nn.utils.clip_grads_with_norm_([flat.master_W for flat in self._flats], self._max_grad_norm, norm)
        return norm

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
            self._publish(trained)

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
        self.begin(num_steps)
        for kind, of_flats in self._state().items():
            for flat, held_W in zip(self._flats, of_flats, strict=True):
                for name, view in flat.views(held_W).items():
                    view.copy_(tensors[f"{kind}/{name}"])
        self._num_averaged = num_steps
        self._publish([flat.master_W for flat in self._flats])

    def begin(self, num_steps: int = 0) -> None:
        """Make the moments, zero after so many steps; without this call the first step does."""
        for flat in self._flats:
            self._adamw.state[flat.master_W] = {
                "step": torch.tensor(float(num_steps), device=flat.master_W.device if flat.master_W.is_cuda else "cpu"),
                **{moment: torch.zeros_like(flat.master_W) for moment in _MOMENTS},
            }

    def _state(self) -> dict[str, list[torch.Tensor]]:
        """Of every kind of state, the tensors of all."""
        state = {"weights": [flat.master_W for flat in self._flats]}
        state |= {moment: [self._adamw.state[flat.master_W][moment] for flat in self._flats] for moment in _MOMENTS}
        return {**state, "average": self._averages} if self._averages else state

    def _copies(self, of_flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """By name, in the model's order."""
        views: dict[str, torch.Tensor] = {}
        for flat, held_W in zip(self._flats, of_flats, strict=True):
            views |= flat.views(held_W)
        return {name: views[name].detach().to("cpu", copy=True) for name in self._names}

    @torch.no_grad()
    def _publish(self, of_flats: list[torch.Tensor]) -> None:
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
