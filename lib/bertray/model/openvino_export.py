"""A torch classifier as an OpenVINO graph: exported, checked against torch, and quantised to int8.

Legend: B sequences of a batch, L tokens of the longest.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from bertray.errors import RequestError, missing_extra
from bertray.model.adapter import finish_first_tokens_alone
from bertray.tokenization.tokenizer import TokenColumn

_log = logging.getLogger(__name__)

# Between torch and an exported fp32 graph: rounding is 1e-6, a graph that is right for one length only is off by far.
_EXPORT_TOLERANCE = 1e-3


def convert(model: Any, max_length: int) -> Any:
    """The torch model as an OpenVINO graph of dynamic shapes, checked at two of them.

    Raises:
        RequestError: the graph cannot be made, or its logits are others.
    """
    openvino = openvino_package()
    rng = np.random.default_rng(0)
    shapes = ((3, max_length), (2, 5))
    probes = [_probe(model.config, rng, *shape) for shape in shapes]
    wrapped = LogitsOnly(model.eval())
    example = dict(zip(("input_ids", "attention_mask"), map(torch.from_numpy, probes[0]), strict=True))
    name = type(model).__name__
    try:
        with _quiet(), torch.inference_mode():
            expected = [wrapped(*map(torch.from_numpy, probe)).numpy() for probe in probes]
            encoder = getattr(model, model.base_model_prefix, None)
            handle = finish_first_tokens_alone(encoder, lambda states: states[:, :1])
            if handle and not _runs_alike(wrapped, probes, expected):
                handle.remove()
            graph = openvino.convert_model(wrapped, example_input=example)
            if handle:
                handle.remove()
            graph.reshape({node: openvino.PartialShape([-1, -1]) for node in graph.inputs})
            run = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32})
            actual = [run(list(probe))[0] for probe in probes]
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        first_line = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"--engine openvino: {name} cannot be exported ({type(error).__name__}: {first_line}). Use --engine torch"
        ) from error
    if not _same(expected, actual):
        difference = max(float(np.abs(a - b).max()) for a, b in zip(expected, actual, strict=True))
        raise RequestError(
            f"--engine openvino: exported, {name} gives other logits (by {difference:.3g}, {_EXPORT_TOLERANCE} is "
            "allowed). Use --engine torch"
        )
    return graph


def _runs_alike(wrapped: torch.nn.Module, probes: list[Any], expected: list[np.ndarray]) -> bool:
    try:
        return _same(expected, [wrapped(*map(torch.from_numpy, probe)).numpy() for probe in probes])
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False


def _same(expected: list[np.ndarray], actual: list[np.ndarray]) -> bool:
    """Whether logits differ by no more than rounding."""
    largest = max(float(np.abs(one).max()) for one in expected)
    return all(
        np.allclose(a, b, rtol=0, atol=_EXPORT_TOLERANCE * max(1.0, largest))
        for a, b in zip(expected, actual, strict=True)
    )


class LogitsOnly(torch.nn.Module):
    """The classifier with two inputs and one output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def _probe(config: Any, rng: np.random.Generator, num_rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random input_ids_BL and a ragged attention_mask_BL, for transformers leaves a mask of ones out of the graph."""
    pad_id = config.pad_token_id or 0
    lengths_B = np.linspace(length, max(1, length // 2), num_rows).astype(int)
    mask_BL = np.arange(length) < lengths_B[:, None]
    input_ids_BL = rng.integers(1, config.vocab_size, (num_rows, length))
    input_ids_BL[input_ids_BL == pad_id] = (pad_id + 1) % config.vocab_size
    return np.where(mask_BL, input_ids_BL, pad_id).astype(np.int64), mask_BL.astype(np.int64)


def quantise(graph: Any, tokens: TokenColumn, sequences: np.ndarray) -> Any:
    """An int8 copy of the graph, its ranges those seen on these sequences."""
    nncf = nncf_package()
    inputs = []
    for start, end in zip(tokens.offsets_S1[sequences], tokens.offsets_S1[sequences + 1], strict=True):
        input_ids_1L = tokens.ids_T[start:end][None].astype(np.int64)
        inputs.append([input_ids_1L, np.ones_like(input_ids_1L)])
    _log.info("openvino: int8, calibrating on %d sequences of training texts", len(inputs))
    with _quiet():
        return nncf.quantize(
            graph, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs)
        )


def openvino_package() -> Any:
    """The package, imported when first needed.

    Raises:
        RequestError: it is not installed.
    """
    # Importing it, and nncf, otherwise reports to Google Analytics; both do without the package that sends.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return _import("openvino")


def nncf_package() -> Any:
    """The package nncf, which quantises; what it logs below an error is not shown.

    Raises:
        RequestError: it is not installed.
    """
    openvino_package()
    nncf = _import("nncf")
    # Not nncf.set_log_level: that would set the level of every handler too, of those that others put there.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise missing_extra(f"--engine openvino ({error})", "openvino", "use --engine torch") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what tracing and calibration say of themselves.

    Tracing warns of every branch of the model's code: what could come of it is what `convert` checks for.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
