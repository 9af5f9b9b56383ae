"""What a search of bertray tune brings: the defaults beside the best trial, on the test rows.

    python -m benchmarks.tune                         banking77, MiniLM, 16 trials of at most 5 epochs
    python -m benchmarks.tune --num-trials 4 --max-epochs 3

The first trial of the search has the defaults of bertray train; the best one is chosen on validation. Both are trained
again with further seeds, which no choice was made on: a search takes the best of many draws, and part of what it finds
is luck. Tested are the epochs that are kept, in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.results import SHARED_DATA, write_result
from benchmarks.training import Run, Subject, prepared
from bertray.drivers.tune import search
from bertray.training.config import TuneConfig
from bertray.training.trials import SEARCHED, options_of


def compare(subject: Subject, num_trials: int, max_epochs: int, num_seeds: int) -> None:
    """Search, then train with the defaults and with what was found, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        config = TuneConfig(
            data=subject.data,
            output=str(Path(folder) / "bundle"),
            encoder=subject.encoder,
            max_length=subject.max_length,
            num_trials=num_trials,
            max_epochs=max_epochs,
        )
        started_s = time.perf_counter()
        summary = search(config)
        wall_s = time.perf_counter() - started_s
    options = {"defaults": options_of(config, 0), "best trial": options_of(config, summary["best_trial"])}
    runs: dict[str, list[Run]] = {name: [] for name in options}
    seeds = range(num_trials, num_trials + num_seeds)  # those before are the trials' own
    for seed in seeds:
        for name, found in runs.items():
            found.append(subject.run(**{**options[name], "seed": seed}))
            print(f"seed {seed}, {name}: test accuracy {found[-1].accuracy:.4f}", file=sys.stderr)
    lines = ["| options | test accuracy, mean of seeds (each) | test macro-F1 |", "|---|---|---|"]
    for name, found in runs.items():
        told = ", ".join(f"{key.replace('_', ' ')} {options[name][key]:g}" for key in SEARCHED if key != "seed")
        each = ", ".join(f"{run.accuracy:.4f}" for run in found)
        accuracy, f1_macro = (statistics.mean(getattr(run, key) for run in found) for key in ("accuracy", "f1_macro"))
        lines.append(f"| {name}: {told} | {accuracy:.4f} ({each}) | {f1_macro:.4f} |")
    facts = {
        "rows": len(subject.train_ids),
        "num_trials": num_trials,
        "num_pruned": summary["num_pruned"],
        "num_failed": summary["num_failed"],
        "max_epochs": max_epochs,
        "seeds": list(seeds),
        "search_wall_s": wall_s,
        "search": config.model_dump(exclude={"data", "output"}),
        "best_trial": summary["best_trial"],
        "validation_of_best_trial": summary["validation"],
    }
    write_result("tune", subject.name, "\n".join(lines), facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="banking77", help="a data set of ../shared/data")
    parser.add_argument("--num-trials", type=int, default=16)
    parser.add_argument("--max-epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"no data sets at {SHARED_DATA}")
    with prepared(arguments.data) as (subject,):
        compare(subject, arguments.num_trials, arguments.max_epochs, arguments.seeds)


if __name__ == "__main__":
    main()
