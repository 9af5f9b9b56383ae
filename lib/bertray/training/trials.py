"""The trials of a search: what each is told, what became of it, and which is the best.

    number  learning_rate  batch_size  epochs  warmup_fraction  label_smoothing  layer_decay  seed  status  f1_macro
    0       5e-05          32          3       0.1              0.0              1.0          0     done    0.871
    1       0.000213       16          4       0.0671           0.0241           0.887        1     pruned  0.652

What trial n is told follows from the seed and n alone: more trials, or a search that goes on, draw the same again.
Numbers are rounded to three digits, so that a row of the table can be typed as options of bertray train.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from bertray.bundle.info import TRIALS_JSON, TRIALS_PARQUET
from bertray.config import bounds
from bertray.errors import BertrayError, RequestError, UnavailableError
from bertray.schema import TRIAL_SCHEMA
from bertray.storage.location import Location
from bertray.storage.lock import RunLock
from bertray.training.config import TrainConfig, TuneConfig
from bertray.training.run_folder import TrainingRun

_log = logging.getLogger(__name__)

# Options of bertray train.
SEARCHED = ("learning_rate", "batch_size", "epochs", "warmup_fraction", "label_smoothing", "layer_decay", "seed")
Status = Literal["done", "pruned", "failed"]  # failed: because of its options


class TrialRecord(BaseModel):
    """What became of a trial."""

    model_config = ConfigDict(frozen=True)

    number: int
    options: dict[str, int | float]  # those of SEARCHED
    status: Status
    history: list[dict[str, float]]  # metrics of every epoch that it ran
    best_epoch: int  # whose weights are kept; 0: it ended none
    failure: str | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Metrics of the kept epoch, on validation; empty: there is none."""
        return self.history[self.best_epoch - 1] if self.best_epoch else {}

    @property
    def accuracy(self) -> float | None:
        """Of the kept epoch; where a row may have several labels, the share of rows that get exactly theirs."""
        return self.scores.get("accuracy", self.scores.get("subset_accuracy"))

    @property
    def f1_macro(self) -> float:
        """Of the kept epoch; -inf where there is none."""
        return self.scores.get("f1_macro", -math.inf)


def options_of(config: TuneConfig, number: int) -> dict[str, int | float]:
    """What a trial is told of the options in SEARCHED; the first one, number 0, has them as the command says."""
    given = {name: getattr(config, name) for name in SEARCHED} | {"seed": config.seed + number}
    if number == 0 or config.only_seeds:
        return given
    rng = np.random.default_rng([config.seed, number])
    options: dict[str, int | float] = {"seed": given["seed"]}
    for name, text in config.searched_bounds.items():
        lowest, highest = bounds(text)
        if name == "learning_rate":
            drawn = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
        else:
            drawn = rng.uniform(lowest, highest)
        options[name] = min(max(float(f"{drawn:.3g}"), lowest), highest)
    options["batch_size"] = int(rng.choice([int(size) for size in config.batch_sizes.split(",")]))
    options["epochs"] = int(rng.integers(config.min_epochs, config.max_epochs, endpoint=True))
    return {name: options[name] for name in SEARCHED}


def train_config(config: TuneConfig, number: int) -> TrainConfig:
    """The configuration with which bertray train does the same as a trial."""
    common = {name: getattr(config, name) for name in TrainConfig.model_fields}
    return TrainConfig(**{**common, **options_of(config, number)})


def best_of(records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The trial of the best macro-F1 among those that ran to their end, the first of equals; None: there is none.

    A pruned trial is no candidate: bertray train with its options would not stop where it was stopped.
    """
    done = sorted((one for one in records if one.status == "done"), key=lambda one: one.number)
    return max(done, key=lambda one: one.f1_macro, default=None)


def best_of_all(records: Sequence[TrialRecord]) -> TrialRecord:
    """The same, where there must be one.

    Raises:
        BertrayError: no trial ran to its end.
    """
    best = best_of(records)
    if best is None:
        reasons = "; ".join(f"trial {one.number}: {one.failure}" for one in records if one.failure)
        raise BertrayError(
            f"none of {len(records)} trials ran to its end ({reasons}). Begin anew with other ranges and --restart"
        )
    return best


def write_trials(folder: Path, config: TuneConfig, records: Sequence[TrialRecord]) -> None:
    """Write trials.json, with every epoch, and trials.parquet, a row a trial, into a local folder."""
    best = best_of_all(records)
    search = {"best_trial": best.number, "search": config.model_dump(), "trials": [one.model_dump() for one in records]}
    text = json.dumps(search, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / TRIALS_JSON).write_text(text + "\n", encoding="utf-8")
    table = pa.Table.from_pylist([_row(one, best) for one in records], schema=TRIAL_SCHEMA)
    pq.write_table(table, folder / TRIALS_PARQUET, compression="zstd")


def _row(record: TrialRecord, best: TrialRecord) -> dict[str, Any]:
    return {
        "trial": record.number,
        **record.options,
        "status": record.status,
        "is_best": record is best,
        "num_epochs_run": len(record.history),
        "best_epoch": record.best_epoch or None,
        "loss": record.scores.get("loss"),
        "accuracy": record.accuracy,
        "f1_macro": record.scores.get("f1_macro"),
        "wall_s": sum(epoch["wall_s"] for epoch in record.history),
        "failure": record.failure,
    }


class Records:
    """What became of trials, in storage and here.

    Attributes:
        ended: by number.
    """

    def __init__(self, run: TrainingRun, config: TuneConfig) -> None:
        self._run, self._config = run, config
        self.ended: list[TrialRecord] = []

    def read(self) -> None:
        """Take up what a search before has left, and remove what it has left half-written."""
        from bertray.training.checkpoints import Checkpoints

        self._run.checkpoints.remove_unfinished()
        # All, also those beyond --num-trials, which may be lower now: the best may be among them.
        for name in self._names():
            self.ended.append(TrialRecord.model_validate_json((self._run.checkpoints / name).read_bytes()))
        for number in self.missing():
            Checkpoints(self._run.trial_checkpoints(number), self._config.keep_checkpoints).remove_unfinished()
        _log.info("going on with the search at %s: %d trials have ended", self._run.location, len(self.ended))

    def missing(self) -> list[int]:
        """Numbers of the trials that have not ended."""
        ended = {record.number for record in self.ended}
        return [number for number in range(self._config.num_trials) if number not in ended]

    def add(self, record: TrialRecord) -> None:
        """Record a trial, then remove the weights that nobody will want."""
        self._file(record.number).put(record.model_dump_json(indent=2).encode())
        before = best_of(self.ended)
        self.ended = sorted([*self.ended, record], key=lambda one: one.number)
        best = best_of(self.ended)
        for one in (before, record):
            if one is not None and one is not best:
                self._run.trial_checkpoints(one.number).remove()

    @contextmanager
    def told_what_is_left(self, lock: RunLock) -> Iterator[None]:
        """Where the block is left early, say what is kept. Without any trial's checkpoint there is nothing to keep."""
        try:
            yield
        except BaseException as error:  # also Ctrl-C
            is_refused = isinstance(error, RequestError) and not isinstance(error, UnavailableError)
            if not self._run.checkpoints.files():
                lock.remove_output()
            elif not is_refused:  # which says itself what to change
                _log.info(
                    "%d of %d trials have ended; the same command goes on from %s",
                    len(self._names()),
                    self._config.num_trials,
                    self._run.location,
                )
            raise

    def _names(self) -> list[str]:
        """Of all records in storage, sorted."""
        return [info.path for info in self._run.checkpoints.files((".json",)) if "/" not in info.path]

    def _file(self, number: int) -> Location:
        return self._run.checkpoints / f"{number:04d}.json"
