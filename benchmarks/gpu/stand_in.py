"""A CPU in the place of a GPU, to try what runs there: all but the kernel, which plain operations replace.

It is as torch documents `varlen_attn`; what the kernel leaves undefined is NaN here.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import varlen

from bertray.model import attention


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Attention [T, H, D] within each sequence; tokens behind the last sequence get NaN."""
    places_T = torch.arange(len(query))
    documents_T = torch.searchsorted(cu_seq_q, places_T, right=True)
    is_seen_TT = documents_T[:, None] == documents_T
    if window_size[0] >= 0:
        is_seen_TT &= (places_T[:, None] - places_T).abs() <= window_size[0]
    is_filler_T11 = (documents_T == len(cu_seq_q))[:, None, None]
    read_HTD = (one.masked_fill(is_filler_T11, 0).transpose(0, 1) for one in (query, key, value))
    states_HTD = torch.nn.functional.scaled_dot_product_attention(*read_HTD, attn_mask=is_seen_TT, scale=scale)
    return states_HTD.transpose(0, 1).masked_fill(is_filler_T11, torch.nan)


def has_kernel(_: torch.device, dtype: torch.dtype) -> bool:
    """As on a GPU."""
    return dtype != torch.float32


def standing_in() -> list[Any]:
    """Patches, to be started or entered, that have states in 16 bits go through the kernel on CPUs."""
    return [patch.object(varlen, "varlen_attn", varlen_attn), patch.object(attention, "has_kernel", has_kernel)]
