"""Attention over documents that lie end to end in one row, without a padded token.

`packed_attention` is registered with transformers' attention interface: a model switched to it attends within the
documents of a `Packing`, which travels through the model's keyword arguments. On CUDA, in 16 bits, that is one call
of torch's variable-length kernel. Elsewhere scoring calls SDPA for every run of documents of equal length, and training
puts documents of like length into rectangles and takes two matrix products: in bf16 on CPUs SDPA's own backward takes
2 to 8 times as long, up to 128 tokens.

In training no attention weight is dropped: the variable-length kernel cannot, and what a result is must not depend on
the device. (Dropout of the states, which BERT has beside it, is left as it is.)

Legend: B documents, B1 = B + 1, T tokens, H heads, A = B * H, D size of a head, E = H * D, L tokens of a document.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bertray.model.buckets import Rectangles
from bertray.tokenization.ragged import offsets

_log = logging.getLogger(__name__)

NAME = "bertray_packed"
# Of the largest state or gradient: 16 bits round by 0.004, and one token too many in a window makes 0.06.
_KERNEL_TOLERANCE = 0.02

_KERNEL_HEAD_UNIT = 8  # the kernel takes heads of multiples of it

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key and value, each [1, H, T, D]


@dataclass(frozen=True)
class Packing:
    """Where the documents of a packed row lie, and how they are attended: by CUDA's kernel if nothing else is given.

    Attributes:
        offsets_B1: document b holds the tokens offsets_B1[b] to offsets_B1[b + 1] (int32, on the model's device).
        max_length: tokens of the longest document.
        runs: (first token, number of documents, tokens of each) of every run of documents of equal length.
        rectangles: what gradients can pass; tokens may then follow that belong to no document.
    """

    offsets_B1: torch.Tensor
    max_length: int
    runs: tuple[tuple[int, int, int], ...] = ()
    rectangles: Rectangles | None = None


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the variable-length kernel takes these states."""
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
    """Attention within each document; the form is that of transformers' attention functions.

    Args:
        attention_mask: None: there is nothing to mask.
        sliding_window: tokens further apart than this less one do not see each other (ModernBERT's local layers).

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
    """Attention over rectangles of documents of like length; zeros for tokens that belong to no document."""
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
        # Keys before queries: softmax over the keys then runs along the queries, which is faster, its backward more so.
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
    from torch.nn.attention.varlen import varlen_attn  # 1.5 s of imports, which CPUs need not take

    reach = -1 if sliding_window is None else sliding_window - 1
    query_THD, key_THD, value_THD = (one[0].transpose(0, 1) for one in qkv)
    size = query_THD.shape[-1]
    if num_missing := -size % _KERNEL_HEAD_UNIT:  # zeros change no product
        query_THD, key_THD, value_THD = (
            torch.nn.functional.pad(one, (0, num_missing)) for one in (query_THD, key_THD, value_THD)
        )
    states_THD = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        packing.offsets_B1,
        packing.offsets_B1,
        packing.max_length,
        packing.max_length,
        scale=size**-0.5 if scaling is None else scaling,
        window_size=(reach, reach),
    )
    assert isinstance(states_THD, torch.Tensor)  # a pair where more is asked for
    return states_THD[None, ..., :size]


def kernel_works(device: torch.device, dtype: torch.dtype, config: Any, *, with_gradients: bool = False) -> bool:
    """Whether attention in this precision gives there what it gives in fp32 without the kernel; on CPUs it has none.

    Builds of torch differ in what the variable-length kernel takes, and GPUs in which kernels they have.

    Args:
        config: of the model, for the size of its heads.
    """
    if device.type != "cuda":
        return True
    generator = torch.Generator().manual_seed(0)
    lengths_B, num_heads, head_size = np.array([93, 9, 9, 3]), 4, _head_size(config)
    num_tokens = int(lengths_B.sum())
    rectangles = Rectangles(lengths_B, num_tokens, device)
    packing = Packing(torch.from_numpy(offsets(lengths_B)).to(device, torch.int32), 93, rectangles=rectangles)
    shape = (1, num_heads, num_tokens, head_size)
    qkv = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]

    def attended(attend: Any, dtype: torch.dtype, sliding_window: int | None) -> tuple[torch.Tensor, ...]:
        inputs = [one.to(device, dtype).requires_grad_(with_gradients) for one in qkv]
        states_1THD = attend(inputs, packing, None, sliding_window)
        gradients = torch.autograd.grad(states_1THD.square().sum(), inputs) if with_gradients else ()
        return states_1THD, *gradients

    for sliding_window in (None, 17):
        try:
            actual = attended(_on_cuda, dtype, sliding_window)
        except (TypeError, RuntimeError) as error:
            _log.warning("batches will be padded: torch %s: %s: %s", torch.__version__, type(error).__name__, error)
            return False
        expected = attended(_by_rectangles, torch.float32, sliding_window)
        difference = max(
            ((one.float() - other).abs().max() / other.abs().max()).item()
            for one, other in zip(actual, expected, strict=True)
        )
        if difference > _KERNEL_TOLERANCE:
            _log.warning("batches will be padded: torch %s: varlen_attn is off by %.2g", torch.__version__, difference)
            return False
    return True


def _head_size(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _is_near(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which tokens of a document see each other; None where all do."""
    if sliding_window is None or length <= sliding_window:
        return None
    places_L = torch.arange(length, device=device)
    return (places_L[:, None] - places_L).abs() < sliding_window


def _no_mask(*_: Any, **__: Any) -> None:
    return None


ALL_ATTENTION_FUNCTIONS.register(NAME, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _no_mask)
