"""bertray demo: generate a corpus and run the other jobs on it, each as a command that a person could type."""

import shlex
import subprocess
import sys
from pathlib import Path

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
    labelled = str(write_corpus(folder, config.num_labelled, config.num_archive))
    names = ("archive", "dataset", "bundle", "evaluation", "scored")
    archive, dataset, bundle, evaluation, scored = places = [str(folder / name) for name in names]
    # Without Ray, which takes longer to start than a few hundred texts take to train on.
    training = f"--num-workers 0 --epochs {config.epochs} --learning-rate {config.learning_rate} --overwrite"
    steps = [
        ["prepare", "--input", labelled, "--output", dataset],
        ["train", "--data", dataset, "--output", bundle, "--encoder", config.encoder, *training.split()],
        ["evaluate", "--bundle", bundle, "--data", dataset, "--output", evaluation],
        ["score", "--bundle", bundle, "--input", archive, "--output", scored, "--keep-columns", "document_id"],
    ]
    for words in steps:
        print(f"\n$ bertray {shlex.join(words)}", flush=True)
        # The job's summary goes to stderr: stdout is for the demo's own.
        command = [sys.executable, "-P", "-m", "bertray", *words]
        exit_code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if exit_code != EXIT_OK:
            return JobResult({"failed": f"bertray {words[0]}", "exit_code": exit_code}, exit_code)
    print_look(Path(archive), Path(scored) / "predictions")
    summary = {"labelled": labelled, **dict(zip(names, places, strict=True))}
    print("where everything lies:")
    for name, place in summary.items():
        print(f"  {name:<11} {place}")
    print("next: notebooks/explore.ipynb (make notebooks), then your own data (README.md)")
    return JobResult(summary)
