"""How sure a model is: a temperature for its logits, and the scores from which its labels can be relied on.

    logits_NC [[4, 0], [4, 0], [4, 0], [0, 4]], label ids [0, 0, 1, 1], all 100 times: 98 % claimed, 75 % right
      1. fit       divided by T = 3.53, the logits claim 76 %                temperature, goes into the model's weights
      2. measure   expected calibration error 0.23 before, 0.01 after        calibration, goes into bundle.json
      3. choose    the score from which a wanted share of labels is right    review_below, goes into bundle.json
                   several labels a row: the score from which each is given  thresholds, go into bundle.json

All of it is computed on validation rows. Dividing the logits by T > 0 changes no row's likeliest label.

Targets are label ids (int [N]) if each row has one label, or multi-hot [N, C] if each label of a row is a decision of
its own. Values must be finite: leave out rows without tokens, and rows without a class.

Legend: N rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, expit, logsumexp, softmax

from bertray.types import ProblemType

# Beyond them scores are all alike, or all 0 and 1: no validation split can ask for that.
TEMPERATURE_BOUNDS = (0.05, 20.0)
_PRIOR_RATE = 4.0  # of the Gamma prior of 1 / T, whose mode is 1
NUM_BINS = 15  # as in Guo et al. (2017) and in papers that compare with them
DEFAULT_THRESHOLD = 0.5
MIN_POSITIVES = 20  # a label with fewer validation rows does not choose a threshold alone
CONFIDENCE = 0.95  # that new rows reach the precision wanted
_PROBABILITIES: dict[ProblemType, Callable[[np.ndarray], np.ndarray]] = {
    "single_label_classification": partial(softmax, axis=1),
    "multi_label_classification": expit,
}


def probabilities(logits_NC: np.ndarray, problem_type: ProblemType) -> np.ndarray:
    """Probabilities of each row, float32; NaN for a row whose logits are not all finite.

    One label a row: the softmax, each row sums to 1. Several labels: the sigmoid of each logit.
    """
    logits_NC = np.where(np.isfinite(logits_NC).all(axis=1, keepdims=True), logits_NC, np.nan)
    return np.asarray(_PROBABILITIES[problem_type](logits_NC), dtype=np.float32)


def calibrate(logits_NC: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, float]]:
    """Fit a temperature, and measure its effect on these rows.

    Returns:
        The temperature, and ece_before, ece_after, nll_before, nll_after and nll_gain_z (`BundleInfo.calibration`);
        without rows none of these. If nll_gain_z is below 1.96, T = 1 explains these rows as well (95 %).
    """
    temperature = fit_temperature(logits_NC, targets)
    if not len(logits_NC):
        return temperature, {}
    problem_type: ProblemType = "single_label_classification" if targets.ndim == 1 else "multi_label_classification"
    measured, losses_N = {}, {}
    for when, scaled_NC in (("before", logits_NC), ("after", logits_NC / temperature)):
        measured[f"ece_{when}"] = expected_calibration_error(probabilities(scaled_NC, problem_type), targets)
        losses_N[when] = _losses(*_checked(scaled_NC, targets)).reshape(len(targets), -1).mean(axis=1)
        measured[f"nll_{when}"] = float(losses_N[when].mean())
    # T was fitted to these rows, and a temperature that is right gains on them too. Near T = 1 the loss is a parabola,
    # whose gain is half of slope times step: so twice its mean, over its standard error, is the z of the fitted step.
    gain_N = losses_N["before"] - losses_N["after"]
    error = gain_N.std() / math.sqrt(len(gain_N))
    measured["nll_gain_z"] = float(2 * gain_N.mean() / error) if error > 0 else 0.0
    return temperature, measured


def fit_temperature(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    """The temperature T that minimizes the mean negative log-likelihood of the logits divided by T, plus a prior.

    Guo et al., On Calibration of Modern Neural Networks (2017): softmax of label ids, sigmoid of multi-hot targets.

    Few rows say little about T, and without a prior a model that is right on all of them would become certain of
    everything. So 1 / T has a Gamma prior of shape 5 and rate 4: its mode is 1, and nine of ten T lie between 0.44 and
    2.03. On 50 draws of 20 clinc150 rows the smallest T was 0.58, and 0.05 without the prior; on draws of 2,000 rows
    the median is the same (benchmarks/how_sure.py).
    Loss and prior are convex in 1 / T: there is one minimum, which is searched for within `TEMPERATURE_BOUNDS`.
    Without rows, or if no other T is better, T is 1.
    """
    from scipy.optimize import minimize_scalar  # an eighth of a second, which every command would take

    logits_NC, targets = _checked(logits_NC, targets)
    if logits_NC.size == 0:
        return 1.0

    def loss(log_temperature: float) -> float:
        sharpness = math.exp(-log_temperature)
        prior = _PRIOR_RATE * (sharpness + log_temperature)  # its negative logarithm, up to a constant
        return _mean_loss(logits_NC * sharpness, targets) + prior / len(targets)

    low, high = np.log(TEMPERATURE_BOUNDS)
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x)) if found.fun < loss(0.0) else 1.0


def negative_log_likelihood(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    """Mean over one row or more (cross-entropy), or with several labels over N × C decisions (binary cross-entropy)."""
    return _mean_loss(*_checked(logits_NC, targets))


def _mean_loss(logits_NC: np.ndarray, targets: np.ndarray) -> float:
    return float(_losses(logits_NC, targets).mean())


def _losses(logits_NC: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Of each row, or with several labels of each decision [N, C]."""
    if targets.ndim == 1:
        return np.asarray(logsumexp(logits_NC, axis=1) - logits_NC[np.arange(len(targets)), targets])
    return np.asarray(np.logaddexp(0, logits_NC) - logits_NC * targets)


def expected_calibration_error(probabilities_NC: np.ndarray, targets: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Mean distance of score and accuracy over bins of equal width from 0 to 1, weighted by rows; without rows 0.

    Naeini et al. (2015). One label a row: the score is the likeliest label's probability, and the accuracy is the share
    of rows that have this label. Several labels: each of the N × C decisions counts like a row. If most decisions are
    easy, as with rare labels, the error is small: do not compare it between data sets.
    """
    probabilities_NC, targets = _checked(probabilities_NC, targets)
    if targets.ndim == 1:
        scores, is_right = probabilities_NC.max(axis=1), probabilities_NC.argmax(axis=1) == targets
    else:
        scores, is_right = probabilities_NC.ravel(), targets.ravel()
    # A score on an edge belongs to the bin below, as in Guo et al.
    bins = np.maximum(np.ceil(scores * num_bins).astype(np.int64) - 1, 0)
    claimed_B, right_B = np.bincount(bins, scores), np.bincount(bins, is_right)  # B bins
    return float(np.abs(claimed_B - right_B).sum() / max(1, len(scores)))


def tune_thresholds(
    probabilities_NC: np.ndarray, true_NC: np.ndarray, min_positives: int = MIN_POSITIVES
) -> np.ndarray:
    """For each label the threshold with the best F1 on these rows: rows that reach it are given the label.

    Every cut between two scores is tried; among equals the highest is taken. The threshold is the middle of the cut, so
    that rounding of a score does not matter.

    With few positives the best cut is chance: chosen on 500 rows of a 28-label data set, it gave one rare label to 121
    times as many rows as have it. (Yang, A Study on Thresholding Strategies for Text Categorization, 2001, names the
    problem.) So a label with fewer than `min_positives` positives is filled up to that number with the average of all
    labels that have too few, or of all labels if those have too few even together. In the same measurement
    (benchmarks/how_sure.py) the factor is 4 instead of 121, and micro-F1 is 0.45 instead of 0.39.

    Returns:
        thresholds_C (float64); `DEFAULT_THRESHOLD` for a label without positives, and for rare labels if all labels
        together have fewer than `min_positives`.
    """
    probabilities_NC, true_NC = _checked(probabilities_NC, true_NC)
    num_positives_C = true_NC.sum(axis=0)
    is_rare_C = (num_positives_C > 0) & (num_positives_C < min_positives)
    pooled_C = num_positives_C > 0 if 0 < num_positives_C[is_rare_C].sum() < min_positives else is_rare_C
    pool = _cuts(probabilities_NC[:, pooled_C].ravel(), true_NC[:, pooled_C].ravel())
    thresholds_C = np.full(true_NC.shape[1], DEFAULT_THRESHOLD)
    for label in np.flatnonzero(num_positives_C):
        cuts = _cuts(probabilities_NC[:, label], true_NC[:, label])
        if is_rare_C[label]:
            if pool.num_right[-1] < min_positives:
                continue
            cuts = _filled_up(cuts, pool, min_positives)
        thresholds_C[label] = _best_f1_cut(cuts)
    return thresholds_C


def _filled_up(cuts: _Cuts, pool: _Cuts, min_positives: int) -> _Cuts:
    """Add such a part of the pool, which includes `cuts`, that the positives are `min_positives`."""
    share = (min_positives - cuts.num_right[-1]) / pool.num_right[-1]
    reached = np.searchsorted(-cuts.scores, -pool.scores, side="right")
    num_rows, num_right = (np.append(0, count)[reached] for count in (cuts.num_rows, cuts.num_right))
    return _Cuts(pool.scores, num_rows + share * pool.num_rows, num_right + share * pool.num_right)


def _best_f1_cut(cuts: _Cuts) -> float:
    """The middle between the scores above and below the cut."""
    best = int(np.argmax(2 * cuts.num_right / (cuts.num_rows + cuts.num_right[-1])))
    score, below = np.append(cuts.scores, 0.0)[best : best + 2]
    middle = (score + below) / 2
    return float(middle if middle > below else score)


def threshold_for_precision(
    scores_N: np.ndarray, is_right_N: np.ndarray, target_precision: float, confidence: float = CONFIDENCE
) -> float | None:
    """The lowest score such that of all rows with this score or more, at least the target share is right; None: none.

    The share is not that of these rows, but with `confidence` that of all rows that they are a sample of: the lower
    bound of Clopper and Pearson (1934). Without the bound, other rows miss the target half of the time. So few rows
    never suffice: if all are right, it takes 59 for 0.95 and 299 for 0.99. With few more rows than that the bound is
    strict, and many rows are below the score.

    The bound holds for each cut alone, and the lowest of many cuts is taken. That costs nothing if scores tell right
    from wrong. If the precision is the same at all scores, half a point or a point below the target, the target was
    wrongly promised in 15 to 19 % of simulated cases. The result is a score that occurs: a row that has it is reviewed
    if another arithmetic precision lowers it a little.

    Args:
        scores_N: of the likeliest label.
        is_right_N: whether the row has that label.
    """
    cuts = _cuts(scores_N, is_right_N)
    # NaN, which reaches no target, where no row is right.
    bounds = betaincinv(cuts.num_right, cuts.num_rows - cuts.num_right + 1, 1 - confidence)
    reached = np.flatnonzero(bounds >= target_precision)
    return float(cuts.scores[reached[-1]]) if len(reached) else None


class _Cuts(NamedTuple):
    """The distinct scores, falling, and for each the number of rows, and of right rows, with this score or more.

    Rows may be counted in part.
    """

    scores: np.ndarray
    num_rows: np.ndarray
    num_right: np.ndarray


def _cuts(scores_N: np.ndarray, is_right_N: np.ndarray) -> _Cuts:
    order = np.argsort(-scores_N, kind="stable")
    scores = scores_N[order]
    last_of_each = np.flatnonzero(np.diff(scores, append=-np.inf))
    return _Cuts(scores[last_of_each], last_of_each + 1, np.cumsum(is_right_N[order])[last_of_each])


def _checked(values_NC: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values as float64, the targets as whole numbers."""
    values_NC, targets = np.asarray(values_NC, dtype=np.float64), np.asarray(targets).astype(np.int64)
    assert np.isfinite(values_NC).all(), "a value is not finite: leave out the rows without tokens"
    assert targets.size == 0 or targets.min() >= 0, "a target is negative: leave out the rows without a class"
    return values_NC, targets
