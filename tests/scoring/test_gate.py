"""What moves by chance passes, what moves is held."""

import re

import numpy as np
import pytest

from bertray.metrics.profile import Profile, js_distance, mean_change
from bertray.scoring.config import ScoreConfig
from bertray.scoring.gate import Verdict, judge

RNG = np.random.default_rng(0)


def profile(
    num_rows: int, shares: tuple[float, ...] = (0.5, 0.3, 0.2), score: float = 0.8, length: float = 60
) -> Profile:
    labels = dict(zip("abc", RNG.multinomial(num_rows, shares).tolist(), strict=False))
    scores = RNG.beta(score * 10, (1 - score) * 10, num_rows)
    lengths = RNG.poisson(length, num_rows) + 1
    return Profile(
        num_rows=num_rows,
        labels=labels,
        num_tokens=int(lengths.sum()),
        scores=tuple(np.histogram(scores, 20, (0, 1))[0].tolist()),
        lengths=tuple(np.bincount(np.log2(lengths).astype(int), minlength=20).tolist()),
        score_sum=float(scores.sum()),
        score_square_sum=float((scores**2).sum()),
        length_square_sum=float((lengths**2).sum()),
    )


def verdict(now: Profile, num_failed: int = 0, **options: object) -> Verdict:
    config = ScoreConfig(bundle="b", input="i", output="o", **options)
    return judge(now, {"before": profile(5000), "nothing": Profile()}, 10, num_failed, config)


@pytest.mark.parametrize("num_rows", [1, 3, 30, 1000, 20_000])
def test_samples_of_the_same_pass(num_rows: int) -> None:
    for _ in range(50):
        assert verdict(profile(num_rows)).reasons == []


@pytest.mark.parametrize(
    ("moved", "what"),
    [
        ({"shares": (0.1, 0.2, 0.7)}, ["label mix"]),
        ({"score": 0.55}, ["scores", "mean score"]),
        ({"length": 300}, ["lengths", "mean length"]),
    ],
)
@pytest.mark.parametrize("num_rows", [200, 20_000])
def test_what_moved_is_held(moved: dict[str, object], what: list[str], num_rows: int) -> None:
    found = verdict(profile(num_rows, **moved))  # type: ignore[arg-type]
    assert [one.what for one in found.movements if one.is_beyond] == what
    assert found.is_held
    assert found.summary()["gate"] == "held"
    assert all("against before" in reason for reason in found.reasons)


def test_truncation_that_was_not_there() -> None:
    now = profile(1000).model_copy(update={"num_rows_truncated": 600})
    (reason,) = verdict(now).reasons
    assert reason.startswith("truncation moved by ")
    assert reason.endswith(" (limit 0.3) against before: 0.0% of rows → 60.0% of rows")


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_texts_for_which_the_model_gives_no_number_move_nothing_else(share: float) -> None:
    """They are long and cut, and counted as errors."""
    num = int(1000 * share)
    broken = Profile(num_rows=num, num_rows_error=num, num_tokens=512 * num, num_tokens_error=512 * num)
    before = profile(5000)
    now = profile(1000)
    expected, found = against(before, now), against(before, now + broken)
    assert found.movements == expected.movements and not found.is_held
    assert found.error_fraction == pytest.approx(num / (1000 + num))


def test_a_record_of_an_earlier_version_counted_them() -> None:
    """As cut, so that more rows could be cut than had a label."""
    update = {"num_rows": 1500, "num_rows_error": 500, "num_rows_truncated": 1400}
    before = profile(1000).model_copy(update=update)
    found = against(before, profile(1000).model_copy(update={"num_rows_truncated": 1000}))
    truncation = found.movements[-1]
    assert (truncation.what, truncation.value, truncation.before) == ("truncation", 0, "100.0% of rows")
    assert np.isfinite([one.value for one in found.movements]).all()


def several(num_rows: int, shares: tuple[float, ...]) -> Profile:
    """Rows that have each label with its share, independently of the others."""
    has_NC = RNG.random((num_rows, len(shares))) < shares
    counts = dict(zip("abc", has_NC.sum(axis=0).tolist(), strict=False))
    update = {"labels": counts, "num_rows_unlabelled": int((~has_NC.any(axis=1)).sum())}
    return profile(num_rows).model_copy(update=update)


def against(before: Profile, now: Profile, **options: object) -> Verdict:
    return judge(now, {"before": before}, 10, 0, ScoreConfig(bundle="b", input="i", output="o", **options))


def test_several_labels_a_row() -> None:
    shares = (0.5, 0.3, 0.02)
    for num_rows in (1, 30, 5000):
        assert against(several(5000, shares), several(num_rows, shares)).reasons == []
    (reason,) = against(several(5000, shares), several(5000, (0.1, 0.05, 0.6))).reasons
    assert reason.startswith("label mix moved by ")
    assert re.search(r"against before: c [12]\.\d% → c (59|60|61)\.\d%$", reason)


def test_labels_that_are_no_longer_given() -> None:
    before = several(5000, (0.5, 0.3, 0.02))
    (reason,) = against(before, several(5000, (0.0, 0.0, 0.0)), max_mean_change=2).reasons
    assert "→ no label 100.0%" in reason
    nothing = several(500, (0.0, 0.0, 0.0))
    assert against(nothing, several(500, (0.0, 0.0, 0.0))).reasons == []


def test_limits_are_options_and_a_person_may_accept() -> None:
    now = profile(1000, (0.1, 0.2, 0.7))
    assert not verdict(now, max_distance=0.9).is_held
    accepted = verdict(now, accept=True)
    assert (accepted.is_held, accepted.summary()["gate"]) == (False, "accepted")
    assert verdict(profile(100)).summary()["gate"] == "passed"


def test_errors_of_rows_and_failures_of_shards() -> None:
    broken = profile(100) + Profile(num_rows=300, num_rows_error=300)
    assert verdict(broken).reasons == ["75.0% of rows have an error (limit 50.0%)"]
    assert not verdict(broken, max_error_fraction=0.75).is_held
    assert verdict(profile(100), num_failed=6).is_held
    assert not verdict(profile(100), num_failed=5).is_held
    assert verdict(Profile(num_rows=5, num_rows_error=5)).is_held  # nothing to compare


def test_jensen_shannon_distance() -> None:
    many = 10**9
    assert js_distance([many, 0], [0, many]) == pytest.approx(1, abs=1e-6)
    assert js_distance([many, many], [many, many]) == 0
    # sqrt(H(3/4, 1/4) - (H(1, 0) + H(1/2, 1/2)) / 2)
    assert js_distance([many, 0], [many, many]) == pytest.approx((0.811278 - 0.5) ** 0.5, abs=1e-5)


def test_chance_is_what_it_is_said_to_be() -> None:
    """At a limit of 0, samples of one distribution of 77 labels pass, which without the correction never do."""
    shares = np.sort(RNG.dirichlet(np.full(77, 5)))
    samples = [(RNG.multinomial(2000, shares), RNG.multinomial(1000, shares)) for _ in range(500)]
    assert sum(js_distance(before, now) > 0 for before, now in samples) <= 2  # type: ignore[arg-type]
    values = [js_distance(before, RNG.multinomial(1000, shares[::-1])) for before, _ in samples]  # type: ignore[arg-type]
    assert min(values) > 0.15


def test_numbers_in_one_bin_that_spread_out_are_held() -> None:
    """Of a bundle that knows no bounds: all values are in the last bin."""

    def values(num_rows: int, deviation: float) -> Profile:
        values_N = RNG.normal(3000, deviation, num_rows)
        sums = {"score_sum": values_N.sum(), "score_square_sum": np.square(values_N).sum()}
        return profile(num_rows).model_copy(update={"labels": {}, "scores": (*[0] * 19, num_rows), **sums})

    def verdict(now: Profile, **limits: float) -> Verdict:
        return judge(
            now, {"before": before}, 10, 0, ScoreConfig(bundle="b", input="i", output="o", **limits), "regression"
        )

    before = values(5000, 10)
    for num_rows in (1, 3, 30, 1000, 20_000):
        assert not any(verdict(values(num_rows, 10), max_mean_change=0.1).reasons for _ in range(50))
    (reason,) = verdict(values(1000, 30)).reasons
    assert re.match(
        r"deviation of values moved by 0\.\d+ .* deviation (9|10)\.\d+ → deviation (2[89]|3[012])\.", reason
    )
    assert verdict(values(1000, 0)).is_held


def test_mean_change() -> None:
    many = 10**9
    assert mean_change((10, 2), (13, 2), many, many) == pytest.approx(3 / (2**2 + 1.5**2) ** 0.5, abs=1e-4)
    assert mean_change((10, 0), (10, 0), 5, 5) == 0
    assert mean_change((10, 0), (11, 0), many, many) == pytest.approx(2)  # the most there can be
    assert mean_change((10, 0), (11, 0), 3, 4) == 0  # of so few rows that is chance
    assert mean_change((10, 2), (15, 2), 4, 4) == 0
