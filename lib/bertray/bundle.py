"""A model bundle: one self-contained folder that every part of the project, and any Hugging Face tool, can read.

    bundle/
      config.json, model.safetensors       the classifier, labels in its id2label
      tokenizer.json, …                    its tokenizer
      README.md                            the model card
      bundle.json                          what is here: sha256 of every file, labels, length, origin, metrics; last

    >>> Bundle.load("bundle").predict(["Python, SQL, Spark"])
    [Prediction(label='Skills', score=0.98, num_tokens=7, truncated=False, error=None)]

Loading checks every file against its sha256. Nothing in a bundle is executable: weights are safetensors, no pickle.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from bertray.choices import Device, LongDocuments, Precision, ProblemType
from bertray.encoder import Encoder, probabilities
from bertray.errors import BundleError, RequestError
from bertray.report import model_card
from bertray.schema import PREDICTION_SCHEMA
from bertray.storage import Location
from bertray.tokenization import ColumnTokenizer, TokenColumn
from bertray.versions import versions
from bertray.windows import aggregate

BUNDLE_FILE, CARD_FILE = "bundle.json", "README.md"


class BundleInfo(BaseModel):
    """What bundle.json holds."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    labels: tuple[str, ...]  # by id
    problem_type: ProblemType = "single_label_classification"
    max_length: int  # tokens of a window, special tokens included
    long_documents: LongDocuments = "truncate"  # what is read of a text that is longer; see bertray.windows
    stride: int | None = None  # tokens that its neighbouring windows share at least; None: truncate
    encoder: str  # what was fine-tuned: Hub id, folder or package
    data_fingerprint: str  # Dataset.fingerprint() of the training data
    training: dict[str, Any]  # the job's configuration
    metrics: dict[str, float]  # of the kept epoch, on validation
    history: list[dict[str, float]]  # one entry an epoch
    versions: dict[str, str]  # of Python and the packages that matter
    files: dict[str, str]  # sha256 of every other file but the card, which a person may edit

    @model_validator(mode="after")
    def _stride_belongs_to_windows(self) -> Self:
        if (self.stride is None) != (self.long_documents == "truncate"):
            raise ValueError(f"long_documents {self.long_documents} does not go with stride {self.stride}")
        return self

    def fingerprint(self) -> str:
        """What makes two bundles predict alike: the same files, read in the same way."""
        read = {"files": self.files, "max_length": self.max_length, "long_documents": self.long_documents}
        if self.stride is not None:  # added later: a bundle that truncates keeps its fingerprint, and its archive
            read["stride"] = self.stride
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


class Prediction(NamedTuple):
    """What the model says of one text; `label` and `score` are None where `error` is not."""

    label: str | None
    score: float | None  # probability of the label: softmax, or sigmoid of a multi-label model
    num_tokens: int  # read by the model, special tokens included, in all windows
    truncated: bool
    error: str | None


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
        """Classify an Arrow column: N texts in, a table of N rows in `schema.PREDICTION_SCHEMA` out.

        Raises:
            ShardError: the column holds no text.
        """
        with self._turn:  # tokenizer and encoder keep what they are at work on
            tokens = self.tokenizer.encode(texts)
            logits_SC = self.encoder.logits(tokens)
        logits_NC = aggregate(logits_SC, tokens.documents_S, len(tokens.errors), self.info.long_documents)
        probabilities_NC = probabilities(logits_NC, self.info.problem_type)
        not_a_number_N = np.isnan(probabilities_NC).any(axis=1)  # also where there was nothing to read
        errors = pc.if_else(
            pc.and_(pa.array(not_a_number_N), tokens.errors.is_null()),
            "the model's output is not a number",
            tokens.errors,
        )
        best_N = np.nan_to_num(probabilities_NC).argmax(axis=1)
        columns = [
            pa.DictionaryArray.from_arrays(
                pa.array(best_N.astype(np.int32), mask=not_a_number_N), pa.array(self.info.labels, pa.string())
            ).cast(pa.string()),
            pa.array(probabilities_NC[np.arange(len(best_N)), best_N], pa.float32(), mask=not_a_number_N),
            pa.array(tokens.num_tokens_N.astype(np.int32)),
            pa.array(tokens.truncated_N),
            errors,
        ]
        return pa.table(columns, schema=PREDICTION_SCHEMA)


@contextmanager
def opened(uri: str) -> Iterator[tuple[Path, BundleInfo]]:
    """A bundle's folder as a verified local one, and its bundle.json, inside the block.

    Raises:
        BundleError: the folder is missing, incomplete or altered.
    """
    location = Location.of(uri)
    info = read_info(location)
    with location.local_copy() as folder:
        verify(folder, info, uri)
        yield folder, info


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
    info = BundleInfo(files=_hash_files(folder), versions=versions(), **facts)
    (folder / CARD_FILE).write_text(model_card(info), encoding="utf-8")
    text = json.dumps(info.model_dump(), indent=2, ensure_ascii=False)
    (folder / BUNDLE_FILE).write_text(text + "\n", encoding="utf-8")
    return info


def read_info(location: Location) -> BundleInfo:
    """Read bundle.json without loading the model.

    Raises:
        BundleError: it is missing or not what jobs.train writes.
    """
    file = location / BUNDLE_FILE
    if not file.exists():
        raise BundleError(
            f"{location} is no model bundle: it has no {BUNDLE_FILE}. Make one with "
            f"python -m jobs.train --data DATASET --output {location}"
        )
    try:
        info = BundleInfo.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise BundleError(f"{file} cannot be read: {wrong}. Train the bundle again") from error
    if info.format_version != 1:
        raise BundleError(f"{file} is of format {info.format_version}; this version of bertray reads format 1")
    return info


def verify(folder: Path, info: BundleInfo, name: str) -> None:
    """Check every file of a bundle against its recorded sha256.

    Raises:
        BundleError: a file is missing, differs, or was not there when the bundle was made.
    """
    if added := sorted(_content(folder) - set(info.files)):
        raise BundleError(f"the bundle {name} was altered: {', '.join(added)} is not its own. Take it out")
    for file, expected in info.files.items():
        path = folder / file
        if not path.is_file():
            raise BundleError(f"the bundle {name} is incomplete: {file} is missing. Copy or train it again")
        actual = sha256_of(path)
        if actual != expected:
            raise BundleError(
                f"the bundle {name} was altered: {file} has sha256 {actual[:12]}…, bundle.json says {expected[:12]}…. "
                "Copy or train it again"
            )


def sha256_of(path: Path) -> str:
    """The file's sha256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a bundle folder but bundle.json and the card, by relative path."""
    return {name: sha256_of(folder / name) for name in sorted(_content(folder))}


def _content(folder: Path) -> set[str]:
    """Files of a bundle that predictions may depend on; hidden ones are other tools' notes."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names - {BUNDLE_FILE, CARD_FILE} if not name.startswith(".")}
