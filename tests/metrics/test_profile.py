"""Counts of predictions add up."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bertray.metrics.profile import Profile
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
