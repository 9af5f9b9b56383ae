"""Whether what was scored may be announced: has anything moved that does not move by chance?

What `runs/latest.json` would announce next is held against the bundle's validation rows, and against what it announced
last: by the Jensen-Shannon distance of distributions (labels, scores, lengths, truncation), and by the change of means
(score, length) in standard deviations. Both are corrected for what samples of these sizes differ by chance. The share
of rows to be reviewed is not compared by itself: it follows from the scores, whose distribution moves at least as far.

Jensen-Shannon distance: the square root of the divergence of J. Lin, Divergence measures based on the Shannon entropy
(1991), to base 2: 0 for equal distributions, 1 for such as have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import chdtri

from bertray.config import ScoreConfig
from bertray.profile import Profile

# One comparison in so many is taken to be moved though it is not, at a limit of 0.
_CHANCE = 1e-4
# Stands for the rows without any, of a bundle with several labels a row; a label is never empty.
_NO_LABEL = ""
# A variance below it is none.
_ROUNDING = 1e-12


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


def js_distance(before: Sequence[int], now: Sequence[int]) -> float:
    """Jensen-Shannon distance of two counts over the same categories, beyond what chance makes of equal ones.

    To second order the divergence is, in nats, 1/8 of the sum of (p - q)² / p. For samples of n and m rows over k
    categories of one distribution that sum, over (1/n + 1/m), is chi-squared of k - 1 degrees of freedom.
    """
    p, q = (np.asarray(counts, dtype=np.float64) for counts in (before, now))
    num_categories = int(((p + q) > 0).sum())
    chance = _chance(num_categories - 1) / 8 * (1 / p.sum() + 1 / q.sum()) / math.log(2)
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    divergence = sum(float((one[one > 0] * np.log2(one[one > 0] / middle[one > 0])).sum()) / 2 for one in (p, q))
    return math.sqrt(max(0.0, divergence - chance))


def mean_change(before: tuple[float, float], now: tuple[float, float], num_rows: int, num_rows_now: int) -> float:
    """How far a mean moved, in standard deviations, beyond what chance moves it; 2 at most.

    The deviation is that of both sets together, in equal shares: rows that are all alike have none of their own.

    Args:
        before, now: mean and standard deviation.
    """
    change = abs(now[0] - before[0])
    variance = (before[1] ** 2 + now[1] ** 2) / 2 + change**2 / 4
    if variance < _ROUNDING:
        return 0.0
    return math.sqrt(max(0.0, change**2 / variance - _chance(1) * (1 / num_rows + 1 / num_rows_now)))


def _chance(degrees_of_freedom: int) -> float:
    """What chi-squared exceeds by chance so rarely that a nightly job does not see it in ten years."""
    return float(chdtri(degrees_of_freedom, _CHANCE)) if degrees_of_freedom else 0.0
