"""How pages are rendered: jinja2 with autoescape over templates/, and how numbers and texts are written on them.

{{ 0.9005 | percent }}  90.1 %     {{ 12345 | number }}  12,345     {{ none | number }}  –
{{ -0.021 | points }}   −2.1       {{ 2.98173 | number }}  2.98     {{ "a\\u202eb" | text }}  a\\u202eb
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from bertray.cli import printable
from bertray.schema import SOURCE, SOURCE_ROW

TEXT_CHARS, LABEL_CHARS = 400, 80
_NUM_TICKS = 5
_NONE = "–"
_SCORES = {"mae": "mean absolute error", "rmse": "root mean square error", "subset_accuracy": "all labels right"}
_SCORES |= {"f1_macro": "macro-F1", "f1_micro": "micro-F1", "f1_weighted": "weighted F1"}


def rendered(template: str, facts: dict[str, Any]) -> str:
    """The page that a template makes of facts."""
    return str(_environment().get_template(template).render(facts))


@cache
def _environment() -> Any:
    # Only a job that writes a page needs them.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "points": points, "text": text, "short": short}
    environment.filters["line"] = lambda markup: Markup(re.sub(r"\s*\n\s*|  +", " ", markup).strip())  # noqa: S704
    environment.tests["finite"] = is_finite
    environment.globals["axis"] = axis
    return environment


def is_finite(value: Any) -> bool:
    """Whether this is a number that can be shown."""
    return isinstance(value, int | float) and math.isfinite(value)


def percent(share: Any) -> str:
    """0.9005 -> 90.1 %."""
    return f"{100 * share:.1f}\u00a0%" if is_finite(share) else _NONE


def points(difference: Any) -> str:
    """0.021 -> +2.1, in percentage points."""
    return f"{100 * difference:+.1f}".replace("-", "−") if is_finite(difference) else _NONE


def number(value: Any, sign: str = "") -> str:
    """12345 -> 12,345; 0.88693 -> 0.887. With the sign "+" as a difference."""
    if not is_finite(value):
        return _NONE
    is_whole = isinstance(value, int) or (value == round(value) and abs(value) < 1e15)
    return format(value, f"{sign},.0f" if is_whole or abs(value) >= 1000 else f"{sign}.3g").replace("-", "−")


def text(value: Any, num_chars: int = LABEL_CHARS) -> str:
    """Any text in one line, at most so long, with what would change the page around it as escapes."""
    whole = _NONE if value is None else str(value)
    line = printable(" ".join(whole[: 4 * num_chars].split()))
    line = line.encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= num_chars and len(whole) <= 4 * num_chars else f"{line[:num_chars]}…"


def short(line: str, num_chars: int) -> str:
    """A line without its middle if it is longer: names that begin alike often end differently."""
    half = num_chars // 2
    return line if len(line) <= num_chars else f"{line[:half]}…{line[half - num_chars + 1 :]}"


def plain_words(name: str) -> str:
    """A name in a file, as of a score, as people say it."""
    return _SCORES.get(name, name.replace("_", " "))


def source_of(row: dict[str, Any]) -> str:
    """Where a labelled row comes from: the file's name and the row in it."""
    return f"{row[SOURCE].rsplit('/', 1)[-1]}, row {row[SOURCE_ROW]}"


def axis(values: Iterable[Any], low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Round ends, and ticks between them, of an axis that holds the values, or has these ends."""
    seen = [one for one in values if is_finite(one)]
    low, high = min(seen, default=0.0) if low is None else low, max(seen, default=1.0) if high is None else high
    if not high > low:
        high = low + (abs(low) or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / _NUM_TICKS))
    step = next(size * step for size in (1, 2, 5, 10) if high - low <= _NUM_TICKS * size * step * (1 + 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return {"low": first * step, "high": last * step, "ticks": [index * step for index in range(first, last + 1)]}
