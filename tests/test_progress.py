"""Progress in a log: a line now and then, with the time left."""

import io
import logging
import re
import sys

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from bertray import progress
from bertray.cli import _log_to_stderr
from bertray.progress import ProgressBar


def test_lines_in_a_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO", logger="bertray"), ProgressBar("training", 100, "steps") as bar:
        for now_s, done in ((30, 0), (40, 10), (45, 15), (60, 30), (61, 31)):
            now[0] = now_s
            bar.update(done, "epoch 1/2")
    # start-up (the first 40 s) is no part of the rate: 20 steps in 20 s, 70 steps left
    assert [record.getMessage() for record in caplog.records] == [
        "training: 15 of 100 steps, about 0:01:25 left epoch 1/2",
        "training: 30 of 100 steps, about 0:01:10 left epoch 1/2",
        "training: 31 of 100 steps, 0:01:01 in all",
    ]


def test_a_total_that_is_found_out_on_the_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level("INFO", logger="bertray"), ProgressBar("training", 100, "steps") as bar:
        for now_s, done in ((30, 0), (40, 10), (60, 30)):
            now[0] = now_s
            bar.update(done, "epoch 1/2", 200 if done else 0)
    assert [record.getMessage() for record in caplog.records] == [
        "training: 30 of 200 steps, about 0:02:50 left epoch 1/2",
        "training: 30 of 200 steps, 0:01:00 in all",
    ]


def test_on_a_terminal_log_lines_stand_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    _log_to_stderr()
    with ProgressBar("training", 10, "steps") as bar:
        bar.update(5, "epoch 1/2")
        logging.getLogger("bertray").info("epoch 1 is done")
        bar.update(10, "epoch 2/2")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").split("\n")
    assert any(re.fullmatch(r"\d\d:\d\d:\d\d epoch 1 is done *", line) for line in lines)
    assert any("training" in line and "10/10" in line and "epoch 2/2" in line and "left" in line for line in lines)


def test_nothing_is_said_before_anything_is_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="bertray"), ProgressBar("scoring", 0, "shards") as bar:
        bar.update(0)
    assert not caplog.records


def test_under_a_notebooks_cell_the_bar_stays_when_it_is_saved() -> None:
    """Without widgets; one bar, however often it moves."""
    code = """\
from bertray.progress import ProgressBar
with ProgressBar("training", 10, "steps") as bar:
    for done in range(4):
        bar.update(done, "epoch 1/2")"""
    notebook = new_notebook(cells=[new_code_cell(code)])
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    [output] = notebook.cells[0].outputs
    shown = output["data"]["text/plain"]
    assert shown.startswith("training") and "3/10" in shown and "epoch 1/2" in shown
    assert "<pre" in output["data"]["text/html"]
