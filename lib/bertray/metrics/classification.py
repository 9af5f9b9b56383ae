"""How well predicted labels match true ones.

`precision_weighted`, `recall_weighted` and `f1_weighted` weigh the classes by their rows, as tutorials report;
`f1_macro` weighs them alike, and is the better measure for an imbalanced archive.

With several labels a row, `f1_micro` counts all N * C decisions alike, `f1_macro` again weighs the labels alike, and
`subset_accuracy` is the share of rows whose labels are all right and complete. A share of no rows is None.

Legend: N rows, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support, roc_auc_score

from bertray.schema import NO_CLASS


def summary_metrics(true_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy, precision/recall/F1 weighted by class size, and macro-F1 over the classes that occur in either.

    A prediction may be `schema.NO_CLASS`, which is wrong.
    """
    occurring = np.setdiff1d(np.union1d(true_N, predicted_N), [NO_CLASS])
    precision, recall, f1, _ = precision_recall_fscore_support(
        true_N, predicted_N, labels=np.arange(num_classes), average="weighted", zero_division=0
    )
    return {
        "accuracy": float(accuracy_score(true_N, predicted_N)),
        "precision_weighted": float(precision),
        "recall_weighted": float(recall),
        "f1_weighted": float(f1),
        "f1_macro": float(f1_score(true_N, predicted_N, labels=occurring, average="macro", zero_division=0)),
    }


def full_metrics(true_N: np.ndarray, predicted_N: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """`summary_metrics`, and `per_class`, `confusion_matrix` (rows true, columns predicted), `labels`, `num_rows`."""
    return {
        **summary_metrics(true_N, predicted_N, len(labels)),
        "per_class": _per_class(true_N, predicted_N, labels),
        "confusion_matrix": confusion_matrix(true_N, predicted_N, labels=np.arange(len(labels))).tolist(),
        "labels": list(labels),
        "num_rows": len(true_N),
    }


def multi_label_metrics(true_NC: np.ndarray, predicted_NC: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
    """`f1_micro`, `f1_macro` (over the labels that occur in either), `subset_accuracy`; the rest as `full_metrics`.

    Args:
        true_NC, predicted_NC: multi-hot, of any numeric type; decisions, not probabilities.
        labels: C names.

    Raises:
        ValueError: an array is not multi-hot over C labels.
    """
    for given_NC in (true_NC, predicted_NC):
        if given_NC.shape != (len(given_NC), len(labels)) or not np.isin(given_NC, (0, 1)).all():
            raise ValueError(f"an array of shape {given_NC.shape} is not multi-hot over {len(labels)} labels")
    true_NC, predicted_NC = true_NC.astype(bool), predicted_NC.astype(bool)
    per_class = _per_class(true_NC, predicted_NC, labels)
    occurring = np.flatnonzero((true_NC | predicted_NC).any(axis=0))
    return {
        "f1_micro": float(f1_score(true_NC, predicted_NC, average="micro", zero_division=0)),
        "f1_macro": float(np.mean([per_class[labels[label]]["f1"] for label in occurring])) if len(occurring) else 0.0,
        "subset_accuracy": float(accuracy_score(true_NC, predicted_NC)),
        "per_class": per_class,
        "labels": list(labels),
        "num_rows": len(true_NC),
    }


def review_metrics(is_right_N: np.ndarray, is_reviewed_N: np.ndarray) -> dict[str, Any]:
    """What a review by people costs and brings; both arguments are bool.

    Returns:
        coverage: share of rows without review.
        precision: share of these that are right.
        num_rows_review: number of rows to be reviewed.
    """
    return {
        "coverage": _share(~is_reviewed_N),
        "precision": _share(is_right_N[~is_reviewed_N]),
        "num_rows_review": int(is_reviewed_N.sum()),
    }


def out_of_scope_metrics(true_N: np.ndarray, predicted_N: np.ndarray, score_N: np.ndarray) -> dict[str, Any]:
    """How well rows without a class are told from rows with one.

    Args:
        true_N: label ids, or `schema.NO_CLASS` for rows out of scope.
        predicted_N: label ids, or `schema.NO_CLASS` for rows that are rejected.
        score_N: how sure it is that the row has a class.

    Returns:
        in_scope_accuracy: share of the rows with a class that are predicted to have it.
        in_scope_coverage: share of the rows with a class that are not rejected.
        oos_recall: share of the rows without a class that are rejected.
        oos_precision: share of the rejected rows that have no class.
        auroc: how often a row with a class has a higher score than one without (a tie counts half).
        num_rows_in_scope, num_rows_out_of_scope: number of rows with and without a class.
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


def _per_class(true: np.ndarray, predicted: np.ndarray, labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 and true rows of each label, from label ids [N] or multi-hot [N, C]."""
    names = ("precision", "recall", "f1", "num_rows")
    columns = precision_recall_fscore_support(true, predicted, labels=np.arange(len(labels)), zero_division=0)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {label: dict(zip(names, row, strict=True)) for label, row in zip(labels, rows, strict=True)}
