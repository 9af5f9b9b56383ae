"""See the whole of it work: a generated résumé corpus through prepare, train, evaluate and score.

    python -m jobs.demo
    python -m jobs.demo --output /tmp/demo --num-labelled 400 --num-archive 400 --epochs 1

The corpus is synthetic: its accuracy says nothing about your data. Every step is a command that you can type yourself;
it is printed before it runs.
"""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertray.cli import EXIT_OK, Outcome, leave, run_job
from bertray.drivers.config import DemoConfig


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(DemoConfig, _run, argv, __doc__ or "")


def _run(config: DemoConfig) -> Outcome:
    from bertray.data.synthetic import write_corpus
    from bertray.reports.terminal import print_look

    folder = Path(config.output)
    places = {name: str(folder / name) for name in ("archive", "dataset", "bundle", "evaluation", "scored")}
    places["labelled"] = str(write_corpus(folder, config.num_labelled, config.num_archive))
    training = {"--encoder": config.encoder, "--epochs": config.epochs, "--learning-rate": config.learning_rate}
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
        command = ["-m", f"jobs.{job}", *words, *switches]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        # Each job's summary goes to stderr with the rest: the demo's own is the last line of stdout.
        finished = subprocess.run([sys.executable, *command], stdout=sys.stderr, check=False)
        if finished.returncode != EXIT_OK:
            return Outcome({"failed": f"jobs.{job}", "exit_code": finished.returncode}, finished.returncode)
    print_look(Path(places["archive"]), Path(places["scored"]) / "predictions")
    print("where everything lies:")
    for name in ("labelled", "archive", "dataset", "bundle", "evaluation", "scored"):
        print(f"  {name:<11} {places[name]}")
    print("next: notebooks/explore.ipynb (make notebooks), then your own data (README.md)")
    return Outcome(places)


if __name__ == "__main__":
    leave(main())
