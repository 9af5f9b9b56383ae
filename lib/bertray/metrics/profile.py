"""Counts over predictions, which add up over shards, and how far two of them differ, less what chance causes.

The share of rows to be reviewed needs no comparison: it follows from the scores, whose distribution moves at least as
far.

Jensen-Shannon distance: the square root of the divergence of J. Lin, Divergence measures based on the Shannon entropy
(1991), to base 2: 0 for equal distributions, 1 for distributions that have nothing in common.

Legend: N rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict
from scipy.special import chdtri, rel_entr

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
    VALUE,
)

# How often samples of one distribution differ at a limit of 0: a nightly comparison does once in 27 years.
_CHANCE = 1e-4
BOUNDS = b"bertray.bounds"  # in the metadata of a column of values: JSON, the lower and the upper one
_LEAST_VARIANCE = 1e-12  # below it is rounding
_LEAST_VARIATION = 1e-13  # likewise of a variance from sums of squares, as a share of the squared mean


class Profile(BaseModel):
    """Counts of rows; labels, scores, lengths and truncation count rows without an error only.

    With several labels a row, `labels` counts each of them, and `num_rows_unlabelled` counts the rows without any. Of
    predicted numbers, `scores` and its sums are about the values, in bins between the bounds of the column.
    """

    model_config = ConfigDict(frozen=True)

    num_rows: int = 0
    num_rows_error: int = 0
    num_rows_truncated: int = 0
    num_rows_review: int = 0  # to be reviewed, those with an error included
    num_rows_unlabelled: int = 0
    num_tokens: int = 0  # of all rows, special tokens included
    num_tokens_error: int = 0  # of rows with an error: the model may have read them and given no number
    labels: dict[str, int] = {}  # rows by label
    scores: tuple[int, ...] = (0,) * NUM_SCORE_BINS  # rows by score, in bins of equal width; from 0 to 1
    lengths: tuple[int, ...] = (0,) * NUM_LENGTH_BINS  # rows by number of tokens: 1, 2 to 3, 4 to 7, and so on
    score_sum: float = 0.0
    score_square_sum: float = 0.0
    length_square_sum: float = 0.0

    @classmethod
    def of(cls, predictions: pa.Table) -> Self:
        """Count the rows of a table in a `schema.prediction_schema`."""
        column = VALUE if VALUE in predictions.column_names else SCORE
        low, high = json.loads((predictions.field(column).metadata or {}).get(BOUNDS, b"[0, 1]"))
        is_scored = pc.and_(predictions[ERROR].is_null(), pc.is_finite(predictions[column]))
        scored = predictions.filter(is_scored)  # not where it is null
        scores_N = scored[column].to_numpy().astype(np.float64)
        lengths_N = scored[NUM_TOKENS].to_numpy().astype(np.float64)
        num_rows_unlabelled = 0
        if LABELS in scored.column_names:
            num_rows_unlabelled = pc.sum(pc.equal(pc.list_value_length(scored[LABELS]), 0)).as_py() or 0
        labels = pc.value_counts(given_labels(scored))
        num_tokens = pc.sum(predictions[NUM_TOKENS]).as_py() or 0
        return cls(
            num_rows=len(predictions),
            num_rows_error=len(predictions) - len(scored),
            num_rows_truncated=pc.sum(scored[TRUNCATED]).as_py() or 0,
            num_rows_review=pc.sum(predictions[REVIEW]).as_py() or 0,
            num_rows_unlabelled=num_rows_unlabelled,
            num_tokens=num_tokens,
            num_tokens_error=num_tokens - int(lengths_N.sum()),
            labels=dict(zip(labels.field("values").to_pylist(), labels.field("counts").to_pylist(), strict=True)),
            scores=_counted((scores_N - low) / (high - low) * NUM_SCORE_BINS, NUM_SCORE_BINS),
            lengths=_counted(np.log2(np.maximum(lengths_N, 1)), NUM_LENGTH_BINS),
            score_sum=float(scores_N.sum()),
            score_square_sum=float(np.square(scores_N).sum()),
            length_square_sum=float(np.square(lengths_N).sum()),
        )

    def __add__(self, other: Profile) -> Profile:
        total: dict[str, Any] = {}
        for name, one in self:
            two = getattr(other, name)
            if isinstance(one, dict):
                total[name] = {label: one.get(label, 0) + two.get(label, 0) for label in {**one, **two}}
            else:
                total[name] = tuple(np.add(one, two).tolist()) if isinstance(one, tuple) else one + two
        return Profile(**total)

    @property
    def num_rows_scored(self) -> int:
        return self.num_rows - self.num_rows_error

    def score_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the scores."""
        return _moments(self.score_sum, self.score_square_sum, self.num_rows_scored)

    def length_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the number of tokens."""
        return _moments(self.num_tokens - self.num_tokens_error, self.length_square_sum, self.num_rows_scored)


def given_labels(rows: pa.Table) -> pa.ChunkedArray:
    """The labels of all rows: one each, or those in their lists; none if the answers are numbers alone."""
    if LABELS in rows.column_names:
        return pc.list_flatten(rows[LABELS])
    return rows[LABEL] if LABEL in rows.column_names else pa.chunked_array([], pa.string())


def _counted(bins_N: np.ndarray, num_bins: int) -> tuple[int, ...]:
    whole_N = np.clip(bins_N, 0, num_bins - 1).astype(np.int64)
    return tuple(np.bincount(whole_N, minlength=num_bins).tolist())


def _moments(total: float, square_total: float, num_rows: int) -> tuple[float, float]:
    if num_rows == 0:
        return 0.0, 0.0
    mean = total / num_rows
    variance = square_total / num_rows - mean**2
    return mean, variance**0.5 if variance > _LEAST_VARIATION * mean**2 else 0.0


def js_distance(before: Sequence[int], now: Sequence[int]) -> float:
    """Jensen-Shannon distance (0 to 1) of two counts over the same categories, less what chance causes.

    To second order the divergence is, in nats, 1/8 of the sum of (p - q)² / p. For samples of n and m rows from one
    distribution over k categories this sum, divided by (1/n + 1/m), is chi-squared with k - 1 degrees of freedom.
    Where either counts nothing there is no distance.
    """
    p, q = (np.asarray(counts, dtype=np.float64) for counts in (before, now))
    if not (p.any() and q.any()):
        return 0.0
    num_categories = int(((p + q) > 0).sum())
    chance = chdtri(num_categories - 1, _CHANCE) / 8 * (1 / p.sum() + 1 / q.sum()) if num_categories > 1 else 0.0
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    divergence = (rel_entr(p, middle) + rel_entr(q, middle)).sum() / 2
    return math.sqrt(max(0.0, divergence - chance) / math.log(2))


def mean_change(before: tuple[float, float], now: tuple[float, float], num_rows: int, num_rows_now: int) -> float:
    """How far a mean moved, in standard deviations, less what chance causes; at most 2.

    The standard deviation is that of both sets in equal shares: a set of equal rows has none of its own.

    Args:
        before, now: mean and standard deviation.
    """
    change = abs(now[0] - before[0])
    variance = (before[1] ** 2 + now[1] ** 2) / 2 + change**2 / 4
    if variance < _LEAST_VARIANCE:
        return 0.0
    return math.sqrt(max(0.0, change**2 / variance - chdtri(1, _CHANCE) * (1 / num_rows + 1 / num_rows_now)))


Limits: TypeAlias = tuple[float, float]  # of a distance, of a change of means


@dataclass(frozen=True)
class Movement:
    """One comparison. `before` and `now` are the figures behind the value, for people."""

    against: str
    what: str
    value: float
    limit: float
    before: str
    now: str
    is_beyond: bool

    @classmethod
    def of(cls, against: str, what: str, value: float, limit: float, shown: Sequence[str]) -> Self:
        """Args: shown: the figures before and now."""
        return cls(against, what, (moved := round(value, 4)), limit, shown[0], shown[1], moved > limit)

    def __str__(self) -> str:
        size = f"{self.value:.3f} (limit {self.limit:g})"
        return f"{self.what} moved by {size} against {self.against}: {self.before} → {self.now}"


def label_movement(before: Profile, now: Profile, against: str, limits: Limits) -> Movement:
    """How far the shares of labels moved."""
    both, labels = (before, now), sorted({**before.labels, **now.labels})
    # With several labels a row, a row may also have none.
    mixes = [[*(one.labels.get(label, 0) for label in labels), one.num_rows_unlabelled] for one in both]
    shares = [[count / one.num_rows_scored for count in mix] for one, mix in zip(both, mixes, strict=True)]
    most_moved = max(range(len(labels) + 1), key=lambda index: abs(shares[1][index] - shares[0][index]))
    label = [*labels, "no label"][most_moved]
    shown = [f"{label} {share[most_moved]:.1%}" for share in shares]
    return Movement.of(against, "label mix", js_distance(*mixes), limits[0], shown)


def score_movements(before: Profile, now: Profile, against: str, limits: Limits, what: str = "score") -> list[Movement]:
    """How far scores, or values, moved."""
    scores = [one.score_moments() for one in (before, now)]
    shown = [f"mean {mean:.3f}" for mean, _ in scores]
    change = mean_change(scores[0], scores[1], before.num_rows_scored, now.num_rows_scored)
    return [
        Movement.of(against, f"{what}s", js_distance(before.scores, now.scores), limits[0], shown),
        Movement.of(against, f"mean {what}", change, limits[1], shown),
    ]


def length_movements(before: Profile, now: Profile, against: str, limits: Limits) -> list[Movement]:
    """How far the lengths of texts moved, and how often they are cut."""
    both, num_rows = (before, now), (before.num_rows_scored, now.num_rows_scored)
    # Earlier versions counted rows with an error, too.
    cuts = [min(one.num_rows_truncated, one.num_rows_scored) for one in both]
    truncated = [(cut, rows - cut) for cut, rows in zip(cuts, num_rows, strict=True)]
    lengths = [one.length_moments() for one in both]
    shown_lengths = [f"mean {mean:.1f} tokens" for mean, _ in lengths]
    shown_truncated = [f"{cut / (cut + whole):.1%} of rows" for cut, whole in truncated]
    moved, change = partial(Movement.of, against), mean_change(lengths[0], lengths[1], *num_rows)
    return [
        moved("lengths", js_distance(before.lengths, now.lengths), limits[0], shown_lengths),
        moved("mean length", change, limits[1], shown_lengths),
        moved("truncation", js_distance(*truncated), limits[0], shown_truncated),
    ]
