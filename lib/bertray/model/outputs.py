"""What the outputs of a finished classifier are, as its config.json says; looked at before torch is imported.

id2label {"0": "neg", "1": "pos"}    labels ("neg", "pos"), in the order of the outputs
id2label {"0": "LABEL_0", …}         no names: --labels neg,pos gives them
problem_type null                    that of the data set; without one as in transformers: one output is a
                                     regression, more are one label a row
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from bertray.data.dataset import Dataset
from bertray.errors import RequestError, listed
from bertray.tasks.task import TASKS
from bertray.tokenization.columns import one_line
from bertray.types import UNNAMED_PROBLEM_TYPE, ProblemType

_log = logging.getLogger(__name__)

_CLASSIFIER = "ForSequenceClassification"
_NO_NAME = re.compile(r"\s*(LABEL_\d+)?", re.IGNORECASE)
_IN_ORDER = "Name them with --labels, in the order of the outputs: whoever trained the model knows it"
_PREPARE = "Prepare rows of the model's labels, and no others, or leave --data out"
NO_HEAD = (
    "It has no whole classification head, and transformers would draw one at random. To train one: bertray train "
    "--encoder {} --data DATASET"
)


def outputs_of(
    model: str, config: dict[str, Any], names: Sequence[str], dataset: Dataset | None
) -> tuple[tuple[str, ...], ProblemType]:
    """The labels of a model's outputs, in their order, and the problem type.

    Args:
        model: its name, for errors.
        config: the content of its config.json.
        names: labels in the place of the model's own; empty: none.

    Raises:
        RequestError: it is no classifier, its outputs have no names, or labels or problem type are not those of the
            data set.
    """
    architectures = [str(one) for one in config.get("architectures") or []]
    if architectures and not any(one.endswith(_CLASSIFIER) for one in architectures):
        raise RequestError(f"--model {model} is a {architectures[0]}, no …{_CLASSIFIER}. {NO_HEAD.format(model)}")
    own = _own_labels(model, config, names)
    if names and len(names) != len(own):
        raise RequestError(f"--labels names {len(names)} labels, and {model} has {len(own)} outputs: {listed(own)}")
    problem_type = _problem_type(model, config.get("problem_type"), len(own), dataset)
    labels = tuple(names or own)
    if (outputs := TASKS[problem_type].outputs) is None:
        _check_labels(model, labels, dataset)
        return labels, problem_type
    if names or len(own) != len(outputs):
        why = f"--labels names {', '.join(names)}" if names else f"it has {len(own)} outputs: {listed(own)}"
        raise RequestError(f"--model {model}: {problem_type} has one output and no labels, and {why}")
    return outputs, problem_type


def kind_of(own: str | None, num_outputs: int) -> str:
    """What the outputs are for, if config.json alone says it; `own` is its problem_type."""
    return own or ("regression" if num_outputs == 1 else UNNAMED_PROBLEM_TYPE)


def _own_labels(model: str, config: dict[str, Any], names: Sequence[str]) -> list[str]:
    id2label = config.get("id2label")
    if not id2label:  # transformers leaves out what it would assume
        return [f"LABEL_{number}" for number in range(config.get("num_labels") or len(names) or 2)]
    numbers = [str(key) for key in id2label] if isinstance(id2label, dict) else [""]
    if not all(map(str.isdecimal, numbers)) or (not names and {*map(int, numbers)} != {*range(len(numbers))}):
        raise RequestError(
            f"--model {model}: id2label in its config.json is {id2label!r:.200}, and must number outputs from 0, as "
            '{"0": "a label", "1": "another"}. Mend it, in a copy of the model'
        )
    return ["" if id2label[key] is None else str(id2label[key]) for key in sorted(id2label, key=int)]


def _problem_type(model: str, own: Any, num_outputs: int, dataset: Dataset | None) -> ProblemType:
    found = dataset.problem_type if dataset and not own else kind_of(own, num_outputs)
    if found not in TASKS:
        why = f"its config.json says problem_type {own!r}"
        raise RequestError(f"--model {model}: {why}; bertray adopts models for {', '.join(TASKS)}")
    if dataset and found != dataset.problem_type:
        raise RequestError(
            f"--model {model} is for {found}, --data {dataset.location} for {dataset.problem_type}: prepare the data "
            "with or without --multi-label or --regression, as the model was trained, or leave --data out"
        )
    if not own and not dataset:
        fit = (name for name, task in TASKS.items() if len(task.outputs or range(num_outputs)) == num_outputs)
        others = " or ".join(name for name in fit if name != found)
        message = "%s is for %s, as config.json says nothing else; if it is for %s, write that as problem_type there"
        _log.info(f"{message}, in a copy, or give --data", model, found, others)
    return found


def _check_labels(model: str, labels: Sequence[str], dataset: Dataset | None) -> None:
    compared = list(map(one_line, labels))
    if dataset and len(labels) != len(dataset.labels):
        raise RequestError(
            f"--model {model} has {len(labels)} outputs ({listed(labels)}), --data {dataset.location} "
            f"{len(dataset.labels)} labels ({listed(dataset.labels)}). {_PREPARE}"
        )
    if any(map(_NO_NAME.fullmatch, labels)):
        known = f" The data set has {listed(dataset.labels)}" if dataset else ""
        raise RequestError(f"--model {model}: outputs have no names ({listed(labels)}). {_IN_ORDER}.{known}")
    if twice := [label for label in compared if compared.count(label) > 1]:
        raise RequestError(f"--model {model}: several outputs have the label {twice[0]!r}. {_IN_ORDER}")
    if dataset and set(compared) != set(map(one_line, dataset.labels)):  # the order does not matter
        raise RequestError(
            f"--model {model} has other labels ({listed(labels)}) than --data {dataset.location} "
            f"({listed(dataset.labels)}). If they mean the same, give --labels the data set's names, in the model's "
            f"order. Else: {_PREPARE}"
        )
