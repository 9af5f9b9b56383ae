"""Hold rows out for validation and test: stratified by label, reproducible, groups undivided."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from bertray.errors import RequestError

# A held-out share is cut from at most this many folds of groups: 0.1 is one of 10, 0.15 three of 20.
_MAX_FOLDS = 20


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
        Positions of the staying and of the held-out rows, both ascending, and the classes with a single row, which
        cannot stand on both sides and therefore stay.

    Raises:
        RequestError: too few rows or groups for that fraction.
    """
    counts = Counter(labels)
    single = sorted(label for label, count in counts.items() if count == 1)
    divisible = np.array([row for row, label in enumerate(labels) if counts[label] > 1], dtype=np.int64)
    if groups is None:
        held_out = _stratified(labels, divisible, fraction, seed)
    else:
        held_out = _by_group(labels, groups, fraction, seed)
        single = []
    staying = np.setdiff1d(np.arange(len(labels)), held_out)
    return staying, np.sort(held_out), single


def _stratified(labels: list[str], rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
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
    share = Fraction(fraction).limit_denominator(_MAX_FOLDS)
    share = max(share, Fraction(1, _MAX_FOLDS))
    names = [f"row {row}" if group is None else f"group {group}" for row, group in enumerate(groups)]
    num_groups = len(set(names))
    if num_groups < share.denominator:
        raise RequestError(
            f"--group-column has {num_groups} distinct values; holding out {fraction:g} of the rows without dividing a "
            f"group needs at least {share.denominator}. Raise the fractions or give splits with --validation and --test"
        )
    folds = StratifiedGroupKFold(n_splits=share.denominator, shuffle=True, random_state=seed)
    parts = [held_out for _, held_out in folds.split(np.zeros(len(labels)), labels, names)]
    return np.concatenate(parts[: share.numerator])
