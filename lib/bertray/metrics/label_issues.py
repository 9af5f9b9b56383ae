"""Which labels are probably wrong, by confident learning: what do models say of labels that they were not trained on?

    text                     label     probabilities by a model not trained on it
    "where is my new card"   top_up    card 0.91, top_up 0.04
      1. score     quality 0.04: the lower, the worse the label
      2. choose    the confusions of all rows tell how many rows of top_up are really card; take the likeliest ones
      3. suggest   card; given_probability 0.04, suggested_probability 0.91

With several labels a row, each label is a decision of its own, yes or no; a row is suspect if one of its decisions is:

    labels [joy]     love 0.95, joy 0.88   ->   suggested_labels [joy, love], given_probability 0.05 (of: not love)

The method is that of Northcutt, Jiang and Chuang, "Confident Learning", JAIR 70, 2021, as implemented in cleanlab.

Legend: N rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from cleanlab.count import estimate_joint
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from scipy.stats import rankdata

# Weight of the worst decision in the quality of a row with several labels; cleanlab's default.
_WORST_WEIGHT = 0.8


@dataclass(frozen=True)
class LabelIssues:
    """Doubts about the labels of N rows.

    The probabilities are those of the given and the suggested label. With several labels a row: of all decisions in
    which the two differ; 1 if they do not differ.
    """

    quality_N: np.ndarray  # from 0 (wrong) to 1; rows are ranked by it
    is_suspect_N: np.ndarray  # the label, or one of the labels, is probably wrong
    suggested: np.ndarray  # what the model would give instead: as `Dataset.targets`; multi-hot ones are bool
    given_probability_N: np.ndarray
    suggested_probability_N: np.ndarray
    noise: float  # estimated share of wrong labels; with several labels a row, of wrong decisions among N * C
    by_label: list[dict[str, Any]]  # facts about every label, in the order of their ids


def find_issues(label_ids_N: np.ndarray, probabilities_NC: np.ndarray) -> LabelIssues:
    """Find doubtful labels in rows with one label each.

    Args:
        label_ids_N: the given labels; each of the C has a row.
        probabilities_NC: from models that were not trained on the row that they judge; rows sum to 1.

    Returns:
        `by_label` has `num_rows`, `num_suspects`, `noise`, and, if there are suspects, `most_often` (the label id that
        most of them probably have) and `num_most_often`.
    """
    probabilities_NC = probabilities_NC.astype(np.float64)
    is_suspect_N, joint_CC = _judge(label_ids_N, probabilities_NC)
    suggested_N = probabilities_NC.argmax(axis=1)
    by_label = []
    for label, of_given_C in enumerate(joint_CC):
        suspects = np.flatnonzero(is_suspect_N & (label_ids_N == label))
        facts: dict[str, Any] = {
            "num_rows": int((label_ids_N == label).sum()),
            "num_suspects": len(suspects),
            "noise": float(1 - of_given_C[label] / of_given_C.sum()),
        }
        if len(suspects):
            counts_C = np.bincount(suggested_N[suspects])
            facts |= {"most_often": int(counts_C.argmax()), "num_most_often": int(counts_C.max())}
        by_label.append(facts)
    every = np.arange(len(label_ids_N))
    return LabelIssues(
        get_label_quality_scores(label_ids_N, probabilities_NC),
        is_suspect_N,
        suggested_N,
        probabilities_NC[every, label_ids_N],
        probabilities_NC[every, suggested_N],
        float(1 - np.trace(joint_CC)),
        by_label,
    )


def find_multi_label_issues(given_NC: np.ndarray, probabilities_NC: np.ndarray) -> LabelIssues:
    """Find doubtful labels in rows with any number of them. A label that every row has is not doubted.

    Args:
        given_NC: multi-hot; each label has a row.
        probabilities_NC: from models that were not trained on the row that they judge.

    Returns:
        `by_label` has `num_rows` with the label, `num_suspects` of these that probably should not have it,
        `num_missing` that probably should have it, and `noise` (the share of wrong decisions on this label).
    """
    given_NC, probabilities_NC = given_NC.astype(bool), probabilities_NC.astype(np.float64)
    given_probability_NC = np.where(given_NC, probabilities_NC, 1 - probabilities_NC)
    is_doubted_NC = np.zeros_like(given_NC)
    quality_N = np.ones(len(given_NC))
    by_label = []
    is_judged_C = np.logical_not(given_NC.all(axis=0))
    for label, given_N in enumerate(given_NC.T):
        noise = 0.0
        if is_judged_C[label]:
            of_label_N = probabilities_NC[:, label]
            is_doubted_NC[:, label], joint_22 = _judge(
                given_N.astype(int), np.stack([1 - of_label_N, of_label_N], axis=1)
            )
            noise = float(1 - np.trace(joint_22))
        is_doubted_N = is_doubted_NC[:, label]
        by_label.append(
            {
                "num_rows": int(given_N.sum()),
                "num_suspects": int((given_N & is_doubted_N).sum()),
                "num_missing": int((~given_N & is_doubted_N).sum()),
                "noise": noise,
            }
        )
    # As cleanlab's get_label_quality_scores for several labels, which refuses a single one: a moving average from the
    # best decision to the worst.
    for number, worse_N in enumerate(-np.sort(-given_probability_NC[:, is_judged_C], axis=1).T):
        quality_N = quality_N + (_WORST_WEIGHT if number else 1) * (worse_N - quality_N)
    return LabelIssues(
        quality_N,
        np.asarray(is_doubted_NC.any(axis=1)),
        given_NC ^ is_doubted_NC,
        np.prod(given_probability_NC, axis=1, where=is_doubted_NC),
        np.prod(1 - given_probability_NC, axis=1, where=is_doubted_NC),
        float(np.mean([facts["noise"] for facts in by_label])),
        by_label,
    )


def find_value_issues(given_N: np.ndarray, predicted_N: np.ndarray, max_z: float) -> LabelIssues:
    """Find doubtful numbers: those whose error is an outlier among the errors of all rows.

    Args:
        predicted_N: by models that were not trained on the row that they judge.
        max_z: of the modified z-score (Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers): the distance from
            the median, in 1.4826 median absolute deviations.

    Returns:
        `quality_N` is the share of rows whose error is as large or larger. There are no probabilities.
    """
    errors_N = given_N - predicted_N
    distance_N = np.abs(errors_N - np.median(errors_N))
    is_suspect_N = distance_N > max_z * 1.4826 * np.median(distance_N)
    quality_N = rankdata(-distance_N, method="max") / len(distance_N)
    none_N, noise = np.full(len(given_N), np.nan), float(is_suspect_N.mean())
    facts = {"num_rows": len(given_N), "num_suspects": int(is_suspect_N.sum()), "noise": noise}
    return LabelIssues(quality_N, is_suspect_N, predicted_N, none_N, none_N, noise, [facts])


def _judge(label_ids_N: np.ndarray, probabilities_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each label is doubted, and the joint distribution of given (rows) and true labels, which sums to 1."""
    # n_jobs: a fork of a process that is connected to Ray may hang.
    is_doubted_N = find_label_issues(label_ids_N, probabilities_NC, n_jobs=1)
    return is_doubted_N, estimate_joint(label_ids_N, probabilities_NC)


def ranked(issues: LabelIssues) -> np.ndarray:
    """Positions of the suspect rows, the worst label first, equal ones in the rows' order."""
    suspects = np.flatnonzero(issues.is_suspect_N)
    return suspects[np.argsort(issues.quality_N[suspects], kind="stable")]
