"""The gate: may the new predictions be published, or has something moved more than it moves by chance?

What `runs/latest.json` would announce is compared with the bundle's validation rows and with the last announcement:
distributions (labels, scores, lengths, truncation) by the Jensen-Shannon distance, means (score, length) by their
change in standard deviations. Both are corrected for the differences that samples of these sizes have by chance: see
`metrics.profile`. What is compared of the answers, their task says.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bertray.metrics.profile import Movement, Profile, length_movements
from bertray.scoring.config import ScoreConfig
from bertray.tasks.task import TASKS
from bertray.types import UNNAMED_PROBLEM_TYPE, ProblemType


@dataclass(frozen=True)
class Verdict:
    """Whether the gate announces the run, and why not."""

    movements: tuple[Movement, ...]
    error_fraction: float  # of the rows or of the shards, whichever is larger
    max_error_fraction: float
    errors_are: str = "rows have an error"
    is_accepted: bool = False

    @property
    def reasons(self) -> list[str]:
        """The limits that are exceeded."""
        beyond = [str(movement) for movement in self.movements if movement.is_beyond]
        if self.error_fraction > self.max_error_fraction:
            share, limit = f"{self.error_fraction:.1%}", f"{self.max_error_fraction:.1%}"
            beyond.insert(0, f"{share} of {self.errors_are} (limit {limit})")
        return beyond

    @property
    def is_held(self) -> bool:
        return bool(self.reasons) and not self.is_accepted

    def summary(self) -> dict[str, Any]:
        return {
            "gate": "held" if self.is_held else "accepted" if self.reasons else "passed",
            "held_because": self.reasons,
            "error_fraction": round(self.error_fraction, 6),
        }

    def table(self) -> list[dict[str, Any]]:
        return [asdict(movement) for movement in self.movements]


def judge(
    now: Profile,
    references: dict[str, Profile],
    num_shards: int,
    num_shards_failed: int,
    config: ScoreConfig,
    problem_type: ProblemType = UNNAMED_PROBLEM_TYPE,
) -> Verdict:
    """Compare a profile with others.

    Args:
        references: profiles by their names in the verdict; those without rows are ignored.
        num_shards: the number of shards behind `now`, failed ones included.
    """
    movements: list[Movement] = []
    limits = config.max_distance, config.max_mean_change
    for name, reference in references.items():
        if now.num_rows_scored and reference.num_rows_scored:
            movements += TASKS[problem_type].movements(reference, now, name, limits)
            movements += length_movements(reference, now, name, limits)
    of_rows, of_shards = now.num_rows_error / max(1, now.num_rows), num_shards_failed / max(1, num_shards)
    errors_are = "rows have an error" if of_rows >= of_shards else "shards failed"
    return Verdict(tuple(movements), max(of_rows, of_shards), config.max_error_fraction, errors_are, config.accept)
