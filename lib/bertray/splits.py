"""Hold rows out for validation and test: stratified by label, reproducible, groups undivided."""

from __future__ import annotations

import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from bertray.errors import RequestError

# A held-out share is cut from at most this many folds of groups: 0.1 is one of 10, 0.15 three of 20, 0.02 one of 50.
_MAX_FOLDS = 50


def hold_out(
    labels: list[str], fraction: float, seed: int, groups: list[str | None] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Divide rows into those that stay and those held out.

    Args:
        labels: one a row.
        fraction: share of the rows to hold out, between 0 and 1.
        seed: same labels, groups, fraction and seed give the same rows.
        groups: one a row; rows of one group stay together, a null group is a group of its own.

    Returns:
        Positions of the staying and of the held-out rows, both ascending, and the classes without a held-out row:
        those of a single row, and others too small for their share to be one, or to divide by groups.

    Raises:
        RequestError: too few rows or groups for that fraction.
    """
    held_out = _stratified(labels, fraction, seed) if groups is None else _by_group(labels, groups, fraction, seed)
    staying = np.setdiff1d(np.arange(len(labels)), held_out)
    return staying, np.sort(held_out), sorted(set(labels) - {labels[row] for row in held_out})


def _stratified(labels: list[str], fraction: float, seed: int) -> np.ndarray:
    counts = Counter(labels)
    rows = np.array([row for row, label in enumerate(labels) if counts[label] > 1], dtype=np.int64)
    strata = [labels[row] for row in rows]
    try:
        _, held_out = train_test_split(rows, test_size=fraction, random_state=seed, stratify=strata)
    except ValueError as error:
        raise RequestError(
            f"{len(rows)} rows of {len(set(strata))} classes are too few to hold out {fraction:g} of them with every "
            f"class on both sides ({error}). Add rows, raise --validation-fraction and --test-fraction, or give "
            "splits of your own with --validation and --test"
        ) from error
    return np.asarray(held_out, dtype=np.int64)


def _by_group(labels: list[str], groups: list[str | None], fraction: float, seed: int) -> np.ndarray:
    names = [f"row {row}" if group is None else f"group {group}" for row, group in enumerate(groups)]
    num_groups = len(set(names))
    most_frequent = max(Counter(labels).values())
    # The closest share that can be cut; scikit-learn wants as many groups, and rows of some label, as folds.
    max_folds = max(2, min(_MAX_FOLDS, num_groups, most_frequent))
    share = Fraction(fraction).limit_denominator(max_folds)
    share = min(max(share, Fraction(1, max_folds)), Fraction(max_folds - 1, max_folds))
    if min(num_groups, most_frequent) < share.denominator or abs(share - fraction) > fraction / 2:
        raise RequestError(
            f"--group-column has {num_groups} distinct values, the most frequent label {most_frequent} rows; holding "
            f"out {fraction:.3g} of the rows without dividing a group needs some {round(1 / fraction)} of both. Choose "
            "larger fractions, add rows, or give splits of your own with --validation and --test"
        )
    folds = StratifiedGroupKFold(n_splits=share.denominator, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # handled by the caller
        parts = [held_out for _, held_out in folds.split(np.zeros(len(labels)), labels, names)]
    held_out = np.concatenate(parts[: share.numerator])
    # A label whose groups were all held out could not be learnt: they come back.
    staying_labels = {labels[row] for row in np.setdiff1d(np.arange(len(labels)), held_out)}
    returning = {names[row] for row in held_out if labels[row] not in staying_labels}
    return np.array([row for row in held_out if names[row] not in returning], dtype=np.int64)
