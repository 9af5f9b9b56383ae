"""How near predicted numbers are to true ones, and intervals around them.

A correlation is 0 where either side is all one number, and r2 where the true ones are.

Legend: N rows, B bins of predicted values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# A bin of fewer validation rows would give an interval that other rows of the archive do not bear out.
_LEAST_ROWS_OF_BIN, _MAX_BINS = 100, 10


class ValueErrors:
    """Metrics of rows that count several times or not at all, for a bootstrap; all values are finite.

    Ranks are those among all rows, however often they count.
    """

    def __init__(self, true_N: np.ndarray, predicted_N: np.ndarray) -> None:
        from scipy.stats import rankdata  # half a second, which every command would take

        both = np.asarray(true_N, np.float64), np.asarray(predicted_N, np.float64)
        self._error_N, self._columns_4N = both[1] - both[0], np.stack([*both, *map(rankdata, both)])

    def metrics(self, times_N: np.ndarray | None = None) -> dict[str, float]:
        """Mean absolute error, root of the mean squared error, r2, Pearson's and Spearman's correlation.

        Args:
            times_N: how often each row counts; None: once.
        """
        if not (len(self._error_N) if times_N is None else times_N.sum()):
            return dict.fromkeys(("mae", "rmse", "r2", "pearson", "spearman"), 0.0)
        covariance_44 = np.cov(self._columns_4N, aweights=times_N, ddof=0)

        def correlation(one: int, other: int) -> float:
            product = covariance_44[one, one] * covariance_44[other, other]
            return float(covariance_44[one, other] / math.sqrt(product)) if product > 0 else 0.0

        square_error, variance = float(np.average(self._error_N**2, weights=times_N)), float(covariance_44[0, 0])
        return {
            "mae": float(np.average(np.abs(self._error_N), weights=times_N)),
            "rmse": math.sqrt(square_error),
            "r2": 1 - square_error / variance if variance > 0 else 0.0,
            "pearson": correlation(0, 1),
            "spearman": correlation(2, 3),
        }


def conformal(
    predicted_N: np.ndarray, true_N: np.ndarray, coverage: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Intervals that hold a share `coverage` of true values, by the errors on rows that were not trained on.

    Split conformal prediction (Lei et al. 2018, https://arxiv.org/abs/1604.04173, algorithm 2) in each of up to 10 bins
    of the predicted value, of 100 rows or more (Mondrian: Vovk et al. 2005, Algorithmic Learning in a Random World,
    4.5): errors are often larger in the middle of a scale than at its ends.

    Returns:
        The edges between the B bins, and half the width of the interval in each; none of both if there are too few rows
        for any.
    """
    needed = math.ceil(coverage / (1 - coverage) - 1e-9)  # rows that can promise it
    if len(true_N) < needed:
        return (), ()
    num_bins = max(1, min(_MAX_BINS, len(true_N) // max(needed, _LEAST_ROWS_OF_BIN)))
    edges, first, sorted_N = list[float](), 0, np.sort(predicted_N)
    for edge in np.quantile(predicted_N, np.arange(1, num_bins) / num_bins).tolist():
        below = int(np.searchsorted(sorted_N, edge))
        if min(below - first, len(sorted_N) - below) >= needed:  # not where many predictions are the same
            edges, first = [*edges, edge], below
    bin_N = np.digitize(predicted_N, edges)
    halves = []
    for number in range(len(edges) + 1):
        errors = np.sort(np.abs(true_N - predicted_N)[bin_N == number])
        halves.append(float(errors[math.ceil((len(errors) + 1) * coverage - 1e-9) - 1]))
    return tuple(edges), tuple(halves)


def spelt(number: float) -> str:
    """A number as people write it, with all of its digits."""
    return repr(number).removesuffix(".0")


def class_metrics(
    true_N: np.ndarray, predicted_N: np.ndarray, cuts: Sequence[float], labels: tuple[str, ...]
) -> dict[str, Any]:
    """Metrics of ordered classes: `classification.full_metrics`, quadratic kappa, and F1 of being above each cut.

    Args:
        true_N, predicted_N: positions in `labels`.

    Returns:
        Cohen's kappa with quadratic weights is Cohen 1968, Psychological Bulletin 70; 1 where both sides have one class
        and the same.
    """
    from sklearn.metrics import cohen_kappa_score, f1_score

    from bertray.metrics.classification import full_metrics

    kappa = 1.0
    if len(np.union1d(true_N, predicted_N)) > 1:
        kappa = float(cohen_kappa_score(true_N, predicted_N, weights="quadratic", labels=np.arange(len(labels))))
    return {
        **full_metrics(true_N, predicted_N, labels),
        "quadratic_kappa": kappa,
        "f1_at_cuts": {
            spelt(cut): float(f1_score(true_N > number, predicted_N > number, zero_division=0))
            for number, cut in enumerate(cuts)
        },
    }
