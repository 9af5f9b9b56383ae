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
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from bertray.bundle.bundle import Bundle, load_model, load_tokenizer
from bertray.bundle.guard import measure, place_of, sample, torch_summary, training_data, user_cache
from bertray.bundle.info import BundleInfo, opened, read_info
from bertray.errors import BundleError, RequestError
from bertray.model.encoder import Encoder
from bertray.model.openvino_export import convert, openvino_package, quantise
from bertray.storage.location import Location
from bertray.storage.outputs import sha256_of
from bertray.tokenization.batching import pad, padded_batches
from bertray.tokenization.tokenizer import TokenColumn
from bertray.types import Device, Engine, InferencePrecision
from bertray.versions import versions

_log = logging.getLogger(__name__)

MODEL_FILE, WEIGHTS_FILE, RECORD_FILE = "model.xml", "model.bin", "engine.json"
NUM_CALIBRATION_ROWS = 300  # nncf's own default
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
        bundle = Bundle.load(uri, precision, device, cache)
        return bundle, torch_summary(cache or user_cache(), bundle.info, precision, bundle.precision)
    record = prepare(uri, precision, cache or user_cache())
    return load_prepared(uri, precision, cache or user_cache()), record.summary()


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
    return place_of(cache, info) / kind


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
        "pad_id": model.config.pad_token_id or 0,
        "num_labels": len(info.labels),
    }
    if precision in ("auto", "int8"):
        try:
            dataset = training_data(info)
        except RequestError as error:
            facts["note"] = f"not int8, for there are no texts to calibrate and measure it on: {error}"
            _log.warning("warning: openvino: %s", facts["note"])
        else:
            tokens = sample(dataset, "train", NUM_CALIBRATION_ROWS, tokenizer)[0]
            # A long text may be many sequences; calibration takes the same time for all bundles.
            sequences = np.unique(np.linspace(0, len(tokens.lengths_S) - 1, NUM_CALIBRATION_ROWS).astype(int))
            quantised = quantise(graph, tokens, sequences)
            candidate = OpenVinoEncoder(quantised, EngineRecord(**facts, note="", versions={}, files={}, is_int8=True))
            # The model is of no more use to an export then.
            measured = measure(info, dataset, tokenizer, Encoder(model, "fp32", "cpu"), candidate)
            facts |= {
                "is_int8": measured.is_allowed,
                "note": measured.note("int8"),
                "num_calibration_rows": len(sequences),
                "num_validation_rows": measured.num_rows,
                "accuracy_fp32": measured.accuracy_fp32,
                "accuracy_int8": measured.accuracy,
                "accuracy_drop_points": round(measured.drop_points, 4),
                "label_agreement_int8": measured.agreement,
            }
            if facts["is_int8"]:
                graph = quantised
            else:
                _log.warning("warning: openvino: %s", facts["note"])
    else:
        facts["note"] = f"{precision}, as asked"
    facts.setdefault("is_int8", False)
    openvino.save_model(graph, staging / MODEL_FILE, compress_to_fp16=False)
    files = {name: sha256_of(staging / name) for name in (MODEL_FILE, WEIGHTS_FILE)}
    record = EngineRecord(**facts, versions=versions(), files=files)
    (staging / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record
