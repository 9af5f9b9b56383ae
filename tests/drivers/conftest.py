"""What tests of several jobs share: a data set that a tiny encoder learns."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from bertray.data.config import PrepareConfig
from bertray.data.prepare import prepare
from tests.kills import end_driver

# 33 steps an epoch, of some ten milliseconds.
LONG_RUN: dict[str, Any] = {
    "epochs": 24,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 32,
    "precision": "fp32",
    "checkpoint_steps": 40,
}

WORDS = {"fruit": "apple banana cherry mango", "car": "wheel engine motor brake", "sea": "wave shore tide fish"}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three labels that a word tells apart; 130 training rows, so a last batch of 2 is left over."""
    folder = tmp_path_factory.mktemp("dataset")
    rows = []
    for number in range(163):
        label = sorted(WORDS)[number % 3]
        word = WORDS[label].split()[number % 4]
        rows.append({"text": f"the {word} of day {number} " + "and so on " * (number % 6), "label": label})
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepared = prepare(PrepareConfig(input=[str(folder / "in.jsonl")], output=str(folder / "data")))
    assert prepared.num_rows["train"] == 129
    return str(folder / "data")


def step_kept(output: Path) -> int:
    """The step that a run would go on from; 0: there is no checkpoint."""
    commits = (output.parent / f".{output.name}.training" / "checkpoints").glob("step-*.json")
    return max((int(path.stem.removeprefix("step-")) for path in commits), default=0)


def stop_and_kill(command: list[str], output: Path, log: Path) -> None:
    """Begin a training of checkpoints every 40 steps, end it by SIGTERM, go on with it and end it by SIGKILL."""
    code, stderr = end_driver(command, log, signal.SIGTERM, lambda _: step_kept(output) > 0)
    assert code == 143, stderr
    assert f"step {step_kept(output)} is kept in" in stderr
    assert step_kept(output) % 40 != 0  # written because of the signal, not because it was due
    assert not output.exists()
    before = step_kept(output)
    code, stderr = end_driver(command, log, signal.SIGKILL, lambda _: step_kept(output) > before)
    assert code == -signal.SIGKILL
    assert "continuing the run at" in stderr
