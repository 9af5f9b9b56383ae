"""Attention over documents that lie end to end in one row, without a padded token.

`packed_attention` is registered with transformers' attention interface: a model switched to it attends within the
documents of a `Packing`, which travels through the model's keyword arguments. On CUDA, in 16 bits, that is one call
of torch's variable-length kernel; on a CPU one call of SDPA for every run of documents of equal length.

Legend: B documents, B1 = B + 1, T tokens, H heads, D size of a head, L tokens of a document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "bertray_packed"


@dataclass(frozen=True)
class Packing:
    """Where the documents of a packed row lie.

    Attributes:
        offsets_B1: document b holds the tokens offsets_B1[b] to offsets_B1[b + 1] (int32, on the model's device).
        runs: (first token, number of documents, tokens of each) of every run of documents of equal length.
        max_length: tokens of the longest document.
    """

    offsets_B1: torch.Tensor
    runs: tuple[tuple[int, int, int], ...]
    max_length: int


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
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
    if query_1HTD.is_cuda and query_1HTD.dtype != torch.float32:  # which the kernel does not take
        return _on_cuda(query_1HTD, key_1HTD, value_1HTD, packing, scaling, sliding_window), None
    states_1THD = torch.empty_like(query_1HTD.transpose(1, 2), memory_format=torch.contiguous_format)
    for first, num_documents, length in packing.runs:
        span = slice(first, first + num_documents * length)
        query_BHLD, key_BHLD, value_BHLD = (
            one[0, :, span].transpose(0, 1).unflatten(0, (num_documents, length)).transpose(1, 2)
            for one in (query_1HTD, key_1HTD, value_1HTD)
        )
        is_near_LL = _is_near(length, sliding_window, query_1HTD.device)
        states_BHLD = scaled_dot_product_attention(
            query_BHLD, key_BHLD, value_BHLD, attn_mask=is_near_LL, dropout_p=dropout, scale=scaling
        )
        states_1THD[0, span].unflatten(0, (num_documents, length)).copy_(states_BHLD.transpose(1, 2))
    return states_1THD, None


def _on_cuda(
    query_1HTD: torch.Tensor,
    key_1HTD: torch.Tensor,
    value_1HTD: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn  # needs a build of torch with CUDA

    reach = -1 if sliding_window is None else sliding_window - 1
    states_THD = varlen_attn(
        query_1HTD[0].transpose(0, 1),
        key_1HTD[0].transpose(0, 1),
        value_1HTD[0].transpose(0, 1),
        packing.offsets_B1,
        packing.offsets_B1,
        packing.max_length,
        packing.max_length,
        scale=scaling,
        window_size=(reach, reach),
    )
    assert isinstance(states_THD, torch.Tensor)  # a pair where more is asked for
    return states_THD[None]


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
