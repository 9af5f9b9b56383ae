"""Numbers: what cells mean, what becomes of equal texts, intervals, cuts."""

import re
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score, mean_absolute_error, r2_score, root_mean_squared_error

from bertray import schema
from bertray.data.cleaning import clean
from bertray.errors import RequestError
from bertray.metrics.regression import ValueErrors, class_metrics, conformal
from bertray.tasks.regression import Regression, ValueFacts, classes_of

TASK = Regression()
WISHES = SimpleNamespace(coverage=0.9, cuts=None)


def read(cells: pa.Array) -> list[float | None]:
    found: list[float | None] = TASK.read(pa.chunked_array([cells]), "column 'grade' of a.csv", "").to_pylist()
    return found


@pytest.mark.parametrize(
    "cells",
    [
        pa.array(["3.5", " 4 ", "", None, "-1e-2", "  ", "NaN"]),
        pa.array(["3.5", "4", None, None, "-.01", None, "nan"]).dictionary_encode(),
        pa.array([3.5, 4, None, None, -0.01, None, float("nan")]),
        pa.array([Decimal(one) if one else None for one in ("3.5", "4", "", "", "-0.01", "", "")]),
    ],
)
def test_cells_are_numbers_however_they_are_written(cells: pa.Array) -> None:
    assert read(cells) == [3.5, 4.0, None, None, -0.01, None, None]


def test_whole_numbers_are_numbers() -> None:
    assert read(pa.array([1, None, 2**40])) == [1.0, None, 2.0**40]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (pa.array(["1", "good"]), r"row 1 of column 'grade' of a\.csv, counted from 0, is 'good', which is no number"),
        (pa.array(["1", None, "1,5"]), r"row 2 .* is '1,5', which is no number such as 3\.5"),
        (pa.array(["1", "inf"]), r"row 1 .* is inf; numbers may be at most 1e\+30"),
        (pa.array([1.0, -np.inf]), r"row 1 .* is -inf; numbers"),
        (pa.array([1.0, 1e39]), r"row 1 .* is 1e\+39; numbers"),
        (pa.array([True, False]), r"true and false, which are classes: leave --regression out"),
        (pa.array([[1.0], [2.0]]), r"column 'grade'"),
        (pa.array([1, 2], pa.duration("s")), r"column 'grade' of a\.csv is of type duration\[s\]: write it as numbers"),
    ],
)
def test_what_is_no_number_is_refused_with_its_row(cells: pa.Array, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(cells)


def rows_of(*rows: tuple[str | None, float | None]) -> pa.Table:
    texts, values = zip(*rows, strict=True)
    others = {schema.SOURCE: ["a.csv"] * len(rows), schema.SOURCE_ROW: range(len(rows))}
    return pa.table({"text": pa.array(texts, pa.string()), "value": pa.array(values, pa.float64()), **others})


@pytest.mark.parametrize(
    ("max_spread", "kept", "reasons"),
    [
        (None, [("a", 2.0), ("b", 0.0), ("c", 5.0)], {"duplicate": 3}),
        (1.0, [("b", 0.0), ("c", 5.0)], {"duplicate": 1, "value_spread": 3}),
        (3.0 - 1e-13, [("a", 2.0), ("b", 0.0), ("c", 5.0)], {"duplicate": 3}),  # as rounding may have it
        (3.0, [("a", 2.0), ("b", 0.0), ("c", 5.0)], {"duplicate": 3}),
    ],
)
def test_equal_texts_get_their_mean_or_go(
    max_spread: float | None, kept: list[tuple[str, float]], reasons: dict[str, int]
) -> None:
    table = rows_of(("a", 1.0), (" a ", 1.0), ("b", 0.0), ("a", 4.0), ("c", 5.0), ("c ", 5.0), ("d", None), (None, 1.0))
    cleaned = clean(table, max_spread)
    assert list(zip(*(cleaned.rows[name].to_pylist() for name in ("text", "value")), strict=True)) == kept
    assert cleaned.rows_out == {**reasons, "label_missing": 1, "text_missing": 1}
    assert cleaned.num_rows_in == cleaned.rows.num_rows + cleaned.rows_out.total()
    assert cleaned.conflicts == [{"text": "a", "labels": {1.0: 2, 4.0: 1}, "kept": None if max_spread == 1 else 2.0}]


def test_metrics_are_those_of_the_textbooks() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=200)
    predicted = np.round(true + rng.normal(size=200), 1)  # with ties
    for times in (None, np.bincount(rng.integers(200, size=200), minlength=200)):
        one, other = (side if times is None else np.repeat(side, times) for side in (true, predicted))
        found = ValueErrors(true, predicted).metrics(times)
        assert found["mae"] == pytest.approx(mean_absolute_error(one, other))
        assert found["rmse"] == pytest.approx(root_mean_squared_error(one, other))
        assert found["r2"] == pytest.approx(r2_score(one, other))
        assert found["pearson"] == pytest.approx(pearsonr(one, other).statistic)
        # Of rows drawn again, the ranks are those before.
        assert found["spearman"] == pytest.approx(spearmanr(one, other).statistic, abs=1e-12 if times is None else 0.02)
    assert ValueErrors(np.ones(3), np.array([1.0, 2.0, 3.0])).metrics()["pearson"] == 0
    assert set(ValueErrors(np.empty(0), np.empty(0)).metrics().values()) == {0.0}
    classes = np.digitize(true, [-0.5, 0.5]), np.digitize(predicted, [-0.5, 0.5])
    found = class_metrics(*classes, (-0.5, 0.5), ("low", "middle", "high"))
    assert found["quadratic_kappa"] == pytest.approx(cohen_kappa_score(*classes, weights="quadratic"))
    assert set(found["f1_at_cuts"]) == {"-0.5", "0.5"} and found["f1_macro"] > 0.3


def test_intervals_hold_what_they_promise_where_errors_differ() -> None:
    rng = np.random.default_rng(1)

    def drawn(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        predicted = rng.uniform(0, 10, num_rows)
        return predicted, predicted + rng.normal(size=num_rows) * np.where(predicted < 5, 0.1, 2)

    edges, halves = conformal(*drawn(2000), 0.9)
    assert len(halves) == 10 == len(edges) + 1
    predicted, true = drawn(20_000)
    held = np.abs(true - predicted) <= np.array(halves)[np.searchsorted(edges, predicted, side="right")]
    for part in (predicted < 5, predicted >= 5):
        assert held[part].mean() == pytest.approx(0.9, abs=0.03)
    assert conformal(*drawn(8), 0.9) == ((), ())  # 9 rows can promise 0.9
    assert len(conformal(*drawn(9), 0.9)[1]) == 1
    assert conformal(np.empty(0), np.empty(0), 0.9) == ((), ())


def test_intervals_where_many_predictions_are_the_same() -> None:
    rng = np.random.default_rng(2)
    predicted = np.where(np.arange(600) % 3 == 0, 0.0, rng.uniform(3, 7, 600))
    true = predicted + rng.normal(size=600) * np.where(predicted > 0, 1, 0.01)
    edges, halves = conformal(predicted, true, 0.9)
    assert len(halves) == len(edges) + 1 > 2 and halves[0] < 0.1 < halves[-1]
    assert conformal(np.zeros(1000), rng.normal(size=1000), 0.9)[1] == (pytest.approx(1.64, abs=0.15),)


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        (np.linspace(0, 1, 60), None),
        (np.full(60, 3.0), r"all about 3, and differ by some 0"),
        (1.7e9 + np.linspace(0, 1, 60), r"all about 1\.7e\+09, and differ by some 0\.29.*subtract what they have"),
        (
            [*np.full(58, 3.0), 9999.0, 0.0],
            r"1 of 60 training values lie far from the others.*: 9999 \(a\.csv, row 58\)",
        ),
        ([*np.linspace(1, 5, 59), 500.0], r"1 of 60 training values lie far from .*: 500 \(a\.csv, row 59\)"),
    ],
)
def test_values_that_a_person_should_look_at(values: list[float], warning: str | None) -> None:
    found = TASK.warnings({"train": rows_of(*(("a text", float(value)) for value in values))})
    assert len(found) == (warning is not None)
    assert warning is None or re.search(warning, found[0]), found


def test_cuts_that_help_little_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    raw, trained = np.zeros((5, 1), np.float32), np.arange(10.0)
    TASK.decide(raw, np.zeros(5), SimpleNamespace(coverage=0.9, cuts="5,20"), lambda: trained)
    assert "5 validation rows are too few for intervals with a --coverage of 0.9" in caplog.text
    assert "no training value is in the class '20 or more'" in caplog.text
    caplog.clear()
    TASK.decide(np.zeros((50, 1), np.float32), np.zeros(50), SimpleNamespace(coverage=0.9, cuts="5"), lambda: trained)
    assert not caplog.text


def test_what_cheaper_arithmetic_loses_is_seen_where_all_values_are_equal() -> None:
    assert TASK.quality(np.array([1.0, 1.0]), np.ones(2)) == 1 > TASK.quality(np.array([1.0, 1.3]), np.ones(2))


@pytest.mark.parametrize(
    "facts",
    [
        {"cuts": (2, 1)},
        {"edges": (2, 1), "half_widths": (1, 1, 1)},
        {"bounds": (5, 0)},
        {"coverage": 7},
        {"half_widths": (-1.0,)},
        {"half_widths": (float("nan"),)},
    ],
)
def test_facts_that_somebody_has_edited_are_refused(facts: dict[str, Any]) -> None:
    whole = {"coverage": 0.9, "edges": (), "half_widths": (1.0,), "cuts": (1, 2), "bounds": (0, 5)}
    assert ValueFacts(**whole)
    with pytest.raises(ValueError, match=r"do not ascend|out of its range"):
        ValueFacts(**{**whole, **facts})


@pytest.mark.parametrize(
    ("wanted", "trained", "cuts", "classes"),
    [
        (None, [1, 2], (), ()),
        ("2.5", [1, 2], (2.5,), ("below 2.5", "2.5 or more")),
        ("1,2.25,3", [1, 2], (1, 2.25, 3), ("below 1", "1 to 2.25", "2.25 to 3", "3 or more")),
        ("auto", [0, 0, 1, 3], (0.5, 2), ("below 0.5", "0.5 to 2", "2 or more")),
        ("auto", [1, 1], (), ()),
        ("auto", range(91), (30, 60), ("below 30", "30 to 60", "60 or more")),
    ],
)
def test_cuts(wanted: str | None, trained: list[float], cuts: tuple[float, ...], classes: tuple[str, ...]) -> None:
    raw = np.array([[1.0], [2.0], [3.0]], np.float32)
    facts = TASK.decide(
        raw, np.array([1.0, 2.0, 3.0]), SimpleNamespace(coverage=0.9, cuts=wanted), lambda: np.array(trained)
    )
    values = facts["values"]
    assert values.cuts == cuts and classes_of(values.cuts) == classes
    answers = TASK.answer(np.array([[1.0], [2.25], [np.nan]], np.float32), SimpleNamespace(values=values))
    assert answers["value"].to_pylist() == [1.0, 2.25, None] and answers["low"].null_count == 3
    # Without an interval nobody knows on which side of a cut a value is.
    assert answers["review"].to_pylist() == [bool(cuts), bool(cuts), True]
    if cuts == (1, 2.25, 3):
        assert answers["label"].to_pylist() == ["1 to 2.25", "2.25 to 3", None]


@pytest.mark.parametrize(
    ("trained", "bounds"),
    [([1.2, 4.6], (1, 5)), ([0, 5], (0, 5)), ([3, 3], (2.7, 3.3)), ([0, 0], (0, 1)), ([-1990.3, 2030], (-2000, 2200))],
)
def test_the_bins_of_the_profile_lie_around_the_training_values(
    trained: list[float], bounds: tuple[float, float]
) -> None:
    values = TASK.decide(np.zeros((1, 1), np.float32), np.zeros(1), WISHES, lambda: np.array(trained))["values"]
    low, high = values.bounds
    assert low <= min(trained) and max(trained) <= high and high > low
    assert high - low <= 1.5 * ((max(trained) - min(trained)) or abs(trained[0]) or 1.0) + 0.2
