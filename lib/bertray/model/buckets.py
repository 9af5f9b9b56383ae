"""Put sequences of similar length into rectangles of few different sizes, for attention in training.

    lengths_B [5, 6, 40], tokens_T  ->  2 rows of 8 places, 1 row of 40: 56 places for 51 tokens

oneDNN makes kernels for every shape of a matrix product, which takes milliseconds, and keeps 1,024 of them. Few
different sizes let it reuse them. States are moved by index, once in and once out.

Legend: B sequences, T tokens of the batch, P places of all rectangles, N and M rows, E size of a state.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bertray.model.runtime import put
from bertray.tokenization.batching import num_filler
from bertray.tokenization.windows import offsets, positions

# Sequences share a rectangle while longest <= _SLACK_TOKENS + _SLACK_FACTOR * shortest.
_SLACK_TOKENS, _SLACK_FACTOR = 8, 1.25
_ROUNDED_TO = 4


class Rectangles:
    """Where the tokens of a packed batch lie in rectangles.

    Args:
        lengths_B: tokens of each sequence; those of similar length stand together.
        num_tokens: of the batch; tokens after the last sequence enter no rectangle.

    Attributes:
        sizes: (sequences, places for each) of every rectangle.
        is_hidden: for each rectangle [sequences, key, query]: an empty key for a token's query (an empty place sees
            everything, because softmax needs a key). None: the rectangle has no empty place.
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
            # Made on the device, because it is quadratic in the places.
            is_empty.view(size)[:, :, None] & ~is_empty.view(size)[:, None] if has_empty else None
            for is_empty, size, has_empty in zip(parts, self.sizes, has_empty_R, strict=True)
        ]

    def enter(self, states_TE: torch.Tensor) -> list[torch.Tensor]:
        """The states of each rectangle, [sequences, places, E]; zeros at empty places."""
        states_PE = _Taken.apply(states_TE, self._tokens_P, self._places_T)
        parts = states_PE.split([num_rows * width for num_rows, width in self.sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.sizes, strict=True)]

    def leave(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """states_TE from the rectangles' states; zeros for tokens that are in no rectangle."""
        flat = [part.flatten(0, 1) for part in parts]
        states_PE = flat[0] if len(flat) == 1 else torch.cat(flat)
        states_TE: torch.Tensor = _Taken.apply(states_PE, self._places_T, self._tokens_P)
        return states_TE


class _Rows:
    """Rows to take; -1 gives zeros."""

    def __init__(self, rows_M: np.ndarray, device: torch.device) -> None:
        self._rows_M, self._none = put(rows_M.clip(min=0), device), put(np.flatnonzero(rows_M < 0), device)

    def of(self, states_NE: torch.Tensor) -> torch.Tensor:
        states_ME = states_NE.index_select(0, self._rows_M)
        return states_ME.index_fill_(0, self._none, 0) if len(self._none) else states_ME


class _Taken(torch.autograd.Function):
    """Rows of states, each at most once, so that backward can take rows too; index_select's adds them up one by one."""

    @staticmethod
    def forward(ctx: Any, states_NE: torch.Tensor, there: _Rows, back: _Rows) -> torch.Tensor:
        ctx.back = back
        return there.of(states_NE)

    @staticmethod
    def backward(ctx: Any, gradient_ME: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back.of(gradient_ME), None, None
