"""What the configurations of all jobs share. Each job has a class, each option a field with its unit and reason.

Values come from, later over earlier: the defaults here, a YAML file (`--config`), the environment
(`BERTRAY_TRAIN_LEARNING_RATE=3e-5`), flags (`--learning-rate 3e-5`). `bertray.cli` does the reading.

Here is what they share: the base class, the wording of options that several have, and the types of options whose text
has a form of its own (lists, ranges of workers, intervals to search in). Each of these stays text, or a list of texts,
so that a configuration reads in bundle.json as it was typed. The classes themselves stand beside their consumers:
`data.config`, `training.config`, `scoring.config`, `drivers.config`.
"""

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints

# A path or URI; an empty one, as from an unset shell variable, would be the working folder.
Place = Annotated[str, StringConstraints(min_length=1)]
# Labels of the data are trimmed, so one that is named is too.
LabelName = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


def _comma_separated(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[Place], BeforeValidator(_one_or_many)]
Texts = Annotated[list[str], BeforeValidator(_one_or_many)]
Columns = Annotated[list[str], BeforeValidator(_comma_separated)]


def _as_range(value: Any) -> Any:
    """4 -> "4", " 1:8" -> "1:8"."""
    text = str(value).strip()
    lowest, _, highest = text.partition(":")
    is_range = lowest.isdecimal() and (highest or lowest).isdecimal() and 1 <= int(lowest) <= int(highest or lowest)
    if not is_range and text != "0":
        raise ValueError("give a number of workers, as 4, the fewest and the most, as 1:8, or 0: no Ray")
    return text


Workers = Annotated[str, BeforeValidator(_as_range)]


def _as_bounds(value: Any) -> Any:
    """0.1 -> "0.1", " 2e-5:5e-4" -> "2e-5:5e-4"."""
    text = str(value).strip()
    try:
        lowest, highest = bounds(text)
    except ValueError:
        lowest = highest = math.nan
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest <= highest):
        raise ValueError("give the lowest and the highest, as 0.1:0.5, or one number for all trials")
    return text


def bounds(text: str) -> tuple[float, float]:
    """The lowest and the highest of a `Bounds`."""
    lowest, _, highest = text.partition(":")
    return float(lowest), float(highest or lowest)


def _as_numbers(value: Any) -> Any:
    """[16, 32] -> "16,32"."""
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError("give numbers from 1, as 16,32,64")
    return ",".join(parts)


Bounds = Annotated[str, BeforeValidator(_as_bounds)]
Numbers = Annotated[str, BeforeValidator(_as_numbers)]


DEVICE_HELP = "device of the workers; auto is cuda if the cluster has a GPU now; use cuda if GPU nodes start on demand"
PRECISION_HELP = "precision of the model's arithmetic; auto is bf16 if the processor or GPU supports it, else fp32"
INFERENCE_PRECISION_HELP = (
    f"{PRECISION_HELP}; with --engine openvino, auto and int8 are int8 if it costs at most 0.3 points of accuracy; "
    "on a GPU without bf16 (T4, V100), auto and fp16 are fp16 on the same condition"
)
# auto: a result must not change because a package was installed.
ENGINE_HELP = "engine that runs the model; auto is torch; openvino (extra 'openvino') is faster on CPUs"


def check_engine(config: Any) -> Any:
    """See that engine, precision and device of a configuration go together; for a model_validator."""
    if config.precision == "int8" and config.engine != "openvino":
        raise ValueError(f"precision int8 needs engine openvino, and engine is {config.engine}: add --engine openvino")
    if config.precision == "fp16" and config.engine == "openvino":
        raise ValueError("precision fp16 needs engine torch, and engine is openvino: say --precision int8 or bf16")
    if config.engine == "openvino" and getattr(config, "device", "cpu") == "cuda":
        raise ValueError("engine openvino runs on CPUs, and device is cuda: leave one of the two out")
    return config


class JobConfig(BaseModel):
    """What all jobs share: unknown keys are refused, and a configuration does not change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
