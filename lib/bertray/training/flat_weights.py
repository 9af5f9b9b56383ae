"""A model's weights in a few long tensors: stepped faster than a hundred short ones.

Legend: W weights that lie end to end; each matrix and vector begins at a multiple of `ALIGNMENT`, after zeros. P those
of them that this rank steps.
"""

from __future__ import annotations

import numpy as np
import torch

from bertray.training.ranks import Memory

ALIGNMENT = 64  # weights, of 16 bits or more: what matrix products read begins on a cache line
MOMENTS = ("exp_avg", "exp_avg_sq")


class FlatWeights:
    """Weights that share a learning rate and a decay, end to end.

    Attributes:
        starts: by name, where a weight begins.
        part: which of W this rank steps.
        model_W: the model's weights, in its precision; they are views of it from here on.
        master_W: the same in 32 bits; what is 32 bits wide already is trained in place.
        moments: AdamW's, by name, in 32 bits.
        taken: this rank's gradients, in the order of `starts`; empty where ranks share memory.
        shared: of each rank, the gradients that it gave, W; empty where this rank shares memory with none.
    """

    def __init__(self, named: list[tuple[str, torch.Tensor]], memory: Memory) -> None:
        self._weights, self._memory = dict(named), memory
        starts = np.cumsum([0, *(-(-weights.numel() // ALIGNMENT) * ALIGNMENT for _, weights in named)]).tolist()
        self.starts: dict[str, int] = dict(zip(self._weights, starts, strict=False))
        self._num_weights, self._device, dtype = starts[-1], named[0][1].device, named[0][1].dtype
        num_units, num_ranks = self._num_weights // ALIGNMENT, memory.world_size
        begin, end = (num_units * rank // num_ranks * ALIGNMENT for rank in (memory.rank, memory.rank + 1))
        self.part = slice(begin, end)
        self.model_W = self._zeros(dtype)
        for name, view in self.views(self.model_W).items():
            if memory.rank == 0:
                view.copy_(self._weights[name].detach())
            self._weights[name].data = view
        self.master_W = self.model_W if dtype == torch.float32 else self.copy(self.model_W)
        self.moments = {name: self._zeros(torch.float32) for name in MOMENTS}
        self.taken: list[torch.Tensor] = []
        self.shared = [self._zeros(dtype) for _ in range(num_ranks)] if num_ranks > 1 else []
        self._given = list(self.views(self.shared[memory.rank]).values()) if self.shared else []

    def _zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return self._memory.zeros(self._num_weights, dtype, self._device)

    def copy(self, held_W: torch.Tensor) -> torch.Tensor:
        """In 32 bits, seen by all that see the weights; after a `wait`, for rank 0 writes it."""
        copied_W = self._zeros(torch.float32)
        if self._memory.rank == 0:
            copied_W.copy_(held_W)
        return copied_W

    def views(self, held_W: torch.Tensor) -> dict[str, torch.Tensor]:
        """By name, where the weights lie in a tensor as long as these."""
        return {
            name: held_W[start : start + self._weights[name].numel()].view_as(self._weights[name])
            for name, start in self.starts.items()
        }

    def take_gradients(self) -> None:
        """Move this rank's out of the model."""
        self.taken = [weights.grad for weights in self._weights.values() if weights.grad is not None]
        assert len(self.taken) == len(self._weights), "a weight has no gradient"
        for weights in self._weights.values():
            weights.grad = None
        if self.shared:
            torch._foreach_copy_(self._given, self.taken)
            self.taken.clear()

    def publish(self, held_W: torch.Tensor) -> None:
        """Let the model compute with this rank's part of these weights."""
        if held_W is not self.model_W:
            self.model_W[self.part].copy_(held_W[self.part])
