"""Logits become rows of predictions: label, score, review, error and, with several labels a row, those that are given.

Legend: N rows, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray import schema
from bertray.metrics.calibration import DEFAULT_THRESHOLD, probabilities
from bertray.tokenization.tokenizer import TokenColumn
from bertray.tokenization.windows import offsets
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
    """Predictions for N texts, in `schema.prediction_schema`.

    Args:
        logits_NC: NaN for a text without tokens. A row whose logits are not all finite gets an error.
        thresholds: for each label of a multi-label model; None: `calibration.DEFAULT_THRESHOLD` for all.
        review_below: rows with a lower score have `review` set, as rows without a label always have; None: no others.
    """
    probabilities_NC = probabilities(logits_NC, problem_type)
    is_nan_N = np.isnan(probabilities_NC).any(axis=1)
    is_unexplained_N = pc.and_(pa.array(is_nan_N), tokens.errors.is_null())
    probabilities_NC = np.nan_to_num(probabilities_NC)
    best_N = probabilities_NC.argmax(axis=1)
    score_N = probabilities_NC[np.arange(len(best_N)), best_N]
    # Compared in float64, as readers of the file do: the score is float32, the limit is not rounded to it.
    is_low_N = score_N.astype(np.float64) < (-np.inf if review_below is None else review_below)
    columns = {
        schema.LABEL: pc.take(pa.array(labels, pa.string()), pa.array(best_N, mask=is_nan_N)),
        schema.SCORE: pa.array(score_N, pa.float32(), mask=is_nan_N),
        schema.REVIEW: pa.array(is_low_N | is_nan_N),
        schema.NUM_TOKENS: pa.array(tokens.num_tokens_N.astype(np.int32)),
        schema.TRUNCATED: pa.array(tokens.truncated_N),
        schema.ERROR: pc.if_else(is_unexplained_N, "the model's output is not a number", tokens.errors),
    }
    if problem_type == "multi_label_classification":
        is_given_NC = is_given(probabilities_NC, thresholds) & ~is_nan_N[:, None]
        columns[schema.LABELS] = label_lists(probabilities_NC, is_given_NC, labels, is_nan_N)
    wanted = schema.prediction_schema(problem_type)
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


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
        type=schema.MULTI_LABEL_PREDICTION_SCHEMA.field(schema.LABELS).type,
        mask=None if is_null_N is None else pa.array(is_null_N),
    )
