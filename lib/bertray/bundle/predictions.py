"""Raw outputs become rows of predictions: the answer of the bundle's task, then tokens and error.

Legend: N rows, C outputs of the model.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray import schema
from bertray.bundle.info import BundleInfo
from bertray.tasks.multi_label import is_given as is_given
from bertray.tasks.task import TASKS
from bertray.tokenization.tokenizer import TokenColumn


def predictions(tokens: TokenColumn, raw_NC: np.ndarray, info: BundleInfo) -> pa.Table:
    """Predictions for N texts, in `schema.prediction_schema`.

    Args:
        raw_NC: logits, NaN for a text without tokens. A row whose outputs are not all finite gets an error.
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
    wanted = task.schema(info)
    return pa.table([columns[name] for name in wanted.names], schema=wanted)
