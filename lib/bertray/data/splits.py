"""Hold rows out, or divide them into folds: stratified by label, reproducible, groups undivided.

Legend: N rows; S sides; U units, which are not divided: a group, or a row without one; K columns: the labels and, last,
one that counts rows.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
from scipy.sparse import csc_array, csr_array, hstack

from bertray.errors import RequestError, listed

# Moves end after one to four passes over real labels; a smaller gain is rounding.
_MAX_PASSES, _LEAST_GAIN = 10, 1e-9
# Of the wanted rows: if stratification is further off, rows are drawn as well.
_NEAR_ENOUGH = 0.1


def hold_out(
    labels: list[str] | list[list[str]], fraction: float, seed: int, groups: list[str | None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows into those that stay and those held out; each label is divided by the fraction as far as possible.

    If most labels are too small for that, rows are drawn at random from as many labels as possible.

    Args:
        labels: one a row, or a list of them a row, without repeats; rows with an empty list are divided too.
        fraction: share of the rows to hold out, between 0 and 1.
        seed: the same labels, groups, fraction and seed give the same rows.
        groups: one a row; rows of one group stay together, a null group is a group of its own.

    Returns:
        Positions of the staying and of the held-out rows, both ascending. Every label has a staying row.

    Raises:
        RequestError: too few rows or groups for that fraction.
    """
    single_labels = [of_row for of_row in labels if isinstance(of_row, str)]
    held_out = _stratified(single_labels, fraction, seed) if groups is None and single_labels else None
    if held_out is None:
        held_out = _stratified_by_units(_label_sets(labels), fraction, seed, groups)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def folds(labels: list[str] | list[list[str]], num_folds: int, seed: int, groups: list[str]) -> np.ndarray:
    """Divide rows into folds; each has its share of every label as nearly as the groups allow. Deterministic.

    Args:
        labels: as for `hold_out`.
        groups: one a row; rows of one group stay together.

    Returns:
        The fold of every row, int64 [N]. If each row has one label, every fold has a row of every label.

    Raises:
        RequestError: a label is in fewer groups than there are folds.
    """
    labels_K, counts_UK, units_N = _count_by_unit(_label_sets(labels), groups)
    num_units_K = (counts_UK > 0).sum(axis=0).tolist()
    too_few = {label: num for label, num in zip(labels_K, num_units_K, strict=True) if label and num < num_folds}
    if too_few:
        named = listed((f"{label!r} ({num})" for label, num in too_few.items()), 5)
        lower = f"Lower --folds to {fewest}, add rows" if (fewest := min(too_few.values())) > 1 else "Add rows"
        raise RequestError(
            f"--folds {num_folds} needs {num_folds} different texts of every label; fewer have {named}. "
            f"{lower}, merge these labels with others, or prepare a data set without them"
        )
    fold_U = _stratified_iteratively(counts_UK, [1 / num_folds] * num_folds, np.random.default_rng(seed))
    return np.asarray(fold_U[units_N])


def _label_sets(labels: list[str] | list[list[str]]) -> list[list[str]]:
    return [[of_row] if isinstance(of_row, str) else of_row for of_row in labels]


def _stratified(labels: list[str], fraction: float, seed: int) -> np.ndarray | None:
    """Held-out rows (ascending), by scikit-learn; a class with a single row stays. None: not a row for every class."""
    from sklearn.model_selection import train_test_split  # a second: a request is refused before

    counts = Counter(labels)
    rows = np.array([row for row, label in enumerate(labels) if counts[label] > 1], dtype=np.int64)
    strata = [labels[row] for row in rows]
    try:
        staying, held_out = train_test_split(rows, test_size=fraction, random_state=seed, stratify=strata)
    except ValueError:
        return None
    # A large fraction may hold out all rows of a small class: one of them returns, to be learnt from.
    staying_labels = {labels[row] for row in staying}
    returning = {labels[row]: row for row in held_out if labels[row] not in staying_labels}
    return np.setdiff1d(held_out, list(returning.values())).astype(np.int64)


def _stratified_by_units(
    label_sets: list[list[str]], fraction: float, seed: int, groups: list[str | None] | None
) -> np.ndarray:
    """Held-out rows (ascending), with groups or several labels a row."""
    num_rows = len(label_sets)
    names = [
        f"row {row}" if group is None else f"group {group}" for row, group in enumerate(groups or [None] * num_rows)
    ]
    labels_K, counts_UK, units_N = _count_by_unit(label_sets, names)

    rng = np.random.default_rng(seed)
    held_out_U = _stratified_iteratively(counts_UK, [1 - fraction, fraction], rng) == 1
    _move_to_nearer_shares(counts_UK, held_out_U, fraction, rng)
    _return_lost_labels(counts_UK, held_out_U)

    wanted, num_held_out = fraction * num_rows, np.count_nonzero(held_out_U[units_N])
    off = abs(num_held_out - wanted)
    if not num_held_out or off > max(1, _NEAR_ENOUGH * wanted):
        drawn_U = _drawn(counts_UK, fraction, rng)
        is_far = not num_held_out or off > max(1, wanted / 2)
        if drawn_U.any() and (is_far or abs(np.count_nonzero(drawn_U[units_N]) - wanted) < off):
            held_out_U = drawn_U
        elif is_far:
            rows = f"{num_rows} rows" if groups is None else f"{num_rows} rows in {len(held_out_U)} groups"
            raise RequestError(
                f"{rows} with {len(set(labels_K) - {''})} labels are too few to hold out {fraction:.3g} of them with "
                f"every label left to train on: the nearest is {num_held_out} rows. Add rows, raise "
                "--validation-fraction and --test-fraction, or give splits of your own with --validation and --test"
            )
    return np.flatnonzero(held_out_U[units_N])


def _count_by_unit(label_sets: list[list[str]], names: list[str]) -> tuple[list[str], csr_array, np.ndarray]:
    """The K columns' labels, counts_UK of the rows, and the unit of every row, given the name of each row's unit.

    Rows without a label get the label "", so that they are divided like others. The last column is called "" too.
    """
    from sklearn.preprocessing import MultiLabelBinarizer

    binarizer = MultiLabelBinarizer(sparse_output=True)
    labels_NC = binarizer.fit_transform([labels or [""] for labels in label_sets])
    counts_NK = hstack([labels_NC, np.ones((len(names), 1))], format="csr", dtype=np.int64)
    # Not numpy.unique: it makes each name as wide as the longest one.
    units_N, names_U = pd.factorize(np.array(names, dtype=object), sort=True)
    in_unit = (np.ones(len(names), np.int64), (units_N, np.arange(len(names))))
    counts_UK = csr_array(in_unit, shape=(len(names_U), len(names))) @ csr_array(counts_NK)
    return [*binarizer.classes_.tolist(), ""], counts_UK, units_N


def _stratified_iteratively(counts_UK: csr_array, fractions: list[float], rng: np.random.Generator) -> np.ndarray:
    """The side of every unit (int64 [U]), assigned label by label; each side gets its fraction of the rows.

    Iterative stratification: Sechidis, Tsoumakas and Vlahavas, "On the Stratification of Multi-Label Data", ECML PKDD
    2011, algorithm 1, with units instead of rows. The rarest label comes first, while there is a choice; each of its
    units goes to the side that lacks most rows of the label, then most rows in all, then to the first.
    """
    remaining_K = counts_UK.sum(axis=0)
    lacking_SK = np.outer(fractions, remaining_K)
    order_U = rng.permutation(counts_UK.shape[0])
    by_label = counts_UK[order_U].tocsc()
    side_U = np.full(len(order_U), -1)
    while remaining_K.any():
        label = int(np.argmin(np.where(remaining_K > 0, remaining_K, np.inf)))
        for unit in order_U[_entries(by_label, label)[0]]:
            if side_U[unit] >= 0:
                continue
            lacking = lacking_SK[:, [label, -1]].tolist()
            side_U[unit] = side = lacking.index(max(lacking))
            labels, counts = _entries(counts_UK, unit)
            lacking_SK[side, labels] -= counts
            remaining_K[labels] -= counts
    return side_U


def _move_to_nearer_shares(
    counts_UK: csr_array, held_out_U: np.ndarray, fraction: float, rng: np.random.Generator
) -> None:
    """Move units, one at a time and in place, while that lowers the sum over K of (held out - wanted)² / rows.

    Stratification looks at one label of a unit and leaves the frequent labels to chance if groups have all labels:
    14,219 rows of goemotions' `neutral` in groups of 7 were 87 rows from a tenth, afterwards 2.
    """
    total_K = counts_UK.sum(axis=0)
    surplus_K = held_out_U @ counts_UK - fraction * total_K
    for _ in range(_MAX_PASSES):
        num_moved = 0
        for unit in rng.permutation(len(held_out_U)):
            labels, counts = _entries(counts_UK, unit)
            change = -counts if held_out_U[unit] else counts
            if np.sum(change * (2 * surplus_K[labels] + change) / total_K[labels]) < -_LEAST_GAIN:
                surplus_K[labels] += change
                held_out_U[unit] = not held_out_U[unit]
                num_moved += 1
        if not num_moved:
            return


def _return_lost_labels(counts_UK: csr_array, held_out_U: np.ndarray) -> None:
    """Return, in place, the smallest unit of each label that was held out whole: it could not be learnt."""
    by_label = counts_UK.tocsc()
    num_rows_U = counts_UK[:, [-1]].toarray().ravel()
    for label in np.flatnonzero(~held_out_U @ counts_UK == 0).tolist():
        units, _ = _entries(by_label, label)
        # A unit that returned for another label may have this one; without any row there is no unit.
        if len(units) and held_out_U[units].all():
            held_out_U[units[np.argmin(num_rows_U[units])]] = False


def _drawn(counts_UK: csr_array, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Units to hold out (bool [U]), drawn at random, first of labels that have none; every label keeps a unit.

    The fraction is of the rows that can leave. None is held out if a unit is larger than 1.5 times of that.
    """
    num_staying_K = (counts_UK > 0).sum(axis=0)[:-1]
    has_held_out_K = np.zeros(len(num_staying_K), dtype=bool)
    by_label = counts_UK[:, :-1].tocsr()
    labels_of = [_entries(by_label, unit)[0] for unit in range(by_label.shape[0])]
    num_rows_U = counts_UK[:, [-1]].toarray().ravel()
    can_leave_U = np.array([(num_staying_K[labels] > 1).all() for labels in labels_of], dtype=bool)
    num_wanted, num_held_out = round(fraction * num_rows_U[can_leave_U].sum()), 0
    held_out_U = np.zeros(len(labels_of), dtype=bool)
    order = rng.permutation(np.flatnonzero(can_leave_U))
    for may_repeat in (False, True):
        for unit in order[~held_out_U[order]].tolist():
            labels, num_after = labels_of[unit], num_held_out + num_rows_U[unit]
            is_new = not has_held_out_K[labels].any()
            has_room = num_held_out < num_wanted and num_after <= 1.5 * num_wanted
            if has_room and (is_new or may_repeat) and (num_staying_K[labels] > 1).all():
                held_out_U[unit], num_held_out, has_held_out_K[labels] = True, num_after, True
                num_staying_K[labels] -= 1
    return held_out_U


def _entries(counts: csr_array | csc_array, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of the nonzero entries of a row (csr) or column (csc)."""
    entries = slice(counts.indptr[position], counts.indptr[position + 1])
    return counts.indices[entries], counts.data[entries]
