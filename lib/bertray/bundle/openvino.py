"""A bundle's model run by OpenVINO on CPUs: exported once, kept in a cache, in int8 where that costs no accuracy.

1. export     the torch model becomes a graph of dynamic shapes; its logits are compared with torch's
                                                                                           [model.openvino_export]
2. quantise   int8 (--precision auto or int8), calibrated on texts that the bundle was trained on
3. gate       accuracy on the validation rows, int8 beside torch fp32; a larger drop than allowed, or no data to
              measure it on: the graph is not quantised, and the reason is kept
4. keep       model.xml, model.bin, and engine.json last:
                CACHE/<bundle's fingerprint>/<int8 or float>/
5. run        sequences of like length in padded batches; where it is not quantised, in bf16 or fp32

A decision holds as long as its cache does, so that one archive is not scored in two precisions; a later OpenVINO reads
what an earlier one wrote.

Legend: S sequences, C classes, B sequences of a batch, L tokens of its longest.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from bertray.bundle.bundle import Bundle, load_model, load_tokenizer
from bertray.bundle.info import BundleInfo, opened, read_info
from bertray.bundle.predictions import is_given
from bertray.data.dataset import Dataset
from bertray.errors import BundleError, RequestError
from bertray.metrics.calibration import probabilities
from bertray.model.encoder import Encoder
from bertray.model.openvino_export import convert, openvino_package, quantise
from bertray.schema import TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import sha256_of
from bertray.tokenization.batching import pad, padded_batches
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn
from bertray.tokenization.windows import aggregate
from bertray.types import Device, Engine, InferencePrecision
from bertray.versions import versions

_log = logging.getLogger(__name__)

MODEL_FILE, WEIGHTS_FILE, RECORD_FILE = "model.xml", "model.bin", "engine.json"
# Points of accuracy that int8 may lose: 3 labels in 1,000. With fewer than 334 validation rows one label alone is more.
MAX_DROP_POINTS = 0.3
NUM_CALIBRATION_ROWS = 300  # nncf's own default
NUM_VALIDATION_ROWS = 2000  # enough to tell 0.05 points; bounds the time that the gate takes
# 512 to 2,048 are within 3 % of each other on a core; two threads share a larger batch better.
TOKEN_BUDGET = 2048


class EngineRecord(BaseModel):
    """What engine.json holds."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    bundle_fingerprint: str
    is_int8: bool
    note: str  # how it was decided, for the log
    pad_id: int
    num_labels: int
    num_calibration_rows: int = 0  # sequences of training texts
    num_validation_rows: int = 0
    accuracy_fp32: float | None = None  # torch, on the validation rows
    accuracy_int8: float | None = None
    accuracy_drop_points: float | None = None  # 100 × (accuracy_fp32 - accuracy_int8); negative: int8 is better
    label_agreement_int8: float | None = None  # share of the validation rows that get the same label, or labels
    versions: dict[str, str]
    files: dict[str, str]  # sha256 of model and weights

    def summary(self) -> dict[str, Any]:
        """What goes into the summary of a job."""
        facts: dict[str, Any] = {"engine": "openvino", "engine_note": self.note}
        if self.accuracy_int8 is not None:
            names = ("accuracy_fp32", "accuracy_int8", "accuracy_drop_points", "label_agreement_int8")
            facts |= {name: getattr(self, name) for name in names}
        return facts


def open_bundle(
    uri: str,
    engine: Engine = "auto",
    precision: InferencePrecision = "auto",
    device: Device = "auto",
    cache: Location | None = None,
) -> tuple[Bundle, dict[str, Any]]:
    """Load a bundle to be run by an engine, exporting it first where the cache does not hold it.

    Returns:
        The bundle, and what the summary should say of the engine.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        RequestError: the engine is not installed, cannot run the model, or the device is not there.
    """
    if engine != "openvino":
        assert precision != "int8"  # the configuration has checked it
        return Bundle.load(uri, precision, device), {"engine": "torch"}
    record = prepare(uri, precision, cache or user_cache())
    return load_prepared(uri, precision, cache or user_cache()), record.summary()


def user_cache() -> Location:
    """Where this user's exported models are kept: $XDG_CACHE_HOME/bertray/engine, by default below ~/.cache."""
    return Location.of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bertray" / "engine"


def prepare(uri: str, precision: InferencePrecision, cache: Location) -> EngineRecord:
    """Have the exported model in the cache; what is there and whole stays as it is.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        RequestError: OpenVINO is not installed or cannot run this model.
    """
    openvino_package()
    info = read_info(Location.of(uri))
    place = _place(cache, info, precision)
    try:
        with _exported(place, info) as (_, record):
            _log.info("openvino: %s; decided before, remove %s to decide anew", record.note, place)
    except _NotExportedError as reason:
        _log.info("openvino: exporting the model (%s)", reason)
        with opened(uri) as (folder, info), tempfile.TemporaryDirectory(prefix="bertray-") as staging:
            record = export(folder, info, precision, Path(staging))
            place.put_folder(Path(staging), last=RECORD_FILE)
        _log.info("openvino: %s; kept in %s", record.note, place)
    return record


def load_prepared(uri: str, precision: InferencePrecision, cache: Location, num_threads: int | None = None) -> Bundle:
    """Load a bundle with the exported model that `prepare` left in the cache.

    Args:
        num_threads: of the processor to use; None: all.

    Raises:
        BundleError: the bundle or the exported model is missing, incomplete or altered.
        RequestError: OpenVINO is not installed here.
    """
    with opened(uri) as (folder, info):
        tokenizer = load_tokenizer(folder, info)
    place = _place(cache, info, precision)
    try:
        with _exported(place, info) as (folder, record):
            encoder = OpenVinoEncoder(folder / MODEL_FILE, record, precision, num_threads)
    except _NotExportedError as reason:
        raise BundleError(f"the exported model at {place} cannot be used: {reason}. Run the job again") from reason
    return Bundle(info, encoder, tokenizer)


class OpenVinoEncoder:
    """An exported model, ready to classify on this machine's processor.

    Args:
        model: an OpenVINO model with inputs input_ids_BL and attention_mask_BL, or the path of its .xml file.
        precision: of what is not quantised; auto and int8: bf16 where the processor has it.
        num_threads: None: all.

    Attributes:
        precision: what it is really run in: int8, bf16 or fp32.
    """

    def __init__(
        self, model: Any, record: EngineRecord, precision: InferencePrecision = "auto", num_threads: int | None = None
    ) -> None:
        openvino = openvino_package()
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            _log.warning("--precision bf16: this processor has no bf16 arithmetic; fp32 is used")
        real: Literal["fp32", "bf16"] = "bf16" if has_bf16 and precision != "fp32" else "fp32"
        self.precision = "int8" if record.is_int8 else real
        self._record = record
        settings = {
            "INFERENCE_PRECISION_HINT": openvino.Type.bf16 if real == "bf16" else openvino.Type.f32,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads or torch.get_num_threads(),
            # Every process would pin its threads to the first cores, those of its neighbours too.
            "ENABLE_CPU_PINNING": False,
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()

    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence."""
        logits_SC = np.empty((len(tokens.lengths_S), self._record.num_labels), dtype=np.float32)
        for rows in padded_batches(tokens.lengths_S, TOKEN_BUDGET):
            inputs = pad(tokens, rows, self._record.pad_id)
            logits_SC[rows] = self._request.infer(list(inputs), share_inputs=True)[0]
        return logits_SC


class _NotExportedError(Exception):
    """Why the cache cannot be used; caught where the model is exported instead."""


def _place(cache: Location, info: BundleInfo, precision: InferencePrecision) -> Location:
    kind = "int8" if precision in ("auto", "int8") else "float"
    return cache / info.fingerprint()[:16] / kind


@contextmanager
def _exported(place: Location, info: BundleInfo) -> Iterator[tuple[Path, EngineRecord]]:
    """An export that is complete, as a local folder, and its record, inside the block.

    Raises:
        _NotExportedError: it is missing, of another bundle, or a file is missing or altered.
    """
    if not (place / RECORD_FILE).exists():
        raise _NotExportedError("not exported yet")
    try:
        record = EngineRecord.model_validate_json((place / RECORD_FILE).read_bytes())
    except ValidationError as error:
        raise _NotExportedError(f"{place / RECORD_FILE} cannot be read") from error
    if record.format_version != 1 or record.bundle_fingerprint != info.fingerprint():
        raise _NotExportedError(f"{place} is of another bundle, or another version of bertray")
    with place.local_copy() as folder:
        for name, expected in record.files.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise _NotExportedError(f"{place / name} is missing or altered")
        yield folder, record


def export(folder: Path, info: BundleInfo, precision: InferencePrecision, staging: Path) -> EngineRecord:
    """Write model, weights and record of a bundle to a folder."""
    openvino = openvino_package()
    model = load_model(folder)
    tokenizer = load_tokenizer(folder, info)
    graph = convert(model, info.max_length)
    facts: dict[str, Any] = {
        "bundle_fingerprint": info.fingerprint(),
        "is_int8": False,
        "pad_id": model.config.pad_token_id or 0,
        "num_labels": len(info.labels),
    }
    if precision in ("auto", "int8"):
        try:
            dataset = _training_data(info)
        except RequestError as error:
            facts["note"] = f"not int8, for there are no texts to calibrate and measure it on: {error}"
            _log.warning("warning: openvino: %s", facts["note"])
        else:
            tokens = _sample(dataset, "train", NUM_CALIBRATION_ROWS, tokenizer)[0]
            # A long text may be many sequences; calibration takes the same time for all bundles.
            sequences = np.unique(np.linspace(0, len(tokens.lengths_S) - 1, NUM_CALIBRATION_ROWS).astype(int))
            quantised = quantise(graph, tokens, sequences)
            facts |= _measure(quantised, model, info, dataset, tokenizer, facts)
            facts["num_calibration_rows"] = len(sequences)
            if facts["is_int8"]:
                graph = quantised
            else:
                _log.warning("warning: openvino: %s", facts["note"])
    else:
        facts["note"] = f"{precision}, as asked"
    openvino.save_model(graph, staging / MODEL_FILE, compress_to_fp16=False)
    files = {name: sha256_of(staging / name) for name in (MODEL_FILE, WEIGHTS_FILE)}
    record = EngineRecord(**facts, versions=versions(), files=files)
    (staging / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def _training_data(info: BundleInfo) -> Dataset:
    """The data set that the bundle was trained on.

    Raises:
        RequestError: it is gone, or not the same any more.
    """
    dataset = Dataset.open(str(info.training["data"]))
    if dataset.fingerprint() != info.data_fingerprint:
        raise RequestError(f"the data set {dataset.location} is not the one that the bundle was trained on")
    return dataset


def _sample(dataset: Dataset, split: str, num_rows: int, tokenizer: ColumnTokenizer) -> tuple[TokenColumn, np.ndarray]:
    """Up to so many rows of a split that have a class: their tokens, and `Dataset.targets` of them."""
    rows = dataset.in_scope(dataset.split(split))
    if rows.num_rows > num_rows:
        chosen = np.random.default_rng(0).choice(rows.num_rows, num_rows, replace=False)
        rows = rows.take(pa.array(np.sort(chosen)))
    return tokenizer.encode(rows[TEXT]), dataset.targets(rows)


def _measure(
    quantised: Any, model: Any, info: BundleInfo, dataset: Dataset, tokenizer: ColumnTokenizer, facts: dict[str, Any]
) -> dict[str, Any]:
    """The gate: accuracy of int8 and of torch fp32 on validation rows, and whether int8 may be used.

    With several labels a row, accuracy is the share of rows whose labels are all right and complete. The model is left
    as torch's engine wants it, and of no more use to an export.
    """
    tokens, targets = _sample(dataset, "validation", NUM_VALIDATION_ROWS, tokenizer)
    _log.info("openvino: measuring int8 on %d validation rows", len(targets))

    def decided(encoder: Encoder | OpenVinoEncoder) -> np.ndarray:
        """As targets are: label ids, or which labels each row is given."""
        logits_NC = aggregate(encoder.logits(tokens), tokens.documents_S, len(targets), info.long_documents)
        if info.problem_type == "multi_label_classification":
            return is_given(np.nan_to_num(probabilities(logits_NC, info.problem_type)), info.thresholds)
        return np.asarray(np.nan_to_num(logits_NC).argmax(axis=1))

    def agreement(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.mean((one == other).reshape(len(one), -1).all(axis=1)))

    decided_fp32 = decided(Encoder(model, "fp32", "cpu"))
    candidate = EngineRecord(**{**facts, "is_int8": True}, note="", versions={}, files={})
    decided_int8 = decided(OpenVinoEncoder(quantised, candidate))
    accuracy_fp32, accuracy_int8 = (agreement(one, targets) for one in (decided_fp32, decided_int8))
    drop_points = 100 * (accuracy_fp32 - accuracy_int8)
    is_int8 = bool(drop_points <= MAX_DROP_POINTS + 1e-9)
    what = (
        f"accuracy on {len(targets)} validation rows is {accuracy_int8:.4f}, in fp32 {accuracy_fp32:.4f}, "
        f"a drop of {drop_points:.2f} points"
    )
    return {
        "is_int8": is_int8,
        "note": f"int8: {what}" if is_int8 else f"not int8: {what}, above the limit of {MAX_DROP_POINTS}",
        "num_validation_rows": len(targets),
        "accuracy_fp32": accuracy_fp32,
        "accuracy_int8": accuracy_int8,
        "accuracy_drop_points": round(drop_points, 4),
        "label_agreement_int8": agreement(decided_int8, decided_fp32),
    }
