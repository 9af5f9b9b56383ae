"""A model bundle, ready to predict: one self-contained folder, which any Hugging Face tool can read too.

    >>> Bundle.load("bundle").predict(["Python, SQL, Spark"])
    [Prediction(label='Skills', score=0.98, review=False, num_tokens=7, truncated=False, error=None, labels=None)]

Loading checks every file against its sha256. Nothing in a bundle is executable: weights are safetensors, no pickle.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from bertray.bundle_folder import BUNDLE_FILE, CARD_FILE, BundleInfo, hash_files, opened
from bertray.calibration import DEFAULT_THRESHOLD, probabilities
from bertray.choices import Device, Precision, ProblemType
from bertray.encoder import Encoder
from bertray.errors import RequestError
from bertray.ragged import offsets
from bertray.report import model_card
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
from bertray.tokenization import ColumnTokenizer, TokenColumn
from bertray.versions import versions
from bertray.windows import aggregate


class Prediction(NamedTuple):
    """What the model says of one text; `label`, `score` and `labels` are None where `error` is not."""

    label: str | None  # the likeliest
    score: float | None  # probability of the label: softmax, or sigmoid of a multi-label model
    review: bool  # the score is below the bundle's `review_below`, or there is none
    num_tokens: int  # read by the model, special tokens included, in all windows
    truncated: bool
    error: str | None
    labels: list[str] | None = None  # of a multi-label model: all that reach their threshold, likeliest first


class Classifier(Protocol):
    """What runs the model: `bertray.encoder.Encoder`, or that of another engine."""

    @property
    def precision(self) -> str:
        """Of the arithmetic that is really used."""

    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence."""


@dataclass
class Bundle:
    """A fine-tuned classifier, ready to predict; several threads may share it, and take turns."""

    info: BundleInfo
    encoder: Classifier
    tokenizer: ColumnTokenizer
    _turn: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def load(cls, uri: str, precision: Precision = "auto", device: Device = "auto") -> Bundle:
        """Load and verify a bundle from a path or URI.

        Raises:
            BundleError: the folder is missing, incomplete or altered.
            RequestError: the device is not there, or lacks the precision.
        """
        with opened(uri) as (folder, info):
            model, tokenizer = load_model(folder), load_tokenizer(folder, info)
        return cls(info, Encoder(model, precision, device), tokenizer)

    @property
    def precision(self) -> str:
        """What the model is really run in."""
        return self.encoder.precision

    @property
    def schema(self) -> pa.Schema:
        """Of what `predict_column` gives."""
        return prediction_schema(self.info.problem_type)

    def predict(self, texts: Sequence[str | None]) -> list[Prediction]:
        """Classify texts, in order. A null or empty text gets an `error` instead of a label."""
        if isinstance(texts, str):
            raise RequestError("predict takes a sequence of strings, not one string: predict([text])")
        try:
            column = pa.array(texts, pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
            raise RequestError(f"predict takes a sequence of strings: {error}") from error
        return [Prediction(**row) for row in self.predict_column(column).to_pylist()]

    def predict_column(self, texts: pa.Array | pa.ChunkedArray) -> pa.Table:
        """Classify an Arrow column: N texts in, a table of N rows in `schema` out.

        Raises:
            ShardError: the column holds no text.
        """
        return self.predictions(*self.logits(texts))

    def logits(self, texts: pa.Array | pa.ChunkedArray) -> tuple[TokenColumn, np.ndarray]:
        """Tokens of N texts, and logits_NC (float32), NaN of a text without tokens.

        Raises:
            ShardError: the column holds no text.
        """
        with self._turn:  # tokenizer and encoder keep what they are at work on
            tokens = self.tokenizer.encode(texts)
            logits_SC = self.encoder.logits(tokens)
        return tokens, aggregate(logits_SC, tokens.documents_S, len(tokens.errors), self.info.long_documents)

    def predictions(self, tokens: TokenColumn, logits_NC: np.ndarray) -> pa.Table:
        """What the bundle says of texts with these logits, in `schema`."""
        info = self.info
        return predictions(
            tokens,
            logits_NC,
            info.labels,
            info.problem_type,
            thresholds=info.thresholds,
            review_below=info.review_below,
        )


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


def load_model(folder: Path) -> Any:
    """The classifier of an opened bundle, fp32, on the CPU."""
    transformers_logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True, use_safetensors=True)


def load_tokenizer(folder: Path, info: BundleInfo) -> ColumnTokenizer:
    """The tokenizer of an opened bundle."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return ColumnTokenizer(tokenizer.backend_tokenizer, info.max_length, info.stride)


def seal(folder: Path, **facts: Any) -> BundleInfo:
    """Make a folder with a saved model and tokenizer a bundle: write its card and, last, bundle.json.

    Args:
        folder: local.
        facts: the fields of `BundleInfo` but `files` and `versions`, which are found out here.
    """
    info = BundleInfo(files=hash_files(folder), versions=versions(), **facts)
    (folder / CARD_FILE).write_text(model_card(info, folder), encoding="utf-8")
    text = json.dumps(info.model_dump(), indent=2, ensure_ascii=False)
    (folder / BUNDLE_FILE).write_text(text + "\n", encoding="utf-8")
    return info
