"""The gate: may the new predictions be published, or has something moved more than it moves by chance?

What `runs/latest.json` would announce is compared with the bundle's validation rows and with the last announcement:
distributions (labels, scores, lengths, truncation) by the Jensen-Shannon distance, means (score, length) by their
change in standard deviations. Both are corrected for the differences that samples of these sizes have by chance. The
share of rows to be reviewed needs no comparison: it follows from the scores, whose distribution moves at least as far.

Jensen-Shannon distance: the square root of the divergence of J. Lin, Divergence measures based on the Shannon entropy
(1991), to base 2: 0 for equal distributions, 1 for distributions that have nothing in common.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from bertray.metrics.profile import Profile, js_distance, mean_change
from bertray.scoring.config import ScoreConfig


@dataclass(frozen=True)
class Movement:
    """One comparison. `before` and `now` are the figures behind the value, for people."""

    against: str
    what: str
    value: float
    limit: float
    before: str
    now: str
    is_beyond: bool

    def __str__(self) -> str:
        size = f"{self.value:.3f} (limit {self.limit:g})"
        return f"{self.what} moved by {size} against {self.against}: {self.before} → {self.now}"


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
    now: Profile, references: dict[str, Profile], num_shards: int, num_shards_failed: int, config: ScoreConfig
) -> Verdict:
    """Compare a profile with others.

    Args:
        references: profiles by their names in the verdict; those without rows are ignored.
        num_shards: the number of shards behind `now`, failed ones included.
    """
    movements: list[Movement] = []
    for name, reference in references.items():
        if now.num_rows_scored and reference.num_rows_scored:
            movements += _movements(reference, now, name, config)
    of_rows, of_shards = now.num_rows_error / max(1, now.num_rows), num_shards_failed / max(1, num_shards)
    errors_are = "rows have an error" if of_rows >= of_shards else "shards failed"
    return Verdict(tuple(movements), max(of_rows, of_shards), config.max_error_fraction, errors_are, config.accept)


def _movements(before: Profile, now: Profile, name: str, config: ScoreConfig) -> list[Movement]:
    both, num_rows = (before, now), (before.num_rows_scored, now.num_rows_scored)
    labels = sorted({**before.labels, **now.labels})
    # With several labels a row, a row may also have none.
    mixes = [[*(one.labels.get(label, 0) for label in labels), one.num_rows_unlabelled] for one in both]
    shares = [[count / one.num_rows_scored for count in mix] for one, mix in zip(both, mixes, strict=True)]
    most_moved = max(range(len(labels) + 1), key=lambda index: abs(shares[1][index] - shares[0][index]))
    label = [*labels, "no label"][most_moved]
    # Earlier versions counted rows with an error, too.
    cuts = [min(one.num_rows_truncated, one.num_rows_scored) for one in both]
    truncated = [(cut, rows - cut) for cut, rows in zip(cuts, num_rows, strict=True)]
    scores, lengths = [one.score_moments() for one in both], [one.length_moments() for one in both]
    shown_mixes = [f"{label} {share[most_moved]:.1%}" for share in shares]
    shown_scores = [f"mean {mean:.3f}" for mean, _ in scores]
    shown_lengths = [f"mean {mean:.1f} tokens" for mean, _ in lengths]
    shown_truncated = [f"{cut / (cut + whole):.1%} of rows" for cut, whole in truncated]
    compared = [
        ("label mix", js_distance(*mixes), config.max_distance, shown_mixes),
        ("scores", js_distance(before.scores, now.scores), config.max_distance, shown_scores),
        ("mean score", mean_change(scores[0], scores[1], *num_rows), config.max_mean_change, shown_scores),
        ("lengths", js_distance(before.lengths, now.lengths), config.max_distance, shown_lengths),
        ("mean length", mean_change(lengths[0], lengths[1], *num_rows), config.max_mean_change, shown_lengths),
        ("truncation", js_distance(*truncated), config.max_distance, shown_truncated),
    ]
    return [
        Movement(name, what, (moved := round(value, 4)), limit, shown[0], shown[1], moved > limit)
        for what, value, limit, shown in compared
    ]
