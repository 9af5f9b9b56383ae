"""bundle/report.html: what was trained, on what, and how did it go?

bundle.json                  options, epochs, scores on validation
tensorboard/                 the loss of every step
trials.json                  the search that found the options (bertray tune)
report.json of the data set  what was taken out, if the data set is still that of the training
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import numpy as np

from bertray.bundle.info import EVENTS_FOLDER, TRIALS_FILE, BundleInfo, read_info
from bertray.data.dataset import REPORT_FILE, Dataset
from bertray.errors import RequestError
from bertray.reports.layout import number, plain_words, rendered
from bertray.schema import SPLITS
from bertray.storage.location import Location
from bertray.storage.outputs import read_json, readable
from bertray.tasks.task import TASKS
from bertray.training.trials import SEARCHED, TrialRecord, best_of

_NUM_POINTS, _MAX_TRIALS, _MAX_TRIAL_LINES = 150, 100, 5
_SCORES = ("accuracy", "f1_macro", "f1_micro", "subset_accuracy", "spearman", "pearson", "r2")
_TRAIN_LOSS = "train/loss"


def render(facts: dict[str, Any]) -> str:
    """The page."""
    return rendered("bundle.html", facts)


def facts(folder: Location, num_texts: int = 0) -> dict[str, Any]:
    """What the page shows of a bundle."""
    info = read_info(folder)
    task = TASKS[info.problem_type]
    history = [epoch for epoch in info.history if "epoch" in epoch]
    best = task.metric_names[task.best_metric]
    return {
        **info.model_dump(exclude={"files", "validation_profile"}),
        "place": info.training.get("output", folder),  # while it is made it lies elsewhere
        "fingerprint": info.fingerprint(),
        "best": [best, info.metrics.get(task.best_metric)],
        "losses": [
            {"name": "training, by step", "points": _steps(folder, history), "faint": True},
            {"name": "training, by epoch", "points": _points(history, "train_loss"), "dots": True},
            {"name": "validation", "points": _points(history, "loss"), "dots": True},
        ],
        "scores": [
            {"name": plain_words(name), "points": _points(history, name), "dots": True}
            for name in _SCORES
            if any(name in epoch for epoch in history)
        ],
        "epochs": [
            [int(one["epoch"]), one.get("train_loss"), one.get("loss"), one.get(task.best_metric), one["wall_s"]]
            for one in history
        ],
        "is_rising": _is_rising([epoch.get(task.best_metric) for epoch in history], info),
        "measured": [
            [plain_words(name), number(value)]
            for name, value in info.metrics.items()
            if name not in ("epoch", "train_loss")
        ],
        **_data(info),
        **_trials(folder),
    }


def _points(history: list[dict[str, float]], name: str) -> list[list[Any]]:
    return [[epoch["epoch"], epoch.get(name)] for epoch in history]


def _is_rising(scores: list[Any], info: BundleInfo) -> bool:
    """Whether the last epoch was the best by more than half a point, so that more of them may help."""
    is_last = info.metrics.get("epoch") == len(scores) and len(scores) > 1
    return is_last and None not in scores and scores[-1] - max(scores[:-1]) > 0.005


def _steps(folder: Location, history: list[dict[str, float]]) -> list[list[float]]:
    """Means of the training loss over some steps, by epoch; none without event files."""
    from tensorboardX.proto.event_pb2 import Event  # imports torch where there is one

    loss_of_step: dict[int, float] = {}
    for file in (folder / EVENTS_FOLDER).files():
        content, at = (folder / EVENTS_FOLDER / file.path).read_bytes(), 0
        while at + 12 <= len(content):  # a record: its length, 4 bytes of a checksum, the event, 4 bytes of another
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16
            # A step that was repeated after a restart counts once, as it was last.
            loss_of_step.update((event.step, one.simple_value) for one in event.summary.value if one.tag == _TRAIN_LOSS)
    if not loss_of_step or not history:
        return []
    epochs_per_step = history[-1]["epoch"] / history[-1]["step"]
    steps, losses = np.array(sorted(loss_of_step.items())).T
    edges = np.unique(np.linspace(0, len(steps), _NUM_POINTS + 1).astype(int))
    return [
        [float(steps[low:high].mean() * epochs_per_step), float(losses[low:high].mean())]
        for low, high in pairwise(edges)
    ]


def _data(info: BundleInfo) -> dict[str, Any]:
    """What the data set's report says: rows by label and split, what was taken out, and warnings."""
    report: dict[str, Any] = {}
    place = info.training.get("data")
    try:
        dataset = Dataset.open(place) if place else None
        if dataset and dataset.fingerprint() == info.data_fingerprint:
            report = read_json(dataset.location / REPORT_FILE, "Prepare the data set again")
    except RequestError:  # it has been moved, or cannot be read from here
        report = {}
    labels = report.get("labels", {})
    out = report.get("num_rows_out", {})
    return {
        "data": place,
        "report": report or None,
        "classes": [[label, *(counts.get(split, 0) for split in SPLITS)] for label, counts in labels.items()],
        "taken_out": sorted(([plain_words(reason), count] for reason, count in out.items()), key=lambda row: -row[1]),
        "warnings": report.get("warnings", []),
    }


def _trials(folder: Location) -> dict[str, Any]:
    """The trials of a search: a table, and the scores by epoch of the best ones."""
    file = folder / TRIALS_FILE
    if not file.exists():
        return {"trials": None}
    with readable(file, "Tune again"):
        records = [TrialRecord(**one) for one in read_json(file, "Tune again")["trials"]]
    ordered, best = sorted(records, key=lambda one: -one.score), best_of(records)
    varied = [name for name in SEARCHED if len({one.options[name] for one in records}) > 1]
    rows = [
        [one.number, "the best" if one is best else one.failure or one.status]
        + [number(one.options[name]) for name in varied]
        + [len(one.history), one.scores.get(one.metric)]
        for one in ordered[:_MAX_TRIALS]
    ]
    lines = [
        {"name": f"trial {one.number}", "points": _points(one.history, one.metric), "dots": True}
        for one in ordered[:_MAX_TRIAL_LINES]
        if one.history
    ]
    found = {"rows": rows, "varied": [plain_words(name) for name in varied], "metric": plain_words(records[0].metric)}
    return {"trials": {**found, "lines": lines, "number": len(records)}}
