"""What measurements of benchmarks.scale find: figures, and what is wanted of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A figure, and what is wanted of it."""

    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    @property
    def verdict(self) -> str:
        if self.at_most is None and self.at_least is None:
            return ""
        is_met = self.value <= self.at_most if self.at_most is not None else self.value >= (self.at_least or 0)
        return "met" if is_met else "missed"

    def row(self) -> str:
        wanted = f"≤ {self.at_most:g}" if self.at_most is not None else ""
        wanted = f"≥ {self.at_least:g}" if self.at_least is not None else wanted
        value = f"{self.value:,.{_decimals(self.value)}f} {self.unit}".strip()
        return f"| {self.what} | {value} | {wanted} | {self.verdict} |"


@dataclass
class Measured:
    """What a measurement has found."""

    lines: list[Line]
    facts: dict[str, Any] = field(default_factory=dict)


def _decimals(value: float) -> int:
    return 0 if value == int(value) or abs(value) >= 100 else 1 if abs(value) >= 10 else 2
