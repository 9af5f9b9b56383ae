"""Sequences of like length side by side in rectangles of few different sizes, for attention in training.

    lengths_B [5, 6, 40], tokens_T  ->  2 rows of 8 places, 1 row of 40: 56 places for 51 tokens

oneDNN makes its kernels for every shape of a matrix product, which takes milliseconds, and keeps 1,024 of them: sizes
come from few numbers, so that kernels are found again. States enter and leave by index, once each way.

Legend: B sequences, T tokens of the batch, P places of all rectangles, N and M rows, E size of a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bertray.model.runtime import put
from bertray.tokenization.batching import num_filler
from bertray.tokenization.ragged import offsets, positions

# Sequences share a rectangle while the longest has at most this many tokens, plus this many for each of the shortest's.
_SLACK_TOKENS, _SLACK_FACTOR = 8, 1.25
_ROUNDED_TO = 4


class Rectangles:
    """Where the tokens of a packed batch lie in rectangles.

    Args:
        lengths_B: tokens of each sequence; those of like length stand together.
        num_tokens: of the batch; those beyond the sequences' own stand behind them and enter no rectangle.
        device: where the states are.

    Attributes:
        sizes: (sequences, places for each) of every rectangle.
        is_hidden: of each rectangle, [sequences, key, query], places without a token, which tokens do not see (places
            without a token do: they must see something); None where every place has a token.
    """

    def __init__(self, lengths_B: np.ndarray, num_tokens: int, device: torch.device) -> None:
        starts, shortest, longest = [0], lengths_B[0], lengths_B[0]
        for row, length in enumerate(lengths_B):
            shortest, longest = min(shortest, length), max(longest, length)
            if longest > _SLACK_TOKENS + _SLACK_FACTOR * shortest:
                starts.append(row)
                shortest = longest = length
        counts_R = np.diff(starts, append=len(lengths_B))
        widths_R = np.maximum.reduceat(lengths_B, starts)
        widths_R += np.array([num_filler(int(width), _ROUNDED_TO) for width in widths_R])
        self.sizes = list(zip(counts_R.tolist(), widths_R.tolist(), strict=True))

        widths_B = np.repeat(widths_R, counts_R)
        places = positions(offsets(widths_B)[:-1], lengths_B)
        places_T, tokens_P = np.full(num_tokens, -1), np.full(int(widths_B.sum()), -1)
        places_T[: len(places)] = places
        tokens_P[places] = np.arange(len(places))
        self._places_T, self._tokens_P = _Rows(places_T, device), _Rows(tokens_P, device)
        is_empty_P, places_R = tokens_P < 0, counts_R * widths_R
        has_empty_R = np.logical_or.reduceat(is_empty_P, offsets(places_R)[:-1])
        parts = put(is_empty_P, device).split(places_R.tolist())
        self.is_hidden = [
            # On the device: it is quadratic in the places.
            is_empty.view(size)[:, :, None] & ~is_empty.view(size)[:, None] if has_empty else None
            for is_empty, size, has_empty in zip(parts, self.sizes, has_empty_R, strict=True)
        ]

    def enter(self, states_TE: torch.Tensor) -> list[torch.Tensor]:
        """The states at their places, zeros at the others, of each rectangle: [sequences, places, E]."""
        states_PE = _Taken.apply(states_TE, self._tokens_P, self._places_T)
        parts = states_PE.split([num_rows * width for num_rows, width in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def leave(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """states_TE of the rectangles' tokens; zeros for those that are in none."""
        flat = [part.flatten(0, 1) for part in parts]
        states_PE = flat[0] if len(flat) == 1 else torch.cat(flat)
        states_TE: torch.Tensor = _Taken.apply(states_PE, self._places_T, self._tokens_P)
        return states_TE


class _Rows:
    """Which rows to take; -1: zeros."""

    def __init__(self, rows_M: np.ndarray, device: torch.device) -> None:
        self._rows_M, self._none = put(rows_M.clip(min=0), device), put(np.flatnonzero(rows_M < 0), device)

    def of(self, states_NE: torch.Tensor) -> torch.Tensor:
        states_ME = states_NE.index_select(0, self._rows_M)
        return states_ME.index_fill_(0, self._none, 0) if len(self._none) else states_ME


class _Taken(torch.autograd.Function):
    """Rows of states, none of them twice: the gradient takes them back, where index_select's own adds up row by row."""

    @staticmethod
    def forward(ctx: Any, states_NE: torch.Tensor, there: _Rows, back: _Rows) -> torch.Tensor:
        ctx.back = back
        return there.of(states_NE)

    @staticmethod
    def backward(ctx: Any, gradient_ME: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back.of(gradient_ME), None, None
