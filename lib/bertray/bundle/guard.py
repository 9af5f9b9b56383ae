"""Cheaper arithmetic is used where it costs no accuracy: labels of validation rows, beside those of torch in fp32.

1. measure   accuracy of both on up to `NUM_VALIDATION_ROWS` validation rows of the data set that it was trained on
2. decide    a larger drop than `MAX_DROP_POINTS`, or no such data: it is not used, and the reason is kept
3. keep      of processes that load the bundle on GPUs without bf16 and decide on fp16, the first; all follow it:
               CACHE/<bundle's fingerprint>/fp16.json

Of int8, whose graph is kept too, `bundle.openvino` has the steps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from bertray.bundle.info import BundleInfo
from bertray.bundle.predictions import is_given
from bertray.data.dataset import Dataset
from bertray.errors import RequestError, UnavailableError
from bertray.metrics.calibration import probabilities
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn
from bertray.tokenization.windows import aggregate
from bertray.versions import versions

if TYPE_CHECKING:
    from bertray.bundle.bundle import Classifier

Half = Literal["fp32", "fp16"]

_log = logging.getLogger(__name__)

# Points of accuracy that may be lost: 3 labels in 1,000. With fewer than 334 validation rows one label alone is more.
MAX_DROP_POINTS = 0.3
NUM_VALIDATION_ROWS = 2000  # enough to tell 0.05 points; bounds the time that it takes


class Measured(NamedTuple):
    """What cheaper arithmetic costs.

    Attributes:
        accuracy_fp32, accuracy: in fp32 and in the other; with several labels a row, the share of rows whose labels are
            all right and complete.
        agreement: share of the rows that get the same label, or labels, in both.
    """

    num_rows: int
    accuracy_fp32: float
    accuracy: float
    agreement: float

    @property
    def drop_points(self) -> float:
        """100 × (accuracy_fp32 - accuracy); negative: the other is better."""
        return 100 * (self.accuracy_fp32 - self.accuracy)

    @property
    def is_allowed(self) -> bool:
        return self.drop_points <= MAX_DROP_POINTS + 1e-9

    def note(self, name: str) -> str:
        """What was decided, and why, for people."""
        what = (
            f"accuracy on {self.num_rows} validation rows is {self.accuracy:.4f}, in fp32 {self.accuracy_fp32:.4f}, "
            f"a drop of {self.drop_points:.2f} points"
        )
        return f"{name}: {what}" if self.is_allowed else f"not {name}: {what}, above the limit of {MAX_DROP_POINTS}"


def training_data(info: BundleInfo) -> Dataset:
    """The data set that the bundle was trained on.

    Raises:
        RequestError: it is gone, or not the same any more.
    """
    dataset = Dataset.open(str(info.training["data"]))
    if dataset.fingerprint() != info.data_fingerprint:
        raise RequestError(f"the data set {dataset.location} is not the one that the bundle was trained on")
    return dataset


def sample(dataset: Dataset, split: str, num_rows: int, tokenizer: ColumnTokenizer) -> tuple[TokenColumn, np.ndarray]:
    """Up to so many rows of a split that have a class: their tokens, and `Dataset.targets` of them."""
    rows = dataset.in_scope(dataset.split(split))
    if rows.num_rows > num_rows:
        chosen = np.random.default_rng(0).choice(rows.num_rows, num_rows, replace=False)
        rows = rows.take(pa.array(np.sort(chosen)))
    return tokenizer.encode(rows[TEXT]), dataset.targets(rows)


def measure(
    info: BundleInfo, dataset: Dataset, tokenizer: ColumnTokenizer, reference: Classifier, other: Classifier
) -> Measured:
    """Compare two ways to run a bundle's model on validation rows; the reference is torch in fp32."""
    tokens, targets = sample(dataset, "validation", NUM_VALIDATION_ROWS, tokenizer)
    _log.info("measuring %s on %d validation rows", other.precision, len(targets))

    def decided(classifier: Classifier) -> np.ndarray:
        """As targets are: label ids, or which labels each row is given; of no number, none."""
        logits_NC = aggregate(classifier.logits(tokens), tokens.documents_S, len(targets), info.long_documents)
        if info.problem_type == "multi_label_classification":
            return is_given(np.nan_to_num(probabilities(logits_NC, info.problem_type)), info.thresholds)
        return np.where(np.isfinite(logits_NC).all(axis=1), logits_NC.argmax(axis=1), -1)

    def agreement(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean((one == other).reshape(len(one), -1).all(axis=1)))

    decided_reference, decided_other = decided(reference), decided(other)
    return Measured(
        len(targets),
        agreement(decided_reference, targets),
        agreement(decided_other, targets),
        agreement(decided_reference, decided_other),
    )


class HalfRecord(BaseModel):
    """What fp16.json holds: whether the model is run in fp16."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    bundle_fingerprint: str
    is_fp16: bool
    note: str  # how it was decided, for the log
    num_validation_rows: int = 0
    accuracy_fp32: float | None = None
    accuracy_fp16: float | None = None
    accuracy_drop_points: float | None = None
    label_agreement_fp16: float | None = None
    versions: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """What goes into the summary of a job."""
        names = ("accuracy_fp32", "accuracy_fp16", "accuracy_drop_points", "label_agreement_fp16")
        facts = {} if self.accuracy_fp16 is None else {name: getattr(self, name) for name in names}
        return {"engine_note": self.note, **facts}


def user_cache() -> Location:
    """Where this user's decisions and exported models are: $XDG_CACHE_HOME/bertray/engine, by default in ~/.cache."""
    return Location.of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bertray" / "engine"


def place_of(cache: Location, info: BundleInfo) -> Location:
    """Where a cache keeps what belongs to a bundle."""
    return cache / info.fingerprint()[:16]


def torch_summary(cache: Location, info: BundleInfo, asked: str, used: str | None) -> dict[str, Any]:
    """What the summary of a job should say of torch's engine.

    Args:
        asked: the precision that the job was told.
        used: the one that the model was run in.
    """
    facts: dict[str, Any] = {"engine": "torch"}
    if asked in ("auto", "fp16") and used in ("fp16", "fp32"):
        record = decided_before(cache, info)
        if record and record.is_fp16 == (used == "fp16"):
            facts |= record.summary()
    return facts


def decided_before(cache: Location, info: BundleInfo) -> HalfRecord | None:
    """What was decided of fp16; None: nothing yet, or it cannot be read."""
    file = place_of(cache, info) / "fp16.json"
    try:
        if not file.exists():
            return None
        record = HalfRecord.model_validate_json(file.read_bytes())
    except (ValidationError, UnavailableError) as error:
        _log.warning("warning: %s cannot be read; what it says is decided anew: %s", file, error)
        return None
    is_ours = (record.format_version, record.bundle_fingerprint) == (1, info.fingerprint())
    return record if is_ours else None


def decide_half(
    cache: Location, info: BundleInfo, tokenizer: ColumnTokenizer, encoder_of: Callable[[Half], Classifier]
) -> HalfRecord:
    """Whether the model is run in fp16, decided once for all that share a cache.

    Args:
        encoder_of: the model, newly loaded.
    """
    file = place_of(cache, info) / "fp16.json"
    if record := decided_before(cache, info):
        _log.info("%s; decided before, remove %s to decide anew", record.note, file)
        return record
    facts: dict[str, Any] = {"bundle_fingerprint": info.fingerprint(), "versions": versions()}
    try:
        dataset = training_data(info)
    except RequestError as error:
        note = f"not fp16, for there are no texts to measure it on: {error}"
        record = HalfRecord(is_fp16=False, note=note, **facts)
        if isinstance(error, UnavailableError):  # they may be there at the next try, and what is kept holds for good
            _log.warning("warning: %s", note)
            return record
    else:
        measured = measure(info, dataset, tokenizer, encoder_of("fp32"), encoder_of("fp16"))
        record = HalfRecord(
            is_fp16=measured.is_allowed,
            note=measured.note("fp16"),
            num_validation_rows=measured.num_rows,
            accuracy_fp32=measured.accuracy_fp32,
            accuracy_fp16=measured.accuracy,
            accuracy_drop_points=round(measured.drop_points, 4),
            label_agreement_fp16=measured.agreement,
            **facts,
        )
    if record.is_fp16:
        _log.info("%s", record.note)
    else:
        _log.warning("warning: %s", record.note)
    try:
        if not file.create(f"{record.model_dump_json(indent=2)}\n".encode()):
            # Another process was faster, and what it decided holds; or the file there cannot be read.
            if first := decided_before(cache, info):
                return first
            file.put(f"{record.model_dump_json(indent=2)}\n".encode())
    except UnavailableError as error:
        _log.warning("warning: what was decided is not kept, and will be decided again: %s", error)
    return record
