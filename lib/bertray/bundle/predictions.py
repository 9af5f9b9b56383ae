"""Raw outputs become rows of predictions: the answer of the bundle's task, then tokens and error.

Legend: N rows, C outputs of the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray import schema
from bertray.bundle.info import BundleInfo
from bertray.tasks.task import TASKS
from bertray.tokenization.tokenizer import TokenColumn


def predictions(tokens: TokenColumn, raw_NC: np.ndarray, info: BundleInfo, listed: str | None = None) -> pa.Table:
    """Predictions for N texts, in `schema.prediction_schema`.

    Args:
        raw_NC: logits, NaN for a text without tokens. A row whose outputs are not all finite gets an error.
        listed: `--probabilities` of bertray score.
    """
    is_nan_N = pa.array(~np.isfinite(raw_NC).all(axis=1))
    is_unexplained_N = pc.and_(is_nan_N, tokens.errors.is_null())
    task = TASKS[info.problem_type]
    columns = {
        **task.answer(raw_NC, info),
        schema.NUM_TOKENS: pa.array(tokens.num_tokens_N.astype(np.int32)),
        schema.TRUNCATED: pa.array(tokens.truncated_N),
        schema.ERROR: pc.if_else(is_unexplained_N, "the model's output is not a number", tokens.errors),
    }
    wanted = task.schema(info, listed)
    if listed is not None:
        columns[wanted.names[-1]] = _listed(task.probabilities(raw_NC), wanted[-1].type, info.labels, listed)
    return pa.table([columns[name] for name in wanted.names], schema=wanted)


def _listed(probabilities_NC: np.ndarray, kind: pa.DataType, labels: Sequence[str], listed: str) -> pa.LargeListArray:
    """Of each row all probabilities, or the likeliest labels with theirs; null where they are NaN."""
    num_rows, num_values = probabilities_NC.shape
    values = pa.array(probabilities_NC.ravel())
    if listed != "all":
        num_values = min(num_values, int(listed.removeprefix("top:")))
        best_NK = np.argsort(-probabilities_NC, axis=1, kind="stable")[:, :num_values]
        best = [pa.array(labels, pa.string()).take(pa.array(best_NK.ravel()))]
        best.append(pa.array(np.take_along_axis(probabilities_NC, best_NK, axis=1).ravel()))
        values = pa.StructArray.from_arrays(best, fields=list(kind.value_type))
    ends = pa.array(np.arange(num_rows + 1) * num_values)
    return pa.LargeListArray.from_arrays(ends, values, type=kind, mask=pa.array(np.isnan(probabilities_NC).any(axis=1)))
