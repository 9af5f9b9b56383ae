"""Logits become rows of predictions: label, score, review, error, and of several labels those that are given.

Legend: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.metrics.calibration import DEFAULT_THRESHOLD, probabilities
from bertray.schema import (
    ERROR,
    LABEL,
    LABELS,
    MULTI_LABEL_PREDICTION_SCHEMA,
    NUM_TOKENS,
    REVIEW,
    SCORE,
    TRUNCATED,
    prediction_schema,
)
from bertray.tokenization.ragged import offsets
from bertray.tokenization.tokenizer import TokenColumn
from bertray.types import ProblemType


def predictions(
    tokens: TokenColumn,
    logits_NC: np.ndarray,
    labels: Sequence[str],
    problem_type: ProblemType,
    *,
    thresholds: Sequence[float] | None = None,
    review_below: float | None = None,
) -> pa.Table:
    """What is said of N texts, in `schema.prediction_schema`; logits of a text without tokens are NaN.

    Args:
        thresholds: of each label, of a multi-label model; None: `calibration.DEFAULT_THRESHOLD` of all.
        review_below: a lower score, or none, is to be reviewed; None: no row is.
    """
    probabilities_NC = probabilities(logits_NC, problem_type)
    not_a_number_N = np.isnan(probabilities_NC).any(axis=1)  # also where there was nothing to read
    errors = pc.if_else(
        pc.and_(pa.array(not_a_number_N), tokens.errors.is_null()),
        "the model's output is not a number",
        tokens.errors,
    )
    probabilities_NC = np.nan_to_num(probabilities_NC)
    best_N = probabilities_NC.argmax(axis=1)
    score_N = probabilities_NC[np.arange(len(best_N)), best_N]
    columns = {
        LABEL: pc.take(pa.array(labels, pa.string()), pa.array(best_N, mask=not_a_number_N)),
        SCORE: pa.array(score_N, pa.float32(), mask=not_a_number_N),
        # As readers of the file compare: the score is float32, the limit is not rounded to it.
        REVIEW: pa.array(
            np.zeros_like(not_a_number_N)
            if review_below is None
            else not_a_number_N | (score_N.astype(np.float64) < review_below)
        ),
        NUM_TOKENS: pa.array(tokens.num_tokens_N.astype(np.int32)),
        TRUNCATED: pa.array(tokens.truncated_N),
        ERROR: errors,
    }
    if problem_type == "multi_label_classification":
        is_given_NC = is_given(probabilities_NC, thresholds) & ~not_a_number_N[:, None]
        columns[LABELS] = label_lists(probabilities_NC, is_given_NC, labels, not_a_number_N)
    schema = prediction_schema(problem_type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def is_given(probabilities_NC: np.ndarray, thresholds: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Which labels each row is given (bool [N, C]): those whose probability reaches their threshold."""
    return np.asarray(probabilities_NC >= (DEFAULT_THRESHOLD if thresholds is None else np.array(thresholds)))


def label_lists(
    probabilities_NC: np.ndarray, is_given_NC: np.ndarray, labels: Sequence[str], is_null_N: np.ndarray | None = None
) -> pa.ListArray:
    """The labels that each row is given, the likeliest first; null where `is_null_N`."""
    rows, label_ids = np.nonzero(is_given_NC)
    by_probability = np.lexsort((label_ids, -probabilities_NC[rows, label_ids], rows))
    return pa.ListArray.from_arrays(
        pa.array(offsets(is_given_NC.sum(axis=1)), pa.int32()),
        pc.take(pa.array(labels, pa.string()), pa.array(label_ids[by_probability])),
        type=MULTI_LABEL_PREDICTION_SCHEMA.field(LABELS).type,
        mask=None if is_null_N is None else pa.array(is_null_N),
    )
