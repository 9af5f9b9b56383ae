"""AdamW over 32-bit weights, whatever the model computes in, and the schedule of its learning rate.

1. gradients  of the model's weights, cast to 32 bits if they are not, scaled down to a norm
2. AdamW      Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; fused: one pass over memory
3. publish    the weights, rounded to the model's precision

Without 32-bit weights an update of less than 1/256 of a weight would be lost in bf16. Ranks that share memory take each
a part of the weights through all three.                                                                [bertray.ranks]

Legend: W weights that lie end to end; each matrix and vector begins at a multiple of `_ALIGNMENT`, after zeros. P those
of them that this rank steps, R ranks that share memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bertray.ranks import Memory, OwnMemory

_LAYER_NUMBER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALIGNMENT = 64  # weights, of 16 bits or more: what matrix products read begins on a cache line
_PIECE = 1 << 16  # weights, so that what is cast stays in the cache until it is added


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
        moments: AdamW's, by name, as long.
        part: which of them this rank steps.
        gradient_P: of these, 32 bits wide.
    """

    def __init__(self, named: list[tuple[str, torch.Tensor]], memory: Memory) -> None:
        self._weights, self._memory = dict(named), memory
        starts = np.cumsum([0, *(-(-weights.numel() // _ALIGNMENT) * _ALIGNMENT for _, weights in named)])
        self._starts = dict(zip(self._weights, starts.tolist(), strict=False))
        self._num_weights, self._device, dtype = int(starts[-1]), named[0][1].device, named[0][1].dtype
        num_units, num_ranks = self._num_weights // _ALIGNMENT, memory.world_size
        begin, end = (num_units * rank // num_ranks * _ALIGNMENT for rank in (memory.rank, memory.rank + 1))
        self.part = slice(begin, end)
        self.model_W = self._zeros(dtype)
        for name, view in self.views(self.model_W).items():
            if memory.rank == 0:
                view.copy_(self._weights[name].detach())
            self._weights[name].data = view
        self.master_W = self.model_W if dtype == torch.float32 else self.copy(self.model_W)
        self.moments = {name: self._zeros(torch.float32) for name in _MOMENTS}
        self.gradient_P = torch.zeros_like(self.master_W[self.part])
        # Of every rank; one that shares memory with none has its gradients cast where they are needed.
        self._given_RW = [self._zeros(dtype) for _ in range(memory.world_size)] if memory.world_size > 1 else []
        self._gradients = list(self.views(self._given_RW[memory.rank] if self._given_RW else self.gradient_P).values())

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return self._memory.zeros(self._num_weights, dtype, self._device)

    def copy(self, held_W: torch.Tensor) -> torch.Tensor:
        """In 32 bits, seen by all that see the weights."""
        copied_W = self._zeros(torch.float32)
        if self._memory.rank == 0:
            copied_W.copy_(held_W)
        return copied_W

    def views(self, held_W: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name, where the weights lie in a tensor as long as these."""
        return {
            name: held_W[start : start + self._weights[name].numel()].view_as(self._weights[name])
            for name, start in self._starts.items()
        }

    def take_gradients(self) -> None:
        """Move this rank's out of the model."""
        given = [weights.grad for weights in self._weights.values() if weights.grad is not None]
        torch._foreach_copy_(self._gradients, given)  # which refuses lists of unequal length
        for weights in self._weights.values():
            weights.grad = None

    def add_gradients(self) -> None:
        """Add up what the ranks have taken."""
        for start in range(0, len(self.gradient_P) if self._given_RW else 0, _PIECE):
            sum_P = self.gradient_P[start : start + _PIECE]
            for rank, given_W in enumerate(self._given_RW):
                given_P = given_W[self.part][start : start + _PIECE]
                sum_P.add_(given_P.float()) if rank else sum_P.copy_(given_P)

    def publish(self, held_W: torch.Tensor) -> None:
        """Let the model compute with this rank's part of these weights."""
        if held_W is not self.model_W:
            self.model_W[self.part].copy_(held_W[self.part])


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
        memory: where the weights lie; ranks that share it call every method but `weights` and `state` together.
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
        memory: Memory | None = None,
    ) -> None:
        self._memory = memory or OwnMemory()
        named = [(name, weights) for name, weights in model.named_parameters() if weights.requires_grad]
        self._names = [name for name, _ in named]
        self._max_grad_norm, self._learning_rate = max_grad_norm, learning_rate
        depths = _depths(self._names, model.base_model_prefix)
        alike: dict[tuple[float, bool, torch.dtype], list[tuple[str, torch.Tensor]]] = {}
        for depth, (name, weights) in zip(depths, named, strict=True):
            factor = layer_decay ** (max(depths) - depth)
            alike.setdefault((factor, weights.ndim > 1, weights.dtype), []).append((name, weights))
        self._flats = [_FlatWeights(weights, self._memory) for weights in alike.values()]
        self._stepped = [flat.master_W[flat.part] for flat in self._flats]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [stepped_P], "weight_decay": weight_decay if is_matrix else 0.0, "factor": factor}
                for stepped_P, (factor, is_matrix, _) in zip(self._stepped, alike, strict=True)
            ],
            lr=learning_rate,
            fused=True,
        )
        for flat, stepped_P in zip(self._flats, self._stepped, strict=True):
            stepped_P.grad = flat.gradient_P
            if exact and self._memory.rank == 0:
                for name, view in flat.views(flat.master_W).items():
                    view.detach().copy_(exact[name])
        self._average_decay, self._num_averaged = average_decay, 0
        self._averages = [] if average_decay is None else [flat.copy(flat.master_W) for flat in self._flats]
        self._begin(num_steps=0)
        self._memory.wait()

    def step(self, factor: float) -> torch.Tensor:
        """Take one step and forget the gradients.

        Args:
            factor: of the learning rate, as `learning_rate_factor` gives it.

        Returns:
            The norm of the gradients before they were scaled; a scalar on the device.
        """
        for flat in self._flats:
            flat.take_gradients()
        self._memory.wait()
        for flat in self._flats:
            flat.add_gradients()
        norm = self._clip_gradients()
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * factor * group["factor"]
        self._adamw.step()
        if self._average_decay is not None:
            # A running mean of few steps must not remember where training began.
            self._num_averaged += 1
            decay = min(self._average_decay, (1 + self._num_averaged) / (10 + self._num_averaged))
            averages = [average_W[flat.part] for flat, average_W in zip(self._flats, self._averages, strict=True)]
            torch._foreach_lerp_(averages, self._stepped, 1 - decay)
        self._publish([flat.master_W for flat in self._flats])
        return norm

    @torch.no_grad()
    def _clip_gradients(self) -> torch.Tensor:
        """Scale the gradients down to a norm of at most `max_grad_norm`; returns what it was."""
        # Row by row: of one vector of 12 million numbers the norm is off by 5e-4 on CPUs, and takes twice as long.
        rows = [flat.gradient_P.view(_ALIGNMENT, len(flat.gradient_P) // _ALIGNMENT) for flat in self._flats]
        norms = [torch.linalg.vector_norm(of_flat, dim=1) for of_flat in rows]
        norm = self._memory.total(torch.cat(norms).double().square().sum()).sqrt().float()
        torch.nn.utils.clip_grads_with_norm_(self._stepped, self._max_grad_norm, norm)
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
            self._memory.wait()  # others may still compute with the mean
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
        self._begin(num_steps)
        for kind, of_flats in self._state().items():
            for flat, held_W in zip(self._flats, of_flats, strict=True):
                for name, view in flat.views(held_W).items():
                    view.copy_(tensors[f"{kind}/{name}"])
        self._num_averaged = num_steps
        self._publish([flat.master_W for flat in self._flats])

    def _begin(self, num_steps: int) -> None:
        """Let AdamW know the moments, and how many steps they are of."""
        for flat, stepped_P in zip(self._flats, self._stepped, strict=True):
            self._adamw.state[stepped_P] = {
                "step": torch.tensor(float(num_steps), device=stepped_P.device if stepped_P.is_cuda else "cpu"),
                **{name: moment_W[flat.part] for name, moment_W in flat.moments.items()},
            }

    def _state(self) -> dict[str, list[torch.Tensor]]:
        """Of every kind of state, the tensors of all."""
        state = {"weights": [flat.master_W for flat in self._flats]}
        state |= {name: [flat.moments[name] for flat in self._flats] for name in _MOMENTS}
        return {**state, "average": self._averages} if self._averages else state

    def _copies(self, of_flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """By name, in the model's order."""
        views: dict[str, torch.Tensor] = {}
        for flat, held_W in zip(self._flats, of_flats, strict=True):
            views |= flat.views(held_W)
        return {name: views[name].detach().to("cpu", copy=True) for name in self._names}

    @torch.no_grad()
    def _publish(self, of_flats: list[torch.Tensor]) -> None:
        """Let the model compute with these weights, on every rank."""
        for flat, held_W in zip(self._flats, of_flats, strict=True):
            flat.publish(held_W)
        self._memory.wait()


def _depths(names: list[str], encoder: str) -> list[int]:
    """0 of embeddings, 1 … of layers, and one more of all that stands above them."""
    numbers = [_LAYER_NUMBER.search(name) for name in names]
    top = max((int(number[1]) for number in numbers if number), default=-1) + 2
    return [
        int(number[1]) + 1 if number else 0 if name.startswith(f"{encoder}.embeddings") else top
        for name, number in zip(names, numbers, strict=True)
    ]
