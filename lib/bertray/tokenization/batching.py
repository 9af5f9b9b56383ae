"""Group sequences into batches with little or no padding.

    lengths_S [3, 120, 4, 118]  ->  batches [1, 3], [2, 0]: sequences of similar length share a batch

For inference a batch has a budget of tokens: `packed_batches` serves models that read sequences end to end,
`padded_batches` the others. In training it has a number of sequences: see `bertray.training.batches`.

Legend: S sequences, B sequences of a batch, B1 = B + 1, T tokens of a batch, L tokens of its longest sequence.
"""

from __future__ import annotations

import numpy as np

from bertray.tokenization.tokenizer import Sequences
from bertray.tokenization.windows import offsets, positions

# A padded batch that has used _ENOUGH of its budget ends before more than _MAX_PADDING of it is padding.
_ENOUGH, _MAX_PADDING = 0.25, 0.02


def packed_batches(lengths_S: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """The sequences of each batch, longest first: if the first batch fits into memory, all do.

    A batch holds at most `token_budget` tokens, or one sequence.
    """
    order = np.argsort(-lengths_S, kind="stable")
    ends = np.cumsum(lengths_S[order])
    batches, start, num_before = [], 0, 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, num_before + token_budget, side="right")))
        batches.append(order[start:stop])
        start, num_before = stop, int(ends[stop - 1])
    return batches


def padded_batches(lengths_S: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """The sequences of each batch, longest first.

    A batch holds at most `token_budget` tokens, padding included, or one sequence. It ends early where much shorter
    sequences follow.
    """
    order = np.argsort(-lengths_S, kind="stable")
    lengths = lengths_S[order]
    batches, start = [], 0
    while start < len(order):
        longest = int(lengths[start])
        held = lengths[start : start + max(1, token_budget // longest)]
        padded = longest * np.arange(1, len(held) + 1)
        is_dense = (padded - np.cumsum(held) <= _MAX_PADDING * padded) | (padded < _ENOUGH * token_budget)
        num_rows = len(held) if is_dense.all() else int(np.argmin(is_dense))
        batches.append(order[start : start + num_rows])
        start += num_rows
    return batches


def num_filler(num_tokens: int, unit: int = 8) -> int:
    """Tokens to append so that few different sizes remain: multiples of `unit`, at most 16 per power of two."""
    return -num_tokens % max(unit, 1 << max(0, num_tokens.bit_length() - 5))


def pack(tokens: Sequences, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the sequences `rows` end to end: input_ids_T, position_ids_T (from 0 in each) and offsets_B1 (all int64)."""
    lengths_B = tokens.lengths_S[rows]
    input_ids_T = tokens.ids_T[positions(tokens.offsets_S1[rows], lengths_B)].astype(np.int64)
    return input_ids_T, positions(np.zeros_like(lengths_B), lengths_B), offsets(lengths_B)


def equal_runs(offsets_B1: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(first token, number of sequences, tokens of each) of every run of packed sequences of equal length."""
    lengths_B = np.diff(offsets_B1)
    firsts = np.flatnonzero(np.diff(lengths_B, prepend=-1))
    counts = np.diff(firsts, append=len(lengths_B))
    return tuple(zip(*(one.tolist() for one in (offsets_B1[firsts], counts, lengths_B[firsts])), strict=True))


def pad(tokens: Sequences, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Pad the sequences `rows` to one length: input_ids_BL and attention_mask_BL (int64, 1 on tokens)."""
    lengths_B = tokens.lengths_S[rows]
    columns_L = np.arange(int(lengths_B.max()))
    mask_BL = columns_L < lengths_B[:, None]
    input_ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    input_ids_BL[mask_BL] = tokens.ids_T[(tokens.offsets_S1[rows][:, None] + columns_L)[mask_BL]]
    return input_ids_BL, mask_BL.astype(np.int64)
