"""What every task promises the rooms below."""

from types import SimpleNamespace
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest

from bertray import schema
from bertray.metrics.classification import full_metrics
from bertray.tasks.task import TASKS, Task, task_of_cells, task_of_rows, task_of_targets
from bertray.training.loss import LOSSES
from bertray.types import ProblemType

LABELS = ("a", "b", "c")
# Labels of rows as a file may have them, with those of a second file's rows.
CELLS = {
    "single_label_classification": (["b", " a ", "c", "a"], ["a", "a", "b", "c"]),
    "multi_label_classification": (["b|a", "", "c", "a|c|a "], ["a", "b", "c|b", "a"]),
}

every_task = pytest.mark.parametrize("task", [TASKS[name] for name in CELLS], ids=CELLS)  # with labels


def encoded(task: Task, cells: list[str]) -> pa.Table:
    """Rows of a data set, as `prepare` makes them."""
    column = task.read(pa.chunked_array([pa.array(cells)]), "column 'label' of a.csv", "|")
    num_rows = len(cells)
    others = {schema.TEXT: ["x"] * num_rows, schema.SOURCE: ["a.csv"] * num_rows, schema.SOURCE_ROW: range(num_rows)}
    rows, keys = task.tidied(pa.table({**others, task.column: column}))
    assert task_of_rows(rows) is task
    return task.encoded(rows.filter(pa.array([bool(key) for key in keys])), list(LABELS))


def logits(num_rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(num_rows, 3)).astype(np.float32) * 3


def facts(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"labels": LABELS, "thresholds": None, "review_below": None, **changes})


def test_every_problem_type_has_a_task_and_a_loss() -> None:
    assert {task_of_cells(separator, False) for separator in (None, "|")} < set(TASKS.values())
    assert set(TASKS) == set(LOSSES) == set(get_args(ProblemType))


@every_task
def test_targets_are_what_the_data_set_says(task: Task) -> None:
    rows = encoded(task, CELLS[task.problem_type][0])
    targets = task.targets(rows, 3)
    assert task_of_targets(targets) is task
    names = [LABELS[one] if targets.ndim == 1 else [LABELS[at] for at in np.flatnonzero(one)] for one in targets]
    assert names == rows[task.column].to_pylist() == task.strata(rows)
    assert [len(one) for one in task.stored(rows).to_pylist()] == [
        1 if targets.ndim == 1 else sum(one) for one in targets
    ]
    assert task.is_in_scope(rows).all() and task.quality(targets, targets) == 1


@every_task
@pytest.mark.parametrize("thresholds", [None, (0.9, 0.1, 0.5)])
def test_what_is_decided_is_what_is_answered(task: Task, thresholds: tuple[float, ...] | None) -> None:
    raw_NC = logits(50)
    raw_NC[7, 1] = np.nan
    found = facts(thresholds=thresholds, review_below=0.7)
    answers = task.answer(raw_NC, found)
    wanted = schema.prediction_schema(task.problem_type)
    assert set(answers) == set(wanted.names) - {schema.NUM_TOKENS, schema.TRUNCATED, schema.ERROR}
    assert all(answers[name].type == wanted.field(name).type for name in answers)
    answers = pa.table(answers)
    decided = task.decided(raw_NC, found)
    for row, given in enumerate(task.evaluated(answers).to_pylist()):
        ids = [decided[row]] if decided.ndim == 1 else np.flatnonzero(decided[row])
        names = [LABELS[one] for one in ids if one != schema.NO_CLASS]
        assert sorted(given if isinstance(given, list) else [given] if given else []) == names, row
    assert answers[schema.LABEL][7].as_py() is None and answers[schema.REVIEW][7].as_py()
    assert (answers[schema.SCORE][8].as_py() < 0.7) == answers[schema.REVIEW][8].as_py()


@every_task
def test_metrics_have_what_is_shown_and_compared(task: Task) -> None:
    true, other = (task.targets(encoded(task, cells), 3) for cells in CELLS[task.problem_type])
    num_rows = min(len(true), len(other))
    metrics = full_metrics(true[:num_rows], other[:num_rows], LABELS)
    summary = task.summary(other[:num_rows], true[:num_rows], 3)
    assert summary == {name: metrics[name] for name in summary}
    assert {*task.metric_names, task.best_metric} <= set(summary)
    assert set(summary) == set(task.difference_intervals(true, true, true, 3))
    assert set(metrics["per_class"]) == set(LABELS)


@every_task
def test_what_is_right_is_trusted(task: Task) -> None:
    """A model that is always right needs no review; one that is never right has all rows reviewed."""
    targets = np.concatenate([task.targets(encoded(task, CELLS[task.problem_type][0]), 3)] * 100)
    right_NC = 8.0 * (np.eye(3)[targets] if targets.ndim == 1 else targets) - 4
    for target_precision in (0.9, None):
        found = task.decide(right_NC, targets, SimpleNamespace(target_precision=target_precision), list)
        assert set(task.answer(right_NC, facts(**found))[schema.REVIEW].to_pylist()) == {False}
    never = task.decide(-right_NC, targets, SimpleNamespace(target_precision=0.9), list)
    assert never["review_below"] == 2.0
