"""Which labels are probably wrong, by confident learning: what a model that never saw a row says of its label.

    text                     label     probabilities by a model not trained on it
    "where is my new card"   top_up    card 0.91, top_up 0.04
      1. score     quality 0.04: the lower, the worse the label
      2. choose    as many rows of top_up as the confusions of all rows say are really card, the likeliest first
      3. suggest   card; given_probability 0.04, suggested_probability 0.91

With several labels a row each label is a decision of its own, yes or no; a row is suspect for those that are doubted:

    labels [joy]     love 0.95, joy 0.88   ->   suggested_labels [joy, love], given_probability 0.05 (of: not love)

The method is that of Northcutt, Jiang and Chuang, "Confident Learning", JAIR 70, 2021, as the package cleanlab has it.

Legend: N rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cleanlab.count import compute_confident_joint, estimate_joint
from cleanlab.filter import find_label_issues
from cleanlab.multilabel_classification import get_label_quality_scores as get_multi_label_quality_scores
from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
from cleanlab.rank import get_label_quality_scores


@dataclass(frozen=True)
class LabelIssues:
    """What is to be said of the labels of N rows.

    Attributes:
        quality_N: from 0, surely wrong, to 1; by it rows are ranked.
        is_suspect_N: the label, or one of the labels, is probably wrong.
        suggested: what the model would give instead: label ids (int64 [N]), or multi-hot (bool [N, C]).
        given_probability_N, suggested_probability_N: of the given and of the suggested label; with several labels of
            the decisions in which the two differ, all of them (1 where they do not differ).
        noise: share of the rows whose label is estimated to be wrong; with several labels of the N * C decisions.
        by_label: facts of every label, in the order of their ids.
    """

    quality_N: np.ndarray
    is_suspect_N: np.ndarray
    suggested: np.ndarray
    given_probability_N: np.ndarray
    suggested_probability_N: np.ndarray
    noise: float
    by_label: list[dict[str, Any]]


def find_issues(label_ids_N: np.ndarray, probabilities_NC: np.ndarray) -> LabelIssues:
    """Doubtful labels, of rows that have one each.

    Args:
        label_ids_N: the given labels; each of the C has a row.
        probabilities_NC: by models that were not trained on the row that they judge; rows sum to 1.

    Returns:
        `by_label` has `num_rows`, `num_suspects`, `noise`, and, where there are suspects, `most_often`: the id of the
        label that most of them probably have, and `num_most_often`.
    """
    num_classes = probabilities_NC.shape[1]
    probabilities_NC = probabilities_NC.astype(np.float64)
    quality_N = get_label_quality_scores(label_ids_N, probabilities_NC)
    # Not in several processes: a fork of one that is connected to Ray may hang.
    is_suspect_N = find_label_issues(label_ids_N, probabilities_NC, n_jobs=1)
    joint_CC = estimate_joint(label_ids_N, probabilities_NC)  # of given (rows) and true labels; sums to 1
    suggested_N = probabilities_NC.argmax(axis=1)
    by_label = []
    for label, of_given_C in enumerate(joint_CC):
        rows = np.flatnonzero(label_ids_N == label)
        suspects = rows[is_suspect_N[rows]]
        facts: dict[str, Any] = {
            "num_rows": len(rows),
            "num_suspects": len(suspects),
            "noise": float(1 - of_given_C[label] / of_given_C.sum()),
        }
        if len(suspects):
            counts_C = np.bincount(suggested_N[suspects], minlength=num_classes)
            facts |= {"most_often": int(counts_C.argmax()), "num_most_often": int(counts_C.max())}
        by_label.append(facts)
    every = np.arange(len(label_ids_N))
    return LabelIssues(
        quality_N,
        is_suspect_N,
        suggested_N,
        probabilities_NC[every, label_ids_N],
        probabilities_NC[every, suggested_N],
        float(1 - np.trace(joint_CC)),
        by_label,
    )


def find_multi_label_issues(given_NC: np.ndarray, probabilities_NC: np.ndarray) -> LabelIssues:
    """Doubtful labels, of rows that have any number of them.

    Args:
        given_NC: multi-hot; each label has a row.
        probabilities_NC: of each label, by models that were not trained on the row that they judge.

    Returns:
        `by_label` has `num_rows` that are given the label, `num_suspects` of these that probably should not be,
        `num_missing` that probably should be, and `noise` (of all decisions on this label).
    """
    given_NC, probabilities_NC = given_NC.astype(bool), probabilities_NC.astype(np.float64)
    is_judged_C = np.logical_not(given_NC.all(axis=0))  # of a label that every row has nothing can be learnt
    if not is_judged_C.all():
        return _with_unjudged(given_NC, is_judged_C, probabilities_NC)
    label_lists = [np.flatnonzero(given_C).tolist() for given_C in given_NC]
    is_doubted_NC = find_multilabel_issues_per_class(label_lists, probabilities_NC, n_jobs=1)
    joints_C22 = estimate_joint(
        label_lists,
        probabilities_NC,
        confident_joint=compute_confident_joint(label_lists, probabilities_NC, multi_label=True),
        multi_label=True,
    )
    noise_C = np.array([1 - np.trace(joint_22) / joint_22.sum() for joint_22 in joints_C22])
    given_probability_NC = np.where(given_NC, probabilities_NC, 1 - probabilities_NC)
    by_label = [
        {
            "num_rows": int(given_N.sum()),
            "num_suspects": int((given_N & is_doubted_N).sum()),
            "num_missing": int((~given_N & is_doubted_N).sum()),
            "noise": float(noise),
        }
        for given_N, is_doubted_N, noise in zip(given_NC.T, is_doubted_NC.T, noise_C, strict=True)
    ]
    quality_N = given_probability_NC[:, 0]
    if len(by_label) > 1:  # cleanlab refuses one
        quality_N = np.asarray(get_multi_label_quality_scores(label_lists, probabilities_NC))
    return LabelIssues(
        quality_N,
        is_doubted_NC.any(axis=1),
        given_NC ^ is_doubted_NC,
        np.prod(given_probability_NC, axis=1, where=is_doubted_NC),
        np.prod(1 - given_probability_NC, axis=1, where=is_doubted_NC),
        float(noise_C.mean()),
        by_label,
    )


def _with_unjudged(given_NC: np.ndarray, is_judged_C: np.ndarray, probabilities_NC: np.ndarray) -> LabelIssues:
    """Doubtful labels where some labels are on every row: none of these is doubted."""
    num_rows = len(given_NC)
    unjudged = {"num_rows": num_rows, "num_suspects": 0, "num_missing": 0, "noise": 0.0}
    if not is_judged_C.any():
        ones_N = np.ones(num_rows)
        return LabelIssues(ones_N, ones_N < 1, given_NC, ones_N, ones_N, 0.0, [dict(unjudged) for _ in is_judged_C])
    judged = find_multi_label_issues(given_NC[:, is_judged_C], probabilities_NC[:, is_judged_C])
    suggested_NC = given_NC.copy()
    suggested_NC[:, is_judged_C] = judged.suggested
    facts = iter(judged.by_label)
    return replace(
        judged,
        suggested=suggested_NC,
        noise=judged.noise * is_judged_C.mean(),
        by_label=[next(facts) if is_judged else dict(unjudged) for is_judged in is_judged_C],
    )


def ranked(issues: LabelIssues) -> np.ndarray:
    """Positions of the suspect rows, the worst label first, equal ones in the rows' order."""
    suspects = np.flatnonzero(issues.is_suspect_N)
    return suspects[np.argsort(issues.quality_N[suspects], kind="stable")]
