"""Doubtful labels: planted errors are found, with what they should have been; sound labels are left alone."""

import numpy as np
import pytest

from bertray.metrics.label_issues import find_issues, find_multi_label_issues, ranked

NUM_ROWS, NUM_LABELS = 2000, 5


def noisy(is_wrong: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and given label ids, and probabilities of a model that is right in nine of ten rows."""
    rng = np.random.default_rng(seed)
    true_N = rng.integers(0, NUM_LABELS, NUM_ROWS)
    logits_NC = rng.normal(size=(NUM_ROWS, NUM_LABELS))
    logits_NC[np.arange(NUM_ROWS), true_N] += 3
    odds_NC = np.exp(logits_NC)
    wrong_N = rng.random(NUM_ROWS) < is_wrong
    given_N = np.where(wrong_N, (true_N + 1) % NUM_LABELS, true_N)  # always the next one
    return true_N, given_N, (odds_NC / odds_NC.sum(axis=1, keepdims=True)).astype(np.float32)


def test_planted_errors_are_found() -> None:
    true_N, given_N, probabilities_NC = noisy(0.08)
    issues = find_issues(given_N, probabilities_NC)
    wrong_N = true_N != given_N
    assert issues.noise == pytest.approx(wrong_N.mean(), abs=0.03)
    assert (wrong_N & issues.is_suspect_N).sum() > 0.8 * wrong_N.sum()
    assert (wrong_N & issues.is_suspect_N).sum() > 0.7 * issues.is_suspect_N.sum()
    found = issues.is_suspect_N & wrong_N
    assert (issues.suggested[found] == true_N[found]).mean() > 0.9
    assert [facts["most_often"] for facts in issues.by_label] == [4, 0, 1, 2, 3]
    assert sum(facts["num_suspects"] for facts in issues.by_label) == issues.is_suspect_N.sum()
    assert [facts["num_rows"] for facts in issues.by_label] == np.bincount(given_N).tolist()


def test_both_probabilities_are_the_models() -> None:
    _, given_N, probabilities_NC = noisy(0.08)
    issues = find_issues(given_N, probabilities_NC)
    every = np.arange(NUM_ROWS)
    assert issues.given_probability_N == pytest.approx(probabilities_NC[every, given_N])
    assert issues.suggested_probability_N == pytest.approx(probabilities_NC.max(axis=1))
    assert (issues.suggested[issues.is_suspect_N] != given_N[issues.is_suspect_N]).all()


def test_suspects_are_ranked_by_quality() -> None:
    _, given_N, probabilities_NC = noisy(0.08)
    issues = find_issues(given_N, probabilities_NC)
    order = ranked(issues)
    assert sorted(order.tolist()) == np.flatnonzero(issues.is_suspect_N).tolist()
    assert (np.diff(issues.quality_N[order]) >= 0).all()


def test_sound_labels_have_no_suspects() -> None:
    labels_N = np.repeat(np.arange(3), 20)
    probabilities_NC = np.full((60, 3), 0.01, dtype=np.float32)
    probabilities_NC[np.arange(60), labels_N] = 0.98
    issues = find_issues(labels_N, probabilities_NC)
    assert not issues.is_suspect_N.any()
    assert len(ranked(issues)) == 0
    assert issues.noise == pytest.approx(0)
    assert "most_often" not in issues.by_label[0]


def test_of_several_labels_the_wrong_ones_are_named() -> None:
    rng = np.random.default_rng(0)
    true_NC = rng.random((NUM_ROWS, NUM_LABELS)) < 0.3
    logits_NC = rng.normal(size=true_NC.shape) + np.where(true_NC, 4, -4)
    wrong_NC = rng.random(true_NC.shape) < 0.02
    given_NC = true_NC ^ wrong_NC
    issues = find_multi_label_issues(given_NC.astype(np.float32), 1 / (1 + np.exp(-logits_NC)))
    assert issues.noise == pytest.approx(0.02, abs=0.01)
    assert (issues.suggested != true_NC).sum() < 0.3 * wrong_NC.sum()
    has_wrong_N = wrong_NC.any(axis=1)
    assert (issues.is_suspect_N & has_wrong_N).sum() > 0.7 * has_wrong_N.sum()
    doubted_NC = issues.suggested != given_NC
    assert (doubted_NC.any(axis=1) == issues.is_suspect_N).all()
    assert [facts["num_suspects"] for facts in issues.by_label] == (doubted_NC & given_NC).sum(axis=0).tolist()
    assert [facts["num_missing"] for facts in issues.by_label] == (doubted_NC & ~given_NC).sum(axis=0).tolist()
    suspects = issues.is_suspect_N
    assert (issues.given_probability_N[suspects] < issues.suggested_probability_N[suspects]).all()

    # A label that every row has is not doubted, and changes nothing for the others.
    ones_N1, sure_N1 = np.ones((NUM_ROWS, 1)), rng.random((NUM_ROWS, 1))
    probabilities_NC = 1 / (1 + np.exp(-logits_NC))
    more = find_multi_label_issues(np.hstack([ones_N1, given_NC]), np.hstack([sure_N1, probabilities_NC]))
    assert (more.is_suspect_N == suspects).all()
    assert (more.suggested == np.hstack([ones_N1 > 0, issues.suggested])).all()
    assert more.by_label[0] == {"num_rows": NUM_ROWS, "num_suspects": 0, "num_missing": 0, "noise": 0.0}
    assert more.by_label[1:] == issues.by_label
    # The same where one label alone is left to judge.
    one = find_multi_label_issues(np.hstack([ones_N1, given_NC[:, :1]]), np.hstack([sure_N1, probabilities_NC[:, :1]]))
    assert one.by_label[1] == issues.by_label[0]
    assert (one.suggested[:, 1] == issues.suggested[:, 0]).all()
    assert np.corrcoef(one.quality_N, given_NC[:, 0] == true_NC[:, 0])[0, 1] > 0.8
    none = find_multi_label_issues(ones_N1, sure_N1)
    assert (none.suggested == (ones_N1 > 0)).all()
    assert not none.is_suspect_N.any()
