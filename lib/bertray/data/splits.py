"""Hold rows out, or divide them into folds: stratified by label, reproducible, groups undivided.

Legend: N rows; S sides; U units, which are not divided: a group, or a row without one; K columns: the labels and, last,
one that counts rows.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy.sparse import csc_array, csr_array, hstack
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MultiLabelBinarizer

from bertray.errors import RequestError

# Moves end after one to four passes over real labels; a smaller gain is rounding.
_MAX_PASSES, _LEAST_GAIN = 10, 1e-9


def hold_out(
    labels: list[str] | list[list[str]], fraction: float, seed: int, groups: list[str | None] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Divide rows into those that stay and those held out; each label is divided by the fraction as far as possible.

    Args:
        labels: one a row, or a list of them a row, without repeats; rows with an empty list are divided too.
        fraction: share of the rows to hold out, between 0 and 1.
        seed: the same labels, groups, fraction and seed give the same rows.
        groups: one a row; rows of one group stay together, a null group is a group of its own.

    Returns:
        Positions of the staying and of the held-out rows, both ascending, and the labels without a held-out row. Every
        label has a staying row.

    Raises:
        RequestError: too few rows or groups for that fraction.
    """
    label_sets = [[of_row] if isinstance(of_row, str) else of_row for of_row in labels]
    single_labels = [of_row for of_row in labels if isinstance(of_row, str)]
    if groups is None and single_labels:
        held_out = _stratified(single_labels, fraction, seed)
    else:
        held_out = _stratified_by_units(label_sets, fraction, seed, groups)
    staying = np.setdiff1d(np.arange(len(labels)), held_out)
    total, held = ({label for row in rows for label in label_sets[row]} for rows in (range(len(labels)), held_out))
    return staying, held_out, sorted(total - held)


def folds(label_sets: list[list[str]], num_folds: int, seed: int, groups: list[str]) -> np.ndarray:
    """Divide rows into folds; each has its share of every label as nearly as the groups allow. Deterministic.

    Args:
        label_sets: labels of each row, without repeats.
        groups: one a row; rows of one group stay together.

    Returns:
        The fold of every row, int64 [N]. If each row has one label, every fold has a row of every label.

    Raises:
        RequestError: a label is in fewer groups than there are folds.
    """
    labels_K, counts_UK, units_N = _count_by_unit(label_sets, groups)
    num_units_K = (counts_UK > 0).sum(axis=0).tolist()
    too_few = {label: num for label, num in zip(labels_K, num_units_K, strict=True) if label and num < num_folds}
    if too_few:
        listed = ", ".join(f"{label!r} ({num})" for label, num in list(too_few.items())[:5])
        more = f" and {len(too_few) - 5} others" if len(too_few) > 5 else ""
        lower = f"Lower --folds to {fewest}, add rows" if (fewest := min(too_few.values())) > 1 else "Add rows"
        raise RequestError(
            f"--folds {num_folds} needs {num_folds} different texts of every label; fewer have {listed}{more}. "
            f"{lower}, merge these labels with others, or prepare a data set without them"
        )
    fold_U = _stratified_iteratively(counts_UK, [1 / num_folds] * num_folds, np.random.default_rng(seed))
    return np.asarray(fold_U[units_N])


def _stratified(labels: list[str], fraction: float, seed: int) -> np.ndarray:
    """Held-out rows (ascending), by scikit-learn; a class with a single row stays."""
    counts = Counter(labels)
    rows = np.array([row for row, label in enumerate(labels) if counts[label] > 1], dtype=np.int64)
    strata = [labels[row] for row in rows]
    try:
        staying, held_out = train_test_split(rows, test_size=fraction, random_state=seed, stratify=strata)
    except ValueError as error:
        raise RequestError(
            f"{len(rows)} rows of {len(set(strata))} classes are too few to hold out {fraction:g} of them with every "
            f"class on both sides ({error}). Add rows, raise --validation-fraction and --test-fraction, or give "
            "splits of your own with --validation and --test"
        ) from error
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

    held_out = np.flatnonzero(held_out_U[units_N])
    if not len(held_out) or abs(len(held_out) - fraction * num_rows) > max(1, fraction * num_rows / 2):
        rows = f"{num_rows} rows" if groups is None else f"{num_rows} rows in {len(held_out_U)} groups"
        raise RequestError(
            f"{rows} with {len(set(labels_K) - {''})} labels are too few to hold out {fraction:.3g} of them with every "
            f"label left to train on: the nearest is {len(held_out)} rows. Add rows, raise --validation-fraction and "
            "--test-fraction, or give splits of your own with --validation and --test"
        )
    return held_out


def _count_by_unit(label_sets: list[list[str]], names: list[str]) -> tuple[list[str], csr_array, np.ndarray]:
    """The K columns' labels, counts_UK of the rows, and the unit of every row, given the name of each row's unit.

    Rows without a label get the label "", so that they are divided like others. The last column is called "" too.
    """
    binarizer = MultiLabelBinarizer(sparse_output=True)
    labels_NC = binarizer.fit_transform([labels or [""] for labels in label_sets])
    counts_NK = hstack([labels_NC, np.ones((len(names), 1))], format="csr", dtype=np.int64)
    names_U, units_N = np.unique(names, return_inverse=True)
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


def _entries(counts: csr_array | csc_array, position: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of the nonzero entries of a row (csr) or column (csc)."""
    entries = slice(counts.indptr[position], counts.indptr[position + 1])
    return counts.indices[entries], counts.data[entries]
