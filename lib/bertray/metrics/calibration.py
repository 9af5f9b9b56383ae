"""How sure a model is: one temperature for its logits, and the scores from which its labels may be relied on.

    logits_NC [[4, 0], [4, 0], [4, 0], [0, 4]], label ids [0, 0, 1, 1], and 100 times so: it claims 98 %, 75 % are right
      1. fit       divided by T = 3.53, logits claim 76 %                    temperature, goes into the model's weights
      2. measure   expected calibration error 0.23 before, 0.01 after        calibration, goes into bundle.json
      3. choose    the score from which a wanted share of labels is right    review_below, goes into bundle.json
                   of several labels a row: from which each is given         thresholds, go into bundle.json

All of it is read off validation rows. A division of the logits by T > 0 changes no row's likeliest label.

Targets are label ids (int [N]) where a row has one label of all, or multi-hot [N, C] where each label of a row is a
decision of its own.

Legend: N rows, C classes, B bins.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaincinv, logsumexp

from bertray.types import ProblemType

# Beyond them scores are all alike, or all 0 and 1: no validation split can ask for that.
TEMPERATURE_BOUNDS = (0.05, 20.0)
# Of the Gamma distribution that 1 / T is taken to have; its mode is 1.
_PRIOR_RATE = 4.0
NUM_BINS = 15  # Guo et al. (2017), and those who compare with them
DEFAULT_THRESHOLD = 0.5  # of a label, where nothing better is known
# A label of fewer validation rows does not choose a threshold alone.
MIN_POSITIVES = 20
# That the precision wanted is really reached.
CONFIDENCE = 0.95


def probabilities(logits_NC: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """Probabilities of each row, float32; NaN rows stay NaN.

    One label of all: softmax, each row sums to 1. Several labels: the sigmoid of each, independent of the others.
    """
    if problem_type == "multi_label_classification":
        with np.errstate(over="ignore"):  # exp(100) is infinite in float32, and 1 / infinity is right
            return np.asarray(1 / (1 + np.exp(-logits_NC)), dtype=np.float32)
    odds_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    return np.asarray(odds_NC / odds_NC.sum(axis=1, keepdims=True), dtype=np.float32)


def calibrate(logits_NC: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, float]]:
    """The temperature of `fit_temperature`, and what it does to these rows: `BundleInfo.calibration`.

    Returns:
        The temperature, and ece_before, ece_after, nll_before, nll_after; without rows none of these.

    Raises:
        ValueError: as `fit_temperature`.
    """
    temperature = fit_temperature(logits_NC, targets)
    if not len(logits_NC):
        return temperature, {}
    problem_type: ProblemType = "single_label_classification" if targets.ndim == 1 else "multi_label_classification"
    measured = {}
    for when, scaled_NC in (("before", logits_NC), ("after", logits_NC / temperature)):
        measured[f"ece_{when}"] = expected_calibration_error(probabilities(scaled_NC, problem_type), targets)
        measured[f"nll_{when}"] = negative_log_likelihood(scaled_NC, targets)
    return temperature, measured


def fit_temperature(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    """The temperature T by which logits are divided for the least mean negative log-likelihood.

    Guo et al., On Calibration of Modern Neural Networks (2017): softmax of label ids, sigmoid of multi-hot targets.

    Few rows tell little of T, and a model that is right in all of them would be told to be certain of everything. So
    1 / T has a prior, as a parameter that is estimated: a Gamma distribution of shape 5 and rate 4, whose mode is 1
    and in which nine of ten T lie between 0.44 and 2.03. On 50 draws of 20 clinc150 rows the smallest T was 0.58, and
    0.05 without it; on draws of 2,000 rows the median is the same (benchmarks/how_sure.py).
    Loss and prior are convex in 1 / T: there is one minimum, which is searched for within `TEMPERATURE_BOUNDS`.

    Returns:
        T; 1 where another would not be better, as without rows.

    Raises:
        ValueError: shapes differ, a logit is not finite, or a label id is none of the classes.
    """
    logits_NC, targets = _checked(logits_NC, targets)
    if logits_NC.size == 0:
        return 1.0

    def loss(log_temperature: float) -> float:
        sharpness = math.exp(-log_temperature)
        prior = _PRIOR_RATE * (sharpness + log_temperature)  # its negative logarithm, but for a constant
        return _mean_loss(logits_NC * sharpness, targets) + prior / len(targets)

    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def negative_log_likelihood(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    """Mean over rows of one label (cross-entropy), or over the N × C decisions of several (binary cross-entropy).

    Args:
        logits_NC: of one row at least.

    Raises:
        ValueError: as `fit_temperature`.
    """
    return _mean_loss(*_checked(logits_NC, targets))


def _mean_loss(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    if targets.ndim == 1:
        losses = logsumexp(logits_NC, axis=1) - logits_NC[np.arange(len(targets)), targets]
    else:
        losses = np.logaddexp(0, logits_NC) - logits_NC * targets
    return float(losses.mean())


class Reliability(NamedTuple):
    """A reliability diagram: what is claimed and what is true, in bins of the score of equal width from 0 to 1."""

    num_rows_B: np.ndarray  # or decisions
    mean_score_B: np.ndarray  # NaN in an empty bin, as below
    accuracy_B: np.ndarray


def reliability(probabilities_NC: np.ndarray, targets: np.ndarray, num_bins: int = NUM_BINS) -> Reliability:
    """Rows, mean score and accuracy by score.

    One label a row: the score is the likeliest label's probability, accuracy the share of rows where it is the true
    one. Several: each of the N × C decisions counts, its score is the label's probability, accuracy the share of
    decisions where the row has the label.

    Raises:
        ValueError: as `fit_temperature`.
    """
    probabilities_NC, targets = _checked(probabilities_NC, targets)
    if targets.ndim == 1:
        scores, is_right = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == targets
    else:
        scores, is_right = probabilities_NC.ravel(), targets.ravel()
    # A score on an edge belongs to the bin below, as in Guo et al.
    bins = np.clip(np.ceil(scores * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    num_rows_B = np.bincount(bins, minlength=num_bins)
    sums = (np.bincount(bins, weights, minlength=num_bins) for weights in (scores, is_right))
    with np.errstate(invalid="ignore"):
        mean_score_B, accuracy_B = (sum_B / num_rows_B for sum_B in sums)
    return Reliability(num_rows_B, mean_score_B, accuracy_B)


def expected_calibration_error(probabilities_NC: np.ndarray, targets: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Mean distance of score and accuracy over the bins of `reliability`, by rows: 0 is calibrated; without rows 0.

    Naeini et al. (2015). Where most decisions are easy, as of rare labels, it is small by nature: compare it with
    itself, not between data sets.
    """
    found = reliability(probabilities_NC, targets, num_bins)
    distance_B = np.nan_to_num(np.abs(found.accuracy_B - found.mean_score_B))
    return float(distance_B @ found.num_rows_B / max(1, found.num_rows_B.sum()))


def tune_thresholds(
    probabilities_NC: np.ndarray, true_NC: np.ndarray, min_positives: int = MIN_POSITIVES
) -> np.ndarray:
    """For each label the probability from which giving it has the best F1 on these rows.

    Every cut between two scores is tried; of equal ones the highest is taken, and the threshold is its middle, so that
    a score may differ by rounding.

    With few positives the best cut is chance: chosen on 500 rows of a 28-label data set, it gave some rare label to 121
    times as many rows as have it. (Yang, A Study on Thresholding Strategies for Text Categorization, 2001, names the
    problem.) So a label of fewer positives than `min_positives` is filled up to that number with the average of all
    labels that have too few; where these have too few even together, with the average of all labels. In the same
    measurement (benchmarks/how_sure.py) that is 4 times as many, and micro-F1 is 0.45, not 0.39.

    Args:
        probabilities_NC: as in `probabilities`.
        true_NC: multi-hot.

    Returns:
        thresholds_C (float64); `DEFAULT_THRESHOLD` for a label without a positive, and where all labels together have
        fewer than `min_positives`.

    Raises:
        ValueError: as `fit_temperature`.
    """
    probabilities_NC, true_NC = _checked(probabilities_NC, true_NC)
    num_positives_C = true_NC.sum(axis=0)
    is_rare_C = (num_positives_C > 0) & (num_positives_C < min_positives)
    pooled_C = is_rare_C if num_positives_C[is_rare_C].sum() >= min_positives else num_positives_C > 0
    pool = _cuts(probabilities_NC[:, pooled_C].ravel(), true_NC[:, pooled_C].ravel()) if is_rare_C.any() else None
    thresholds_C = np.full(true_NC.shape[1], DEFAULT_THRESHOLD)
    for label in np.flatnonzero(num_positives_C):
        cuts = _cuts(probabilities_NC[:, label], true_NC[:, label])
        if is_rare_C[label]:
            assert pool is not None
            if pool.num_right[-1] < min_positives:
                continue
            cuts = _filled_up(cuts, pool, min_positives)
        thresholds_C[label] = _best_f1_cut(cuts)
    return thresholds_C


def _filled_up(cuts: _Cuts, pool: _Cuts, min_positives: int) -> _Cuts:
    """With so much of the pool, of which they are part, that the positives are `min_positives`."""
    share = (min_positives - cuts.num_right[-1]) / pool.num_right[-1]
    reached = np.searchsorted(-cuts.scores, -pool.scores, side="right")
    num_rows, num_right = (np.append(0, count)[reached] for count in (cuts.num_rows, cuts.num_right))
    return _Cuts(pool.scores, num_rows + share * pool.num_rows, num_right + share * pool.num_right)


def _best_f1_cut(cuts: _Cuts) -> float:
    """The middle between the scores that are above and below it."""
    f1 = 2 * cuts.num_right / (cuts.num_rows + cuts.num_right[-1])
    best = int(f1.argmax())
    score, below = cuts.scores[best], cuts.scores[best + 1] if best + 1 < len(cuts.scores) else 0.0
    middle = (score + below) / 2
    return float(middle if middle > below else score)


def threshold_for_precision(
    scores_N: np.ndarray, is_right_N: np.ndarray, target_precision: float, confidence: float = CONFIDENCE
) -> float | None:
    """The lowest score such that of the rows at or above it, at least this share is right; None: there is none.

    The share must be reached not by these rows alone but, with `confidence`, by all that they are a sample of: their
    lower bound after Clopper and Pearson (1934) is compared with it. The lowest cut that reaches it on the rows alone
    misses it on others every second time. So few rows never suffice: all right, it takes 59 for 0.95 and 299 for 0.99.
    For few more rows than that it is strict, and many rows are below it.

    The bound is of every cut by itself, and the lowest of many is taken. Where scores tell right from wrong that costs
    nothing; where the precision is the same at all scores, and a point or half a point below the target, it was
    promised all the same in 15 to 19 % of simulated cases.

    Rows of equal scores stand on the same side. It is a score that occurs: a row that has it, and in another
    precision a little less, is reviewed.

    Args:
        scores_N: of the likeliest label.
        is_right_N: whether it is the true one, or one of them.

    Raises:
        ValueError: the precision is not between 0 and 1, shapes differ, or a score is not finite.
    """
    scores_N, is_right_N = np.asarray(scores_N, dtype=np.float64), np.asarray(is_right_N, dtype=bool)
    if not 0 < target_precision < 1:
        raise ValueError(f"target_precision is {target_precision}; it must be above 0 and below 1")
    if scores_N.shape != is_right_N.shape or not np.isfinite(scores_N).all():
        raise ValueError(f"{scores_N.shape} finite scores and as many truths are needed, got {is_right_N.shape}")
    if not len(scores_N):
        return None
    cuts = _cuts(scores_N, is_right_N)
    reached = np.flatnonzero(_lower_bound(cuts.num_right, cuts.num_rows, confidence) >= target_precision)
    return float(cuts.scores[reached[-1]]) if len(reached) else None


def _lower_bound(num_right: np.ndarray, num_rows: np.ndarray, confidence: float) -> np.ndarray:
    """What a share is not below, with this confidence, when so many of so many rows are right."""
    bound = betaincinv(np.maximum(num_right, 1), num_rows - num_right + 1, 1 - confidence)
    return np.where(num_right > 0, bound, 0.0)


class _Cuts(NamedTuple):
    """The distinct scores, falling, and of the rows at or above each how many there are, and how many are right.

    Rows may be counted in part.
    """

    scores: np.ndarray
    num_rows: np.ndarray
    num_right: np.ndarray


def _cuts(scores_N: np.ndarray, is_right_N: np.ndarray) -> _Cuts:
    order = np.argsort(-scores_N, kind="stable")
    scores = scores_N[order]
    last_of_each = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return _Cuts(scores[last_of_each], last_of_each + 1, np.cumsum(is_right_N[order])[last_of_each])


def _checked(values_NC: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As float64, and targets as whole numbers.

    Raises:
        ValueError: they do not go together.
    """
    values_NC, targets = np.asarray(values_NC, dtype=np.float64), np.asarray(targets).astype(np.int64)
    if values_NC.ndim != 2 or targets.shape not in (values_NC.shape, values_NC.shape[:1]):
        raise ValueError(
            f"values of shape {values_NC.shape} need label ids {values_NC.shape[:1]} or multi-hot targets of the same "
            f"shape; targets have {targets.shape}"
        )
    if not np.isfinite(values_NC).all():
        raise ValueError("a value is not finite: leave out the rows without tokens")
    num_choices = values_NC.shape[1] if targets.ndim == 1 else 2
    if targets.size and not 0 <= targets.min() <= targets.max() < num_choices:
        raise ValueError(
            f"targets go from {targets.min()} to {targets.max()}, and must lie in 0 to {num_choices - 1}: leave out "
            "the rows without a class"
        )
    return values_NC, targets
