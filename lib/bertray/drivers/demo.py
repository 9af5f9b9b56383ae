"""A generated corpus through the other jobs, each as a command that a person can type: the driver of bertray demo."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from bertray.cli import EXIT_OK, JobResult
from bertray.data.synthetic import write_corpus
from bertray.drivers.config import DemoConfig
from bertray.reports.terminal import print_look
from bertray.storage.location import Location
from bertray.storage.outputs import refuse_in_bundle


def run(config: DemoConfig) -> JobResult:
    """The job of the command line."""
    refuse_in_bundle(Location.of(config.output))
    folder = Path(config.output)
    places = {name: str(folder / name) for name in ("archive", "dataset", "bundle", "evaluation", "scored")}
    places["labelled"] = str(write_corpus(folder, config.num_labelled, config.num_archive))
    # A few hundred texts: Ray would take longer to start than they take to train on.
    training = {
        "--num-workers": 0,
        "--encoder": config.encoder,
        "--epochs": config.epochs,
        "--learning-rate": config.learning_rate,
    }
    evaluated = {"--bundle": places["bundle"], "--data": places["dataset"], "--output": places["evaluation"]}
    scored = {"--input": places["archive"], "--output": places["scored"], "--keep-columns": "document_id"}
    steps: list[tuple[str, dict[str, Any], list[str]]] = [
        ("prepare", {"--input": places["labelled"], "--output": places["dataset"]}, []),
        ("train", {"--data": places["dataset"], "--output": places["bundle"], **training}, ["--overwrite"]),
        ("evaluate", evaluated, []),
        ("score", {"--bundle": places["bundle"], **scored}, []),
    ]
    for job, options, switches in steps:
        words = [word for option, value in options.items() for word in (option, str(value))]
        print(f"\n$ bertray {shlex.join([job, *words, *switches])}", flush=True)
        # Each job's summary goes to stderr with the rest: the demo's own is the last line of stdout.
        command = [sys.executable, "-P", "-m", "bertray", job, *words, *switches]
        finished = subprocess.run(command, stdout=sys.stderr, check=False)
        if finished.returncode != EXIT_OK:
            return JobResult({"failed": f"bertray {job}", "exit_code": finished.returncode}, finished.returncode)
    print_look(Path(places["archive"]), Path(places["scored"]) / "predictions")
    print("where everything lies:")
    for name in ("labelled", "archive", "dataset", "bundle", "evaluation", "scored"):
        print(f"  {name:<11} {places[name]}")
    print("next: notebooks/explore.ipynb (make notebooks), then your own data (README.md)")
    return JobResult(places)
