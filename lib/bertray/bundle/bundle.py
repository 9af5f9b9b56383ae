"""A model bundle, ready to predict. It is one self-contained folder, which Hugging Face tools can read too.

    >>> Bundle.load("bundle").predict(["Python, SQL, Spark"])
    [Prediction(label='Skills', score=0.98, review=False, num_tokens=7, truncated=False, error=None, labels=None,
     value=None, low=None, high=None)]

Loading checks the sha256 of every file. Nothing in a bundle is executable: weights are safetensors, not pickle.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, logging

from bertray.bundle.card import model_card
from bertray.bundle.guard import agreed_precision, half_record, user_cache
from bertray.bundle.info import CARD_FILE, BundleInfo, hash_files, opened
from bertray.bundle.predictions import predictions
from bertray.errors import BundleError, RequestError, ShardError
from bertray.model.encoder import Encoder
from bertray.model.pretrained import NO_CODE
from bertray.model.runtime import ModelThread, device_name, resolve_device, resolve_precision
from bertray.schema import OTHER_IDS
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.tasks.task import TASKS
from bertray.tokenization.columns import check_text_type
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn
from bertray.tokenization.windows import aggregate
from bertray.types import Device, TorchPrecision
from bertray.versions import versions

if TYPE_CHECKING:
    from bertray.bundle.openvino import OpenVinoEncoder

# A list, an array or a series of strings; null: no text.
Texts: TypeAlias = Sequence[str | None] | pa.Array | pa.ChunkedArray


class Prediction(NamedTuple):
    """The prediction for one text. Label, score, labels and numbers are None if there is an `error`."""

    label: str | None  # the likeliest; of a bundle with cuts, the class of the value
    score: float | None  # probability of the label: softmax, or sigmoid for a multi-label model
    # There is an error; the score is below the bundle's `review_below`, if it has one; or the interval holds a cut.
    review: bool
    num_tokens: int  # that the model read, in all windows, special tokens included
    truncated: bool  # the model did not read the end
    error: str | None
    labels: list[str] | None = None  # of a multi-label model: all that reach their threshold, the likeliest first
    value: float | None = None  # of a bundle that gives numbers
    low: float | None = None  # the interval that holds the true value
    high: float | None = None


@dataclass
class Bundle:
    """A fine-tuned classifier, ready to predict. Threads may share it: they take turns with tokenizer and model.

    Attributes:
        model_thread: where `predict_column` and `begin_column` run the model, if not in the caller's thread.
        probabilities: the column that these two add, as of `bertray score --probabilities`.
    """

    info: BundleInfo
    encoder: Encoder | OpenVinoEncoder
    tokenizer: ColumnTokenizer
    model_thread: ModelThread | None = field(default=None, repr=False, compare=False)
    probabilities: str | None = field(default=None, repr=False, compare=False)
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _at_work: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def load(
        cls, uri: str, precision: TorchPrecision = "auto", device: Device = "auto", cache: Location | None = None
    ) -> Bundle:
        """Load and verify a bundle from a path or URI.

        Args:
            precision: auto: bf16 if the device has it, else fp32 on CPUs and fp16 on GPUs. fp16 is used only if it
                loses at most 0.3 points of accuracy on the validation rows, else fp32.
            cache: of an output, where auto is decided once; None: this user's, where the decision on fp16 is kept.

        Raises:
            BundleError: the folder is missing, incomplete or altered.
            RequestError: there is no such device, or it lacks the precision.
            UnavailableError: it lacks what was decided for the output.
        """
        for name, value, allowed in (("precision", precision, TorchPrecision), ("device", device, Device)):
            if value not in get_args(allowed):
                raise RequestError(f"{name} {value!r} is not allowed: use one of {', '.join(get_args(allowed))}")
        with opened(uri) as (folder, info):
            tokenizer = load_tokenizer(folder, info)

            def encoder_of(precision: TorchPrecision) -> Encoder:
                return Encoder(load_model(folder), precision, device)

            there = resolve_device(device)
            real = resolve_precision(precision, there)
            half = partial(half_record, cache or user_cache(), info, tokenizer, encoder_of)
            if precision == "auto" and cache is not None:
                real = agreed_precision(cache, info, real, device_name(there), half)
            elif real == "fp16" and not half().is_fp16:
                real = "fp32"
            return cls(info, encoder_of(real), tokenizer)

    @property
    def precision(self) -> str:
        """The precision in use."""
        return self.encoder.precision

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of `predict_proba`'s columns."""
        return self.info.labels

    @property
    def schema(self) -> pa.Schema:
        """The schema of `predict_column`'s tables."""
        return TASKS[self.info.problem_type].schema(self.info, self.probabilities)

    def predict(self, texts: Texts) -> list[Prediction]:
        """Classify texts, in order. A null or empty text gets an `error` instead of a label.

        Raises:
            RequestError: these are not texts.
        """
        rows = self.predict_column(_as_column(texts)).to_pylist()
        return [Prediction(*map(row.get, Prediction._fields)) for row in rows]

    def predict_proba(self, texts: Texts) -> np.ndarray:
        """The probability of every label, float32 [N, C], in the order of `labels`; NaN for a text with an error.

        With one label a row they add up to 1; with several, each is independent of the others.

        Raises:
            RequestError: these are not texts, or the bundle gives numbers.
        """
        return TASKS[self.info.problem_type].probabilities(self.logits(_as_column(texts))[1])

    def predict_column(self, texts: pa.Array | pa.ChunkedArray) -> pa.Table:
        """Classify an Arrow column: N texts in, a table of N rows in `schema` out.

        Raises:
            ShardError: the column holds no text.
        """
        return self.begin_column(texts)()

    def begin_column(self, texts: pa.Array | pa.ChunkedArray, order: float = 0.0) -> Callable[[], pa.Table]:
        """Tokenize, and let the model's thread begin, if there is one; the result waits for it, see `predict_column`.

        Args:
            order: see `ModelThread.submit`.

        Raises:
            ShardError: the column holds no text.
        """
        tokens, is_fast = self.tokenize(texts)
        answer = partial(self.answer_tokens, tokens)
        if self.model_thread:
            answer = self.model_thread.submit(answer, order).result  # type: ignore[assignment]

        def finish() -> pa.Table:
            table = self.predictions(tokens, answer())
            # Texts of earlier calls may have had other ids: the caller scores the whole shard again.
            return table if is_fast else table.replace_schema_metadata({OTHER_IDS: b""})

        return finish

    def logits(self, texts: pa.Array | pa.ChunkedArray) -> tuple[TokenColumn, np.ndarray]:
        """Tokens of N texts, and logits_NC (float32), NaN for a text without tokens.

        Raises:
            ShardError: the column holds no text.
        """
        tokens, _ = self.tokenize(texts)
        return tokens, self.answer_tokens(tokens)

    def tokenize(self, texts: pa.Array | pa.ChunkedArray) -> tuple[TokenColumn, bool]:
        """Tokens of N texts, and whether the fast tokenizer gave them.

        Raises:
            ShardError: the column holds no text.
        """
        with self._tokenizing:  # it keeps state during a call
            return self.tokenizer.encode(texts), self.tokenizer.is_fast

    def answer_tokens(self, tokens: TokenColumn) -> np.ndarray:
        """logits_NC (float32) of N texts, NaN for a text without tokens."""
        with self._at_work:
            logits_SC = self.encoder.logits(tokens)
        return aggregate(logits_SC, tokens.documents_S, len(tokens.errors), self.info.long_documents)

    def predictions(self, tokens: TokenColumn, logits_NC: np.ndarray) -> pa.Table:
        """Predictions for texts with these logits, in `schema`."""
        return predictions(tokens, logits_NC, self.info, self.probabilities)


def _as_column(texts: Texts) -> pa.Array | pa.ChunkedArray:
    if isinstance(texts, str):
        raise RequestError("give a sequence of strings, not one string: [text]")
    try:
        if isinstance(texts, pa.Array | pa.ChunkedArray):
            check_text_type(texts.type)
            return texts
        return pa.array(texts, pa.large_string(), from_pandas=True)  # NaN is null
    except (ShardError, pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError, TypeError) as error:
        raise RequestError(f"give a sequence of strings: {error}") from error


def load_model(folder: Path) -> Any:
    """The classifier of an opened bundle, in fp32, on the CPU."""
    logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(folder, **NO_CODE, use_safetensors=True)


def load_tokenizer(folder: Path, info: BundleInfo) -> ColumnTokenizer:
    """The tokenizer of an opened bundle.

    Raises:
        BundleError: transformers cannot load it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **NO_CODE)
        vocabulary_size = AutoConfig.from_pretrained(folder, **NO_CODE).vocab_size
    except (OSError, ValueError) as error:  # its files are whole: it needs code of its own, or another transformers
        raise BundleError(f"the bundle, made from {info.encoder}, cannot be loaded: {error}") from error
    return ColumnTokenizer(tokenizer.backend_tokenizer, info.max_length, info.stride, vocabulary_size)


def seal(folder: Path, **facts: Any) -> BundleInfo:
    """Turn a local folder with a saved model and tokenizer into a bundle: write its card and, last, bundle.json.

    Args:
        facts: the fields of `BundleInfo`, except `files` and `versions`.
    """
    info = BundleInfo(files=hash_files(folder), versions=versions(), **facts)
    (folder / CARD_FILE).write_text(model_card(info, folder), encoding="utf-8")
    text = json.dumps(info.model_dump(), indent=2, ensure_ascii=False)
    (folder / BUNDLE_FILE).write_text(text + "\n", encoding="utf-8")
    return info
