"""Attention over documents that lie end to end in one row, without padding.

`packed_attention` is registered with transformers' attention interface. A model that is switched to it attends within
the documents of a `Packing`, which it receives as a keyword argument. On CUDA in 16 bits this is one call of torch's
variable-length kernel. Elsewhere scoring calls SDPA for each run of documents of equal length. Training puts documents
of similar length into rectangles and computes two matrix products, because in bf16 on CPUs SDPA's own backward takes
2 to 8 times as long, up to 128 tokens.

Training drops states as BERT does, but no attention weights: the kernel cannot, and devices must not differ.

Legend: B documents, B1 = B + 1, T tokens, H heads, A = B * H, D size of a head, E = H * D, L tokens of a document.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertray.model.buckets import Rectangles
from bertray.tokenization.windows import offsets

_log = logging.getLogger(__name__)

NAME = "bertray_packed"
# Relative to the largest state or gradient: rounding to 16 bits makes 0.004, one token too many in a window 0.06.
_KERNEL_TOLERANCE = 0.02
_KERNEL_HEAD_UNIT = 8  # the kernel takes heads whose size is a multiple of this

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key and value, each [1, H, T, D]


@dataclass(frozen=True)
class Packing:
    """Where the documents of a packed row lie. Attention uses the rectangles, else the runs, else CUDA's kernel."""

    offsets_B1: torch.Tensor  # int32, on the model's device
    max_length: int  # tokens of the longest document
    runs: tuple[tuple[int, int, int], ...] = ()  # see `equal_runs`
    rectangles: Rectangles | None = None  # for training; tokens that belong to no document may follow the last one


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernel supports this device and precision."""
    return device.type == "cuda" and dtype != torch.float32


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    *,
    packing: Packing,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each document, with the signature of transformers' attention functions.

    Tokens at a distance of `sliding_window` or more do not see each other (ModernBERT's local layers).

    Returns:
        The states [1, T, H, D], and None for the weights.
    """
    attend = _by_rectangles if packing.rectangles else _by_runs if packing.runs else _on_cuda
    return attend((query_1HTD, key_1HTD, value_1HTD), packing, scaling, sliding_window), None


def _by_runs(qkv: QKV, packing: Packing, scaling: float | None, sliding_window: int | None) -> torch.Tensor:
    """Attention over runs of documents of equal length."""
    states_1THD = torch.empty_like(qkv[0].transpose(1, 2), memory_format=torch.contiguous_format)
    for first, num_documents, length in packing.runs:
        span = slice(first, first + num_documents * length)
        query_BHLD, key_BHLD, value_BHLD = (
            one[0, :, span].transpose(0, 1).unflatten(0, (num_documents, length)).transpose(1, 2) for one in qkv
        )
        is_near_LL = _is_near(length, sliding_window, states_1THD.device)
        states_BHLD = scaled_dot_product_attention(
            query_BHLD, key_BHLD, value_BHLD, attn_mask=is_near_LL, scale=scaling
        )
        states_1THD[0, span].unflatten(0, (num_documents, length)).copy_(states_BHLD.transpose(1, 2))
    return states_1THD


def _by_rectangles(qkv: QKV, packing: Packing, scaling: float | None, sliding_window: int | None) -> torch.Tensor:
    """Attention over rectangles of documents of similar length; zeros for tokens that belong to no document."""
    query_1HTD, key_1HTD, value_1HTD = qkv
    rectangles, (num_heads, num_tokens, size) = packing.rectangles, query_1HTD.shape[1:]
    assert rectangles is not None
    scale = size**-0.5 if scaling is None else scaling
    parts = []
    for query_BLE, key_BLE, value_BLE, is_hidden_BLL in zip(
        *(rectangles.enter(one[0].transpose(0, 1).flatten(1)) for one in (query_1HTD * scale, key_1HTD, value_1HTD)),
        rectangles.is_hidden,
        strict=True,
    ):
        num_documents, length, _ = query_BLE.shape
        query_ALD, key_ALD, value_ALD = (
            one.unflatten(2, (num_heads, size)).transpose(1, 2).flatten(0, 1) for one in (query_BLE, key_BLE, value_BLE)
        )
        # Keys before queries: a softmax over keys is faster along the first dimension, and its backward more so.
        affinity_ALL = torch.bmm(key_ALD, query_ALD.transpose(1, 2))
        is_near_LL = _is_near(length, sliding_window, query_1HTD.device)
        if is_near_LL is not None:
            affinity_ALL = affinity_ALL.masked_fill(~is_near_LL, -torch.inf)
        if is_hidden_BLL is not None:
            affinity_BHLL = affinity_ALL.unflatten(0, (num_documents, num_heads))
            affinity_ALL = affinity_BHLL.masked_fill(is_hidden_BLL[:, None], -torch.inf).flatten(0, 1)
        states_ALD = torch.bmm(affinity_ALL.softmax(1).transpose(1, 2), value_ALD)
        parts.append(states_ALD.unflatten(0, (num_documents, num_heads)).transpose(1, 2).flatten(2))
    return rectangles.leave(parts).view(1, num_tokens, num_heads, size)


def _on_cuda(qkv: QKV, packing: Packing, scaling: float | None, sliding_window: int | None) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # 1.5 s, which CPUs do without

    reach = -1 if sliding_window is None else sliding_window - 1
    size = qkv[0].shape[-1]
    qkv_THD: Any = [one[0].transpose(0, 1) for one in qkv]
    if num_missing := -size % _KERNEL_HEAD_UNIT:  # zeros change no product
        qkv_THD = [pad(one, (0, num_missing)) for one in qkv_THD]
    where: Any = (packing.offsets_B1, packing.offsets_B1, packing.max_length, packing.max_length)
    scale = size**-0.5 if scaling is None else scaling
    states_THD = varlen_attn(*qkv_THD, *where, scale=scale, window_size=(reach, reach), **_one_split(varlen_attn))
    assert isinstance(states_THD, torch.Tensor)  # with other options it is a pair
    return states_THD[None, ..., :size]


@cache
def _one_split(varlen_attn: Any) -> dict[str, Any]:
    """An option that keeps the kernel from adding up a document's keys in parts whose number other documents decide.

    Not every version of torch has it, and ROCm's kernel refuses it.
    """
    is_known = "num_splits" in inspect.signature(varlen_attn).parameters and torch.version.hip is None
    return {"num_splits": 1} if is_known else {}


def kernel_works(device: torch.device, dtype: torch.dtype, config: Any, *, with_gradients: bool = False) -> bool:
    """Whether the kernel gives about the states that fp32 gives without it; True on CPUs, which have no kernel.

    Builds of torch and GPUs differ in what the kernel supports. The model's `config` has the size of its heads.
    """
    if device.type != "cuda":
        return True
    generator = torch.Generator().manual_seed(0)
    lengths_B, num_heads = np.array([93, 9, 9, 3]), 4
    num_tokens = int(lengths_B.sum())
    offsets_B1 = torch.from_numpy(offsets(lengths_B)).to(device, torch.int32)
    packing = Packing(offsets_B1, 93, rectangles=Rectangles(lengths_B, num_tokens, device))
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, num_heads, num_tokens, int(head_size))
    qkv = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]

    def attended(attend: Any, dtype: torch.dtype, sliding_window: int | None) -> tuple[torch.Tensor, ...]:
        inputs = [one.to(device, dtype).requires_grad_(with_gradients) for one in qkv]
        states_1THD = attend(inputs, packing, None, sliding_window)
        gradients = torch.autograd.grad(states_1THD.square().sum(), inputs) if with_gradients else ()
        return states_1THD, *gradients

    for sliding_window in (None, 17):
        try:
            actual = attended(_on_cuda, dtype, sliding_window)
            expected = attended(_by_rectangles, torch.float32, sliding_window)
            pairs = zip(actual, expected, strict=True)
            difference = max(((one.float() - other).abs().max() / other.abs().max()).item() for one, other in pairs)
            fault = f"varlen_attn is off by {difference:.2g}" if difference > _KERNEL_TOLERANCE else ""
        except (TypeError, RuntimeError) as error:
            fault = f"{type(error).__name__}: {error}"
        if fault:
            _log.warning("batches will be padded: torch %s: %s", torch.__version__, fault)
            return False
    return True


def _is_near(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which tokens of a document see each other; None: all."""
    if sliding_window is None or length <= sliding_window:
        return None
    places_L = torch.arange(length, device=device)
    return (places_L[:, None] - places_L).abs() < sliding_window


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)
