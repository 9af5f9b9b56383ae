"""AdamW of weights in bf16 on CPUs in one pass over memory, compiled by numba when it is first called.

torch takes four: gradients are cast to 32 bits, scaled, weights and moments stepped, weights cast to 16 bits; and one
before them for the norm. Here a piece is cast, stepped and rounded while it is in the cache.

Legend: K pieces of at most `PIECE` weights, W weights.
"""

from __future__ import annotations

import functools
import logging
import pickle
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

_log = logging.getLogger(__name__)

PIECE = 4096
# Threads of numba's own beside torch's, which spin, are slower.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


def use_torchs_threads() -> None:
    """Let this thread's calls use as many as torch does.

    Both find the same OpenMP library where torch has made its own known to all, and so run on the same threads: numba,
    when it begins, has torch use all processors. Two ranks, of which each had one, were eight times as slow.
    """
    num_threads = torch.get_num_threads()
    numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
    torch.set_num_threads(num_threads)
    if num_threads > 1:
        _tell_what_is_slower(num_threads)


@functools.cache
def _tell_what_is_slower(num_threads: int) -> None:
    """Once; numba's threads have begun."""
    if (layer := numba.threading_layer()) != "omp":
        _log.warning(
            "warning: the optimizer runs on threads of its own (%s) beside torch's, which is slower: install OpenMP's "
            "library (libgomp), and leave NUMBA_THREADING_LAYER unset",
            layer,
        )
    if (limit := numba.config.NUMBA_NUM_THREADS) < num_threads:
        _log.warning(
            "warning: the optimizer runs on %d of %d threads: leave OMP_PROC_BIND and NUMBA_NUM_THREADS unset",
            limit,
            num_threads,
        )


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """Kept on disk where that is possible.

    Divisions by zero give what IEEE 754 says: where Python's error had to be raised nothing would be vectorised.
    """

    def compiled(function: Any) -> Any:
        compile_anew = functools.partial(numba.njit(error_model="numpy", **options), function)
        try:
            kept = numba.njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # no folder where this user may write
            return compile_anew()

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal kept
            try:
                return kept(*arguments)
            except (OSError, EOFError, pickle.UnpicklingError) as error:  # before anything was computed
                _log.warning("%s is compiled again: what numba kept on disk cannot be used: %r", call.__name__, error)
            kept = compile_anew()
            return kept(*arguments)

        return call

    return compiled


@intrinsic
def _pointer(_: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(address), code


@numba.njit(error_model="numpy", fastmath={"contract"})
def _widen(address: int, length: int, words: Any) -> None:
    """The gradients in bf16 that begin at an address, as bits of 32."""
    bits = numba.carray(_pointer(address), length)
    for at in range(length):
        words[at] = np.uint32(bits[at]) << np.uint32(16)


@_compiled(parallel=True, fastmath={"contract", "reassoc", "nsz"})
def squared_norm(addresses_K: Any, lengths_K: Any) -> float:
    """Of the gradients."""
    squares_K = np.zeros(lengths_K.size)
    for piece in numba.prange(lengths_K.size):
        length = lengths_K[piece]
        words = np.empty(PIECE, np.uint32)
        _widen(addresses_K[piece], length, words)
        gradients, square = words.view(np.float32), np.float32(0)
        for at in range(length):
            square += gradients[at] * gradients[at]
        squares_K[piece] = square
    return float(squares_K.sum())


@_compiled(parallel=True, fastmath={"contract"})
def step(
    addresses_K: Any,
    starts_K: Any,
    lengths_K: Any,
    master_W: Any,
    exp_avg_W: Any,
    exp_avg_sq_W: Any,
    model_W: Any,
    scale: np.float32,
    beta1: np.float32,
    beta2: np.float32,
    rest1: np.float32,
    rest2: np.float32,
    decay: np.float32,
    step_size: np.float32,
    correction: np.float32,
    eps: np.float32,
) -> None:
    """Change the weights of the pieces.

    Args:
        starts_K: where, in arrays of W, a piece begins.
        model_W: the bits of what the model computes with.
        scale: of gradients.
        rest1: 1 - beta1, and rest2 1 - beta2, which 32 bits would round otherwise.
        decay: what weights are multiplied with.
        step_size: the learning rate over the first moment's bias correction.
        correction: 1 over the root of the second moment's bias correction.
    """
    for piece in numba.prange(lengths_K.size):
        start, length = starts_K[piece], lengths_K[piece]
        words = np.empty(PIECE, np.uint32)
        _widen(addresses_K[piece], length, words)
        gradients = words.view(np.float32)
        master, model = master_W[start : start + length], model_W[start : start + length]
        first, second = exp_avg_W[start : start + length], exp_avg_sq_W[start : start + length]
        rounded = words.view(np.float32)
        for at in range(length):
            gradient = gradients[at] * scale
            mean = first[at] * beta1 + gradient * rest1
            square = second[at] * beta2 + gradient * gradient * rest2
            first[at], second[at] = mean, square
            stepped = master[at] * decay - step_size * mean / (np.sqrt(square) * correction + eps)
            master[at] = rounded[at] = stepped
        for at in range(length):  # to the nearest, to an even one of two
            bits = words[at]
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            model[at] = np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
