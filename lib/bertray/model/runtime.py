"""How a process that holds a model is set up: measured in benchmarks/README.md."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch

from bertray.errors import RequestError
from bertray.types import Device, Precision, TorchPrecision

P = ParamSpec("P")
T = TypeVar("T")

# Of malloc.h in glibc; other C libraries have no mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The most that every version of glibc takes, and above what a batch needs in one piece.
_MAPPED_FROM_BYTES = 1 << 25
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep what a batch frees for the next one.

    Outside a process's main thread glibc gives it back to the system at once, which then clears the same pages again.
    """
    mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES):
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class ModelThread:
    """The one thread that a process's model is loaded and run in.

    OpenMP keeps a team of threads for every thread that has called it. Ray builds an actor in one thread and calls it
    in another: with two teams on the processors of one, GNU's OpenMP no longer spins at barriers but sleeps.
    """

    def __init__(self) -> None:
        keep_freed_memory()
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function in the thread; its result, or its exception."""
        return self.start(function, *args, **kwargs).result()

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Begin to call the function in the thread."""
        return self._executor.submit(function, *args, **kwargs)


# Tokens of one forward pass. On CPUs activations of a larger batch leave the cache; a GPU wants enough work a launch.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536}


def num_cpus() -> int:
    """Of the processor, that this process may use, also in a container with a quota."""
    num = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")  # microseconds in so many, or "max"
    quota, _, period = limit.read_text().partition(" ") if limit.is_file() else ("max", "", "")
    return num if quota == "max" else max(1, min(num, int(quota) // int(period)))


def resolve_device(device: Device) -> torch.device:
    """What `auto` means here: the GPU if torch sees one.

    Raises:
        RequestError: cuda was asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; check nvidia-smi and torch's build"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, copied without the host waiting for it; on CPUs the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# What cuBLAS and cuDNN say where the driver, rather than torch's allocator, has no memory left for them.
_OUT_OF_MEMORY = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU had too little memory, so that a smaller batch may fit."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _OUT_OF_MEMORY)


def resolve_training_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on this device for training, which fp16 would need scaled losses for.

    Raises:
        RequestError: bf16 was asked for on a GPU without it.
    """
    real = resolve_precision(precision, device)
    return "bf16" if real == "bf16" else "fp32"


def resolve_precision(precision: TorchPrecision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What `auto` means on this device for predicting; fp16 only as far as `bundle.guard` allows it.

    Raises:
        RequestError: bf16 was asked for on a GPU without it. (A CPU without it emulates it, slowly but rightly.)
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise RequestError(f"--precision bf16: {name} has no bf16 arithmetic; use --precision fp32 or auto")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision != "auto":
        return precision
    return "bf16" if has_bf16 else "fp16" if device.type == "cuda" else "fp32"
