"""Held-out rows: stratified, reproducible, groups undivided, refusals that say what to do."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from bertray.data.splits import folds, hold_out
from bertray.errors import RequestError
from tests.conftest import SHARED_DATA, needs_shared_data

LABELS = ["a"] * 60 + ["b"] * 30 + ["c"] * 10


def test_shares_follow_the_classes() -> None:
    staying, held_out = hold_out(LABELS, 0.1, seed=0)
    assert Counter(LABELS[row] for row in held_out) == {"a": 6, "b": 3, "c": 1}
    assert sorted([*staying, *held_out]) == list(range(100))


def test_the_seed_decides() -> None:
    first, same, other = (hold_out(LABELS, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == same
    assert first != other


def test_a_class_with_one_row_stays_in_training() -> None:
    staying, held_out = hold_out([*LABELS, "rare"], 0.1, seed=0)
    assert 100 in staying
    assert 100 not in held_out


@pytest.mark.parametrize("is_list", [False, True])
@pytest.mark.parametrize("rows_a_group", [0, 1, 2])
@pytest.mark.parametrize("fraction", [0.1, 1 / 9])
def test_many_classes_of_few_rows_are_divided(fraction: float, is_list: bool, rows_a_group: int) -> None:
    names = [*(f"{row // 3}" for row in range(1200)), *(f"single {row}" for row in range(20))]  # 400 classes of 3
    labels: Any = [[name] for name in names] if is_list else names
    groups: Any = [str(row // rows_a_group) for row in range(1220)] if rows_a_group else None
    staying, held_out = hold_out(labels, fraction, 0, groups)
    assert {names[row] for row in staying} == set(names)
    assert abs(len(held_out) - 1220 * fraction) <= 4
    if not rows_a_group:  # as many classes as rows
        assert len({names[row] for row in held_out}) == len(held_out)
    assert (
        hold_out(labels, fraction, 0, groups)[1].tolist()
        == held_out.tolist()
        != hold_out(labels, 0.1, 1, groups)[1].tolist()
    )


def test_classes_of_one_row_each_are_refused() -> None:
    with pytest.raises(RequestError, match=r"60 rows with 60 labels are too few to hold out 0\.1 .*--validation"):
        hold_out([str(row) for row in range(60)], 0.1, seed=0)


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.3])
def test_groups_are_not_divided(fraction: float) -> None:
    rng = np.random.default_rng(0)
    labels = [str(label) for label in rng.integers(3, size=600)]
    groups: list[str | None] = [None if group == 0 else str(group) for group in rng.integers(80, size=600)]
    staying, held_out = hold_out(labels, fraction, seed=0, groups=groups)
    sides = [{groups[row] for row in side} - {None} for side in (staying, held_out)]
    assert not sides[0] & sides[1]
    assert abs(len(held_out) / 600 - fraction) < 0.03
    assert sorted([*staying, *held_out]) == list(range(600))


def test_a_class_whose_groups_were_all_held_out_comes_back() -> None:
    labels = [*LABELS, *["rare"] * 3]
    groups: list[str | None] = [*(str(row // 2) for row in range(100)), *["only"] * 3]
    for seed in range(12):
        staying, held_out = hold_out(labels, 0.1, seed, groups)
        assert {100, 101, 102} <= set(staying)
        assert len(held_out) > 0


def test_a_class_with_one_group_each_is_refused() -> None:
    labels = [str(row // 6) for row in range(60)]
    with pytest.raises(RequestError, match=r"60 rows in 10 groups with 10 labels are too few to hold out 0\.1"):
        hold_out(labels, 0.1, seed=0, groups=[*labels])


def test_one_large_group_does_not_become_the_held_out_rows() -> None:
    rng = np.random.default_rng(0)
    sizes = [1500, 1200, 300, *[1] * 1000]  # of authors: in folds of groups the largest would be a fold
    groups: list[str | None] = [f"author {author}" for author, size in enumerate(sizes) for _ in range(size)]
    labels = [str(label) for label in rng.integers(4, size=len(groups))]
    seen = set()
    for seed in range(3):
        staying, held_out = hold_out(labels, 0.1, seed, groups)
        assert abs(len(held_out) - 400) <= 5
        assert not {groups[row] for row in staying} & {groups[row] for row in held_out}
        assert len({groups[row] for row in held_out}) > 20
        seen.add(tuple(held_out))
    assert len(seen) == 3  # the seed has a say


@pytest.mark.parametrize("fraction", [0.5, 0.7, 0.8])
def test_a_large_fraction_leaves_a_row_of_every_class(fraction: float) -> None:
    labels = [*["large"] * 100, *(str(label) for label in range(30) for _ in range(2 + label % 3))]
    for seed in range(4):
        staying, held_out = hold_out(labels, fraction, seed)
        assert {labels[row] for row in staying} == set(labels)
        assert sorted([*staying, *held_out]) == list(range(len(labels)))


@pytest.mark.parametrize("fraction", [0.1, 0.1132, 0.1 / 0.9])
def test_few_groups_are_enough_for_odd_fractions(fraction: float) -> None:
    labels = ["ab"[row % 2] for row in range(90)]
    groups: list[str | None] = [str(row // 4) for row in range(90)]  # 23 of them
    staying, held_out = hold_out(labels, fraction, seed=0, groups=groups)
    assert not {groups[row] for row in staying} & {groups[row] for row in held_out}
    assert abs(len(held_out) / 90 - fraction) < 0.05


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(RequestError, match=r"100 rows in 2 groups with 3 labels are too few to hold out 0\.1"):
        hold_out(LABELS, 0.1, seed=0, groups=["x", "y"] * 50)


def test_no_rows_are_refused() -> None:
    with pytest.raises(RequestError, match=r"^0 rows in 0 groups .* are too few"):
        hold_out([], 0.1, seed=0, groups=[])


def label_counts(label_sets: list[list[str]], rows: np.ndarray | range) -> Counter[str]:
    return Counter(label for row in rows for label in label_sets[row])


def random_label_sets(num_rows: int, num_labels: int, seed: int) -> list[list[str]]:
    """Labels of uneven shares, some rows without any."""
    rng = np.random.default_rng(seed)
    has_NC = rng.random((num_rows, num_labels)) < rng.random(num_labels) * rng.random()
    return [[f"label {label}" for label in np.flatnonzero(of_row)] for of_row in has_NC]


@given(st.integers(20, 300), st.integers(1, 9), st.sampled_from([0.1, 0.2, 0.3, 0.5]), st.integers(0, 2**31))
def test_every_label_is_divided_by_the_fraction(num_rows: int, num_labels: int, fraction: float, seed: int) -> None:
    label_sets = random_label_sets(num_rows, num_labels, seed)
    staying, held_out = hold_out(label_sets, fraction, seed)
    assert sorted([*staying, *held_out]) == list(range(num_rows))
    assert all((np.diff(side) > 0).all() for side in (staying, held_out))
    total, held = label_counts(label_sets, range(num_rows)), label_counts(label_sets, held_out)
    assert set(label_counts(label_sets, staying)) == set(total)
    # In 5,400 draws like these the worst label was 2.6 rows from its share; of 300 rows at random it would be 20.
    for label, count in total.items():
        assert abs(held[label] - fraction * count) < 5


@given(st.integers(40, 300), st.integers(1, 9), st.sampled_from([0.1, 0.3]), st.integers(0, 2**31))
def test_groups_of_several_labels_are_not_divided(num_rows: int, num_labels: int, fraction: float, seed: int) -> None:
    label_sets = random_label_sets(num_rows, num_labels, seed)
    drawn = np.random.default_rng(seed).integers(num_rows // 3, size=num_rows)
    groups: list[str | None] = [None if group == 0 else str(group) for group in drawn]
    try:
        staying, held_out = hold_out(label_sets, fraction, seed, groups)
    except RequestError:
        assume(False)
    assert sorted([*staying, *held_out]) == list(range(num_rows))
    assert not {groups[row] for row in staying} & {groups[row] for row in held_out} - {None}
    assert set(label_counts(label_sets, staying)) == set(label_counts(label_sets, range(num_rows)))
    assert abs(len(held_out) - fraction * num_rows) <= max(1, fraction * num_rows / 2)


def test_rows_without_labels_are_divided_too() -> None:
    for seed in range(20):
        label_sets = random_label_sets(300, 6, seed)
        _, held_out = hold_out(label_sets, 0.2, seed)
        num_unlabelled = label_sets.count([])
        assert abs(sum(not label_sets[row] for row in held_out) - 0.2 * num_unlabelled) <= 2


def test_a_label_of_one_row_stays_in_training_whatever_the_fraction() -> None:
    label_sets = [["a"]] * 50 + [["a", "b"]] * 50 + [["b", "rare"]]
    for seed in range(5):
        staying, _ = hold_out(label_sets, 0.8, seed)
        assert 100 in staying


def test_the_seed_decides_where_rows_with_several_labels_go() -> None:
    label_sets = random_label_sets(200, 5, seed=0)
    first, same, other = (hold_out(label_sets, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize("num_rows", [0, 1, 4])
def test_too_few_rows_with_several_labels_are_refused(num_rows: int) -> None:
    with pytest.raises(RequestError, match=rf"^{num_rows} rows with . labels .*hold out 0\.1 .*nearest is 0 .*--test"):
        hold_out([["a"]] * num_rows, 0.1, seed=0)


def test_too_few_groups_with_several_labels_are_refused() -> None:
    with pytest.raises(RequestError, match=r"100 rows in 2 groups with 1 labels are too few.*nearest is 0 rows"):
        hold_out([["a"]] * 100, 0.1, seed=0, groups=["x", "y"] * 50)


@needs_shared_data
@pytest.mark.parametrize("group_size", [1, 7])
def test_emotions_are_divided_to_within_a_few_rows(group_size: int) -> None:
    column = pq.ParquetFile(SHARED_DATA / "goemotions_multilabel" / "train.parquet").read(["label"])["label"]
    label_sets = [labels.split(";") for labels in column.to_pylist()]
    groups: list[str | None] = [str(row // group_size) for row in range(len(label_sets))]
    _, held_out = hold_out(label_sets, 0.1, seed=0, groups=groups)
    total, held = label_counts(label_sets, range(len(label_sets))), label_counts(label_sets, held_out)
    assert len(total) == 28
    assert max(abs(held[label] - 0.1 * count) for label, count in total.items()) < 3


def test_folds_have_their_share_of_every_label() -> None:
    label_sets = [[label] for label in LABELS]
    fold_N = folds(label_sets, 5, seed=0, groups=[str(row) for row in range(100)])
    for fold in range(5):
        assert Counter(np.array(LABELS)[fold_N == fold].tolist()) == {"a": 12, "b": 6, "c": 2}


def test_folds_follow_from_the_seed_and_do_not_divide_groups() -> None:
    rng = np.random.default_rng(0)
    label_sets = [[str(label) for label in np.flatnonzero(rng.random(4) < 0.4)] for _ in range(400)]
    groups = [str(group) for group in rng.integers(150, size=400)]
    first, same, other = (folds(label_sets, 4, seed, groups) for seed in (1, 1, 2))
    assert first.tolist() == same.tolist() != other.tolist()
    assert len({*zip(groups, first.tolist(), strict=True)}) == len(set(groups))
    assert set(first.tolist()) == {0, 1, 2, 3}
    assert max(np.bincount(first)) - min(np.bincount(first)) < 20
    for label in "0123":
        counts = Counter(fold for fold, names in zip(first.tolist(), label_sets, strict=True) if label in names)
        assert max(counts.values()) - min(counts.values()) < 20


def test_one_long_name_of_a_group_costs_no_memory_for_the_others() -> None:
    groups = [*(str(row) for row in range(20_000)), "long " * 3_000]
    tracemalloc.start()
    folds([["a"]] * len(groups), 2, 0, groups)
    assert tracemalloc.get_traced_memory()[1] < 100e6  # names as wide as the longest would take 1.2 GB
    tracemalloc.stop()


def test_folds_are_those_of_groups_in_the_order_of_their_names() -> None:
    groups = ["b", "a", "é", "B", "a", "ab", "", "b", "Ω", "a b"]
    sets = [["x"], ["y"], ["x", "y"], [], ["x"], ["y"], ["x"], ["y"], ["y"], ["x"]]
    assert folds(sets, 2, 3, groups).tolist() == [1, 0, 1, 0, 0, 1, 1, 1, 0, 0]


def test_labels_of_fewer_groups_than_folds_are_refused() -> None:
    label_sets = [["a"], ["a"], ["a"], ["b"], ["b"], ["b"], ["b"], []]
    groups = ["1", "2", "3", "4", "5", "5", "5", "6"]
    assert len(set(folds(label_sets, 2, 0, groups)[:3].tolist())) == 2
    with pytest.raises(RequestError, match=r"--folds 3 needs 3 different texts of every label; fewer have 'b' \(2\)"):
        folds(label_sets, 3, 0, groups)
    with pytest.raises(RequestError, match=r"fewer have 'c' \(1\)\. Add rows, merge"):
        folds([*label_sets, ["c"]], 2, 0, [*groups, "7"])
