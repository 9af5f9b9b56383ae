"""AdamW over 32-bit weights, whatever the model computes in, and the schedule of its learning rate.

1. gradients  of the model's weights, cast to 32 bits if they are not, scaled down to a norm
2. AdamW      Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; fused: one pass over memory
3. publish    the weights, rounded to the model's precision

Without 32-bit weights an update of less than 1/256 of a weight would be lost in bf16.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LAYER_NUMBER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate_factor(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Of the peak, at a step that counts from 1: a linear rise to 1, then a linear fall, to 0 after the last step."""
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    return (num_steps - step + 1) / (num_steps - num_warmup_steps + 1)


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
    ) -> None:
        named = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
        self._names = [name for name, _ in named]
        self._weights = [weights for _, weights in named]
        # What is 32 bits wide already is trained in place.
        self._masters = [
            weights if weights.dtype == torch.float32 else weights.detach().float() for weights in self._weights
        ]
        self._casts = [
            (weights, master)
            for weights, master in zip(self._weights, self._masters, strict=True)
            if weights is not master
        ]
        for _, master in self._casts:
            master.grad = torch.empty_like(master)
        self._max_grad_norm, self._learning_rate = max_grad_norm, learning_rate
        depths = _depths(self._names, model.base_model_prefix)
        groups: dict[tuple[int, bool], list[torch.Tensor]] = {}
        for depth, master in zip(depths, self._masters, strict=True):
            groups.setdefault((depth, master.ndim > 1), []).append(master)
        self._adamw = torch.optim.AdamW(
            [
                {
                    "params": masters,
                    "weight_decay": weight_decay if is_matrix else 0.0,
                    "factor": layer_decay ** (max(depths) - depth),
                }
                for (depth, is_matrix), masters in sorted(groups.items())
            ],
            lr=learning_rate,
            fused=True,
        )
        self._average_decay, self._num_averaged = average_decay, 0
        self._averages = [] if average_decay is None else [master.detach().clone() for master in self._masters]

    def step(self, factor: float) -> torch.Tensor:
        """Take one step and forget the gradients.

        Args:
            factor: of the learning rate, as `learning_rate_factor` gives it.

        Returns:
            The norm of the gradients before they were scaled; a scalar on the device.
        """
        if self._casts:
            narrow, wide = zip(*((weights.grad, master.grad) for weights, master in self._casts), strict=True)
            torch._foreach_copy_(wide, narrow)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * factor * group["factor"]
        self._adamw.step()
        for weights in self._weights:
            weights.grad = None
        self._publish(self._masters)
        if self._average_decay is not None:
            # A running mean of few steps must not remember where training began.
            self._num_averaged += 1
            decay = min(self._average_decay, (1 + self._num_averaged) / (10 + self._num_averaged))
            torch._foreach_lerp_(self._averages, [master.detach() for master in self._masters], 1 - decay)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model computes with the running mean of its weights, if one is kept."""
        if not self._averages:
            yield
            return
        trained = [weights.detach().clone() for weights in self._weights]
        self._publish(self._averages)
        try:
            yield
        finally:
            self._publish(trained)

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of the 32-bit weights by name; of their running mean if one is kept."""
        kept = self._averages or self._masters
        return {name: weights.detach().to("cpu", copy=True) for name, weights in zip(self._names, kept, strict=True)}

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of all that a later run needs to go on from here."""
        tensors: dict[str, torch.Tensor] = {}
        for number, (name, master) in enumerate(zip(self._names, self._masters, strict=True)):
            moments = self._adamw.state[master]
            tensors[f"weights/{name}"] = master.detach().to("cpu", copy=True)
            tensors |= {f"{moment}/{name}": moments[moment].to("cpu", copy=True) for moment in _MOMENTS}
            if self._averages:
                tensors[f"average/{name}"] = self._averages[number].to("cpu", copy=True)
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], num_steps: int) -> None:
        """Go on from where `state` was called, after so many steps."""
        for number, (name, master) in enumerate(zip(self._names, self._masters, strict=True)):
            master.copy_(tensors[f"weights/{name}"])
            moments = {moment: tensors[f"{moment}/{name}"].to(master.device, copy=True) for moment in _MOMENTS}
            self._adamw.state[master] = {
                "step": torch.tensor(float(num_steps), device=master.device if master.is_cuda else "cpu"),
                **moments,
            }
            if self._averages:
                self._averages[number].copy_(tensors[f"average/{name}"])
        self._num_averaged = num_steps
        self._publish(self._masters)

    @torch.no_grad()
    def _publish(self, source: list[torch.Tensor]) -> None:
        """Copy into the model, rounded to its precision; what is trained in place is there already."""
        pairs = [(weights, held) for weights, held in zip(self._weights, source, strict=True) if weights is not held]
        if pairs:
            torch._foreach_copy_([weights for weights, _ in pairs], [held for _, held in pairs])


def _depths(names: list[str], encoder: str) -> list[int]:
    """0 of embeddings, 1 … of layers, and one more of all that stands above them."""
    numbers = [_LAYER_NUMBER.search(name) for name in names]
    top = max((int(number[1]) for number in numbers if number), default=-1) + 2
    return [
        int(number[1]) + 1 if number else 0 if name.startswith(f"{encoder}.embeddings") else top
        for name, number in zip(names, numbers, strict=True)
    ]
