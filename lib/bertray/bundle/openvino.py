"""Run a bundle's model with OpenVINO on CPUs: exported once, kept in a cache, in int8 if that costs no accuracy.

1. export     the torch model becomes a graph of dynamic shapes, and its logits are compared with torch's
2. quantise   to int8 (--precision auto or int8), calibrated on texts that the bundle was trained on
3. guard      int8 is used only if it keeps the accuracy of torch in fp32                          [bundle.guard]
4. keep       model.xml, model.bin, and engine.json last:
                CACHE/<bundle's fingerprint>/<int8 or float>/
5. run        sequences of similar length in padded batches; what is not quantised runs in bf16 or fp32

A decision holds as long as its cache exists, so that one archive is not scored in two precisions. A later OpenVINO
reads the graph of an earlier one.

Legend: S sequences, C classes, B sequences of a batch, L tokens of its longest.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

from bertray.bundle.bundle import Bundle, load_model, load_tokenizer
from bertray.bundle.guard import Decision, measure, place_of, sample, torch_summary, training_data, user_cache
from bertray.bundle.info import BundleInfo, opened, read_info
from bertray.errors import BundleError, RequestError, missing_extra
from bertray.model.adapter import Layout, probe_sequences
from bertray.model.encoder import Encoder
from bertray.model.runtime import TOKEN_BUDGET
from bertray.storage.location import Location
from bertray.storage.outputs import sha256_of
from bertray.storage.patience import alive
from bertray.tokenization.batching import pad, padded_batches
from bertray.tokenization.tokenizer import TokenColumn
from bertray.types import Engine, InferencePrecision
from bertray.versions import versions

_log = logging.getLogger(__name__)

MODEL_FILE, WEIGHTS_FILE, RECORD_FILE = "model.xml", "model.bin", "engine.json"
NUM_CALIBRATION_ROWS = 300  # nncf's own default
# Between torch and an exported fp32 graph: rounding is 1e-6; a graph that fits only one length is far off.
_EXPORT_TOLERANCE = 1e-3


class EngineRecord(Decision):
    """The content of engine.json."""

    is_int8: bool
    pad_id: int
    num_calibration_rows: int = 0  # sequences of training texts
    accuracy_int8: float | None = None
    label_agreement_int8: float | None = None  # share of the validation rows that get the same label, or labels
    files: dict[str, str]  # sha256 of model and weights

    def summary(self) -> dict[str, Any]:
        """The fields for the summary of a job."""
        return {"engine": "openvino", **super().summary()}


def open_bundle(
    uri: str, engine: Engine = "auto", precision: InferencePrecision = "auto", cache: Location | None = None
) -> tuple[Bundle, dict[str, Any]]:
    """A bundle for an engine, and the fields about the engine for the summary.

    OpenVINO's export is made if the cache (by default this user's) lacks it.
    """
    place = cache or user_cache()
    if engine == "openvino":
        record = prepare(uri, precision, place)
        return load_prepared(uri, precision, place), record.summary()
    assert precision != "int8"  # the configuration has checked it
    bundle = Bundle.load(uri, precision, cache=cache)
    return bundle, torch_summary(place, bundle.info, precision, bundle.precision)


def prepare(uri: str, precision: InferencePrecision, cache: Location) -> EngineRecord:
    """Export the model into the cache, unless a complete export is there.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        RequestError: OpenVINO is not installed or cannot run this model.
    """
    optional_package("openvino")
    info = read_info(Location.of(uri))
    place = _place(cache, info, precision)
    try:
        with _exported(place, info) as (_, record):
            _log.info("openvino: %s; decided earlier, remove %s to decide again", record.note, place)
    except BundleError:
        _log.info("openvino: exporting the model to %s", place)
        with opened(uri) as (folder, info), tempfile.TemporaryDirectory(prefix="bertray-") as staging:
            record = export(folder, info, precision, Path(staging))
            place.put_folder(Path(staging), last=RECORD_FILE)
        _log.info("openvino: %s", record.note)
    return record


def load_prepared(uri: str, precision: InferencePrecision, cache: Location, num_threads: int = 0) -> Bundle:
    """Load a bundle with the exported model that `prepare` put into the cache; 0 threads are all.

    Raises:
        BundleError: the bundle or the exported model is missing, incomplete or altered.
        RequestError: OpenVINO is not installed.
    """
    with opened(uri) as (folder, info):
        tokenizer = load_tokenizer(folder, info)
    with _exported(_place(cache, info, precision), info) as (folder, record):
        encoder = OpenVinoEncoder(folder / MODEL_FILE, record.pad_id, record.is_int8, precision, num_threads)
    return Bundle(info, encoder, tokenizer)


class OpenVinoEncoder:
    """An exported model, ready to classify on this machine's processor.

    Args:
        model: an OpenVINO model with inputs input_ids_BL and attention_mask_BL, or the path of its .xml file.
        precision: of the operations that are not quantised; auto and int8: bf16 if the processor has it.
    """

    def __init__(
        self, model: Any, pad_id: int, is_int8: bool, precision: InferencePrecision = "auto", num_threads: int = 0
    ) -> None:
        openvino = optional_package("openvino")
        core = openvino.Core()
        has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and not has_bf16:
            _log.warning("--precision bf16: this processor has no bf16 arithmetic; fp32 is used")
        uses_bf16 = has_bf16 and precision != "fp32"
        self.precision = "int8" if is_int8 else "bf16" if uses_bf16 else "fp32"
        self._pad_id = pad_id
        settings = {
            "INFERENCE_PRECISION_HINT": openvino.Type.bf16 if uses_bf16 else openvino.Type.f32,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads or torch.get_num_threads(),
            # Every process would pin its threads to the same first cores.
            "ENABLE_CPU_PINNING": False,
        }
        compiled = core.compile_model(model, "CPU", settings)
        self._num_labels = compiled.output(0).partial_shape[1].get_length()
        self._request = compiled.create_infer_request()

    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence."""
        logits_SC = np.empty((len(tokens.lengths_S), self._num_labels), dtype=np.float32)
        for rows in padded_batches(tokens.lengths_S, TOKEN_BUDGET["cpu"]):
            alive()
            logits_SC[rows] = self._request.infer(list(pad(tokens, rows, self._pad_id)), share_inputs=True)[0]
        return logits_SC


def _place(cache: Location, info: BundleInfo, precision: InferencePrecision) -> Location:
    return place_of(cache, info) / ("int8" if precision in ("auto", "int8") else "float")


@contextmanager
def _exported(place: Location, info: BundleInfo) -> Iterator[tuple[Path, EngineRecord]]:
    """A complete export as a local folder, and its record.

    Raises:
        BundleError: it is missing or of another bundle, or a file is missing or altered.
    """

    def unusable(reason: str) -> BundleError:
        return BundleError(f"the exported model at {place} cannot be used: {reason}. Run the job again")

    if not (place / RECORD_FILE).exists():
        raise unusable("it is not there")
    try:
        record = EngineRecord.model_validate_json((place / RECORD_FILE).read_bytes())
    except ValidationError as error:
        raise unusable(f"{RECORD_FILE} cannot be read") from error
    if (record.format_version, record.bundle_fingerprint) != (1, info.fingerprint()):
        raise unusable("it is of another bundle, or another version of bertray")
    with place.local_copy() as folder:
        for name, expected in record.files.items():
            if not (folder / name).is_file() or sha256_of(folder / name) != expected:
                raise unusable(f"{name} is missing or altered")
        yield folder, record


def export(folder: Path, info: BundleInfo, precision: InferencePrecision, staging: Path) -> EngineRecord:
    """Write a bundle's exported model, weights and record to the folder `staging`."""
    openvino = optional_package("openvino")
    model = load_model(folder)
    pad_id = model.config.pad_token_id or 0
    graph = _converted(model, info.max_length)
    facts: dict[str, Any] = {"is_int8": False, "note": f"{precision}, as requested"}
    if precision in ("auto", "int8"):
        try:
            dataset = training_data(info)
        except RequestError as error:
            facts["note"] = f"not int8, because there are no texts to calibrate and measure it on: {error}"
        else:
            tokenizer = load_tokenizer(folder, info)
            tokens = sample(dataset, "train", NUM_CALIBRATION_ROWS, tokenizer)[0]
            # A long text may be many sequences; calibration takes the same time for all bundles.
            sequences = np.unique(np.linspace(0, len(tokens.lengths_S) - 1, NUM_CALIBRATION_ROWS).astype(int))
            inputs = [list(pad(tokens, sequence, pad_id)) for sequence in sequences[:, None]]
            _log.info("openvino: int8, calibrating on %d sequences of training texts", len(inputs))
            nncf = optional_package("nncf")
            options = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(inputs)}
            with warnings.catch_warnings(action="ignore"):
                quantised = nncf.quantize(graph, nncf.Dataset(inputs), **options)
            candidate = OpenVinoEncoder(quantised, pad_id, is_int8=True)
            reference = Encoder(load_model(folder), "fp32", "cpu")
            facts = {"num_calibration_rows": len(sequences), **measure(info, dataset, tokenizer, reference, candidate)}
            graph = quantised if facts["is_int8"] else graph
        if not facts["is_int8"]:
            _log.warning("warning: openvino: %s", facts["note"])
    openvino.save_model(graph, staging / MODEL_FILE, compress_to_fp16=False)
    record = EngineRecord(
        bundle_fingerprint=info.fingerprint(),
        pad_id=pad_id,
        versions=versions(),
        files={name: sha256_of(staging / name) for name in (MODEL_FILE, WEIGHTS_FILE)},
        **facts,
    )
    (staging / RECORD_FILE).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return record


def _converted(model: Any, max_length: int) -> Any:
    """The torch model, which is changed, as an OpenVINO graph of dynamic shapes; two shapes are checked.

    Raises:
        RequestError: the export fails, or its logits differ.
    """
    openvino = optional_package("openvino")
    name, pad_id = type(model).__name__, model.config.pad_token_id or 0
    # Of unequal lengths, because transformers leaves a mask of ones out of the graph.
    lengths = ([max_length, max_length * 3 // 4, max_length // 2], [5, 2])
    probes = [pad(probe_sequences(model.config, one), np.arange(len(one)), pad_id) for one in lengths]
    wrapped = LogitsOnly(model.eval())
    try:
        # Tracing warns of each branch; the result is compared.
        with warnings.catch_warnings(action="ignore"), torch.inference_mode():
            expected = [wrapped(*map(torch.from_numpy, probe)).numpy() for probe in probes]
            example = dict(zip(("input_ids", "attention_mask"), map(torch.from_numpy, probes[0]), strict=True))
            Layout(model, can_pack=False)  # the last layer then finishes only first tokens
            graph = openvino.convert_model(wrapped, example_input=example)
            graph.reshape({node: openvino.PartialShape([-1, -1]) for node in graph.inputs})
            run = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32})
            differences = [np.abs(run(list(probe))[0] - one).max() for probe, one in zip(probes, expected, strict=True)]
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        first_line = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"--engine openvino: {name} cannot be exported ({type(error).__name__}: {first_line}). Use --engine torch"
        ) from error
    limit = _EXPORT_TOLERANCE * max(1.0, *(float(np.abs(one).max()) for one in expected))
    if not np.max(differences) <= limit:  # np.max, because max may pass over a NaN
        raise RequestError(
            f"--engine openvino: exported, {name} gives other logits (by {max(differences):.3g}, {limit:.3g} is "
            "allowed). Use --engine torch"
        )
    return graph


class LogitsOnly(torch.nn.Module):
    """The classifier with two inputs and one output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def optional_package(name: Literal["openvino", "nncf"]) -> Any:
    """The package, imported when first needed.

    Raises:
        RequestError: it is not installed.
    """
    # On import both report to Google Analytics, unless the package that sends is missing.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        package = import_module(name)
    except ImportError as error:
        raise missing_extra(f"--engine openvino ({error})", "openvino", "use --engine torch") from error
    # Not nncf.set_log_level, which also changes handlers that others installed.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return package
