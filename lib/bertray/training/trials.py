"""The trials of a search: the options of each, its record, and which trial is the best.

    number  learning_rate  batch_size  epochs  warmup_fraction  label_smoothing  layer_decay  seed  status  f1_macro
    0       5e-05          32          3       0.1              0.0              1.0          0     done    0.871
    1       0.000213       16          4       0.0671           0.0241           0.887        1     pruned  0.652

The options of trial n depend on the seed and n alone, so that a longer or continued search draws the same ones. They
are rounded to three digits, so that a row of the table can be typed as options of bertray train.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from bertray.bundle.info import TRIALS_FILE
from bertray.config import bounds
from bertray.training.config import TrainConfig, TuneConfig
from bertray.training.run_folder import TrainingRun

_log = logging.getLogger(__name__)

SEARCHED = ("learning_rate", "batch_size", "epochs", "warmup_fraction", "label_smoothing", "layer_decay", "seed")
Status = Literal["done", "pruned", "failed"]  # failed: because of its options


class TrialRecord(BaseModel):
    """The result of a trial that has ended."""

    model_config = ConfigDict(frozen=True)

    number: int
    options: dict[str, int | float]  # those in SEARCHED
    status: Status
    history: list[dict[str, float]]  # metrics of every epoch that it ran
    best_epoch: int  # the epoch whose weights are kept; 0: it finished none
    failure: str | None = None
    metric: str = "f1_macro"  # by which trials are compared

    @property
    def scores(self) -> dict[str, float]:
        """Metrics of the kept epoch on validation; empty if there is none."""
        return self.history[self.best_epoch - 1] if self.best_epoch else {}

    @property
    def score(self) -> float:
        """The metric of the kept epoch; -inf if there is none."""
        return self.scores.get(self.metric, -math.inf)


def options_of(config: TuneConfig, number: int) -> dict[str, int | float]:
    """The options of a trial that are in SEARCHED; those of trial 0 are the command's."""
    options = {name: getattr(config, name) for name in SEARCHED} | {"seed": config.seed + number}
    if number == 0 or config.only_seeds:
        return options
    rng = np.random.default_rng([config.seed, number])
    for name, text in config.searched_bounds.items():
        lowest, highest = bounds(text)
        if name == "learning_rate":
            drawn = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
        else:
            drawn = rng.uniform(lowest, highest)
        options[name] = min(max(float(f"{drawn:.3g}"), lowest), highest)
    options["batch_size"] = int(rng.choice([int(size) for size in config.batch_sizes.split(",")]))
    options["epochs"] = int(rng.integers(config.min_epochs, config.max_epochs, endpoint=True))
    return options


def train_config(config: TuneConfig, number: int) -> TrainConfig:
    """The configuration with which bertray train does the same as a trial."""
    common = {name: getattr(config, name) for name in TrainConfig.model_fields}
    return TrainConfig(**{**common, **options_of(config, number)})


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The finished trial with the highest metric, the first of equals; None if no trial has finished.

    A pruned trial is no candidate: bertray train with its options would not stop where the trial was stopped.
    """
    done = sorted((one for one in records if one.status == "done"), key=lambda one: one.number)
    return max(done, key=lambda one: one.score, default=None)


def write_trials(folder: Path, config: TuneConfig, records: Sequence[TrialRecord], best: TrialRecord) -> None:
    """Write trials.json into a local folder."""
    search = {"best_trial": best.number, "search": config.model_dump(), "trials": [one.model_dump() for one in records]}
    text = json.dumps(search, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / TRIALS_FILE).write_text(text + "\n", encoding="utf-8")


class Records:
    """The records of trials that have ended, in storage and in memory: `ended`, by number."""

    def __init__(self, run: TrainingRun, config: TuneConfig) -> None:
        self._run, self._config = run, config
        self.ended: list[TrialRecord] = []

    def read(self) -> None:
        """Read what earlier attempts recorded, and remove what they left half-written."""
        from bertray.training.checkpoints import Checkpoints

        folder = self._run.checkpoints
        folder.remove_unfinished()
        # All, also those beyond --num-trials, which may be lower now: the best may be among them.
        names = [info.path for info in folder.files((".json",)) if "/" not in info.path]
        self.ended = [TrialRecord.model_validate_json((folder / name).read_bytes()) for name in names]
        for number in self.missing():
            Checkpoints(self._run.trial_checkpoints(number)).remove_unfinished()
        _log.info("continuing the search at %s: %d trials have ended", self._run.location, len(self.ended))

    def missing(self) -> list[int]:
        """The numbers of trials that have not ended."""
        ended = {record.number for record in self.ended}
        return [number for number in range(self._config.num_trials) if number not in ended]

    def add(self, record: TrialRecord) -> None:
        """Record a trial and log it; then remove the weights of all but the best one."""
        (self._run.checkpoints / f"{record.number:04d}.json").put(record.model_dump_json(indent=2).encode())
        reason = f" ({record.failure})" if record.failure else ""
        _log.info("trial %d: %s%s", record.number, record.status, reason)
        before = best_of(self.ended)
        self.ended = sorted([*self.ended, record], key=lambda one: one.number)
        best = best_of(self.ended)
        for one in (before, record):
            if one is not None and one is not best:
                self._run.trial_checkpoints(one.number).remove()
