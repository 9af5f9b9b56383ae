"""How well predicted labels match true ones.

`precision_weighted`, `recall_weighted` and `f1_weighted` weigh the classes by their rows, as tutorials report;
`f1_macro` weighs them alike, and is what an imbalanced archive should be judged by.

Legend: N rows, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


def summary_metrics(true_N: np.ndarray, predicted_N: np.ndarray, num_classes: int) -> dict[str, float]:
    """accuracy, precision/recall/f1 weighted by class size, and macro-F1 over the classes that occur in either."""
    ids = np.arange(num_classes)
    occurring = np.union1d(true_N, predicted_N)
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
    precision_C, recall_C, f1_C, support_C = precision_recall_fscore_support(
        true_N, predicted_N, labels=ids, average=None, zero_division=0
    )
    return {
        **summary_metrics(true_N, predicted_N, len(labels)),
        "per_class": {
            label: {
                "precision": float(precision_C[index]),
                "recall": float(recall_C[index]),
                "f1": float(f1_C[index]),
                "num_rows": int(support_C[index]),
            }
            for index, label in enumerate(labels)
        },
        "confusion_matrix": confusion_matrix(true_N, predicted_N, labels=ids).tolist(),
        "labels": list(labels),
        "num_rows": len(true_N),
    }
