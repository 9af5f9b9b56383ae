"""Sequences become batches with little or no padding.

    lengths_S [3, 120, 4, 118]  ->  batches [1, 3], [2, 0]: sequences of like length share a batch

For inference a batch is a budget of tokens: `packed_batches` for models that read sequences end to end,
`padded_batches` for the others. For training it is a number of sequences: `bertray.training.batches`.

Legend: S sequences, B sequences of a batch, B1 = B + 1, T tokens of a batch, L tokens of its longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bertray.tokenization.ragged import offsets, positions
from bertray.tokenization.tokenizer import Sequences

# A padded batch that has this share of its budget ends before it would hold more than this share of padding.
_ENOUGH, _MAX_PADDING = 0.25, 0.02


def packed_batches(lengths_S: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Sequences of each batch, longest first, so that memory is known to suffice after the first batch.

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
    """Sequences of each batch, longest first.

    A batch holds at most `token_budget` tokens, padding included, or one sequence; it is cut shorter where sequences of
    much smaller length begin.
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


@dataclass(frozen=True)
class PackedBatch:
    """Sequences end to end: input_ids_T, position_ids_T (int64, from 0 in each), offsets_B1 (int64)."""

    input_ids_T: np.ndarray
    position_ids_T: np.ndarray
    offsets_B1: np.ndarray

    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, number of sequences, tokens of each) of every run of sequences of equal length."""
        lengths_B = np.diff(self.offsets_B1)
        firsts = np.flatnonzero(np.diff(lengths_B, prepend=-1))
        counts = np.diff(firsts, append=len(lengths_B))
        return tuple(
            (int(self.offsets_B1[first]), int(count), int(lengths_B[first]))
            for first, count in zip(firsts, counts, strict=True)
        )


def in_few_shapes(batch: PackedBatch, pad_id: int) -> PackedBatch:
    """The batch with filler: powers of two of tokens, and of sequences, of which those added hold no token."""
    num_tokens, num_sequences = len(batch.input_ids_T), len(batch.offsets_B1) - 1
    filler = (0, power_of_two(num_tokens) - num_tokens)
    return PackedBatch(
        np.pad(batch.input_ids_T, filler, constant_values=pad_id),
        np.pad(batch.position_ids_T, filler),
        np.pad(batch.offsets_B1, (0, power_of_two(num_sequences) - num_sequences), mode="edge"),
    )


def power_of_two(number: int) -> int:
    """The least that is not below a number from 1."""
    return 1 << (number - 1).bit_length()


def num_filler(num_tokens: int, unit: int = 8) -> int:
    """Tokens to append so that few different numbers are left: multiples of `unit`, at most 16 for every doubling."""
    return -num_tokens % max(unit, 1 << max(0, num_tokens.bit_length() - 5))


def pack(tokens: Sequences, rows: np.ndarray) -> PackedBatch:
    """One batch as sequences end to end, in the order of `rows`."""
    lengths_B = tokens.lengths_S[rows]
    return PackedBatch(
        tokens.ids_T[positions(tokens.offsets_S1[rows], lengths_B)].astype(np.int64),
        positions(np.zeros_like(lengths_B), lengths_B),
        offsets(lengths_B),
    )


def pad(tokens: Sequences, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """One batch as rectangles: input_ids_BL (int64) and attention_mask_BL (int64, 1 on tokens)."""
    lengths_B = tokens.lengths_S[rows]
    starts_B = tokens.offsets_S1[rows]
    columns_L = np.arange(int(lengths_B.max()))
    mask_BL = columns_L < lengths_B[:, None]
    input_ids_BL = np.full(mask_BL.shape, pad_id, dtype=np.int64)
    input_ids_BL[mask_BL] = tokens.ids_T[(starts_B[:, None] + columns_L)[mask_BL]]
    return input_ids_BL, mask_BL.astype(np.int64)
