"""Counts of predictions add up."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bertray.profile import Profile
from bertray.schema import PREDICTION_SCHEMA


def predictions(*rows: tuple[str | None, float | None, int, bool, str | None]) -> pa.Table:
    names = PREDICTION_SCHEMA.names
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=PREDICTION_SCHEMA)


ROWS: list[Any] = [
    ("a", 0.97, 9, False, None),
    ("b", 0.5, 128, True, None),
    ("a", 1.0, 1, False, None),
    (None, None, 0, False, "text is null"),
]


def test_what_is_counted() -> None:
    found = Profile.of(predictions(*ROWS))
    assert (found.num_rows, found.num_rows_error, found.num_rows_scored, found.num_rows_truncated) == (4, 1, 3, 1)
    assert found.labels == {"a": 2, "b": 1}
    assert {index: count for index, count in enumerate(found.scores) if count} == {10: 1, 19: 2}
    assert {index: count for index, count in enumerate(found.lengths) if count} == {0: 1, 3: 1, 7: 1}
    lengths, scores = [9, 128, 1], [np.float32(0.97), 0.5, 1.0]
    assert found.length_moments() == pytest.approx((np.mean(lengths), np.std(lengths)))
    assert found.score_moments() == pytest.approx((np.mean(scores), np.std(scores)))


def test_parts_add_up() -> None:
    parts = [Profile.of(predictions(*ROWS[:1])), Profile.of(predictions(*ROWS[1:])), Profile()]
    assert sum(parts, Profile()) == Profile.of(predictions(*ROWS))


def test_of_nothing() -> None:
    assert Profile.of(predictions()) == Profile()
    assert Profile().score_moments() == (0.0, 0.0)
