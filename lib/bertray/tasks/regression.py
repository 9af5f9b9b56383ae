"""Each row has a number: the model's one output, in the unit of the labelled files.

    cell " 3.5 "                read                3.5
      training                  Objective           (3.5 - 2.9) / 0.8: in standard deviations from the mean
      output 3.41               decide              in its bin 90 of 100 errors are below 0.8
                                answer              value 3.41, low 2.61, high 4.21
        with the cut 3                              label "3 or more", review True: the interval holds 3

Legend: N rows, K cuts.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, model_validator

from bertray.errors import RequestError
from bertray.metrics.profile import BOUNDS, Limits, Movement, Profile, label_movement, mean_change, score_movements
from bertray.metrics.regression import ValueErrors, class_metrics, conformal, spelt
from bertray.schema import (
    HIGH,
    LABEL,
    LOW,
    NUM_SCORE_BINS,
    REGRESSION_PREDICTION_SCHEMA,
    REGRESSION_SCHEMA,
    REVIEW,
    VALUE,
)
from bertray.tasks.single_label import options_set
from bertray.tokenization.columns import as_strings
from bertray.types import ProblemType

if TYPE_CHECKING:
    import pandas as pd

    from bertray.metrics.label_issues import LabelIssues

_log = logging.getLogger(__name__)

_NUM_STRATA, _LEAST_ROWS_OF_STRATUM = 10, 20
# What lies so many interquartile ranges outside of the quartiles is rather a slip than a rare value; for Tukey (1977,
# Exploratory Data Analysis, 2D) 3 are "far out", but real grades have some that far.
_FAR_OUT = 10.0
_MANY_DEVIATIONS = 5.0
_MAX_OUTLIERS_LISTED = 5
_LEAST_VARIATION = 1e-5  # of a deviation, as a share of the mean: float32 has seven digits
_LARGEST = 1e30  # float32, in which models compute, ends at 3e38, and errors are squared in float64
_ROUNDING = 1e-12  # 0.4 - 0.3 is more than 0.1
# With --cuts auto: between all neighbours of so many different values, else two that divide the rows into thirds.
_MAX_LEVELS = 10
# Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers: modified z-scores above it are potential outliers.
_MAX_MODIFIED_Z = 3.5

_LABELS = """\
{% if values and values.cuts %}Classes of the numbers: \
{% for label in classes %}{{ label | code }}{{ ", " if not loop.last else "" }}{% endfor %}{% endif %}"""
_ANSWERS = """
The answer is a number{% if values is not none %}, in the unit of the labelled files{% endif %}.\
{% if values and values.half_widths %} The interval from low to high holds the true one for {{ values.coverage }} of \
texts like those of validation.{% else %} It has no interval: there were \
{{ "no labelled rows" if values is none else "too few validation rows" }} to find one on.{% endif %}
"""


class ValueFacts(BaseModel):
    """What bundle.json says of a bundle that gives numbers."""

    model_config = ConfigDict(frozen=True)

    coverage: float  # share of true values that the intervals hold
    edges: tuple[float, ...]  # of predicted values: between the bins of `half_widths`
    half_widths: tuple[float, ...]  # of the intervals; none: too few validation rows
    cuts: tuple[float, ...]  # ascending; a value that is a cut belongs to the class above
    bounds: tuple[float, float]  # of the profile's bins

    @model_validator(mode="after")
    def _are_in_order(self) -> Self:
        for name in ("edges", "cuts", "bounds"):
            if any(not low < high for low, high in itertools.pairwise(getattr(self, name))):
                raise ValueError(f"{name} {getattr(self, name)} do not ascend")
        if not (0 < self.coverage < 1 and all(0 <= half < math.inf for half in self.half_widths)):
            raise ValueError(f"coverage {self.coverage} or a half-width of {self.half_widths} is out of its range")
        return self


class Regression:
    """Each row has a number. Targets are float64 [N]; the model has one output. See `SingleLabel` for the methods."""

    problem_type: ProblemType = "regression"
    column = VALUE
    outputs: tuple[str, ...] | None = (VALUE,)
    targets_are, unseen_advice = ("f", 1), ""
    trust_columns: tuple[str, ...] = (LOW, HIGH, REVIEW)
    not_for = frozenset(["label_smoothing", "label_smoothings", "class_weights", "target_precision"])
    overrides: Mapping[str, Any] = {"label_smoothings": "0:0"}
    best_metric = "spearman"
    metric_names: Mapping[str, str] = {"mae": "MAE", "spearman": "Spearman's correlation"}
    quality_name = "r2"
    baseline_name = "TF-IDF (1-2 words) + ridge regression"
    card: Mapping[str, str] = {
        "title": "text regression",
        "labels": _LABELS,
        "answers": _ANSWERS,
        "options": ', function_to_apply="none"',
    }

    def read(self, cells: pa.ChunkedArray, what: str, separator: str) -> pa.ChunkedArray:
        if pa.types.is_boolean(cells.type):
            raise RequestError(f"{what} holds true and false, which are classes: leave --regression out")
        if pa.types.is_temporal(cells.type):
            raise RequestError(f"{what} is of type {cells.type}: write it as numbers, in the unit to predict")
        try:
            values = cells.cast(pa.float64())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            strings = pc.utf8_trim_whitespace(as_strings(cells, what))
            values = _numbers(pc.if_else(pc.equal(strings, ""), None, strings), what)
        if len(odd := np.flatnonzero(np.abs(values.to_numpy()) > _LARGEST)):
            raise RequestError(
                f"row {odd[0]} of {what}, counted from 0, is {values[odd[0]]}; numbers may be at most {_LARGEST:g} in "
                "size: take it out, correct it, or give all in another unit"
            )
        return pc.if_else(pc.is_nan(values), None, values)

    def tidied(self, rows: pa.Table) -> tuple[pa.Table, list[Any]]:
        return rows, rows[VALUE].to_pylist()

    def agreed(self, votes: pd.DataFrame, max_spread: float | None) -> tuple[pd.Series, pd.Series]:
        """The mean of the texts' numbers; none if they differ by more than `max_spread`."""
        import pandas as pd

        of_text = votes.assign(label=votes["label"].astype(float)).groupby("key")["label"]
        is_wide = of_text.transform("max") - of_text.transform("min") > (
            np.inf if max_spread is None else max_spread + _ROUNDING * of_text.transform("max").abs()
        )
        reasons = pd.Series("", votes.index)
        reasons[votes.duplicated("key")] = "duplicate"
        reasons[is_wide] = "value_spread"
        return reasons, of_text.transform("mean").mask(is_wide)

    def given_anew(self, rows: pa.Table, chosen: np.ndarray, agreed: pd.Series) -> pa.Table:
        values_N = rows[VALUE].to_numpy().copy()
        values_N[chosen] = agreed
        return rows.set_column(rows.column_names.index(VALUE), VALUE, pa.array(values_N, from_pandas=True))

    def strata(self, rows: pa.Table) -> list[Any]:
        """Tenths of the rows by their values; fewer parts if there are few rows."""
        values_N = rows[VALUE].to_numpy()
        num_strata = max(1, min(_NUM_STRATA, len(values_N) // _LEAST_ROWS_OF_STRATUM))
        edges = np.unique(np.quantile(values_N, np.arange(1, num_strata) / num_strata))
        return [str(number) for number in np.digitize(values_N, edges)]

    def encoded(self, rows: pa.Table, labels: list[str]) -> pa.Table:
        return rows.select(REGRESSION_SCHEMA.names).cast(REGRESSION_SCHEMA)

    def counted(self, splits: Mapping[str, pa.Table]) -> dict[str, Any]:
        """Range, quartiles, mean and deviation of each split's values."""
        found = {}
        for name, rows in splits.items():
            values_N = rows[VALUE].to_numpy()
            names = ("lowest", "lower_quartile", "median", "upper_quartile", "highest")
            of_split = dict(zip(names, np.quantile(values_N, [0, 0.25, 0.5, 0.75, 1]).tolist(), strict=True))
            found[name] = {**of_split, "mean": float(values_N.mean()), "std": float(values_N.std())}
        return {"values": found}

    def warnings(self, splits: Mapping[str, pa.Table]) -> list[str]:
        rows = splits["train"]
        values_N = rows[VALUE].to_numpy()
        low, high = np.quantile(values_N, [0.25, 0.75])
        mean, deviation = values_N.mean(), values_N.std()
        if deviation <= _LEAST_VARIATION * abs(mean):
            return [
                f"the training values are all about {mean:g}, and differ by some {deviation:g}: models compute with "
                "seven digits, and cannot tell them apart. If they should differ, subtract what they have in common"
            ]
        # Where half of the values are the same, the deviation says how far the others lie.
        reach = _FAR_OUT * (high - low) or _MANY_DEVIATIONS * deviation
        far = np.flatnonzero((values_N < low - reach) | (values_N > high + reach))
        if not len(far):
            return []
        far = far[np.argsort(-np.abs(values_N[far] - (low + high) / 2), kind="stable")]
        first = rows.take(pa.array(far[:_MAX_OUTLIERS_LISTED])).to_pylist()
        listed = "; ".join(f"{row[VALUE]:g} ({row['source']}, row {row['source_row']})" for row in first)
        return [
            f"{len(far)} of {len(values_N)} training values lie far from the others, half of which are between {low:g} "
            f"and {high:g}: {listed}. A few such rows can govern the training: correct them, or train with --huber"
        ]

    def targets(self, rows: pa.Table, num_labels: int) -> np.ndarray:
        return np.asarray(rows[VALUE].to_numpy(), dtype=np.float64)

    def is_in_scope(self, rows: pa.Table) -> np.ndarray:
        return np.ones(rows.num_rows, dtype=bool)

    def stored(self, rows: pa.Table) -> pa.LargeListArray:
        return pa.LargeListArray.from_arrays(pa.array(np.arange(rows.num_rows + 1)), rows[VALUE].combine_chunks())

    def meaningless(self, options: Any) -> list[str]:
        is_max = getattr(options, "long_documents", None) == "max"  # the largest of several numbers is not the text's
        return [*options_set(options, self.not_for), *(["--long-documents max"] if is_max else [])]

    def names(self, targets: np.ndarray, labels: tuple[str, ...]) -> list[Any]:
        return list(targets.tolist())

    # Bundles: what raw outputs mean.

    def probabilities(self, raw_NC: np.ndarray) -> np.ndarray:
        raise RequestError("the bundle gives numbers, which have no probabilities: use predict")

    def answers(self, facts: Any) -> dict[str, Any]:
        if facts.values is None:
            return {"labels": ()}
        low, high = facts.values.bounds
        edges = np.linspace(low, high, NUM_SCORE_BINS + 1)
        return {"labels": classes_of(facts.values.cuts), "score_edges": tuple(edges.tolist())}

    def schema(self, facts: Any, listed: str | None = None) -> pa.Schema:
        """Of predictions; the profile's bounds are in the metadata of the values' column.

        Raises:
            RequestError: probabilities are to be listed.
        """
        if listed is not None:
            raise RequestError(f"--probabilities {listed}: the bundle gives numbers, which have none: leave it out")
        found = REGRESSION_PREDICTION_SCHEMA
        if facts.values is not None:
            bounds = {BOUNDS: json.dumps(facts.values.bounds)}
            found = found.set(0, found.field(VALUE).with_metadata(bounds))
        return found if facts.values and facts.values.cuts else found.remove(found.get_field_index(LABEL))

    def check(self, facts: Any) -> None:
        if facts.thresholds is not None or facts.review_below is not None:
            raise ValueError(f"thresholds and review_below do not go with problem_type {self.problem_type}")
        if len(facts.labels) != 1:
            raise ValueError(f"there are {len(facts.labels)} outputs; a model that gives numbers has one")
        if (values := facts.values) and len(values.half_widths) not in (0, len(values.edges) + 1):
            raise ValueError(f"there are {len(values.half_widths)} half-widths for {len(values.edges)} edges")

    def calibrate(self, raw_NC: np.ndarray, targets: np.ndarray) -> tuple[float, dict[str, float]]:
        """Nothing: outputs have no temperature."""
        return 1.0, {}

    def decide(
        self, raw_NC: np.ndarray, targets: np.ndarray, wishes: Any, train_targets: Callable[[], np.ndarray]
    ) -> dict[str, Any]:
        predicted_N, trained = raw_NC[:, 0].astype(np.float64), train_targets()
        edges, half_widths = conformal(predicted_N, targets, wishes.coverage)
        cuts = _cuts(wishes.cuts, trained)
        if cuts and not half_widths:
            _log.warning(
                "warning: %d validation rows are too few for intervals with a --coverage of %g, so that every row is "
                "to be reviewed: add rows, or lower it",
                len(targets),
                wishes.coverage,
            )
        if empty := sorted(set(range(len(cuts) + 1)) - set(np.digitize(trained, cuts).tolist())):
            _log.warning("warning: no training value is in the class %r of --cuts", classes_of(cuts)[empty[0]])
        facts = {"coverage": wishes.coverage, "edges": edges, "half_widths": half_widths, "bounds": _bounds(trained)}
        return {"values": ValueFacts(cuts=cuts, **facts)}

    def answer(self, raw_NC: np.ndarray, facts: Any) -> dict[str, pa.Array]:
        value_N, is_nan_N = self.decided(raw_NC), ~np.isfinite(raw_NC[:, 0])
        half_N = _half_widths(value_N, facts.values)
        has_none_N = is_nan_N | np.isnan(half_N)
        columns = {
            VALUE: pa.array(value_N, pa.float32(), mask=is_nan_N),
            LOW: pa.array(value_N - half_N, pa.float32(), mask=has_none_N),
            HIGH: pa.array(value_N + half_N, pa.float32(), mask=has_none_N),
            REVIEW: pa.array(is_nan_N),
        }
        if facts.values and (cuts := facts.values.cuts):
            classes_N, low_N, high_N = (np.digitize(one, cuts) for one in (value_N, value_N - half_N, value_N + half_N))
            names = pa.array(classes_of(cuts))
            columns[LABEL] = names.take(pa.array(np.where(is_nan_N, 0, classes_N), mask=is_nan_N))
            columns[REVIEW] = pa.array(has_none_N | (low_N != high_N))
        return columns

    def decided(self, raw_NC: np.ndarray, facts: Any = None) -> np.ndarray:
        """What each row is given (float64 [N]); NaN where the output is not finite."""
        value_N = raw_NC[:, 0].astype(np.float64)
        return np.where(np.isfinite(value_N), value_N, np.nan)

    def movements(self, before: Profile, now: Profile, against: str, limits: Limits) -> list[Movement]:
        """How far values and their deviation moved, and labels if there are cuts.

        An adopted bundle without a data set has no bounds: all its values may lie in one bin.
        """
        of_labels = [label_movement(before, now, against, limits)] if before.labels or now.labels else []
        spread, spread_now = ((one, one) for _, one in (before.score_moments(), now.score_moments()))
        # The deviation of normal values is as sure as the mean of twice as many.
        change = mean_change(spread, spread_now, 2 * before.num_rows_scored, 2 * now.num_rows_scored)
        shown = [f"deviation {one:.3f}" for one, _ in (spread, spread_now)]
        of_spread = Movement.of(against, "deviation of values", change, limits[1], shown)
        return [*of_labels, *score_movements(before, now, against, limits, "value"), of_spread]

    # How good a model is. What is decided, and targets, are of rows in scope.

    def quality(self, decided: np.ndarray, targets: np.ndarray) -> float:
        """The explained share of the targets' variance (r2), over rows that both have; if there is none, of one."""
        square_error = self.summary(decided, targets, 1)["rmse"] ** 2
        return 1.0 - square_error / (float(np.var(targets[np.isfinite(decided)])) or 1.0)

    def summary(self, decided: np.ndarray, targets: np.ndarray, num_labels: int) -> dict[str, float]:
        both_N = np.isfinite(decided) & np.isfinite(targets)
        return ValueErrors(targets[both_N], decided[both_N]).metrics()

    def measured(self, raw_NC: np.ndarray, targets: np.ndarray, facts: Any) -> dict[str, Any]:
        decided = self.decided(raw_NC)
        read_N = np.isfinite(decided)
        num_rows = {"num_rows": len(targets), "num_rows_without_value": int((~read_N).sum())}
        metrics: dict[str, Any] = self.summary(decided, targets, 1) | num_rows
        values, decided, targets = facts.values, decided[read_N], targets[read_N]
        half_N = _half_widths(decided, values)
        metrics["interval"] = None
        if values and values.half_widths and len(targets):
            is_held_N = np.abs(targets - decided) <= half_N
            found = {"coverage": float(is_held_N.mean()), "mean_width": float(2 * half_N.mean())}
            metrics["interval"] = {"wanted": values.coverage, **found}
        if values and values.cuts:
            true_N, given_N = (np.digitize(one, values.cuts) for one in (targets, decided))
            metrics = class_metrics(true_N, given_N, values.cuts, classes_of(values.cuts)) | metrics
        return metrics

    def difference_intervals(
        self, decided: np.ndarray, other: np.ndarray | None, targets: np.ndarray, num_labels: int
    ) -> dict[str, list[float]]:
        from bertray.metrics.classification import intervals

        both_N = np.isfinite(decided)
        sides = [ValueErrors(targets[both_N], one[both_N]).metrics for one in (decided, other) if one is not None]
        return intervals(sides[0], sides[1] if other is not None else None, int(both_N.sum()))

    def reviews(self, facts: Any) -> bool:
        return bool(facts.values and facts.values.cuts)

    def is_best_right(self, raw_NC: np.ndarray, targets: np.ndarray, facts: Any = None) -> np.ndarray:
        """Whether the class between cuts is right (bool [N])."""
        cuts = facts.values.cuts if facts and facts.values else ()
        given_N, true_N = (np.digitize(one, cuts) for one in (self.decided(raw_NC), targets))
        return np.asarray((given_N == true_N) & np.isfinite(raw_NC[:, 0]))

    def evaluated(self, predictions: pa.Table) -> pa.ChunkedArray:
        return predictions[VALUE]

    def baseline(self, splits: Mapping[str, pa.Table], rows: pa.Table, facts: Any) -> tuple[np.ndarray, pa.Array]:
        from bertray.metrics.baseline import predict_value_baseline

        found = predict_value_baseline(splits["train"], rows)
        return found, pa.array(found, pa.float32())

    def issues(self, targets: np.ndarray, raw_NC: np.ndarray) -> LabelIssues:
        """Rows whose error is an outlier among all errors."""
        from bertray.metrics.label_issues import find_value_issues

        return find_value_issues(targets, self.decided(raw_NC), _MAX_MODIFIED_Z)


def classes_of(cuts: tuple[float, ...]) -> tuple[str, ...]:
    """The names of the K + 1 classes between the cuts, in order; none without cuts."""
    if not cuts:
        return ()
    names = list(map(spelt, cuts))
    between = (f"{low} to {high}" for low, high in itertools.pairwise(names))
    return (f"below {names[0]}", *between, f"{names[-1]} or more")


def _numbers(strings: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    try:
        return strings.cast(pa.float64())
    except pa.ArrowInvalid:
        is_number = pc.match_substring_regex(strings, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$|^(?i:nan)$")
        row = pc.index(pc.fill_null(is_number, True), False).as_py()
        raise RequestError(
            f"row {row} of {what}, counted from 0, is {strings[row].as_py()!r}, which is no number such as 3.5: "
            "correct it, or leave --regression out if these are classes"
        ) from None


def _cuts(wanted: str | None, trained: np.ndarray) -> tuple[float, ...]:
    """The cuts that `--cuts` names, or those between the training values."""
    if wanted is None:
        return ()
    if wanted != "auto":
        return tuple(map(float, wanted.split(",")))
    levels = np.unique(trained)
    if len(levels) <= _MAX_LEVELS:
        return tuple(((levels[1:] + levels[:-1]) / 2).tolist())
    return tuple(np.unique(np.quantile(trained, [1 / 3, 2 / 3])).tolist())


def _bounds(trained: np.ndarray) -> tuple[float, float]:
    """Round numbers around the training values, so that bundles of similar data have the same profile's bins."""
    low, high = float(trained.min()), float(trained.max())
    spread = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(spread))
    step = next(size * step for size in (0.1, 0.2, 0.5, 1.0) if spread <= 10 * size * step)
    return math.floor(low / step - 1e-9) * step, math.ceil(high / step + 1e-9) * step


def _half_widths(value_N: np.ndarray, facts: ValueFacts | None) -> np.ndarray:
    """Half the width of each row's interval; NaN without intervals."""
    if facts is None or not facts.half_widths:
        return np.full(len(value_N), np.nan)
    return np.asarray(np.array(facts.half_widths)[np.digitize(value_N, facts.edges)])
