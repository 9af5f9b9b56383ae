"""How well predicted labels match true ones.

`precision_weighted`, `recall_weighted` and `f1_weighted` weigh the classes by their rows, as tutorials report;
`f1_macro` weighs them alike, and is what an imbalanced archive should be judged by.

Where a row has several labels, `f1_micro` counts all N * C decisions alike, `f1_macro` again weighs the labels alike,
and `subset_accuracy` is the share of rows whose labels are all right and complete.

A share of no rows is None.

Legend: N rows, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support, roc_auc_score

from bertray.schema import NO_CLASS


def summary_metrics(true_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> dict[str, float]:
    """accuracy, precision/recall/f1 weighted by class size, and macro-F1 over the classes that occur in either.

    A prediction may be `schema.NO_CLASS`, which is wrong.
    """
    ids = np.arange(num_classes)
    occurring = np.setdiff1d(np.union1d(true_N, predicted_N), [NO_CLASS])
    precision, recall, f1, _ = precision_recall_fscore_support(
        true_N, predicted_N, labels=ids, average="weighted", zero_division=0
    )
    f1_macro = precision_recall_fscore_support(true_N, predicted_N, labels=occurring, average="macro", zero_division=0)[
        2
    ]
    return {
        "accuracy": float(accuracy_score(true_N, predicted_N)),
        "precision_weighted": float(precision),
        "recall_weighted": float(recall),
        "f1_weighted": float(f1),
        "f1_macro": float(f1_macro),
    }


def full_metrics(true_N: np.ndarray, predicted_N: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """`summary_metrics`, and `per_class`, `confusion_matrix` (rows true, columns predicted), `labels`, `num_rows`."""
    ids = np.arange(len(labels))
    return {
        **summary_metrics(true_N, predicted_N, len(labels)),
        "per_class": _per_class(true_N, predicted_N, labels),
        "confusion_matrix": confusion_matrix(true_N, predicted_N, labels=ids).tolist(),
        "labels": list(labels),
        "num_rows": len(true_N),
    }


def multi_label_metrics(true_NC: np.ndarray, predicted_NC: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """`f1_micro`, `f1_macro`, `subset_accuracy`, and `per_class`, `labels`, `num_rows` as `full_metrics` has them.

    Macro-F1 is over the labels that occur in either, as in `summary_metrics`.

    Args:
        true_NC: multi-hot, of any type of number.
        predicted_NC: multi-hot likewise; decisions, not probabilities.
        labels: C of them.

    Raises:
        ValueError: something else than 0 and 1, or shapes that differ.
    """
    true_NC, predicted_NC = (_multi_hot(one_NC, len(labels)) for one_NC in (true_NC, predicted_NC))
    per_class = _per_class(true_NC, predicted_NC, labels)
    occurring_C = (true_NC | predicted_NC).any(axis=0)
    f1_C = np.array([one["f1"] for one in per_class.values()])
    return {
        "f1_micro": float(f1_score(true_NC, predicted_NC, average="micro", zero_division=0)),
        "f1_macro": float(f1_C[occurring_C].mean()) if occurring_C.any() else 0.0,
        "subset_accuracy": float(accuracy_score(true_NC, predicted_NC)),
        "per_class": per_class,
        "labels": list(labels),
        "num_rows": len(true_NC),
    }


def review_metrics(is_right_N: np.ndarray, is_reviewed_N: np.ndarray) -> dict[str, Any]:
    """What becomes of rows of which a person looks at some: both arguments are bool.

    Returns:
        coverage: share of the rows that nobody looks at.
        precision: of these, the share that is right.
        num_rows_review: how many are looked at.
    """
    return {
        "coverage": _share(~is_reviewed_N),
        "precision": _share(is_right_N[~is_reviewed_N]),
        "num_rows_review": int(is_reviewed_N.sum()),
    }


def out_of_scope_metrics(true_N: np.ndarray, predicted_N: np.ndarray, score_N: np.ndarray) -> dict[str, Any]:
    """How well rows of no class are told from those of one.

    Args:
        true_N: label ids; `schema.NO_CLASS` is out of scope.
        predicted_N: likewise, also of a row that was rejected.
        score_N: how sure it is that the row has a class.

    Returns:
        in_scope_accuracy: of the rows with a class, the share that got it; one that was rejected did not.
        in_scope_coverage: of these, the share that was not rejected.
        oos_recall: of the rows without, the share that was rejected.
        oos_precision: of the rejected ones, the share without a class.
        auroc: how often a row with a class has a higher score than one without (a tie counts half); whatever is
            rejected.
        num_rows_in_scope, num_rows_out_of_scope: how many there are.
    """
    in_scope_N, is_rejected_N = true_N != NO_CLASS, predicted_N == NO_CLASS
    has_both = in_scope_N.any() and not in_scope_N.all()
    return {
        "in_scope_accuracy": _share((predicted_N == true_N)[in_scope_N]),
        "in_scope_coverage": _share(~is_rejected_N[in_scope_N]),
        "oos_recall": _share(is_rejected_N[~in_scope_N]),
        "oos_precision": _share(~in_scope_N[is_rejected_N]),
        "auroc": float(roc_auc_score(in_scope_N, score_N)) if has_both else None,
        "num_rows_in_scope": int(in_scope_N.sum()),
        "num_rows_out_of_scope": int((~in_scope_N).sum()),
    }


def _share(is_so_N: np.ndarray) -> float | None:
    return float(is_so_N.mean()) if len(is_so_N) else None


def _multi_hot(one_NC: np.ndarray, num_classes: int) -> np.ndarray:
    if one_NC.ndim != 2 or one_NC.shape[1] != num_classes or not np.isin(one_NC, (0, 1)).all():
        raise ValueError(f"an array of shape {one_NC.shape} is not multi-hot over {num_classes} labels: 0 and 1 alone")
    return one_NC.astype(np.uint8)


def _per_class(true: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Of every label, from label ids [N] or multi-hot [N, C]; `num_rows` are those that truly have it."""
    precision_C, recall_C, f1_C, support_C = precision_recall_fscore_support(
        true, predicted, labels=np.arange(len(labels)), average=None, zero_division=0
    )
    return {
        label: {
            "precision": float(precision_C[index]),
            "recall": float(recall_C[index]),
            "f1": float(f1_C[index]),
            "num_rows": int(support_C[index]),
        }
        for index, label in enumerate(labels)
    }
