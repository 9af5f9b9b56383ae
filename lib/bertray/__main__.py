"""The command `bertray`. The shell, `python -m bertray` and the scripts in jobs/ all use the same table of jobs.

    bertray score --bundle bundle --input archive --output scored
      1. find      ("bertray.scoring.config:ScoreConfig", "bertray.drivers.score:run")          COMMANDS
      2. read      options from YAML, environment and flags; the configuration class checks them  [bertray.cli]
      3. run       import the driver and run it; its summary is the last line of stdout

No other file outside `drivers` refers to drivers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from bertray import __version__
from bertray.cli import EXIT_BAD_REQUEST, EXIT_OK, describe, did_you_mean, leave, make_streams_last, run_job
from bertray.config import JobConfig

# Configuration class and driver of each job, in the order in which people need them.
COMMANDS = {
    "demo": ("bertray.drivers.config:DemoConfig", "bertray.drivers.local_jobs:run_demo"),
    "prepare": ("bertray.data.config:PrepareConfig", "bertray.drivers.local_jobs:run_prepare"),
    "train": ("bertray.training.config:TrainConfig", "bertray.drivers.train:run"),
    "evaluate": ("bertray.drivers.config:EvaluateConfig", "bertray.drivers.evaluate:run"),
    "predict": ("bertray.drivers.config:PredictConfig", "bertray.drivers.local_jobs:run_predict"),
    "score": ("bertray.scoring.config:ScoreConfig", "bertray.drivers.score:run"),
    "verify": ("bertray.drivers.config:VerifyConfig", "bertray.drivers.local_jobs:run_verify"),
    "report": ("bertray.drivers.config:ReportConfig", "bertray.drivers.local_jobs:run_report"),
    "tune": ("bertray.training.config:TuneConfig", "bertray.drivers.tune:run"),
    "adopt": ("bertray.training.config:AdoptConfig", "bertray.drivers.local_jobs:run_adopt"),
    "audit": ("bertray.training.config:AuditConfig", "bertray.drivers.audit:run"),
}
_OVERVIEW = """\
usage: bertray COMMAND [OPTIONS]

Fine-tune a BERT classifier on labelled texts, and label a large archive with it.

{jobs}

To begin: bertray demo. It runs four of these commands on data of its own and prints each before it runs.
bertray COMMAND --help shows examples and every option."""


def config_class(name: str) -> type[JobConfig]:
    """The class of a job's options."""
    found: type[JobConfig] = _imported(COMMANDS[name][0])
    return found


def command(name: str, module_name: str = "") -> Callable[[Sequence[str] | None], int]:
    """The main function of a job: takes command line arguments, returns the exit code.

    Args:
        module_name: `__name__` of the caller. If it is "__main__", run the job and end the process.
    """

    def main(argv: Sequence[str] | None = None) -> int:
        return run_job(name, config_class(name), lambda config: _imported(COMMANDS[name][1])(config), argv)

    if module_name == "__main__":
        make_streams_last()
        leave(main())
    return main


def main(argv: Sequence[str] | None = None) -> int:
    """Run `bertray NAME …` and return the exit code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return command(name)(arguments)
    if name in ("", "-h", "--help", "help"):
        jobs = "\n".join(f"  {job:<10}{describe(config_class(job)).rstrip('.')}" for job in COMMANDS)
        print(_OVERVIEW.format(jobs=jobs))
    elif name in ("-V", "--version"):
        print(f"bertray {__version__}")
    else:
        known = ", ".join(COMMANDS)
        print(f"error: no command {name!r}.{did_you_mean(name, COMMANDS)} Commands: {known}", file=sys.stderr)
        return EXIT_BAD_REQUEST
    return EXIT_OK


def run() -> NoReturn:
    """Entry point of the installed command `bertray`."""
    make_streams_last()
    leave(main())


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    run()
