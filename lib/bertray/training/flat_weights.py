"""A model's weights in a few long tensors: stepped faster than a hundred short ones.

Legend: W weights that lie end to end; each matrix and vector begins at a multiple of `ALIGNMENT`, after zeros.
"""

from __future__ import annotations

import numpy as np
import torch

ALIGNMENT = 64  # weights, of 16 bits or more: what matrix products read begins on a cache line
MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatWeights:
    """Weights that share a learning rate and a decay, end to end.

    Attributes:
        starts: by name, where a weight begins.
        model_W: the model's weights, in its precision; they are views of it from here on.
        master_W: the same in 32 bits; what is 32 bits wide already is trained in place.
        moments: AdamW's, by name, in 32 bits.
        taken: the gradients of a step, in the order of `starts`.
    """

    def __init__(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self._weights = dict(named)
        starts = np.cumsum([0, *(-(-weights.numel() // ALIGNMENT) * ALIGNMENT for _, weights in named)]).tolist()
        self.starts: dict[str, int] = dict(zip(self._weights, starts, strict=False))
        self._num_weights, self._device, dtype = starts[-1], named[0][1].device, named[0][1].dtype
        self.model_W = self._zeros(dtype)
        for name, view in self.views(self.model_W).items():
            view.copy_(self._weights[name].detach())
            self._weights[name].data = view
        self.master_W = self.model_W if dtype == torch.float32 else self.copy(self.model_W)
        self.moments = {name: self._zeros(torch.float32) for name in MOMENTS}
        self.taken: list[torch.Tensor] = []

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(self._num_weights, dtype=dtype, device=self._device)

    def copy(self, held_W: torch.Tensor) -> torch.Tensor:
        """In 32 bits."""
        return held_W.to(torch.float32, copy=True)

    def views(self, held_W: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name, where the weights lie in a tensor as long as these."""
        return {
            name: held_W[start : start + self._weights[name].numel()].view_as(self._weights[name])
            for name, start in self.starts.items()
        }

    def take_gradients(self) -> None:
        """Move them out of the model."""
        self.taken = [weights.grad for weights in self._weights.values() if weights.grad is not None]
        assert len(self.taken) == len(self._weights), "a weight has no gradient"
        for weights in self._weights.values():
            weights.grad = None

    def publish(self, held_W: torch.Tensor) -> None:
        """Let the model compute with these weights."""
        if held_W is not self.model_W:
            self.model_W.copy_(held_W)
