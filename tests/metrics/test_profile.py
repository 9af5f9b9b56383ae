"""Counts of predictions add up."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertray.metrics.profile import Profile, js_distance, mean_change
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA, PREDICTION_SCHEMA


def predictions(*rows: Any, schema: pa.Schema = PREDICTION_SCHEMA) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


ROWS: list[Any] = [
    ("a", 0.97, False, 9, False, None),
    ("b", 0.5, True, 128, True, None),
    ("a", 1.0, False, 1, False, None),
    (None, None, True, 0, False, "text is null"),
]
MULTI_LABEL_ROWS: list[Any] = [
    ("a", 0.97, ["a", "b"], False, 9, False, None),
    ("b", 0.6, ["b"], True, 128, True, None),
    ("a", 0.1, [], True, 1, False, None),
    (None, None, None, True, 0, False, "text is null"),
]


def test_what_is_counted() -> None:
    found = Profile.of(predictions(*ROWS))
    assert (found.num_rows, found.num_rows_error, found.num_rows_scored, found.num_rows_truncated) == (4, 1, 3, 1)
    assert (found.num_rows_review, found.num_rows_unlabelled) == (2, 0)
    assert found.labels == {"a": 2, "b": 1}
    assert {index: count for index, count in enumerate(found.scores) if count} == {10: 1, 19: 2}
    assert {index: count for index, count in enumerate(found.lengths) if count} == {0: 1, 3: 1, 7: 1}
    lengths, scores = [9, 128, 1], [np.float32(0.97), 0.5, 1.0]
    assert found.length_moments() == pytest.approx((np.mean(lengths), np.std(lengths)))
    assert found.score_moments() == pytest.approx((np.mean(scores), np.std(scores)))


def test_every_label_of_a_row_is_counted() -> None:
    found = Profile.of(predictions(*MULTI_LABEL_ROWS, schema=MULTI_LABEL_PREDICTION_SCHEMA))
    assert found.labels == {"a": 1, "b": 2}
    assert (found.num_rows_scored, found.num_rows_review, found.num_rows_unlabelled) == (3, 3, 1)
    assert found.score_moments()[0] == pytest.approx((0.97 + 0.6 + 0.1) / 3)


@pytest.mark.parametrize(
    ("rows", "schema"), [(ROWS, PREDICTION_SCHEMA), (MULTI_LABEL_ROWS, MULTI_LABEL_PREDICTION_SCHEMA)]
)
def test_parts_add_up(rows: list[Any], schema: pa.Schema) -> None:
    for cut in range(len(rows) + 1):
        parts = [Profile.of(predictions(*part, schema=schema)) for part in (rows[:cut], rows[cut:])]
        assert sum(parts, Profile()) == Profile.of(predictions(*rows, schema=schema))


def test_of_nothing() -> None:
    for schema in (PREDICTION_SCHEMA, MULTI_LABEL_PREDICTION_SCHEMA):
        assert Profile.of(predictions(schema=schema)) == Profile()
    assert Profile().score_moments() == (0.0, 0.0)


KINDS = {
    "scored": lambda tokens: ("a", 0.75, False, tokens, tokens > 9, None),
    "read, and its output is not a number": lambda tokens: (None, None, True, tokens, tokens > 9, "not a number"),
    "not read": lambda tokens: (None, None, True, 0, tokens > 9, "no embedding"),
    "a score that is none": lambda tokens: ("a", float("nan"), False, tokens, tokens > 9, None),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(1, 2000)), max_size=9))
def test_rows_with_an_error_move_nothing_that_is_of_the_others(drawn: list[tuple[str, int]]) -> None:
    rows = [(kind, KINDS[kind](num_tokens)) for kind, num_tokens in drawn]
    found, alone = (
        Profile.of(predictions(*(row for kind, row in rows if kind in kinds))) for kinds in (KINDS, ["scored"])
    )
    assert (found.num_rows, found.num_rows_scored) == (len(rows), alone.num_rows)
    assert found.num_tokens == sum(row[3] for _, row in rows)
    of_all = {"num_rows", "num_rows_error", "num_rows_review", "num_tokens", "num_tokens_error"}
    assert found.model_dump(exclude=of_all) == alone.model_dump(exclude=of_all)
    assert found.length_moments() == alone.length_moments() and found.score_moments() == alone.score_moments()
    lengths = [num_tokens for kind, num_tokens in drawn if kind == "scored"]
    assert found.length_moments() == pytest.approx((np.mean(lengths), np.std(lengths)) if lengths else (0, 0))


@given(st.integers(1, 10**7), st.floats(0, 1, width=32), st.integers(1, 10**6), st.integers(1, 30))
def test_equal_rows_do_not_vary(num_tokens: int, score: float, num_rows: int, num_parts: int) -> None:
    """However their sums are rounded: the difference of two large ones may be a little more, or less, than nothing."""
    squares = {"score_square_sum": num_rows * score**2, "length_square_sum": num_rows * float(num_tokens**2)}
    part = Profile(num_rows=num_rows, num_tokens=num_rows * num_tokens, score_sum=num_rows * score, **squares)
    total = sum([part] * num_parts, Profile())
    for one, other in (
        (part.length_moments(), total.length_moments()),
        (part.score_moments(), total.score_moments()),
    ):
        assert one[1] == other[1] == 0
        assert mean_change(one, other, num_rows, num_rows * num_parts) == 0


def test_what_counts_nothing_is_at_no_distance() -> None:
    assert js_distance([0, 0], [3, 4000]) == js_distance([3, 4000], [0, 0]) == js_distance([0], [0]) == 0
