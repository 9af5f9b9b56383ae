"""The precision of a bundle. Cheaper arithmetic must cost no accuracy: its labels are compared with torch's in fp32.

1. measure   the accuracy of both on up to `NUM_VALIDATION_ROWS` validation rows of the training data set
2. decide    against it if accuracy drops by more than `MAX_DROP_POINTS`, or if there is no such data
3. keep      the decision. Processes that load a bundle on GPUs without bf16 all follow the one that is kept first, in
             CACHE/<bundle's fingerprint>/fp16.json. `bundle.openvino` keeps its own with the exported model.
4. agree     on what --precision auto is for an output: the first process that loads the bundle takes the best of its
             device and keeps it in OUTPUT/engine/<bundle's fingerprint>/decision.json; all others follow
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bertray.bundle.info import BundleInfo, home_cache
from bertray.data.dataset import Dataset
from bertray.errors import RequestError, UnavailableError
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.tasks.task import TASKS
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn
from bertray.tokenization.windows import aggregate
from bertray.types import RealPrecision, TorchPrecision
from bertray.versions import versions

if TYPE_CHECKING:
    from bertray.bundle.openvino import OpenVinoEncoder
    from bertray.model.encoder import Encoder

_log = logging.getLogger(__name__)

# Points of accuracy that may be lost: 3 labels in 1,000. With fewer than 334 validation rows one label is more.
MAX_DROP_POINTS = 0.3
NUM_VALIDATION_ROWS = 2000  # resolves 0.05 points, and bounds the time


class Decision(BaseModel):
    """Whether a bundle is run in cheaper arithmetic, and why, as it is kept in a cache."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    bundle_fingerprint: str
    note: str  # the decision and its reason, for people
    num_validation_rows: int = 0
    # Of numbers r2 instead of accuracy: see `Task.quality`.
    accuracy_fp32: float | None = None  # torch, on the validation rows
    accuracy_drop_points: float | None = None  # 100 × (accuracy_fp32 - the other); negative: the other is better
    versions: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """The fields for the summary of a job."""
        fields = self.model_dump(exclude_none=True).items()
        measured = {name: value for name, value in fields if name.startswith(("accuracy_", "label_agreement_"))}
        return {"engine_note": self.note, **measured}


class HalfRecord(Decision):
    """The content of fp16.json."""

    is_fp16: bool
    accuracy_fp16: float | None = None
    label_agreement_fp16: float | None = None  # share of the validation rows that get the same label, or labels


class PrecisionDecision(BaseModel, frozen=True):
    """The content of decision.json: what `--precision auto` is for one bundle and output."""

    format_version: Literal[1] = 1
    bundle_fingerprint: str
    engine: Literal["torch"] = "torch"
    precision: RealPrecision
    reason: str  # for people
    quality_lost: float | None = None  # points of accuracy against fp32; None: not measured
    versions: dict[str, str] = Field(default_factory=versions)
    decided_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


def training_data(info: BundleInfo) -> Dataset:
    """The data set that the bundle was trained on, or, if it was adopted, measured on.

    Raises:
        RequestError: it is gone or has changed, or there was none.
    """
    if info.data_fingerprint is None:
        raise RequestError("the bundle was adopted without a data set; bertray adopt --data gives it one")
    dataset = Dataset.open(str(info.training["data"]))
    if dataset.fingerprint() != info.data_fingerprint:
        raise RequestError(f"the data set {dataset.location} is not the one that the bundle was {info.origin} on")
    return dataset


def sample(dataset: Dataset, split: str, num_rows: int, tokenizer: ColumnTokenizer) -> tuple[TokenColumn, np.ndarray]:
    """Up to `num_rows` rows of a split that have a class: their tokens, and their `Dataset.targets`."""
    rows = dataset.in_scope(dataset.split(split))
    chosen = np.random.default_rng(0).choice(rows.num_rows, min(num_rows, rows.num_rows), replace=False)
    rows = rows.take(pa.array(np.sort(chosen)))
    return tokenizer.encode(rows[TEXT]), dataset.targets(rows)


def measure(
    info: BundleInfo, dataset: Dataset, tokenizer: ColumnTokenizer, reference: Encoder, other: Encoder | OpenVinoEncoder
) -> dict[str, Any]:
    """Compare cheaper arithmetic with torch in fp32 on validation rows; returns the fields of a `Decision`."""
    tokens, targets = sample(dataset, "validation", NUM_VALIDATION_ROWS, tokenizer)
    name, task = other.precision, TASKS[info.problem_type]
    _log.info("measuring %s on %d validation rows", name, len(targets))

    def decided(encoder: Encoder | OpenVinoEncoder) -> np.ndarray:
        raw_NC = aggregate(encoder.logits(tokens), tokens.documents_S, len(targets), info.long_documents)
        return task.decided(raw_NC, info)

    expected, found = decided(reference), decided(other)
    accuracy_fp32, accuracy = task.quality(expected, targets), task.quality(found, targets)
    drop_points = 100 * (accuracy_fp32 - accuracy)
    is_allowed = drop_points <= MAX_DROP_POINTS + 1e-9
    note = (
        f"{name}: {task.quality_name} on {len(targets)} validation rows is {accuracy:.4f}, in fp32 "
        f"{accuracy_fp32:.4f}, a drop of {drop_points:.2f} points"
    )
    return {
        f"is_{name}": is_allowed,
        "note": note if is_allowed else f"not {note}, above the limit of {MAX_DROP_POINTS}",
        "num_validation_rows": len(targets),
        "accuracy_fp32": accuracy_fp32,
        f"accuracy_{name}": accuracy,
        "accuracy_drop_points": round(drop_points, 4),
        f"label_agreement_{name}": task.quality(found, expected),
    }


def user_cache() -> Location:
    """Where this user's decisions and exported models are."""
    return home_cache("engine")


def place_of(cache: Location, info: BundleInfo) -> Location:
    """The folder of a bundle in a cache."""
    return cache / info.fingerprint()[:16]


def torch_summary(cache: Location, info: BundleInfo, requested: str, used: str | None) -> dict[str, Any]:
    """The fields about torch's engine for the summary of a job, from the precisions requested and used."""
    asks = requested in ("auto", "fp16") and used in ("fp16", "fp32")
    record = decided_before(cache, info) if asks else None
    summary = {"engine": "torch", **(record.summary() if record and record.is_fp16 == (used == "fp16") else {})}
    decision = decided(cache, info) if requested == "auto" else None
    return {**summary, "engine_note": decision.reason} if decision else summary


def decided_before(cache: Location, info: BundleInfo) -> HalfRecord | None:
    """The kept decision on fp16; None: there is none, or it cannot be read."""
    file = place_of(cache, info) / "fp16.json"
    try:
        if not file.exists():
            return None
        record = HalfRecord.model_validate_json(file.read_bytes())
    except (ValidationError, UnavailableError) as error:
        _log.warning("warning: %s cannot be read, so fp16 is measured again: %s", file, error)
        return None
    return record if (record.format_version, record.bundle_fingerprint) == (1, info.fingerprint()) else None


def half_record(
    cache: Location, info: BundleInfo, tokenizer: ColumnTokenizer, encoder_of: Callable[[TorchPrecision], Encoder]
) -> HalfRecord:
    """Whether the model is run in fp16; decided once for all processes that share a cache.

    Args:
        encoder_of: loads the model in a precision.
    """
    file = place_of(cache, info) / "fp16.json"
    if record := decided_before(cache, info):
        _log.info("%s; decided earlier, remove %s to decide again", record.note, file)
        return record
    facts: dict[str, Any] = {"is_fp16": False}
    try:
        dataset = training_data(info)
    except RequestError as error:
        facts["note"] = f"not fp16, because there are no texts to measure it on: {error}"
        if isinstance(error, UnavailableError):  # not kept: the next process may reach the data
            _log.warning("warning: %s", facts["note"])
            return HalfRecord(bundle_fingerprint=info.fingerprint(), versions=versions(), **facts)
    else:
        facts = measure(info, dataset, tokenizer, encoder_of("fp32"), encoder_of("fp16"))
    record = HalfRecord(bundle_fingerprint=info.fingerprint(), versions=versions(), **facts)
    if record.is_fp16:
        _log.info("%s", record.note)
    else:
        _log.warning("warning: %s", record.note)
    content = f"{record.model_dump_json(indent=2)}\n".encode()
    try:
        if not file.create(content):
            # Another process has decided meanwhile and its decision holds; or the file cannot be read.
            if first := decided_before(cache, info):
                return first
            file.put(content)
    except UnavailableError as error:
        _log.warning("warning: the decision on fp16 cannot be kept, so the next process measures again: %s", error)
    return record


def _decision_file(cache: Location, info: BundleInfo) -> Location:
    return place_of(cache, info) / "decision.json"


def decided(cache: Location, info: BundleInfo) -> PrecisionDecision | None:
    """The kept decision on `--precision auto`; None: nobody has decided.

    Raises:
        RequestError: the file is no decision on this bundle. To decide again might mix two precisions.
    """
    file = _decision_file(cache, info)
    if not file.exists():
        return None
    if not (data := file.read_bytes()):  # without hard links a file is empty for a moment
        time.sleep(1)
        data = file.read_bytes()
    try:
        decision = PrecisionDecision.model_validate_json(data)
        if decision.bundle_fingerprint != info.fingerprint():
            raise ValueError("it is of another bundle")
    except ValueError as error:
        raise RequestError(
            f"{file} does not say what --precision auto is for this output and bundle; it begins with {data[:80]!r}. "
            "Restore it; or remove it, and the next run decides as the shards were scored so far; or say "
            "--precision fp32 --rescore"
        ) from error
    return decision


def keep(cache: Location, info: BundleInfo, decision: PrecisionDecision) -> PrecisionDecision:
    """Keep a decision unless there is one; returns the one that holds."""
    file, content = _decision_file(cache, info), f"{decision.model_dump_json(indent=2)}\n".encode()
    if file.create(content):
        _log.info("--precision auto is %s for this output: %s", decision.precision, decision.reason)
        if not file.is_exclusive(content):
            reason = (
                "no conditional put (If-None-Match), so processes that start at once may differ: name a --precision"
            )
            _log.warning("warning: the store of %s knows %s", file, reason)
    return decided(cache, info) or keep(cache, info, decision)


def agreed_precision(
    cache: Location, info: BundleInfo, best: RealPrecision, device: str, half: Callable[[], HalfRecord]
) -> RealPrecision:
    """The precision of `auto` for all processes that share a cache; the first one decides.

    Args:
        best: what this process would choose, as `model.runtime.resolve_precision` says.
        device: the name of its GPU, or "CPU".
        half: measures fp16, if that is the best.

    Raises:
        RequestError: see `decided`.
        UnavailableError: this device cannot run what was decided.
    """
    host = socket.gethostname()
    if not (decision := decided(cache, info)):
        facts: dict[str, Any] = {
            "precision": best,
            "reason": f"{best} is the best of the {device} of {host}, which loaded the bundle first",
        }
        if best == "fp16":
            record = half()
            facts = {"precision": "fp16" if record.is_fp16 else "fp32", "reason": record.note}
            facts["quality_lost"] = record.accuracy_drop_points if record.is_fp16 else None
        decision = keep(cache, info, PrecisionDecision(bundle_fingerprint=info.fingerprint(), **facts))
    name = decision.precision
    said = f"--precision auto is {name} for this output ({_decision_file(cache, info)}: {decision.reason})"
    # Who has bf16 has it as `best`. A CPU emulates fp16, and bf16 that it lacks, at a tenth of its speed.
    if name not in ("fp32", best) and not (name == "fp16" and device != "CPU"):
        raise UnavailableError(
            f"{said}, and {device} of {host} has no {name} arithmetic. Use machines that have it, or score all again "
            "in what every machine has: --precision fp32 --rescore"
        )
    was_measured = decided_before(cache, info) if best == "fp16" else None
    if name == "fp32" != best and not (was_measured and not was_measured.is_fp16):
        _log.warning(
            "warning: %s; %s could run %s: --precision %s --rescore scores all in it", said, device, best, best
        )
    return name
