"""Each row has one label: the likeliest by softmax, whose probability is the score.

Facts are those of bundle.json, a `bundle.info.BundleInfo`; of a method that takes them, None are those of a new model.

Legend: N rows, C outputs of the model: logits, one for each label.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import RequestError
from bertray.formats.columnar import LIST_TYPES, list_map
from bertray.metrics import calibration
from bertray.metrics.profile import Limits, Movement, Profile, label_movement, score_movements
from bertray.schema import DATASET_SCHEMA, LABEL, LABEL_ID, NO_CLASS, REVIEW, SCORE, prediction_schema
from bertray.tokenization.columns import as_strings
from bertray.types import ProblemType

if TYPE_CHECKING:
    import pandas as pd

    from bertray.metrics.label_issues import LabelIssues

# Dividing the last layer's weights rounds otherwise than dividing the logits does: the row whose score is the limit
# must not fall below it.
_ROUNDING = 1e-6


class SingleLabel:
    """Each row has one label. Targets are label ids (int64 [N]), `NO_CLASS` for a row out of scope."""

    problem_type: ProblemType = "single_label_classification"
    column = LABEL  # of labelled rows
    targets_are = ("i", 1)  # kind of numbers, dimensions
    outputs: tuple[str, ...] | None = None  # of the model; None: one for each label of the data set
    trust_columns: tuple[str, ...] = (SCORE, REVIEW)  # of predictions: how sure an answer is
    not_for = frozenset(["huber", "coverage", "cuts"])  # options of training that have no meaning here
    overrides: Mapping[str, Any] = {}  # options with another default here
    baseline_name = "TF-IDF (1-2 words) + logistic regression"
    unseen_advice = (
        "name the label of texts without a class with --oos-label, "  # about a label only held-out rows have
    )
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

    def agreed(self, votes: pd.DataFrame, max_spread: float | None) -> tuple[pd.Series, pd.Series]:
        """What rows with equal texts are given together, and which of them stay.

        Args:
            votes: columns `key` (of the text) and `label`, a string of `tidied`.
            max_spread: see `Regression`.

        Returns:
            The reason why a row goes, "" if it stays; and the label that rows of its text get, null: none.
        """
        import pandas as pd

        counts = votes.value_counts(sort=False).reset_index()
        leaders = counts[counts["count"] == counts.groupby("key")["count"].transform("max")]
        tied_keys = set(leaders.loc[leaders["key"].duplicated(), "key"])
        winners = votes["key"].map(leaders.drop_duplicates("key").set_index("key")["label"])
        is_tied = votes["key"].isin(tied_keys)
        reasons = pd.Series("", votes.index)
        reasons[votes.duplicated()] = "duplicate"
        reasons[votes["label"] != winners] = "label_outvoted"
        reasons[is_tied] = "label_tied"
        return reasons, winners.mask(is_tied)

    def given_anew(self, rows: pa.Table, chosen: np.ndarray, agreed: pd.Series) -> pa.Table:
        """Rows with what `agreed` gives those at some positions; here those that stay have it already."""
        return rows

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

    def warnings(self, splits: Mapping[str, pa.Table]) -> list[str]:
        """What a person should look at, of this task alone."""
        return []

    def targets(self, rows: pa.Table, num_labels: int) -> np.ndarray:
        """What a model should predict for rows of a data set."""
        return np.asarray(rows[LABEL_ID].to_numpy(), dtype=np.int64)

    def is_in_scope(self, rows: pa.Table) -> np.ndarray:
        """Whether rows of a data set have an answer (bool [N])."""
        return np.asarray(rows[LABEL_ID].to_numpy() != NO_CLASS)

    def stored(self, rows: pa.Table) -> pa.LargeListArray:
        """The answers of rows of a data set as training reads them: a list of numbers a row."""
        return pa.LargeListArray.from_arrays(pa.array(np.arange(rows.num_rows + 1)), rows[LABEL_ID].combine_chunks())

    def meaningless(self, options: Any) -> list[str]:
        """Options of training that are set and have no meaning here, as the command line has them."""
        return options_set(options, self.not_for)

    def names(self, targets: np.ndarray, labels: tuple[str, ...]) -> list[Any]:
        """Targets as people read them."""
        names = np.array(labels, dtype=object)
        return [names[one] for one in targets]

    # Bundles: what raw outputs mean.

    calibrate = staticmethod(calibration.calibrate)

    def probabilities(self, raw_NC: np.ndarray) -> np.ndarray:
        """Of each label, float32; NaN for a row whose outputs are not all finite."""
        return calibration.probabilities(raw_NC, self.problem_type)

    def answers(self, facts: Any) -> dict[str, Any]:
        """What an announcement says of the answers: `labels` that rows can get, and `score_edges` of the profile."""
        return {"labels": facts.labels}

    def schema(self, facts: Any, listed: str | None = None) -> pa.Schema:
        """Of predictions; see `schema.prediction_schema`."""
        return prediction_schema(self.problem_type, listed, facts.labels)

    def check(self, facts: Any) -> None:
        """Raises ValueError where facts do not go with this task."""
        for name in ("thresholds", "values"):
            if getattr(facts, name) is not None:
                raise ValueError(f"{name} do not go with problem_type {self.problem_type}")

    def decide(
        self, raw_NC: np.ndarray, targets: np.ndarray, wishes: Any, train_targets: Callable[[], np.ndarray]
    ) -> dict[str, Any]:
        """The facts that answers depend on.

        Args:
            raw_NC, targets: of validation rows that have outputs.
            wishes: what a `training.config.TrainConfig` says of target_precision (None: nothing is reviewed), coverage
                and cuts.
            train_targets: reads the targets of the training rows.
        """
        if (target_precision := wishes.target_precision) is None:
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
        return [label_movement(before, now, against, limits), *score_movements(before, now, against, limits)]

    # How good a model is. What is decided, and targets, are of rows in scope.

    def quality(self, decided: np.ndarray, targets: np.ndarray) -> float:
        """The share of rows that are right, which cheaper arithmetic must not lower; or that two models agree on."""
        return float(np.mean((decided == targets).reshape(len(targets), -1).all(axis=1)))

    def summary(self, decided: np.ndarray, targets: np.ndarray, num_labels: int) -> dict[str, float]:
        """Metrics of an epoch, and those in which a bundle is compared with the baseline."""
        from bertray.metrics.classification import summary_metrics

        return summary_metrics(targets, decided, num_labels)

    def measured(self, raw_NC: np.ndarray, targets: np.ndarray, facts: Any) -> dict[str, Any]:
        """All that an evaluation says of rows in scope."""
        from bertray.metrics.classification import full_metrics

        return full_metrics(targets, self.decided(raw_NC, facts), facts.labels) | self.reliability(raw_NC, targets)

    def difference_intervals(
        self, decided: np.ndarray, other: np.ndarray | None, targets: np.ndarray, num_labels: int
    ) -> dict[str, list[float]]:
        """See `classification.intervals`; other None: intervals of the metrics themselves."""
        from bertray.metrics.classification import Counts, intervals

        sides = [Counts(targets, one, num_labels).metrics for one in (decided, other) if one is not None]
        return intervals(sides[0], sides[1] if other is not None else None, len(targets))

        first, second = (Counts(targets, one, num_labels) for one in (decided, other))
        return intervals(first.metrics, second.metrics, len(targets))

    def reviews(self, facts: Any) -> bool:
        """Whether some rows that have an answer are to be reviewed."""
        return facts.review_below is not None

    def is_best_right(self, raw_NC: np.ndarray, targets: np.ndarray, facts: Any = None) -> np.ndarray:
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


def options_set(options: Any, names: frozenset[str]) -> list[str]:
    """Those of some options that do not have their default, as the command line has them."""
    fields = type(options).model_fields
    found = [name for name in sorted(names & set(fields)) if getattr(options, name) != fields[name].default]
    return [f"--{name.replace('_', '-')}" for name in found]


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
