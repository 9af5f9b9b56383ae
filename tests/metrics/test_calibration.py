"""Temperatures, calibration errors and thresholds, against what is true by construction or by trying everything."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, log_expit, log_softmax
from scipy.stats import binom, gamma

from bertray.metrics.calibration import (
    DEFAULT_THRESHOLD,
    TEMPERATURE_BOUNDS,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    negative_log_likelihood,
    probabilities,
    threshold_for_precision,
    tune_thresholds,
)

seeds = st.integers(0, 2**32 - 1)


def drawn(rng: np.random.Generator, num_rows: int, num_classes: int, *, multi_hot: bool) -> tuple[np.ndarray, ...]:
    """Logits, and targets that are drawn with the probabilities that the logits claim."""
    logits_NC = 2 * rng.normal(size=(num_rows, num_classes))
    if multi_hot:
        return logits_NC, (rng.random(logits_NC.shape) < expit(logits_NC)).astype(np.float32)
    noise_NC = rng.gumbel(size=logits_NC.shape)  # whose argmax is a draw from the softmax
    return logits_NC, (logits_NC + noise_NC).argmax(axis=1)


def test_softmax_of_large_logits() -> None:
    logits_NC = np.array([[1000.0, 1000.0], [0.0, np.log(3.0)]], dtype=np.float32)
    found_NC = probabilities(logits_NC, "single_label_classification")
    np.testing.assert_allclose(found_NC, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-6)


def test_sigmoid_of_large_logits() -> None:
    logits_NC = np.array([[-1000.0, 1000.0], [0.0, np.log(3.0)], [np.inf, 0.0], [np.nan, 0.0]], dtype=np.float32)
    found_NC = probabilities(logits_NC, "multi_label_classification")
    np.testing.assert_allclose(found_NC, [[0.0, 1.0], [0.5, 0.75], [np.nan] * 2, [np.nan] * 2], rtol=1e-6)


def test_the_example_of_the_module() -> None:
    logits_NC, label_ids = np.array([[4, 0], [4, 0], [4, 0], [0, 4]] * 100), np.array([0, 0, 1, 1] * 100)
    temperature, measured = calibrate(logits_NC, label_ids)
    assert temperature == pytest.approx(3.53, abs=0.005)
    assert expit(4 / temperature) == pytest.approx(0.76, abs=0.005)
    assert (measured["ece_before"], measured["ece_after"]) == pytest.approx((0.23, 0.01), abs=0.005)


@pytest.mark.parametrize("multi_hot", [False, True])
def test_the_loss_is_that_of_the_formula(multi_hot: bool) -> None:
    logits_NC, targets = drawn(np.random.default_rng(0), 50, 4, multi_hot=multi_hot)
    if multi_hot:
        expected = -np.where(targets > 0, log_expit(logits_NC), log_expit(-logits_NC)).mean()
    else:
        expected = -log_softmax(logits_NC, axis=1)[np.arange(50), targets].mean()
    assert negative_log_likelihood(logits_NC, targets) == pytest.approx(expected)


@pytest.mark.parametrize("multi_hot", [False, True])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_that_logits_were_multiplied_by_is_found(multi_hot: bool, temperature: float) -> None:
    logits_NC, targets = drawn(np.random.default_rng(1), 4000, 5, multi_hot=multi_hot)
    found, measured = calibrate(logits_NC * temperature, targets)
    assert found == pytest.approx(temperature, rel=0.05)
    assert measured["nll_after"] <= measured["nll_before"] + 1e-6
    if temperature != 1:
        assert measured["ece_after"] < 0.02 < measured["ece_before"]


@given(seeds, st.integers(1, 60), st.integers(2, 6), st.booleans(), st.sampled_from([1e-6, 0.1, 1.0, 10.0, 1e4]))
def test_a_temperature_is_within_bounds_and_no_other_is_better(
    seed: int, num_rows: int, num_classes: int, multi_hot: bool, scale: float
) -> None:
    logits_NC, targets = drawn(np.random.default_rng(seed), num_rows, num_classes, multi_hot=multi_hot)
    logits_NC = (logits_NC * scale).astype(np.float32)
    temperature = fit_temperature(logits_NC, targets)
    assert TEMPERATURE_BOUNDS[0] <= temperature <= TEMPERATURE_BOUNDS[1]

    def loss(candidate: float) -> float:
        """Negative logarithm of likelihood and prior, written out; decisions of a row count as one."""
        scaled_NC = logits_NC.astype(np.float64) / candidate
        if multi_hot:
            rows = np.where(targets > 0, log_expit(scaled_NC), log_expit(-scaled_NC)).mean(axis=1)
        else:
            rows = log_softmax(scaled_NC, axis=1)[np.arange(num_rows), targets]
        return float(-(rows.sum() + gamma.logpdf(1 / candidate, 5, scale=1 / 4)) / num_rows)

    others = [loss(float(other)) for other in np.geomspace(*TEMPERATURE_BOUNDS, 100)]
    assert loss(temperature) <= min(others) + 1e-4 * (1 + abs(min(others)))


@pytest.mark.parametrize("num_rows", [1, 20, 500])
def test_to_be_right_on_few_rows_is_no_certainty(num_rows: int) -> None:
    sure_NC = np.tile([15.0, 0.0, 0.0], (num_rows, 1))
    assert fit_temperature(sure_NC, np.zeros(num_rows, dtype=int)) == pytest.approx(1, abs=0.01)
    unsure_NC = np.tile([0.5, 0.0], (num_rows, 1))
    temperature = fit_temperature(unsure_NC, np.zeros(num_rows, dtype=int))
    claimed = expit(0.5 / temperature)
    assert 0.5 < claimed < (num_rows + 1) / (num_rows + 2) + 0.01  # what so many successes tell of the next one


def test_a_temperature_that_gains_nothing_is_one() -> None:
    assert calibrate(np.zeros((0, 3)), np.zeros(0, dtype=int)) == (1, {})
    assert fit_temperature(np.zeros((9, 3)), np.zeros(9, dtype=int)) == 1


@pytest.mark.parametrize("multi_hot", [False, True])
def test_a_gain_of_chance_is_told_from_one_that_lasts(multi_hot: bool) -> None:
    rng = np.random.default_rng(5)

    def share_beyond(factor: float) -> float:
        draws = [drawn(rng, 500, 4, multi_hot=multi_hot) for _ in range(100)]
        return np.mean(
            [calibrate(factor * logits_NC, targets)[1]["nll_gain_z"] >= 1.96 for logits_NC, targets in draws]
        )

    assert share_beyond(1.0) <= 0.12  # 5 % are meant
    assert share_beyond(1.3) >= 0.9


def test_worse_than_chance_is_not_believed_at_all() -> None:
    logits_NC = np.tile([5.0, 0.0], (100, 1))
    assert fit_temperature(logits_NC, np.ones(100, dtype=int)) == pytest.approx(TEMPERATURE_BOUNDS[1], rel=0.01)


@pytest.mark.parametrize(
    ("values", "targets", "message"),
    [
        (np.full((3, 2), np.nan), np.zeros(3, dtype=int), "leave out the rows without tokens"),
        (np.zeros((2, 2)), np.array([0, -1]), "leave out the rows without a class"),
    ],
)
def test_rows_without_a_prediction_or_a_class_are_refused(
    values: np.ndarray, targets: np.ndarray, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        fit_temperature(values, targets)


def test_calibration_error_by_hand() -> None:
    probabilities_NC = np.array([[0.9, 0.1], [0.8, 0.2], [0.35, 0.65], [0.35, 0.65]])
    # Three rows in the bin up to 0.8, which is on an edge and belongs below, and one above.
    error = expected_calibration_error(probabilities_NC, np.array([0, 0, 1, 0]), num_bins=5)
    assert error == pytest.approx(3 / 4 * (0.7 - 2 / 3) + 1 / 4 * 0.1)


def test_calibration_error_of_several_labels_is_of_every_decision() -> None:
    probabilities_NC, true_NC = np.array([[0.9, 0.1], [0.9, 0.1]]), np.array([[1, 0], [0, 0]])
    assert expected_calibration_error(probabilities_NC, true_NC) == pytest.approx((0.4 + 0.1) / 2)


@given(seeds, st.integers(0, 40), st.integers(1, 20), st.booleans())
def test_calibration_error_is_that_of_the_formula(seed: int, num_rows: int, num_bins: int, multi_hot: bool) -> None:
    logits_NC, targets = drawn(np.random.default_rng(seed), num_rows, 3, multi_hot=multi_hot)
    kind = "multi_label_classification" if multi_hot else "single_label_classification"
    probabilities_NC = probabilities(logits_NC, kind).astype(np.float64)
    scores = probabilities_NC.ravel() if multi_hot else probabilities_NC.max(axis=1)
    is_right = targets.ravel() > 0 if multi_hot else probabilities_NC.argmax(axis=1) == targets
    expected, num_counted = 0.0, 0
    for number in range(num_bins):
        inside = (scores * num_bins > number) & (scores * num_bins <= number + 1)
        num_counted += inside.sum()
        if inside.any():
            expected += inside.mean() * abs(scores[inside].mean() - is_right[inside].mean())
    assert num_counted == targets.size
    assert expected_calibration_error(probabilities_NC, targets, num_bins) == pytest.approx(expected)


# Few distinct values, so that ties are common.
scores = st.lists(st.tuples(st.integers(1, 8).map(lambda eighth: eighth / 8), st.booleans()), min_size=1, max_size=40)


@given(scores)
def test_no_threshold_has_a_better_f1(rows: list[tuple[float, bool]]) -> None:
    scores_N, true_N = np.array([score for score, _ in rows]), np.array([true for _, true in rows])
    (threshold,) = tune_thresholds(scores_N[:, None], true_N[:, None], min_positives=0)

    def f1(cut: float) -> float:
        given_N = scores_N >= cut
        return float(2 * (given_N & true_N).sum() / max(1, given_N.sum() + true_N.sum()))

    if not true_N.any():
        assert threshold == DEFAULT_THRESHOLD
        return
    best = max(f1(cut) for cut in [*scores_N, 2.0])
    assert f1(threshold) == pytest.approx(best)
    assert threshold not in scores_N  # rounding of a score does not matter
    highest = max(cut for cut in scores_N if f1(cut) == pytest.approx(best))  # of equal ones
    assert min(score for score in scores_N if score >= threshold) == highest


def test_neighbouring_numbers_have_no_middle() -> None:
    scores_N = np.array([[0.5], [np.nextafter(0.5, 0)]])
    assert (scores_N >= tune_thresholds(scores_N, np.array([[1], [0]]), 1)).tolist() == [[True], [False]]


def test_rare_labels_lean_on_each_other() -> None:
    rng = np.random.default_rng(0)
    true_NC = rng.random((2000, 5)) < [0.3, 0.005, 0.005, 0.0, 0.005]
    scores_NC = np.where(true_NC, rng.beta(4, 4, true_NC.shape), rng.beta(1, 12, true_NC.shape)).round(3)
    num_positives_C = true_NC.sum(axis=0)
    rare = [1, 2, 4]
    assert (num_positives_C[rare] < 20).all() and num_positives_C[rare].sum() >= 20

    def expected(label: int, pooled: list[int]) -> float:
        """Every cut, with the label's own rows once and all pooled ones in part."""
        part = (20 - num_positives_C[label]) / num_positives_C[pooled].sum()
        best, best_f1 = 0.0, 0.0
        for cut in sorted(set(scores_NC[:, pooled].ravel().tolist()), reverse=True):
            given_NC = scores_NC >= cut
            right, given = (
                which_NC[:, label].sum() + part * which_NC[:, pooled].sum()
                for which_NC in (given_NC & true_NC, given_NC)
            )
            if 2 * right / (given + 20) > best_f1 + 1e-12:
                best, best_f1 = cut, 2 * right / (given + 20)
        return best

    found_C = tune_thresholds(scores_NC, true_NC)
    assert found_C[0] == tune_thresholds(scores_NC, true_NC, min_positives=0)[0]
    assert found_C[3] == DEFAULT_THRESHOLD
    for label in rare:
        assert ((scores_NC[:, rare] >= found_C[label]) == (scores_NC[:, rare] >= expected(label, rare))).all()
    assert len(set(found_C[rare])) > 1  # they lean, they do not agree
    # Too few even together: on all labels.
    (_, one) = tune_thresholds(scores_NC[:, :2], true_NC[:, :2])
    assert ((scores_NC[:, :2] >= one) == (scores_NC[:, :2] >= expected(1, [0, 1]))).all()
    # Too few in all: no reason to leave the default.
    assert tune_thresholds(scores_NC[:, 1:2], true_NC[:, 1:2]).tolist() == [DEFAULT_THRESHOLD]


def test_one_odd_positive_does_not_give_a_label_to_everything() -> None:
    rng = np.random.default_rng(0)
    true_NC = np.zeros((500, 2), dtype=bool)
    true_NC[:100, 0], true_NC[0, 1] = True, True
    scores_NC = np.stack(
        [np.where(true_NC[:, 0], 0.7, 0.2) + rng.uniform(-0.15, 0.15, 500), np.full(500, 0.02)], axis=1
    )
    scores_NC[0, 1] = 0.01  # the only row that has the label has it less likely than all others
    assert (scores_NC >= tune_thresholds(scores_NC, true_NC, min_positives=1))[:, 1].all()
    assert not (scores_NC >= tune_thresholds(scores_NC, true_NC))[:, 1].any()


@given(scores, st.floats(0.05, 0.95), st.sampled_from([0.5, 0.9, 0.95]))
def test_the_lowest_score_of_enough_precision(rows: list[tuple[float, bool]], target: float, confidence: float) -> None:
    scores_N, is_right_N = np.array([score for score, _ in rows]), np.array([right for _, right in rows])
    found = threshold_for_precision(scores_N, is_right_N, target, confidence)

    def is_reached(cut: float) -> bool:
        """Were the precision lower than the target, so many right rows would be rarer than 1 - confidence."""
        num_rows, num_right = int((scores_N >= cut).sum()), int(is_right_N[scores_N >= cut].sum())
        return bool(binom.sf(num_right - 1, num_rows, target) <= 1 - confidence + 1e-12)

    reaching = [cut for cut in scores_N if is_reached(cut)]
    assert found == (min(reaching) if reaching else None)


def test_how_many_rows_prove_a_precision() -> None:
    for target, num_rows in ((0.95, 59), (0.99, 299)):
        assert threshold_for_precision(np.ones(num_rows), np.ones(num_rows), target) == 1
        assert threshold_for_precision(np.ones(num_rows - 1), np.ones(num_rows - 1), target) is None
    assert threshold_for_precision(np.zeros(0), np.zeros(0), 0.9) is None
    assert threshold_for_precision(np.ones(1000), np.zeros(1000), 0.01) is None


def test_the_precision_holds_on_other_rows() -> None:
    """Of 300 samples the lowest cut that reaches 0.9 by itself misses it in half, with the bound in few."""
    rng = np.random.default_rng(0)

    def missed(confidence: float) -> float:
        misses = 0
        for _ in range(300):
            scores_N = rng.beta(3, 1, 1000)
            found = threshold_for_precision(scores_N, rng.random(1000) < scores_N, 0.9, confidence)
            assert found is not None
            # Scores are calibrated: the precision above a cut is the mean of beta(3, 1) there.
            precision = 3 / 4 * (1 - found**4) / (1 - found**3)
            misses += precision < 0.9
        return misses / 300

    assert 0.35 < missed(0.5) < 0.75
    assert missed(0.95) < 0.12
