"""What each lever of training does to test accuracy and macro-F1, one at a time, beside the defaults.

    python -m benchmarks.levers                         csabstruct and banking77, one seed
    python -m benchmarks.levers --data banking77 --seeds 3 --only label_smoothing class_weights

What the defaults' own runs tell needs no other: the last epoch's weights instead of the best epoch's, and where a run
with `patience 1` would have ended.

A lever's difference is the mean over seeds of the difference from the defaults' run of the same seed, with its
standard error where there is more than one seed. 3,080 test rows of banking77 leave an accuracy of 0.93 a standard
error of 0.5 points, 1,349 of csabstruct one of 1.2: what a table like this cannot tell apart, it does not recommend.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from typing import Any

from benchmarks.results import SHARED_DATA, write_result
from benchmarks.training import Run, Subject, prepared
from bertray.training.loop import best_of

# Epochs and learning rate for MiniLM on each; the rest is bertray train's.
BASE: dict[str, dict[str, Any]] = {
    "banking77": {"epochs": 5, "learning_rate": 2e-4},
    "csabstruct": {"epochs": 3, "learning_rate": 5e-5},
}
LEVERS: dict[str, dict[str, Any]] = {
    "class_weights balanced": {"class_weights": "balanced"},
    "label_smoothing 0.1": {"label_smoothing": 0.1},
    "layer_decay 0.9": {"layer_decay": 0.9},
    "fp32": {"precision": "fp32"},
    "learning_rate ÷ 2": {},
    "learning_rate × 2": {},
    "learning_rate × 4": {},
}
_FACTORS = {"learning_rate ÷ 2": 0.5, "learning_rate × 2": 2.0, "learning_rate × 4": 4.0}


def options(lever: str, data: str) -> dict[str, Any]:
    """The options of a run with one lever moved."""
    base = BASE[data]
    return {**base, "learning_rate": base["learning_rate"] * _FACTORS.get(lever, 1.0), **LEVERS.get(lever, {})}


def ended_early(run: Run) -> tuple[int, bool]:
    """With `patience 1`: epochs until the end of the run, and whether it keeps the same one."""
    epochs = range(1, len(run.history) + 1)
    ends = next((epoch for epoch in epochs if best_of(run.history[:epoch], "f1_macro") < epoch), len(run.history))
    return ends, best_of(run.history[:ends], "f1_macro") == best_of(run.history, "f1_macro")


def row(lever: str, runs: list[Run], plain: list[Run]) -> str:
    """A line of the table."""
    cells = [lever]
    for measure in ("accuracy", "f1_macro"):
        found = [getattr(run, measure) for run in runs]
        differences = [100 * (one - getattr(other, measure)) for one, other in zip(found, plain, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
        shown = f"{statistics.mean(differences):+.2f}" + (f" ± {error:.2f}" if error is not None else "")
        cells += [f"{statistics.mean(found):.4f}", "" if runs is plain else shown]
    cells.append(f"{sum(run.wall_s for run in runs):.0f}")
    return f"| {' | '.join(cells)} |"


def measure(subject: Subject, levers: list[str], num_seeds: int) -> None:
    """All runs of a data set, seed by seed."""
    runs: dict[str, list[Run]] = {lever: [] for lever in ["defaults", *levers]}
    for seed in range(num_seeds):
        for lever, found in runs.items():
            found.append(subject.run(seed=seed, **options(lever, subject.name)))
            print(f"{subject.name}, seed {seed}, {lever}: {found[-1].accuracy:.4f}", file=sys.stderr, flush=True)
    lines = ["| lever | accuracy | points | macro-F1 | points | seconds |", "|---|---|---|---|---|---|"]
    lines += [row(lever, found, runs["defaults"]) for lever, found in runs.items()]
    last = [replace(run, accuracy=run.last[0], f1_macro=run.last[1], wall_s=0) for run in runs["defaults"]]
    lines.insert(3, row("keep last (the same runs)", last, runs["defaults"]))
    for run in runs["defaults"]:
        ends, is_same = ended_early(run)
        kept = "the same epoch" if is_same else "an earlier epoch"
        lines.append(f"| patience 1 | ends after epoch {ends} of {len(run.history)}, keeps {kept} | | | | |")
    if num_seeds > 1:
        best = max(runs["defaults"], key=lambda run: max(epoch["f1_macro"] for epoch in run.history))
        lines.append(f"| best of {num_seeds} seeds, by validation | {best.accuracy:.4f} | | {best.f1_macro:.4f} | | |")
    facts = {"base": BASE[subject.name], "seeds": num_seeds, "encoder": subject.encoder}
    facts["accuracies"] = {lever: [run.accuracy for run in found] for lever, found in runs.items()}
    facts["validation_of_defaults"] = [[epoch["f1_macro"] for epoch in run.history] for run in runs["defaults"]]
    write_result("levers", subject.name, "\n".join(lines), facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=list(BASE), choices=list(BASE))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], help="beginnings of levers' names")
    arguments = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"no data sets at {SHARED_DATA}")
    levers = [name for name in LEVERS if not arguments.only or name.startswith(tuple(arguments.only))]
    with prepared(*arguments.data) as subjects:
        for subject in subjects:
            measure(subject, levers, arguments.seeds)


if __name__ == "__main__":
    main()
