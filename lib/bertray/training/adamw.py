"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) over flat weights.

A step has two halves, for gradients are scaled by the norm of all:

1. square_of_gradients  what `FlatWeights.take_gradients` took -> the square of its norm
2. step                 scaled gradients -> moments -> weights in 32 bits -> weights of the model

Legend: W weights that lie end to end, K pieces, S tensors of gradients.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from bertray.training.flat_weights import ALIGNMENT, FlatWeights

_BETAS, _EPS = (0.9, 0.999), 1e-8


class AdamW(Protocol):
    """Steps flat weights."""

    def begin(self, num_steps: int) -> None:
        """So many steps were taken; the moments are of them."""

    def square_of_gradients(self) -> torch.Tensor:
        """The square of their norm, float64."""

    def step(self, learning_rate: float, scale: torch.Tensor) -> None:
        """Change the weights, in `master_W` and `model_W`.

        Args:
            scale: of the gradients; a scalar.
        """


def adamw_of(flat: FlatWeights, weight_decay: float) -> AdamW:
    """The fastest that there is for these weights."""
    if flat.model_W.dtype == torch.bfloat16 and flat.model_W.device.type == "cpu":
        return CompiledAdamW(flat, weight_decay)
    return TorchAdamW(flat, weight_decay)


class TorchAdamW:
    """By torch's fused kernel."""

    def __init__(self, flat: FlatWeights, weight_decay: float) -> None:
        self._flat = flat
        self._stepped_W = flat.master_W
        self._gradient_W = self._stepped_W.grad = torch.zeros_like(self._stepped_W)
        self._gradients = list(flat.views(self._gradient_W).values())
        self._adamw = torch.optim.AdamW(
            [self._stepped_W], betas=_BETAS, eps=_EPS, weight_decay=weight_decay, fused=True
        )
        self.begin(0)

    def begin(self, num_steps: int) -> None:
        step = torch.tensor(float(num_steps), device=self._stepped_W.device)
        self._adamw.state[self._stepped_W] = {"step": step, **self._flat.moments}

    def square_of_gradients(self) -> torch.Tensor:
        torch._foreach_copy_(self._gradients, self._flat.taken)
        self._flat.taken.clear()
        # Row by row: of one vector of 12 million numbers the norm is off by 5e-4 on CPUs, and takes twice as long.
        rows = self._gradient_W.view(ALIGNMENT, len(self._gradient_W) // ALIGNMENT)
        square: torch.Tensor = torch.linalg.vector_norm(rows, dim=1).double().square().sum()
        return square

    def step(self, learning_rate: float, scale: torch.Tensor) -> None:
        self._gradient_W.mul_(scale)
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        self._flat.publish(self._flat.master_W)


class CompiledAdamW:
    """Of weights in bf16 on CPUs: in one pass over memory, which reads gradients where they are."""

    def __init__(self, flat: FlatWeights, weight_decay: float) -> None:
        # Its import takes part of a second, which other trainings need not spend.
        from bertray.training import adamw_kernel

        self._kernel, self._flat, self._weight_decay = adamw_kernel, flat, weight_decay
        self.begin(0)
        tensors = [(flat.starts[name], view.numel()) for name, view in flat.views(flat.model_W).items()]
        piece = adamw_kernel.PIECE
        pieces = [
            (number, offset, start + offset, min(piece, length - offset))
            for number, (start, length) in enumerate(tensors)
            for offset in range(0, length, piece)
        ]
        table = np.array(pieces, np.int64).reshape(-1, 4)
        self._tensors_K, self._offsets_K, self._starts_K, self._lengths_K = np.ascontiguousarray(table.T)
        self._addresses_K = np.zeros(0, np.int64)
        self._arrays = [held.numpy() for held in (flat.master_W, *flat.moments.values())]
        self._arrays.append(flat.model_W.view(torch.uint16).numpy())

    def begin(self, num_steps: int) -> None:
        self._num_steps = num_steps

    def square_of_gradients(self) -> torch.Tensor:
        # Held until the step is taken, as the addresses are.
        self._flat.taken = [gradient.contiguous() for gradient in self._flat.taken]
        addresses_S = np.array([gradient.data_ptr() for gradient in self._flat.taken])
        self._addresses_K = addresses_S[self._tensors_K] + self._flat.model_W.element_size() * self._offsets_K
        self._kernel.use_torchs_threads()
        return torch.tensor(self._kernel.squared_norm(self._addresses_K, self._lengths_K), dtype=torch.float64)

    def step(self, learning_rate: float, scale: torch.Tensor) -> None:
        self._num_steps += 1
        corrections = [1 - beta**self._num_steps for beta in _BETAS]
        numbers = (
            scale.item(),
            *_BETAS,
            *(1 - beta for beta in _BETAS),
            1 - learning_rate * self._weight_decay,
            learning_rate / corrections[0],
            corrections[1] ** -0.5,
            _EPS,
        )
        self._kernel.step(self._addresses_K, self._starts_K, self._lengths_K, *self._arrays, *map(np.float32, numbers))
        self._flat.taken.clear()
