"""Each row has one label: the likeliest by softmax, whose probability is the score.

Facts are those of bundle.json, a `bundle.info.BundleInfo`; of a method that takes them, None are those of a new model.

Legend: N rows, C outputs of the model: logits, one for each label.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import RequestError
from bertray.formats.columnar import LIST_TYPES, list_map
from bertray.metrics import calibration
from bertray.metrics.profile import Limits, Movement, Profile, js_distance, mean_change
from bertray.schema import DATASET_SCHEMA, LABEL, LABEL_ID, NO_CLASS, REVIEW, SCORE
from bertray.tokenization.columns import as_strings
from bertray.types import ProblemType

if TYPE_CHECKING:
    from bertray.metrics.label_issues import LabelIssues

# Dividing the last layer's weights rounds otherwise than dividing the logits does: the row whose score is the limit
# must not fall below it.
_ROUNDING = 1e-6


class SingleLabel:
    """Each row has one label. Targets are label ids (int64 [N]), `NO_CLASS` for a row out of scope."""

    problem_type: ProblemType = "single_label_classification"
    column = LABEL  # of labelled rows
    targets_are = ("i", 1)  # kind of numbers, dimensions
    unseen_advice = "name the one that stands for no class with --oos-label, "  # about a label only held-out rows have
    best_metric = "f1_macro"  # the epoch, and the trial of bertray tune, in which it is highest is kept
    metric_names: Mapping[str, str] = {"accuracy": "accuracy", "f1_macro": "macro-F1"}  # of an epoch, shown to people
    quality_name = "accuracy"
    card: Mapping[str, str] = {  # parts of the model card, as templates: see `bundle.card`
        "title": "{{ labels | length }}-way text classifier",
        "labels": 'Labels: {% for label in labels %}{{ label | code }}{{ ", " if not loop.last else "" }}{% endfor %}',
    }

    # Labelled files and data sets.

    def read(self, cells: pa.ChunkedArray, what: str, separator: str) -> pa.ChunkedArray:
        """The answers of a file; a cell without one is null or blank. Raises RequestError, which names the column."""
        if not isinstance(cells.type, LIST_TYPES):
            return as_strings(cells, what)
        lists = as_lists(cells, what, separator).combine_chunks()
        labels, rows = pc.utf8_trim_whitespace(lists.values), pc.list_parent_indices(lists).to_numpy()
        is_label = pc.fill_null(pc.not_equal(labels, ""), False)
        labels = np.array(labels.filter(is_label).to_pylist(), object)
        rows = rows[is_label.to_numpy(zero_copy_only=False)]
        if len(others := np.flatnonzero((rows[1:] == rows[:-1]) & (labels[1:] != labels[:-1]))):
            row = int(rows[others[0]])
            raise RequestError(
                f"row {row} of {what}, counted from 0, has the labels {', '.join(map(repr, lists[row].as_py()))}: if "
                "a row may have several labels, add --multi-label; else leave one of them"
            )
        found = np.full(len(lists), None, dtype=object)
        found[rows] = labels
        return pa.chunked_array([pa.array(found, pa.string())])

    def tidied(self, rows: pa.Table) -> tuple[pa.Table, list[str | None]]:
        """Rows with labels as they are kept, and as strings to compare; blank or null: the label is missing."""
        trimmed = pc.utf8_trim_whitespace(rows[LABEL])
        return rows.set_column(rows.column_names.index(LABEL), LABEL, trimmed), trimmed.to_pylist()

    def strata(self, rows: pa.Table) -> list[Any]:
        """What a split divides alike: see `data.splits.hold_out`."""
        return list(rows[self.column].to_pylist())

    def encoded(self, rows: pa.Table, labels: list[str]) -> pa.Table:
        """Rows as a data set holds them."""
        ids = pc.index_in(rows[LABEL], value_set=pa.array(labels)).fill_null(NO_CLASS)
        return rows.append_column(LABEL_ID, ids).select(DATASET_SCHEMA.names).cast(DATASET_SCHEMA)

    def counted(self, splits: Mapping[str, pa.Table]) -> dict[str, Any]:
        """What report.json says of the splits of this task alone."""
        return {}

    def targets(self, rows: pa.Table, num_labels: int) -> np.ndarray:
        """What a model should predict for rows of a data set."""
        return np.asarray(rows[LABEL_ID].to_numpy(), dtype=np.int64)

    def is_in_scope(self, rows: pa.Table) -> np.ndarray:
        """Whether rows of a data set have an answer (bool [N])."""
        return np.asarray(rows[LABEL_ID].to_numpy() != NO_CLASS)

    def stored(self, rows: pa.Table) -> pa.LargeListArray:
        """The answers of rows of a data set as training reads them: a list of numbers a row."""
        return pa.LargeListArray.from_arrays(pa.array(np.arange(rows.num_rows + 1)), rows[LABEL_ID].combine_chunks())

    # Bundles: what raw outputs mean.

    calibrate = staticmethod(calibration.calibrate)
    profile = staticmethod(Profile.of)

    def probabilities(self, raw_NC: np.ndarray) -> np.ndarray:
        """Of each label, float32; NaN for a row whose outputs are not all finite."""
        return calibration.probabilities(raw_NC, self.problem_type)

    def check(self, facts: Any) -> None:
        """Raises ValueError where facts do not go with this task."""
        if facts.thresholds is not None:
            raise ValueError(f"thresholds do not go with problem_type {self.problem_type}")

    def decide(self, raw_NC: np.ndarray, targets: np.ndarray, target_precision: float | None) -> dict[str, Any]:
        """The facts that answers depend on, from validation rows that have outputs; None: nothing is reviewed."""
        if target_precision is None:
            return {"review_below": None}
        scores_N, is_right_N = self.probabilities(raw_NC).max(axis=1), self.is_best_right(raw_NC, targets)
        found = calibration.threshold_for_precision(scores_N, is_right_N, target_precision)
        return {"review_below": 2.0 if found is None else found - _ROUNDING}  # 2.0: every row is reviewed

    def answer(self, raw_NC: np.ndarray, facts: Any) -> dict[str, pa.Array]:
        """The columns of predictions, except tokens and errors; null where an output is not finite."""
        probabilities_NC = self.probabilities(raw_NC)
        is_nan_N = np.isnan(probabilities_NC).any(axis=1)
        probabilities_NC = np.nan_to_num(probabilities_NC)
        best_N = probabilities_NC.argmax(axis=1)
        score_N = probabilities_NC[np.arange(len(best_N)), best_N]
        # Compared in float64, as readers of the file do: the score is float32, the limit is not rounded to it.
        is_low_N = score_N.astype(np.float64) < (-np.inf if facts.review_below is None else facts.review_below)
        return {
            LABEL: pc.take(pa.array(facts.labels, pa.string()), pa.array(best_N, mask=is_nan_N)),
            SCORE: pa.array(score_N, pa.float32(), mask=is_nan_N),
            REVIEW: pa.array(is_low_N | is_nan_N),
            **self.given(probabilities_NC, is_nan_N, facts),
        }

    def given(self, probabilities_NC: np.ndarray, is_nan_N: np.ndarray, facts: Any) -> dict[str, pa.Array]:
        """Columns beside the likeliest label's."""
        return {}

    def decided(self, raw_NC: np.ndarray, facts: Any = None) -> np.ndarray:
        """What each row is given, as targets are; `NO_CLASS` where an output is not finite."""
        probabilities_NC = self.probabilities(raw_NC)
        return np.where(np.isnan(probabilities_NC).any(axis=1), NO_CLASS, probabilities_NC.argmax(axis=1))

    def movements(self, before: Profile, now: Profile, against: str, limits: Limits) -> list[Movement]:
        """How far labels and scores moved."""
        both, num_rows = (before, now), (before.num_rows_scored, now.num_rows_scored)
        labels = sorted({**before.labels, **now.labels})
        # With several labels a row, a row may also have none.
        mixes = [[*(one.labels.get(label, 0) for label in labels), one.num_rows_unlabelled] for one in both]
        shares = [[count / one.num_rows_scored for count in mix] for one, mix in zip(both, mixes, strict=True)]
        most_moved = max(range(len(labels) + 1), key=lambda index: abs(shares[1][index] - shares[0][index]))
        label = [*labels, "no label"][most_moved]
        scores = [one.score_moments() for one in both]
        shown_mixes = [f"{label} {share[most_moved]:.1%}" for share in shares]
        shown_scores = [f"mean {mean:.3f}" for mean, _ in scores]
        moved, change = partial(Movement.of, against), mean_change(scores[0], scores[1], *num_rows)
        return [
            moved("label mix", js_distance(*mixes), limits[0], shown_mixes),
            moved("scores", js_distance(before.scores, now.scores), limits[0], shown_scores),
            moved("mean score", change, limits[1], shown_scores),
        ]

    # How good a model is. What is decided, and targets, are of rows in scope.

    def quality(self, decided: np.ndarray, targets: np.ndarray) -> float:
        """The share of rows that are right, which cheaper arithmetic must not lower; or that two models agree on."""
        return float(np.mean((decided == targets).reshape(len(targets), -1).all(axis=1)))

    def summary(self, decided: np.ndarray, targets: np.ndarray, num_labels: int) -> dict[str, float]:
        """Metrics of an epoch, and those in which a bundle is compared with the baseline."""
        found = self.metrics(decided, targets, tuple(map(str, range(num_labels))))
        return {name: value for name, value in found.items() if isinstance(value, float)}

    def metrics(self, decided: np.ndarray, targets: np.ndarray, labels: tuple[str, ...]) -> dict[str, Any]:
        """All metrics; those of the summary are floats."""
        from bertray.metrics.classification import full_metrics

        return full_metrics(targets, decided, labels)

    def is_best_right(self, raw_NC: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether the label that the score is of is right (bool [N]), of rows in scope."""
        return np.asarray(self.decided(raw_NC) == targets)

    def reliability(self, raw_NC: np.ndarray, targets: np.ndarray) -> dict[str, float | None]:
        """How far scores are what they claim; rows without outputs do not count."""
        is_read_N = np.isfinite(raw_NC).all(axis=1)
        raw_NC, targets = raw_NC[is_read_N], targets[is_read_N]
        if not len(targets):
            return {"ece": None, "nll": None}
        ece = calibration.expected_calibration_error(self.probabilities(raw_NC), targets)
        return {"ece": ece, "nll": calibration.negative_log_likelihood(raw_NC, targets)}

    def evaluated(self, predictions: pa.Table) -> pa.ChunkedArray:
        """What rows are given, as an evaluation holds it."""
        return predictions[LABEL]

    def baseline(self, splits: Mapping[str, pa.Table], rows: pa.Table, facts: Any) -> tuple[np.ndarray, pa.Array]:
        """What a plain model, fitted to the train split, decides on `rows`, and that as `evaluated` gives it."""
        from bertray.metrics.baseline import predict_baseline

        decided = predict_baseline(splits["train"], rows)
        return decided, pa.array(facts.labels).take(pa.array(decided))

    def issues(self, targets: np.ndarray, raw_NC: np.ndarray) -> LabelIssues:
        """Doubts about targets, by models that were not trained on these rows."""
        from bertray.metrics.label_issues import find_issues

        return find_issues(targets, self.probabilities(raw_NC))


def as_lists(cells: pa.ChunkedArray, what: str, separator: str) -> pa.ChunkedArray:
    """Lists of strings from a label column with lists, or with strings that have separators.

    Raises:
        RequestError: these are columns of 0 and 1, or lists that were written as text.
    """
    if isinstance(cells.type, LIST_TYPES):
        lists = list_map(cells, lambda values: as_strings(values, what))
        if set(pc.unique(pc.list_flatten(lists)).to_pylist()) <= {"0", "1"} and any(
            one and len(set(one)) < len(one) for one in lists.to_pylist()
        ):
            raise RequestError(f"{what} has a 0 or 1 for each class: write the names of a row's classes instead")
        return lists
    strings = as_strings(cells, what)
    is_list = pc.match_substring_regex(strings, r"^\s*\[.*\]\s*$")
    if pc.all(is_list, min_count=1).as_py():
        raise RequestError(
            f"{what} holds lists that were written as text, as {strings.drop_null()[0].as_py()!r}: write {separator!r} "
            "between a row's labels, or save the table as JSON Lines or Parquet"
        )
    return pc.split_pattern(strings, separator)
