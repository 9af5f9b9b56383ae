"""What a command costs before and after its work: two tiny layers, a few texts, beside the floors of the same machine.

    python -m benchmarks.fixed
    python -m benchmarks.fixed --repeats 9 --only score predict

Floors, in processes of their own, in turn with the commands:

    model   import of the model's class and its tokenizer, loading of the folder
    ray     ray.init and ray.shutdown, import included
    actor   the same, with an actor in between that has imported what `model` imports and loaded the folder
    trainer the same, with an empty function in a Ray TorchTrainer of one worker: Ray starts a controller, a cleaner
            and the worker one after another, each a process that imports Ray

A command's bar is so many seconds above the floors that it cannot do without. Of each command the phases are shown, as
seconds since its start: what is logged tells them.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.results import ROOT, write_result
from benchmarks.tiny import tiny_bundle, tiny_dataset, tiny_encoder, word_archive

_MODEL = """
import sys
from transformers import AutoTokenizer, BertForSequenceClassification
BertForSequenceClassification.from_pretrained(sys.argv[1], local_files_only=True)
AutoTokenizer.from_pretrained(sys.argv[1], local_files_only=True, trust_remote_code=False)
"""
_RAY = """
import os
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import ray
ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=40, log_to_driver=False)
{work}
ray.shutdown()
"""
_ACTOR = """
import sys
class Holder:
    def __init__(self, folder):
        from transformers import AutoTokenizer, BertForSequenceClassification
        self.model = BertForSequenceClassification.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    def ready(self):
        return True
ray.get(ray.remote(Holder).remote(sys.argv[1]).ready.remote())
"""


_TRAINER = """
import ray.train.torch
import os, tempfile
with tempfile.TemporaryDirectory() as folder:
    ray.train.torch.TorchTrainer(
        lambda: None,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": os.cpu_count()}),
        run_config=ray.train.RunConfig(storage_path=folder),
    ).fit()
"""


class Command(NamedTuple):
    """A command, the floors that it stands on, and how many seconds it may take beside them."""

    name: str
    arguments: list[str]
    floors: tuple[str, ...]
    at_most_s: float


def commands(folder: Path) -> list[Command]:
    """The measured commands, each with its floor; all read and write in one folder."""
    places = ["--bundle", f"{folder}/bundle", "--input", f"{folder}/archive"]
    training = ["--data", f"{folder}/dataset", "--encoder", f"{folder}/encoder", "--epochs", "1", "--max-length", "32"]
    return [
        Command("predict", ["predict", "--bundle", f"{folder}/bundle", "one text"], ("model",), 0.7),
        Command("score --num-actors 0", ["score", *places, "--num-actors", "0"], ("model",), 1.5),
        Command("score", ["score", *places, "--num-actors", "1"], ("actor",), 2.0),
        Command("train --num-workers 0", ["train", *training, "--num-workers", "0"], ("model",), 3.0),
        Command("train", ["train", *training], ("trainer", "model"), 4.0),
    ]


def wall_s(command: list[str]) -> float:
    """How long a process takes; what it says is shown where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started_s = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    taken_s = time.perf_counter() - started_s
    if done.returncode:
        sys.exit(f"{command} ended with {done.returncode}: {done.stderr}")
    return taken_s


def runs_of(folder: Path, chosen: list[Command]) -> dict[str, Callable[[], float]]:
    """Floors and commands by name; each call is a run in a fresh process, to a new output."""
    bundle = f"{folder}/bundle"
    python = [sys.executable, "-c"]
    runs: dict[str, Callable[[], float]] = {
        "model": lambda: wall_s([*python, _MODEL, bundle]),
        "ray": lambda: wall_s([*python, _RAY.format(work=""), bundle]),
        "actor": lambda: wall_s([*python, _RAY.format(work=_ACTOR), bundle]),
        "trainer": lambda: wall_s([*python, _RAY.format(work=_TRAINER), bundle]),
    }
    for command in chosen:

        def run(arguments: list[str] = command.arguments) -> float:
            with tempfile.TemporaryDirectory() as output:
                places = [] if arguments[0] == "predict" else ["--output", f"{output}/out"]
                return wall_s([sys.executable, "-m", "bertray", *arguments, *places])

        runs[command.name] = run
    return runs


def phases(command: Command) -> list[tuple[float, str]]:
    """What one run logs, each line with the seconds since the process was started."""
    with tempfile.TemporaryDirectory() as output:
        places = [] if command.arguments[0] == "predict" else ["--output", f"{output}/out"]
        started_s = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "bertray", *command.arguments, *places],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        )
        assert process.stderr is not None
        said = [
            (time.perf_counter() - started_s, logged.group(1)[:70])
            for line in process.stderr
            if (logged := re.match(r"\d\d:\d\d:\d\d (.*)", line))
        ]
        process.wait()
        return [*said, (time.perf_counter() - started_s, "the process has ended")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="commands whose name begins with one of these words")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bertray-fixed-") as temporary:
        folder = Path(temporary)
        tiny_bundle(folder / "bundle")
        tiny_encoder(folder / "encoder")
        tiny_dataset(folder / "dataset")
        word_archive(folder / "archive", [8, 8])
        chosen = [
            command
            for command in commands(folder)
            if not arguments.only or any(command.name.startswith(word) for word in arguments.only)
        ]
        runs = runs_of(folder, chosen)
        for run in runs.values():  # what is compiled or cached once is no part of it
            run()
        walls_s: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.repeats):
            for name, run in runs.items():
                walls_s[name].append(run())
        medians_s = {name: statistics.median(walls) for name, walls in walls_s.items()}
        lines = ["| command | s | floors | above them | bar | |", "|---|---|---|---|---|---|"]
        for command in chosen:
            floor_s = sum(medians_s[name] for name in command.floors)
            above_s = medians_s[command.name] - floor_s
            met = "met" if above_s <= command.at_most_s else "missed"
            lines.append(
                f"| {command.name} | {medians_s[command.name]:.2f} | {' + '.join(command.floors)} {floor_s:.2f} "
                f"| {above_s:+.2f} | ≤ {command.at_most_s:g} | {met} |"
            )
        lines += [
            "",
            "Floors: " + ", ".join(f"{name} {medians_s[name]:.2f} s" for name in ("model", "ray", "actor", "trainer")),
        ]
        for command in chosen:
            lines += ["", f"{command.name}, one run:", "", "| s | |", "|---|---|"]
            lines += [f"| {at_s:.2f} | {what} |" for at_s, what in phases(command)]
    write_result("fixed", "two-layers", "\n".join(lines), {"walls_s": walls_s})


if __name__ == "__main__":
    main()
