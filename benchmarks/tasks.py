"""Data sets with published figures through bertray prepare, train and evaluate, as a user would: what comes out.

    python -m benchmarks.tasks                                  all of them, MiniLM
    python -m benchmarks.tasks --only clinc150 --epochs 1

Several labels a row (goemotions); texts that fit no class: as a class of its own, learnt from 100 rows, and without a
training row of them, by a threshold of the score; numbers (emobank). Nothing is chosen on the test rows: thresholds,
temperature, intervals and the epoch that is kept follow from the validation rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import ROOT, SHARED_DATA, write_result


class Task(NamedTuple):
    """What the jobs are told of a data set, and what is published of its test rows."""

    prepare: dict[str, str]
    train: dict[str, Any]
    measures: tuple[str, ...]  # of metrics.json, or of its out_of_scope
    published: str


GOEMOTIONS = SHARED_DATA / "goemotions_multilabel"
EMOBANK = SHARED_DATA / "emobank"
CLINC = SHARED_DATA / "clinc150"
LARSON = "BERT 0.969 in scope, recall 0.403 (Larson et al. 2019, https://aclanthology.org/D19-1131)"
UNTOLD = ("per_class", "confusion_matrix", "labels", "config", "bundle", "data")  # too long, or of this machine
OUT_OF_SCOPE = ("accuracy", "in_scope_accuracy", "oos_recall", "oos_precision", "auroc", "ece")
TASKS = {
    "goemotions": Task(
        {"input": f"{GOEMOTIONS}/train.parquet", "validation": f"{GOEMOTIONS}/dev.parquet"}
        | {"test": f"{GOEMOTIONS}/test.parquet", "multi_label": ""},
        {"epochs": 4, "learning_rate": 3e-4, "max_length": 64},
        ("f1_macro", "f1_micro", "subset_accuracy", "ece"),
        "BERT-base: macro-F1 0.46 (Demszky et al. 2020, https://aclanthology.org/2020.acl-main.372)",
    ),
    "clinc150, oos a class": Task(
        {"input": f"{CLINC}/train_with_oos.parquet", "validation": f"{CLINC}/dev.parquet"}
        | {"test": f"{CLINC}/test_with_oos.parquet", "oos_label": "oos"},
        {"epochs": 8, "learning_rate": 3e-4, "max_length": 64},
        OUT_OF_SCOPE,
        LARSON,
    ),
    "clinc150, oos by the score": Task(
        {"input": f"{CLINC}/train.parquet", "validation": f"{CLINC}/dev.parquet"}
        | {"test": f"{CLINC}/test_with_oos.parquet", "oos_label": "oos"},
        {"epochs": 8, "learning_rate": 3e-4, "max_length": 64, "target_precision": 0.98},
        OUT_OF_SCOPE,
        "",
    ),
    **{
        f"emobank, valence, seed {seed}": Task(
            {"input": f"{EMOBANK}/train.parquet", "validation": f"{EMOBANK}/dev.parquet"}
            | {"test": f"{EMOBANK}/test.parquet", "label_column": "valence", "regression": ""},
            {"epochs": 3, "learning_rate": 2e-4, "seed": seed},
            ("mae", "pearson", "spearman", "coverage", "mean_width"),
            "MiniLM in a plain loop, batches grouped by length, one seed: MAE 0.175, Pearson 0.736, Spearman 0.700",
        )
        for seed in range(3)
    },
}


def job(name: str, **options: Any) -> dict[str, Any]:
    """Run a job; returns its summary."""
    flags = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value)) if part != ""
    ]
    finished = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    summary: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return summary


def run(task: Task, encoder: str, epochs: int | None) -> dict[str, Any]:
    """Metrics of the test rows, with seconds of training."""
    with tempfile.TemporaryDirectory(prefix="bertray-benchmark-") as temporary:
        data, bundle, evaluation = (str(Path(temporary) / name) for name in ("data", "bundle", "evaluation"))
        job("prepare", **task.prepare, output=data)
        options = {**task.train, **({"epochs": epochs} if epochs else {})}
        started_s = time.perf_counter()
        trained = job("train", data=data, output=bundle, encoder=encoder, **options)
        wall_s = time.perf_counter() - started_s
        job("evaluate", bundle=bundle, data=data, output=evaluation)
        metrics: dict[str, Any] = json.loads((Path(evaluation) / "metrics.json").read_text())
    scores = {name: value for name, value in metrics.items() if name not in UNTOLD}
    return {**scores, "train": options, "train_wall_s": wall_s, "best_epoch": trained["best_epoch"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of tasks' names")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--epochs", type=int, help="instead of each task's own")
    arguments = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"no data sets at {SHARED_DATA}")
    tasks = {name: task for name, task in TASKS.items() if name.startswith(tuple(arguments.only))}
    found = {name: run(task, arguments.encoder, arguments.epochs) for name, task in tasks.items()}
    lines = ["| task | options | on the test rows | TF-IDF | published | training |", "|---|---|---|---|---|---|"]
    for name, task in tasks.items():
        metrics = {**found[name], **(found[name]["out_of_scope"] or {}), **(found[name].get("interval") or {})}
        simplest = ", ".join(
            f"{key.replace('_', ' ')} {value:.3f}"
            for key, value in metrics["baseline"].items()
            if key in ("accuracy", "f1_macro", "mae", "pearson", "spearman")
        )
        measured = ", ".join(f"{key.replace('_', ' ')} {metrics[key]:.3f}" for key in task.measures)
        told = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in metrics["train"].items())
        lines.append(
            f"| {name} | {told} | {measured} | {simplest} | {task.published} | {metrics['train_wall_s']:.0f} s |"
        )
    write_result("tasks", arguments.encoder, "\n".join(lines), {"encoder": arguments.encoder, "tasks": found})


if __name__ == "__main__":
    main()
