"""What the processes that train a model together agree on; each holds all of it, and gradients go by NCCL or Gloo."""

from __future__ import annotations

import torch
import torch.distributed


def rank_and_world_size() -> tuple[int, int]:
    """Of this process; 0 and 1 of one that trains alone."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def least_of_ranks(own: int, device: torch.device) -> int:
    """The least of what the ranks have."""
    if not torch.distributed.is_initialized():
        return own
    least = torch.tensor(own, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least.item())


def on_all_ranks(is_here: bool, device: torch.device) -> bool:
    """Whether it is so on every rank."""
    return bool(least_of_ranks(int(is_here), device))
