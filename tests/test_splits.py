"""Held-out rows: stratified, reproducible, groups undivided, refusals that say what to do."""

from collections import Counter

import numpy as np
import pytest

from bertray.errors import RequestError
from bertray.splits import hold_out

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


def test_shares_follow_the_classes() -> None:
    staying, held_out, single = hold_out(LABELS, 0.1, seed=0)
    assert Counter(LABELS[row] for row in held_out) == {"a": 6, "b": 3, "c": 1}
    assert sorted([*staying, *held_out]) == list(range(100))
    assert single == []


def test_the_seed_decides() -> None:
    first, same, other = (hold_out(LABELS, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_a_class_with_one_row_stays_in_training() -> None:
    staying, held_out, single = hold_out([*LABELS, "rare"], 0.1, seed=0)
    assert single == ["rare"]
    assert 100 in staying
    assert 100 not in held_out


def test_too_few_rows_are_refused() -> None:
    labels = [str(row // 2) for row in range(60)]  # 30 classes of 2 rows: a tenth is 6 rows
    with pytest.raises(RequestError, match=r"60 rows of 30 classes are too few to hold out 0\.1 .*--validation"):
        hold_out(labels, 0.1, seed=0)


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.3])
def test_groups_are_not_divided(fraction: float) -> None:
    rng = np.random.default_rng(0)
    labels = [str(label) for label in rng.integers(3, size=600)]
    groups: list[str | None] = [None if group == 0 else str(group) for group in rng.integers(80, size=600)]
    staying, held_out, _ = hold_out(labels, fraction, seed=0, groups=groups)
    sides = [{groups[row] for row in side} - {None} for side in (staying, held_out)]
    assert not sides[0] & sides[1]
    assert abs(len(held_out) / 600 - fraction) < 0.03
    assert sorted([*staying, *held_out]) == list(range(600))


def test_a_class_whose_groups_were_all_held_out_comes_back() -> None:
    labels = [*LABELS, *["rare"] * 3]
    groups: list[str | None] = [*(str(row // 2) for row in range(100)), *["only"] * 3]
    for seed in range(12):
        staying, held_out, only_staying = hold_out(labels, 0.1, seed, groups)
        assert "rare" in only_staying
        assert {100, 101, 102} <= set(staying)
        assert len(held_out) > 0


def test_a_group_split_that_no_class_has_rows_for_is_refused() -> None:
    labels = [str(row // 6) for row in range(60)]
    groups: list[str | None] = [str(row // 2) for row in range(60)]
    with pytest.raises(RequestError, match=r"the most frequent label 6 rows.* needs some 10 of both"):
        hold_out(labels, 0.1, seed=0, groups=groups)


@pytest.mark.parametrize("fraction", [0.1, 0.1132, 0.1 / 0.9])
def test_few_groups_are_enough_for_odd_fractions(fraction: float) -> None:
    labels = ["ab"[row % 2] for row in range(90)]
    groups: list[str | None] = [str(row // 4) for row in range(90)]  # 23 of them
    staying, held_out, _ = hold_out(labels, fraction, seed=0, groups=groups)
    assert not {groups[row] for row in staying} & {groups[row] for row in held_out}
    assert abs(len(held_out) / 90 - fraction) < 0.05


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(RequestError, match=r"--group-column has 2 distinct values.*needs some 10 of both"):
        hold_out(LABELS, 0.1, seed=0, groups=["x", "y"] * 50)
