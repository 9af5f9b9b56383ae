"""A row has any number of labels: each is a decision of its own, by the sigmoid of its logit and its threshold.

Legend: N rows, C labels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.metrics.calibration import DEFAULT_THRESHOLD, tune_thresholds
from bertray.schema import LABEL_IDS, LABELS, MULTI_LABEL_PREDICTION_SCHEMA, MULTI_LABEL_SCHEMA
from bertray.tasks.single_label import SingleLabel, as_lists
from bertray.tokenization.windows import offsets
from bertray.types import ProblemType

if TYPE_CHECKING:
    from bertray.metrics.label_issues import LabelIssues

_ANSWERS = """
A text may have several labels, or none: all whose probability (sigmoid) is at least \
{{ "0.5" if thresholds is none else "the threshold of the label" }}.
"""
_TABLE = """{% if thresholds is not none %}
| label | given from |
|---|---|
{% for label in labels -%}
| {{ label | code | replace("|", "\\\\|") }} | {{ "%.4f" | format(thresholds[loop.index0]) }} |
{% endfor -%}
{% endif %}"""


class MultiLabel(SingleLabel):
    """Where a row with any number of labels differs from one with one. Targets are multi-hot (float32 [N, C])."""

    problem_type: ProblemType = "multi_label_classification"
    column, targets_are, unseen_advice = LABELS, ("f", 2), ""
    metric_names: Mapping[str, str] = {"subset_accuracy": "subset accuracy", "f1_macro": "macro-F1"}
    card: Mapping[str, str] = {**SingleLabel.card, "answers": _ANSWERS, "table": _TABLE, "options": ", top_k=None"}

    def read(self, cells: pa.ChunkedArray, what: str, separator: str) -> pa.ChunkedArray:
        return as_lists(cells, what, separator)

    def tidied(self, rows: pa.Table) -> tuple[pa.Table, list[str | None]]:
        sets = [_label_set(of_row) for of_row in rows[LABELS].to_pylist()]
        rows = rows.set_column(rows.column_names.index(LABELS), LABELS, pa.array(sets, pa.list_(pa.string())))
        return rows, [None if of_row is None else json.dumps(of_row, ensure_ascii=False) for of_row in sets]

    def encoded(self, rows: pa.Table, labels: list[str]) -> pa.Table:
        """A row's labels are in the order of their ids."""
        id_of = {label: number for number, label in enumerate(labels)}
        ids_of_rows = [sorted(id_of[label] for label in of_row) for of_row in rows[LABELS].to_pylist()]
        lists = {LABELS: [[labels[number] for number in of_row] for of_row in ids_of_rows], LABEL_IDS: ids_of_rows}
        columns = [lists[name] if name in lists else rows[name] for name in MULTI_LABEL_SCHEMA.names]
        return pa.table(columns, schema=MULTI_LABEL_SCHEMA)

    def counted(self, splits: Mapping[str, pa.Table]) -> dict[str, Any]:
        """Rows by their number of labels."""
        num_labels = {name: Counter(map(len, rows[LABELS].to_pylist())) for name, rows in splits.items()}
        by_number = {str(num): {name: num_labels[name][num] for name in splits} for num in range(3)}
        more = {name: rows.num_rows - sum(num_labels[name][num] for num in range(3)) for name, rows in splits.items()}
        return {"num_rows_by_labels": {**by_number, "3+": more}}

    def targets(self, rows: pa.Table, num_labels: int) -> np.ndarray:
        targets_NC = np.zeros((rows.num_rows, num_labels), dtype=np.float32)
        row_of_label = np.repeat(np.arange(rows.num_rows), pc.list_value_length(rows[LABEL_IDS]).to_numpy())
        targets_NC[row_of_label, pc.list_flatten(rows[LABEL_IDS]).to_numpy()] = 1.0
        return targets_NC

    def is_in_scope(self, rows: pa.Table) -> np.ndarray:
        return np.ones(rows.num_rows, dtype=bool)

    def stored(self, rows: pa.Table) -> pa.LargeListArray:
        return rows[LABEL_IDS].combine_chunks().cast(pa.large_list(pa.int32()))

    def check(self, facts: Any) -> None:
        if facts.values is not None:
            raise ValueError(f"values do not go with problem_type {self.problem_type}")
        if facts.thresholds is not None and len(facts.thresholds) != len(facts.labels):
            raise ValueError(f"there are {len(facts.thresholds)} thresholds for {len(facts.labels)} labels")

    def decide(
        self, raw_NC: np.ndarray, targets: np.ndarray, wishes: Any, train_targets: Callable[[], np.ndarray]
    ) -> dict[str, Any]:
        thresholds = tuple(tune_thresholds(self.probabilities(raw_NC), targets).tolist())
        return {"thresholds": thresholds, **super().decide(raw_NC, targets, wishes, train_targets)}

    def given(self, probabilities_NC: np.ndarray, is_nan_N: np.ndarray, facts: Any) -> dict[str, pa.Array]:
        is_given_NC = is_given(probabilities_NC, facts.thresholds) & ~is_nan_N[:, None]
        return {LABELS: _label_lists(probabilities_NC, is_given_NC, facts.labels, is_nan_N)}

    def decided(self, raw_NC: np.ndarray, facts: Any = None) -> np.ndarray:
        """Which labels each row is given (bool [N, C]); none where an output is not finite."""
        return is_given(np.nan_to_num(self.probabilities(raw_NC)), facts and facts.thresholds)

    def measured(self, raw_NC: np.ndarray, targets: np.ndarray, facts: Any) -> dict[str, Any]:
        metrics = super().measured(raw_NC, targets, facts)
        for label, threshold in zip(facts.labels, facts.thresholds or (), strict=False):
            metrics["per_class"][label]["threshold"] = threshold
        return metrics

    def is_best_right(self, raw_NC: np.ndarray, targets: np.ndarray, facts: Any = None) -> np.ndarray:
        best_N = np.nan_to_num(self.probabilities(raw_NC)).argmax(axis=1)
        return np.asarray(targets[np.arange(len(best_N)), best_N] > 0)

    def evaluated(self, predictions: pa.Table) -> pa.ChunkedArray:
        return predictions[LABELS].fill_null([])

    def baseline(self, splits: Mapping[str, pa.Table], rows: pa.Table, facts: Any) -> tuple[np.ndarray, pa.Array]:
        """Its thresholds are tuned on validation rows if the bundle's were, else 0.5 too."""
        from bertray.metrics.baseline import predict_multi_label_baseline

        train, validation = splits["train"], splits["validation"]
        train_NC, validation_NC = (self.targets(one, len(facts.labels)) for one in (train, validation))
        both_NC = predict_multi_label_baseline(train, train_NC, pa.concat_tables([validation, rows]))
        of_validation_NC, of_rows_NC = np.split(both_NC, [len(validation)])
        decided_NC = is_given(of_rows_NC, facts.thresholds and tune_thresholds(of_validation_NC, validation_NC))
        return decided_NC, _label_lists(of_rows_NC, decided_NC, facts.labels)

    def issues(self, targets: np.ndarray, raw_NC: np.ndarray) -> LabelIssues:
        from bertray.metrics.label_issues import find_multi_label_issues

        return find_multi_label_issues(targets, self.probabilities(raw_NC))


def is_given(probabilities_NC: np.ndarray, thresholds: Sequence[float] | np.ndarray | None) -> np.ndarray:
    """Which labels each row is given (bool [N, C]): those whose probability reaches their threshold."""
    return np.asarray(probabilities_NC >= (DEFAULT_THRESHOLD if thresholds is None else np.array(thresholds)))


def _label_set(labels: list[str | None] | None) -> list[str] | None:
    """Sorted, trimmed, without blanks and repeats; None if there was nothing but blanks."""
    named = sorted({label.strip() for label in labels or () if label} - {""})
    return None if labels is None or (labels and not named) else named


def _label_lists(
    probabilities_NC: np.ndarray, is_given_NC: np.ndarray, labels: Sequence[str], is_null_N: np.ndarray | None = None
) -> pa.ListArray:
    """The labels that each row is given, the likeliest first; null where `is_null_N`."""
    rows, label_ids = np.nonzero(is_given_NC)
    by_probability = np.lexsort((label_ids, -probabilities_NC[rows, label_ids], rows))
    return pa.ListArray.from_arrays(
        pa.array(offsets(is_given_NC.sum(axis=1)), pa.int32()),
        pc.take(pa.array(labels, pa.string()), pa.array(label_ids[by_probability])),
        type=MULTI_LABEL_PREDICTION_SCHEMA.field(LABELS).type,
        mask=None if is_null_N is None else pa.array(is_null_N),
    )
