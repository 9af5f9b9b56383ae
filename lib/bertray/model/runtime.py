"""How a process that holds a model is set up; benchmarks/README.md has the measurements."""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from queue import PriorityQueue
from typing import Any, TypeVar

import numpy as np
import torch

from bertray.errors import RequestError
from bertray.types import Device, RealPrecision, TorchPrecision

# Tokens of one forward pass. On CPUs activations of a larger batch leave the cache; a GPU needs more work per launch.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536}

Result = TypeVar("Result")

CGROUP = Path("/sys/fs/cgroup")  # in a container, its own limits

# cuBLAS, cuDNN and the driver say this when they, rather than torch's allocator, have no memory left.
_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def keep_freed_memory() -> None:
    """Let this process keep the memory that a batch frees for the next one.

    Outside the main thread glibc returns it to the system at once, which then clears the same pages again.
    """
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    m_trim_threshold, m_mmap_threshold = -1, -3
    # 32 MB is the most that every version of glibc accepts, and more than a batch needs in one piece.
    if mallopt is not None and mallopt(m_mmap_threshold, 1 << 25):
        mallopt(m_trim_threshold, 1 << 30)


class ModelThread:
    """One thread that a process loads and runs its model in.

    OpenMP keeps a team of threads for each thread that calls it, and Ray builds an actor in one thread and calls it in
    another. With two teams on the same cores GNU's OpenMP sleeps at barriers instead of spinning.
    """

    def __init__(self) -> None:
        self._waiting = PriorityQueue[tuple[float, int, Future[Any], Callable[[], Any]]]()
        self._numbers = itertools.count()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def submit(self, work: Callable[[], Result], order: float = 0.0) -> Future[Result]:
        """Begin, as soon as nothing waits that has a lower order, or the same one and came before."""
        future = Future[Result]()
        self._waiting.put((order, next(self._numbers), future, work))
        return future

    def _run(self) -> None:
        keep_freed_memory()
        while True:
            *_, future, work = self._waiting.get()
            try:
                future.set_result(work())
            except BaseException as error:  # whoever waits for the result raises it
                future.set_exception(error)
            del future, work  # and with them tokens and logits, while nothing else waits


def num_cpus() -> int:
    """Processors that this process may use, also in a container with a quota; at least one."""
    num = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = CGROUP / "cpu.max"  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return num if quota == "max" else max(1, min(num, int(quota) // int(period)))


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, copied while the host continues; on CPUs the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory, so that a smaller batch may fit."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


def resolve_device(device: Device) -> torch.device:
    """The device to use; `auto` is the GPU if torch sees one.

    Raises:
        RequestError: cuda was requested and torch sees no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; check nvidia-smi and torch's build"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """The name of the GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def resolve_precision(precision: TorchPrecision, device: torch.device) -> RealPrecision:
    """The precision to use on this device. `auto` is bf16 where the device has it, else fp16 on GPUs and fp32 on CPUs.

    `bundle.guard` decides whether scoring uses fp16; training never does.

    Raises:
        RequestError: bf16 was requested on a GPU without it. (A CPU without it emulates it, slowly but correctly.)
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            raise RequestError(
                f"--precision bf16: {device_name(device)} has no bf16 arithmetic; use --precision fp32 or auto"
            )
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision != "auto":
        return precision
    return "bf16" if has_bf16 else "fp16" if device.type == "cuda" else "fp32"
