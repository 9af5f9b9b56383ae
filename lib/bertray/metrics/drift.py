"""How far counts and means have moved between two sets of rows, beyond what chance moves them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import chdtri

# One comparison in so many is taken to be moved though it is not, at a limit of 0.
_CHANCE = 1e-4


# A variance below it is none.
_ROUNDING = 1e-12


def js_distance(before: Sequence[int], now: Sequence[int]) -> float:
    """Jensen-Shannon distance of two counts over the same categories, beyond what chance makes of equal ones.

    To second order the divergence is, in nats, 1/8 of the sum of (p - q)² / p. For samples of n and m rows over k
    categories of one distribution that sum, over (1/n + 1/m), is chi-squared of k - 1 degrees of freedom.
    """
    p, q = (np.asarray(counts, dtype=np.float64) for counts in (before, now))
    num_categories = int(((p + q) > 0).sum())
    chance = _chance(num_categories - 1) / 8 * (1 / p.sum() + 1 / q.sum()) / math.log(2)
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    divergence = sum(float((one[one > 0] * np.log2(one[one > 0] / middle[one > 0])).sum()) / 2 for one in (p, q))
    return math.sqrt(max(0.0, divergence - chance))


def mean_change(before: tuple[float, float], now: tuple[float, float], num_rows: int, num_rows_now: int) -> float:
    """How far a mean moved, in standard deviations, beyond what chance moves it; 2 at most.

    The deviation is that of both sets together, in equal shares: rows that are all alike have none of their own.

    Args:
        before, now: mean and standard deviation.
    """
    change = abs(now[0] - before[0])
    variance = (before[1] ** 2 + now[1] ** 2) / 2 + change**2 / 4
    if variance < _ROUNDING:
        return 0.0
    return math.sqrt(max(0.0, change**2 / variance - _chance(1) * (1 / num_rows + 1 / num_rows_now)))


def _chance(degrees_of_freedom: int) -> float:
    """What chi-squared exceeds by chance so rarely that a nightly job does not see it in ten years."""
    return float(chdtri(degrees_of_freedom, _CHANCE)) if degrees_of_freedom else 0.0
