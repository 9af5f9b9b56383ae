"""Fine-tuning beside transformers.Trainer with its best settings, and a plain loop: tokens a second, and accuracy.

    python -m benchmarks.train                      banking77, MiniLM, 5 epochs, 3 seeds: half an hour on 2 cores
    python -m benchmarks.train --seeds 1 --epochs 1
    python -m benchmarks.train --workers            one worker with all cores beside two that share them, on Ray

All fine-tune the same encoder on the same rows with the same epochs, batch size and learning rate, AdamW and a linear
schedule. The Trainer groups by length and computes in bf16 where the machine has it; the plain loop shuffles, pads and
computes in fp32: its rate is that of some steps. A machine's speed drifts by a tenth from minute to minute, so ours and
the Trainer's run of a seed are two processes that take turns, epoch by epoch, of which one works while the other waits;
the ratio is the median of those of all pairs of epochs. Tokens are those of the texts; padding is not counted, nor
validation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Semaphore
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from benchmarks.results import SHARED_DATA, write_result
from benchmarks.training import Subject, prepared
from bertray.model.runtime import resolve_precision

LEARNING_RATE, BATCH_SIZE = 2e-4, 32
NUM_PLAIN_STEPS = 60
OURS, THEIRS = "bertray", "Trainer, grouped by length, bf16"
_LONGEST_TURN_S = 1800


class Trained(NamedTuple):
    """A run of training: tokens a second of each epoch, accuracy on the test rows."""

    tokens_per_s: list[float]
    accuracy: float


class _Texts(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, subject: Subject) -> None:
        self._ids, self._labels = subject.train_ids, subject.train_labels

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids = self._ids[row]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": self._labels[row], "length": len(ids)}


class Turns:
    """Two processes that work in turns: one begins, each hands over after an epoch, and at its end.

    Args:
        mine: released when it is this process's turn.
        others: released to hand over.
    """

    def __init__(self, mine: Semaphore, others: Semaphore) -> None:
        self._mine, self._others = mine, others

    def begin(self) -> None:
        """Wait for the first turn."""
        if not self._mine.acquire(timeout=_LONGEST_TURN_S):
            raise TimeoutError("the other process does not hand over")

    def hand_over(self) -> None:
        """Let the other process work, and wait until it hands over."""
        self._others.release()
        self.begin()

    def end(self) -> None:
        """Let the other process work on alone."""
        self._others.release()


class _Stopwatch(TrainerCallback):
    """Tokens a second of each of the Trainer's epochs; between them it is the other process's turn."""

    def __init__(self, num_tokens: int, turns: Turns) -> None:
        self.tokens_per_s: list[float] = []
        self._num_tokens, self._turns, self._began_s = num_tokens, turns, 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._began_s = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.tokens_per_s.append(self._num_tokens / (time.perf_counter() - self._began_s))
        self._turns.hand_over()


def by_bertray(subject: Subject, seed: int, epochs: int, turns: Turns) -> Trained:
    """The loop of bertray train; the last epoch is kept, as the Trainer does."""
    settings = {"learning_rate": LEARNING_RATE, "batch_size": BATCH_SIZE, "keep": "last"}
    run = subject.run(on_epoch=turns.hand_over, seed=seed, epochs=epochs, **settings)
    return Trained(run.tokens_per_s, run.accuracy)


def by_trainer(subject: Subject, seed: int, epochs: int, turns: Turns) -> Trained:
    """The Trainer with group_by_length, bf16 and fused AdamW."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": BATCH_SIZE,
            "num_train_epochs": epochs,
            "learning_rate": LEARNING_RATE,
            "weight_decay": 0.01,
            "warmup_steps": round(0.1 * epochs * -(-len(subject.train_ids) // BATCH_SIZE)),
            "optim": "adamw_torch_fused",
            "bf16": resolve_precision("auto", device) == "bf16",
            "use_cpu": device.type == "cpu",
            "seed": seed,
            "report_to": [],
            "save_strategy": "no",
            "logging_strategy": "no",
            "disable_tqdm": True,
        }
        # The name of the option since transformers 5.
        grouping = {"train_sampling_strategy": "group_by_length"}
        if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
            grouping = {"group_by_length": True}
        trainer = Trainer(
            subject.classifier(seed),
            TrainingArguments(**settings, **grouping),
            train_dataset=_Texts(subject),
            data_collator=DataCollatorWithPadding(subject.tokenizer),
            callbacks=[stopwatch := _Stopwatch(subject.num_train_tokens, turns)],
        )
        trainer.train()
    return Trained(stopwatch.tokens_per_s, subject.test(trainer.model)[0])


def by_plain_loop(subject: Subject, seed: int) -> float:
    """Tokens a second of the loop that tutorials show: shuffled, padded, fp32; the first steps do not count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = subject.classifier(seed).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    collate = DataCollatorWithPadding(subject.tokenizer)
    texts, order = _Texts(subject), np.random.default_rng(seed).permutation(len(subject.train_ids))
    num_tokens, started_s = 0, 0.0
    for step in range(NUM_PLAIN_STEPS + 3):
        if step == 3:
            num_tokens, started_s = 0, time.perf_counter()
        rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        batch = collate([{key: value for key, value in texts[row].items() if key != "length"} for row in rows])
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens += sum(len(subject.train_ids[row]) for row in rows)
    return num_tokens / (time.perf_counter() - started_s)


def run_in_turns(
    trainer: str, data: str, seed: int, epochs: int, mine: Semaphore, others: Semaphore
) -> tuple[Trained, float | None]:
    """In a process of its own, as a job's: a run, and after ours the rate of the plain loop."""
    turns = Turns(mine, others)
    turns.begin()
    try:
        with prepared(data) as (subject,):
            run = (by_bertray if trainer == OURS else by_trainer)(subject, seed, epochs, turns)
            print(f"seed {seed}, {trainer}: {run.accuracy:.4f}", file=sys.stderr, flush=True)
            return run, by_plain_loop(subject, seed) if trainer == OURS else None
    finally:
        turns.end()


def compare(data: str, num_seeds: int, epochs: int) -> None:
    """Ours and the Trainer's runs of every seed, in turns."""
    spawning = multiprocessing.get_context("spawn")
    ours, theirs, plain = [], [], []
    with spawning.Manager() as manager:
        for seed in range(num_seeds):
            turns = manager.Semaphore(1), manager.Semaphore(0)
            with ProcessPoolExecutor(2, mp_context=spawning) as processes:
                running = [
                    processes.submit(run_in_turns, name, data, seed, epochs, *order)
                    for name, order in ((OURS, turns), (THEIRS, turns[::-1]))
                ]
                (our, plain_rate), (their, _) = (one.result() for one in running)
            ours.append(our)
            theirs.append(their)
            plain.append(plain_rate)
    rates = {OURS: [rate for run in ours for rate in run.tokens_per_s]}
    rates[THEIRS] = [rate for run in theirs for rate in run.tokens_per_s]
    lines = [
        "| what | tokens/s, median of epochs | bertray is faster by, median of pairs | test accuracy, mean (each) |",
        "|---|---|---|---|",
    ]
    for name, runs in ((OURS, ours), (THEIRS, theirs)):
        ratio = statistics.median(own / other for own, other in zip(rates[OURS], rates[name], strict=True))
        each = ", ".join(f"{run.accuracy:.4f}" for run in runs)
        accuracy = statistics.mean(run.accuracy for run in runs)
        lines.append(f"| {name} | {statistics.median(rates[name]):.0f} | {ratio:.2f} | {accuracy:.4f} ({each}) |")
    last = [run.tokens_per_s[-1] for run in ours]
    ratio = statistics.median(own / other for own, other in zip(last, plain, strict=True))
    lines.append(f"| plain loop, shuffled, fp32 | {statistics.median(plain):.0f} | {ratio:.2f} | |")
    facts = {
        "epochs": epochs,
        "seeds": num_seeds,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "tokens_per_s_of_each_epoch": rates,
        "tokens_per_s_of_plain_loop": plain,
        "ratios": [own / other for own, other in zip(rates[OURS], rates[THEIRS], strict=True)],
    }
    write_result("train", data, "\n".join(lines), facts)


def compare_workers(subject: Subject, epochs: int) -> None:
    """One worker with all cores, and two that share them, on a Ray of this machine, in turns."""
    from bertray.drivers.train import train
    from bertray.training.config import TrainConfig

    rates: dict[int, list[float]] = {1: [], 2: []}
    for turn in range(3):
        for num_workers, found in rates.items():
            with tempfile.TemporaryDirectory() as folder:
                summary = train(
                    TrainConfig(
                        data=subject.data,
                        output=str(Path(folder) / "bundle"),
                        encoder=subject.encoder,
                        epochs=epochs,
                        learning_rate=LEARNING_RATE,
                        batch_size=BATCH_SIZE,
                        num_workers=str(num_workers),
                    )
                )
            found.append(summary.train_tokens_per_s)
            print(f"turn {turn}, {num_workers} workers: {found[-1]:.0f} tokens/s", file=sys.stderr)
    one, two = (statistics.median(found) for found in rates.values())
    lines = ["| workers | tokens/s, validation included | of one worker's |", "|---|---|---|"]
    lines += [f"| 1, {os.cpu_count()} CPUs | {one:.0f} | 1 |", f"| 2 | {two:.0f} | {two / one:.2f} |"]
    write_result("train", f"{subject.name}-workers", "\n".join(lines), {"epochs": epochs, "tokens_per_s": rates})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="banking77", help="a data set of ../shared/data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", action="store_true")
    arguments = parser.parse_args()
    if not SHARED_DATA.is_dir():
        sys.exit(f"no data sets at {SHARED_DATA}")
    if arguments.workers:
        with prepared(arguments.data) as (subject,):
            compare_workers(subject, arguments.epochs)
    else:
        compare(arguments.data, arguments.seeds, arguments.epochs)


if __name__ == "__main__":
    main()
