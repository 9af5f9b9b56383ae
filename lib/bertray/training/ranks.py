"""The processes that train a model together: what they agree on, and the memory that those of one machine share.

On the CPUs of one machine ranks need not send one another gradients:

1. Weights, moments and every rank's gradients lie in memory that all ranks see.
2. Each rank adds up the gradients of a part of the weights, and steps that part         [training.optimizer]

On GPUs, and where ranks are on several machines, each keeps all weights, and gradients go by NCCL or Gloo.
"""

from __future__ import annotations

import logging
import mmap
import os
import uuid
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed

_log = logging.getLogger(__name__)


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


class Memory(Protocol):
    """Where the weights of a run lie, and who steps which of them.

    Attributes:
        rank: of `world_size` that share it, and step a part each.
    """

    rank: int
    world_size: int

    def zeros(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor; every rank asks for the same ones in the same order."""

    def total(self, own: torch.Tensor) -> torch.Tensor:
        """The sum of what those that share it give."""

    def wait(self) -> None:
        """Until all that share it are here."""


class OwnMemory:
    """Of a rank that keeps all weights, and steps them all."""

    rank, world_size = 0, 1

    def zeros(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.zeros(num_elements, dtype=dtype, device=device)

    def total(self, own: torch.Tensor) -> torch.Tensor:
        return own

    def wait(self) -> None:
        """For nobody."""


class SharedMemory:
    """Of the ranks of one machine, on its CPUs.

    A tensor is a file without a name, which rank 0 makes and the others open by way of /proc: however the ranks end,
    nothing is left of it.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = rank_and_world_size()

    def zeros(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        num_bytes = num_elements * dtype.itemsize
        mapped, error = self._map(num_bytes)
        if mapped is None:
            raise error or OSError(f"another worker on this machine cannot share {num_bytes:,} bytes of memory")
        return torch.frombuffer(mapped, dtype=dtype)

    def total(self, own: torch.Tensor) -> torch.Tensor:
        summed = own.clone()
        torch.distributed.all_reduce(summed)
        return summed

    def wait(self) -> None:
        self.total(torch.zeros(()))  # a step of 118 ms is 1 to 2 ms shorter than with Gloo's barrier

    def is_possible(self) -> bool:
        """Whether the ranks see one another's memory: they do on one Linux machine, as one user."""
        if not on_all_ranks(hasattr(os, "memfd_create"), torch.device("cpu")):
            return False
        mapped, error = self._map(mmap.PAGESIZE)
        if error:
            _log.info("workers exchange gradients by network, for they do not see one another's memory: %s", error)
        return mapped is not None

    def _map(self, num_bytes: int) -> tuple[mmap.mmap | None, OSError | None]:
        """None on every rank if it fails on one, and what failed here."""
        name, files = f"bertray-{uuid.uuid4().hex}", list[int]()
        mapped, error = None, None
        if self.rank == 0:
            try:
                files.append(os.memfd_create(name))
                os.ftruncate(files[0], num_bytes)
            except OSError as failed:
                error = failed
        offer = [None if error or self.rank else (os.getpid(), files[0], name)]
        torch.distributed.broadcast_object_list(offer)
        if offer[0] is not None:
            try:
                mapped = _open(*offer[0], num_bytes)
            except OSError as failed:
                error = failed
        is_mapped = on_all_ranks(mapped is not None, torch.device("cpu"))
        for file in files:
            os.close(file)
        return mapped if is_mapped else None, error


def _open(process: int, file: int, name: str, num_bytes: int) -> mmap.mmap:
    path = Path(f"/proc/{process}/fd/{file}")
    # On another machine the number is another process's.
    if not str(path.readlink()).startswith(f"/memfd:{name}"):
        raise FileNotFoundError(f"{path} is not {name}")
    opened = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(opened, num_bytes)
    finally:
        os.close(opened)


def memory_of_ranks(device: torch.device) -> Memory:
    """Where the weights of this run lie; every rank asks."""
    if rank_and_world_size()[1] > 1 and device.type == "cpu":
        shared = SharedMemory()
        if shared.is_possible():
            return shared
    return OwnMemory()
