"""Learning curves: what is drawn, that all of it is in the file, and that the same run gives the same bytes."""

import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest

from bertray.training.curves import learning_curves
from bertray.training.tracking import StepRecord
from tests.conftest import ROOT

NAN, INF = float("nan"), float("inf")
SCORES = {"accuracy": "accuracy", "f1_macro": "macro-F1"}


def records(num_steps: int, num_epochs: int) -> list[StepRecord]:
    return [
        StepRecord(step, step * num_epochs / num_steps, 2 / math.sqrt(step) + 0.1 * (step % 3), 1e-5, 1.0, 1000.0)
        for step in range(1, num_steps + 1)
    ]


def history(num_epochs: int) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, "loss": 1 / epoch, "accuracy": 1 - 0.4 / epoch, "f1_macro": 1 - 0.5 / epoch}
        for epoch in range(1, num_epochs + 1)
    ]


def texts(svg: str) -> list[str]:
    """What is written in it: matplotlib draws letters as paths, with the text as a comment before them."""
    return re.findall(r"<!-- (.*?) -->", svg)


@pytest.mark.parametrize("num_epochs", [1, 3, 20, 100])
@pytest.mark.parametrize("num_steps", [10, 3_000])
def test_a_run(num_epochs: int, num_steps: int) -> None:
    svg = learning_curves(records(num_steps, num_epochs), history(num_epochs), SCORES, num_epochs)
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert len(svg) < 300_000  # of as many steps as a run keeps
    for words in ("loss", "score on validation", "epoch", "train", "validation", "accuracy", "macro-F1"):
        assert words in texts(svg)
    assert texts(svg).count(f"kept: epoch {num_epochs}") == 2
    links = re.findall(r'(?:href|src)="([^"]*)"|url\(([^)]*)\)', svg)
    assert links
    assert all((link or place).startswith("#") for link, place in links)


def test_the_scores_that_are_named_are_shown() -> None:
    scores = [{"epoch": 1, "loss": 0.5, "subset_accuracy": 0.3, "f1_micro": 0.5, "f1_macro": 0.4}]
    found = texts(learning_curves([], scores, {"subset_accuracy": "subset accuracy"}, 1))
    assert "subset accuracy" in found
    assert not {"accuracy", "micro-F1", "macro-F1", "train"} & set(found)


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    scores = [{**epoch, "loss": NAN if epoch["epoch"] == 2 else 1.0, "f1_macro": -INF} for epoch in history(3)]
    paths = [
        path
        for element in ElementTree.fromstring(learning_curves(records(10, 3), scores, SCORES, 1)).iter()
        if (path := element.get("d"))
    ]
    assert paths
    assert not [path for path in paths if "nan" in path or "inf" in path]


def test_the_same_run_gives_the_same_bytes() -> None:
    code = """
import hashlib
from bertray.training.curves import learning_curves
from bertray.training.tracking import StepRecord
records = [StepRecord(step, step / 200, 1 / step, 1e-5, 1.0, 1000.0) for step in range(1, 601)]
history = [{"epoch": epoch, "loss": 1 / epoch, "accuracy": 0.5, "f1_macro": 0.4} for epoch in (1, 2, 3)]
digest = hashlib.sha256(learning_curves(records, history, {"accuracy": "accuracy"}, 2).encode()).hexdigest()
"""
    finished = subprocess.run(
        [sys.executable, "-c", code + "print(digest)"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    here: dict[str, str] = {}
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9}):
        exec(code, here)
    assert finished.stdout.strip() == here["digest"]


def test_drawing_leaves_other_figures_alone() -> None:
    before = dict(matplotlib.rcParams)
    learning_curves(records(10, 1), history(1), SCORES, 1)
    assert dict(matplotlib.rcParams) == before
