"""Whether what was scored may be announced: has anything moved that does not move by chance?

What `runs/latest.json` would announce next is held against the bundle's validation rows, and against what it announced
last: by the Jensen-Shannon distance of distributions (labels, scores, lengths, truncation), and by the change of means
(score, length) in standard deviations. Both are corrected for what samples of these sizes differ by chance. The share
of rows to be reviewed is not compared by itself: it follows from the scores, whose distribution moves at least as far.

Jensen-Shannon distance: the square root of the divergence of J. Lin, Divergence measures based on the Shannon entropy
(1991), to base 2: 0 for equal distributions, 1 for such as have nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bertray.metrics.profile import Profile, js_distance, mean_change
from bertray.scoring.config import ScoreConfig

# Stands for the rows without any, of a bundle with several labels a row; a label is never empty.
_NO_LABEL = ""


@dataclass(frozen=True)
class Movement:
    """One comparison. `before` and `now` are for people: what stands behind the value."""

    against: str
    what: str
    value: float
    limit: float
    before: str
    now: str

    @property
    def is_beyond(self) -> bool:
        return self.value > self.limit

    def __str__(self) -> str:
        size = f"{self.value:.3f} (limit {self.limit:g})"
        return f"{self.what} moved by {size} against {self.against}: {self.before} → {self.now}"


@dataclass(frozen=True)
class Verdict:
    """What the gate says, and why."""

    movements: tuple[Movement, ...]
    error_fraction: float  # of rows, or of shards where more of these failed
    max_error_fraction: float
    is_accepted: bool = False

    @property
    def reasons(self) -> list[str]:
        """Why not to announce; none: announce."""
        beyond = [str(movement) for movement in self.movements if movement.is_beyond]
        if self.error_fraction > self.max_error_fraction:
            share, limit = f"{self.error_fraction:.1%}", f"{self.max_error_fraction:.1%}"
            beyond.insert(0, f"{share} of rows have an error, or of shards failed (limit {limit})")
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
        return [{**asdict(movement), "is_beyond": movement.is_beyond} for movement in self.movements]


def judge(
    now: Profile, references: dict[str, Profile], num_shards: int, num_shards_failed: int, config: ScoreConfig
) -> Verdict:
    """Hold a profile against others.

    Args:
        references: by what they are called in the verdict; one without rows is passed over.
        num_shards: that the profile is of, those that failed included.
    """
    movements: list[Movement] = []
    if now.num_rows_scored:
        for name, reference in references.items():
            if reference.num_rows_scored:
                movements += _movements(now, reference, name, config)
    error_fraction = max(now.num_rows_error / max(1, now.num_rows), num_shards_failed / max(1, num_shards))
    return Verdict(tuple(movements), error_fraction, config.max_error_fraction, config.accept)


def _movements(now: Profile, before: Profile, name: str, config: ScoreConfig) -> list[Movement]:
    """One profile against another: six comparisons."""

    def distance(what: str, counts: Callable[[Profile], list[int]], shown: Callable[[Profile], str]) -> Movement:
        value = js_distance(counts(before), counts(now))
        return Movement(name, what, round(value, 4), config.max_distance, shown(before), shown(now))

    def change(
        what: str, moments: Callable[[Profile], tuple[float, float]], shown: Callable[[Profile], str]
    ) -> Movement:
        value = mean_change(moments(before), moments(now), before.num_rows_scored, now.num_rows_scored)
        return Movement(name, what, round(value, 4), config.max_mean_change, shown(before), shown(now))

    labels = [*sorted({**now.labels, **before.labels}), _NO_LABEL]
    most_moved = max(labels, key=lambda label: abs(_share(now, label) - _share(before, label)))
    return [
        distance(
            "label mix",
            lambda profile: [_num_rows_of(profile, label) for label in labels],
            lambda profile: f"{most_moved or 'no label'} {_share(profile, most_moved):.1%}",
        ),
        distance("scores", lambda profile: list(profile.scores), _shown_score),
        change("mean score", Profile.score_moments, _shown_score),
        distance("lengths", lambda profile: list(profile.lengths), _shown_length),
        change("mean length", Profile.length_moments, _shown_length),
        distance(
            "truncation",
            lambda profile: [profile.num_rows_truncated, profile.num_rows_scored - profile.num_rows_truncated],
            lambda profile: f"{profile.num_rows_truncated / profile.num_rows_scored:.1%} of rows",
        ),
    ]


def _num_rows_of(profile: Profile, label: str) -> int:
    return profile.num_rows_unlabelled if label == _NO_LABEL else profile.labels.get(label, 0)


def _share(profile: Profile, label: str) -> float:
    return _num_rows_of(profile, label) / profile.num_rows_scored


def _shown_score(profile: Profile) -> str:
    return f"mean {profile.score_moments()[0]:.3f}"


def _shown_length(profile: Profile) -> str:
    return f"mean {profile.length_moments()[0]:.1f} tokens"
