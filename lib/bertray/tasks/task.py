"""The tasks by problem type: no other room asks which one it has. The losses are in `training.loss`.

What becomes of a row of several labels, and the method of each step:

    cell "joy;love"             read, tidied   ["joy", "love"], sorted, without blanks and repeats
      splits                    strata         what is divided alike: its labels
      data set                  encoded        label_ids [0, 2]
      training                  stored         [0, 2]
                                targets        [1, 0, 1]
      logits [2.2, -3, 1.4]     calibrate      divided by 1.1, in the model's weights
                                decide         thresholds (0.4, 0.5, 0.3) and review_below 0.7, for bundle.json
                                answer         label joy, score 0.88, review False, labels ["joy", "love"]
                                decided        [1, 0, 1], to be compared with the targets
      run                       movements      how far labels and scores moved, for the gate

`SingleLabel` says what the methods do. `Regression` has no labels, and is a class of its own with the same methods:
every use is type-checked against all of them.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import pyarrow as pa

from bertray.tasks.multi_label import MultiLabel
from bertray.tasks.regression import Regression
from bertray.tasks.single_label import SingleLabel
from bertray.types import ProblemType

Task: TypeAlias = SingleLabel | MultiLabel | Regression

TASKS: dict[ProblemType, Task] = {task.problem_type: task for task in (SingleLabel(), MultiLabel(), Regression())}


def task_of_cells(separator: str | None, are_numbers: bool) -> Task:
    """The task of labelled files whose cells have this separator, or are numbers; None: one label a row."""
    if are_numbers:
        return TASKS["regression"]
    return TASKS["single_label_classification" if separator is None else "multi_label_classification"]


def task_of_rows(rows: pa.Table) -> Task:
    """The task of labelled rows: they have its column."""
    return next(task for task in TASKS.values() if task.column in rows.column_names)


def task_of_targets(targets: np.ndarray) -> Task:
    """The task of which these can be targets."""
    return next(task for task in TASKS.values() if task.targets_are == (targets.dtype.kind, targets.ndim))
