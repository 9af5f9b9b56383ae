"""What predictions look like as a whole: counts that add up over shards, and that two sets of rows are compared by.

Legend: N rows.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from bertray.schema import (
    ERROR,
    LABEL,
    LABELS,
    NUM_LENGTH_BINS,
    NUM_SCORE_BINS,
    NUM_TOKENS,
    REVIEW,
    SCORE,
    TRUNCATED,
)


class Profile(BaseModel):
    """Rows, and of those without an error the labels, scores and lengths.

    Where a row may have several labels, each of them counts in `labels`, and a row with none in `num_rows_unlabelled`.
    """

    model_config = ConfigDict(frozen=True)

    num_rows: int = 0
    num_rows_error: int = 0
    num_rows_truncated: int = 0
    num_rows_review: int = 0  # that a person is to look at, those with an error included
    num_rows_unlabelled: int = 0
    num_tokens: int = 0  # of all rows, special tokens included
    labels: dict[str, int] = {}  # rows that have it, by label
    scores: tuple[int, ...] = (0,) * NUM_SCORE_BINS  # rows by score, in twentieths of the way from 0 to 1
    lengths: tuple[int, ...] = (0,) * NUM_LENGTH_BINS  # rows by tokens: 1, 2 to 3, 4 to 7, and so on
    score_sum: float = 0.0
    score_square_sum: float = 0.0
    length_square_sum: float = 0.0

    @classmethod
    def of(cls, predictions: pa.Table) -> Self:
        """Of a table in a `schema.prediction_schema`."""
        scored = predictions.filter(predictions[ERROR].is_null())
        scores_N = scored[SCORE].to_numpy().astype(np.float64)
        lengths_N = scored[NUM_TOKENS].to_numpy().astype(np.float64)
        given, num_rows_unlabelled = scored[LABEL], 0
        if LABELS in scored.column_names:
            given = pc.list_flatten(scored[LABELS])
            num_rows_unlabelled = pc.sum(pc.equal(pc.list_value_length(scored[LABELS]), 0)).as_py() or 0
        labels = pc.value_counts(given)
        return cls(
            num_rows=len(predictions),
            num_rows_error=len(predictions) - len(scored),
            num_rows_truncated=pc.sum(predictions[TRUNCATED]).as_py() or 0,
            num_rows_review=pc.sum(predictions[REVIEW]).as_py() or 0,
            num_rows_unlabelled=num_rows_unlabelled,
            num_tokens=pc.sum(predictions[NUM_TOKENS]).as_py() or 0,
            labels=dict(zip(labels.field("values").to_pylist(), labels.field("counts").to_pylist(), strict=True)),
            scores=_counted(scores_N * NUM_SCORE_BINS, NUM_SCORE_BINS),
            lengths=_counted(np.log2(np.maximum(lengths_N, 1)), NUM_LENGTH_BINS),
            score_sum=float(scores_N.sum()),
            score_square_sum=float(np.square(scores_N).sum()),
            length_square_sum=float(np.square(lengths_N).sum()),
        )

    def __add__(self, other: Profile) -> Profile:
        labels = {
            label: self.labels.get(label, 0) + other.labels.get(label, 0) for label in {**self.labels, **other.labels}
        }
        return Profile(
            num_rows=self.num_rows + other.num_rows,
            num_rows_error=self.num_rows_error + other.num_rows_error,
            num_rows_truncated=self.num_rows_truncated + other.num_rows_truncated,
            num_rows_review=self.num_rows_review + other.num_rows_review,
            num_rows_unlabelled=self.num_rows_unlabelled + other.num_rows_unlabelled,
            num_tokens=self.num_tokens + other.num_tokens,
            labels=labels,
            scores=tuple(np.add(self.scores, other.scores).tolist()),
            lengths=tuple(np.add(self.lengths, other.lengths).tolist()),
            score_sum=self.score_sum + other.score_sum,
            score_square_sum=self.score_square_sum + other.score_square_sum,
            length_square_sum=self.length_square_sum + other.length_square_sum,
        )

    @property
    def num_rows_scored(self) -> int:
        return self.num_rows - self.num_rows_error

    def score_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the rows' scores."""
        return _moments(self.score_sum, self.score_square_sum, self.num_rows_scored)

    def length_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the rows' tokens."""
        return _moments(self.num_tokens, self.length_square_sum, self.num_rows_scored)


def _counted(bins_N: np.ndarray, num_bins: int) -> tuple[int, ...]:
    whole_N = np.minimum(bins_N.astype(np.int64), num_bins - 1)
    return tuple(np.bincount(whole_N, minlength=num_bins).tolist())


def _moments(total: float, square_total: float, num_rows: int) -> tuple[float, float]:
    if num_rows == 0:
        return 0.0, 0.0
    mean = total / num_rows
    return mean, max(0.0, square_total / num_rows - mean**2) ** 0.5
