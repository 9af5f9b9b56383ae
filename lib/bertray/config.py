"""What the configurations of all jobs share: base class, help texts, and types of options with a syntax of their own.

`bertray.cli` reads options: defaults < YAML (`--config`) < environment (`BERTRAY_TRAIN_LEARNING_RATE=3e-5`) < flags
(`--learning-rate 3e-5`). Each job has a class, in `data.config`, `training.config`, `scoring.config` or
`drivers.config`. Ranges and intervals stay text, so that bundle.json shows an option as the user typed it.
"""

import csv
import io
import itertools
import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints

# A path or URI. An empty one, as from an unset shell variable, would mean the working folder.
Place = Annotated[str, StringConstraints(min_length=1)]
# Trimmed, as the labels of the data are.
LabelName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def _split(value: Any) -> Any:
    """'a, "b, c"' -> ["a", "b, c"]: a line of CSV."""
    if not isinstance(value, str):
        return value
    try:
        parts = next(csv.reader([value], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise ValueError('give names as CSV has them, as one,"one, with a comma","one with ""marks"""') from error
    return [part.strip() for part in parts if part.strip()]


def as_csv(names: list[str]) -> str:
    """The inverse of `_split`: what a user types for these names."""
    csv.writer(line := io.StringIO(), lineterminator="").writerow(names)
    return line.getvalue()


def _as_range(value: Any) -> Any:
    """4 -> "4", " 1:8" -> "1:8"."""
    text = str(value).strip()
    lowest, _, highest = text.partition(":")
    is_range = lowest.isdecimal() and (highest or lowest).isdecimal() and 1 <= int(lowest) <= int(highest or lowest)
    if not is_range and text != "0":
        raise ValueError("give a number of workers, as 4, the fewest and the most, as 1:8, or 0 to run without Ray")
    return text


def bounds(text: str) -> tuple[float, float]:
    """The lowest and the highest value of a `Bounds`."""
    lowest, _, highest = text.partition(":")
    return float(lowest), float(highest or lowest)


def _as_bounds(value: Any) -> Any:
    """0.1 -> "0.1", " 2e-5:5e-4" -> "2e-5:5e-4"."""
    text = str(value).strip()
    try:
        lowest, highest = bounds(text)
    except ValueError:
        lowest = highest = math.nan
    if not -math.inf < lowest <= highest < math.inf:
        raise ValueError("give the lowest and the highest, as 0.1:0.5, or one number for all trials")
    return text


def _as_cuts(value: Any) -> Any:
    """[1, 2.5] -> "1,2.5"; auto stays."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()
    if text == "auto":
        return text
    try:
        cuts = [float(part) for part in text.split(",")]
    except ValueError:
        cuts = [math.nan]
    if not all(map(math.isfinite, cuts)) or any(low >= high for low, high in itertools.pairwise(cuts)):
        raise ValueError("give ascending numbers, as 2.5 or 1,2,3, or auto")
    return text


def _as_numbers(value: Any) -> Any:
    """[16, 32] -> "16,32"."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError("give numbers from 1, as 16,32,64")
    return ",".join(parts)


_one_or_many = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
Paths = Annotated[list[Place], _one_or_many]
Texts = Annotated[list[str], _one_or_many]
Columns = Annotated[list[str], BeforeValidator(_split)]
Workers = Annotated[str, BeforeValidator(_as_range)]
Bounds = Annotated[str, BeforeValidator(_as_bounds)]
Cuts = Annotated[str, BeforeValidator(_as_cuts)]
Numbers = Annotated[str, BeforeValidator(_as_numbers)]

OVERWRITE_HELP = "replace what an earlier run wrote to --output; a bundle only on a disk"
DEVICE_HELP = "device of the workers; auto is cuda if the cluster has a GPU now; use cuda if GPU nodes start on demand"
PRECISION_HELP = "precision of the model's arithmetic; auto is bf16 if the processor or GPU supports it, else fp32"
INFERENCE_PRECISION_HELP = (
    f"{PRECISION_HELP}; with --engine openvino, auto and int8 are int8 if it costs at most 0.3 points of accuracy; "
    "on a GPU without bf16 (T4, V100), auto and fp16 are fp16 on the same condition"
)
PAGE_TEXTS_HELP = "texts of the data that the page report.html may show; 0: none, for a confidential corpus"
# auto is torch: installing a package must not change results.
ENGINE_HELP = "engine that runs the model; auto is torch; openvino (extra 'openvino') is faster on CPUs"


def check_engine(config: Any) -> Any:
    """For a model_validator: check that engine, precision and device of a configuration fit together."""
    if config.precision == "int8" and config.engine != "openvino":
        raise ValueError(f"precision int8 needs engine openvino, and engine is {config.engine}: add --engine openvino")
    if config.precision == "fp16" and config.engine == "openvino":
        raise ValueError("precision fp16 needs engine torch, and engine is openvino: use --precision int8 or bf16")
    if config.engine == "openvino" and getattr(config, "device", "cpu") == "cuda":
        raise ValueError("engine openvino runs on CPUs, and device is cuda: leave one of the two out")
    return config


class JobConfig(BaseModel):
    """Base of all job configurations: rejects unknown options and cannot be changed after it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
