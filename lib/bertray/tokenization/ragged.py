"""Pieces of unequal length laid end to end in one array: values and the offsets between which each piece lies.

[[5, 6], [], [7]]  ->  values [5, 6, 7], offsets [0, 2, 2, 3]
"""

from __future__ import annotations

from typing import Any

import numpy as np


def offsets(lengths: Any) -> np.ndarray:
    """Where pieces of these lengths begin when laid end to end, and where the last one ends (int64)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def positions(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions start, start + 1, …, start + length - 1 of every piece, end to end (int64)."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)
