"""From a data set to the bundle of the best of many trials: the driver of bertray tune.

1. begin   check, lock and tokenise, once for all trials                          [drivers.attempt]
2. search  run the trials that have no record under Ray Tune, each in its own process; ASHA prunes those that fall
           behind                                                                 [drivers.tune_on_ray]
3. record  the result of each trial that ends; only the best one's weights stay   [training.trials]
4. bundle  write the best trial's, as bertray train would, with a table of all trials

    .bundle.tuning/
      lock/, rows/, run.json       as of a training run                           [training.run_folder]
      checkpoints/0003/            what trial 3 continues from                    [training.checkpoints]
      checkpoints/0003.json        the record of trial 3

The same command continues an interrupted search: trials with a record are not run again, others continue from their
checkpoints, and the scheduler gets the recorded trials. `Tuner.restore` cannot do that: in Ray 2.60 it forgets the
scheduler's rungs, so that later trials are not compared with earlier ones, and after a kill its state is seconds old.

ASHA: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020. Here each rung decides as soon as a trial
reaches it, and a pruned trial does not come back. Trials with more epochs have higher learning rates at the same
epoch; rungs do not correct for that.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from bertray.bundle.info import BundleInfo
from bertray.cli import JobResult
from bertray.drivers.attempt import Attempt, begun
from bertray.errors import BertrayError
from bertray.reports.terminal import print_trials
from bertray.training.config import TuneConfig
from bertray.training.trials import Records, TrialRecord, best_of, train_config, write_trials

_log = logging.getLogger(__name__)


def run(config: TuneConfig) -> JobResult:
    """The job of the command line."""
    return JobResult(search(config))


def search(config: TuneConfig) -> dict[str, Any]:
    """Search, or continue an interrupted search, and write the best trial's bundle; returns the summary.

    Raises:
        RequestError: an option, data, encoder, output or the cluster does not fit.
        LockedError: another search works on the same output.
        BertrayError: no trial ran to its end, or some were lost too often.
    """
    started_s = time.monotonic()
    with begun(config, "tuning") as attempt:
        config = attempt.config
        records = Records(attempt.run, config)
        if attempt.is_continued:
            records.read()
        num_before = len(records.ended)
        if records.missing():
            from bertray.drivers.tune_on_ray import run_trials

            run_trials(attempt, records)
        best = best_of(records.ended)
        if best is None:
            reasons = "; ".join(f"trial {one.number}: {one.failure}" for one in records.ended if one.failure)
            raise BertrayError(
                f"none of {len(records.ended)} trials ran to its end ({reasons}). Start over with other ranges and "
                "--restart"
            )
        print_trials(records.ended)
        info = _write_bundle(attempt, records.ended, best)
    return {
        "output": config.output,
        "best_trial": best.number,
        "options": best.options,
        "best_epoch": best.best_epoch,
        "num_trials": len(records.ended),
        "num_pruned": sum(one.status == "pruned" for one in records.ended),
        "num_failed": sum(one.status == "failed" for one in records.ended),
        **({"num_trials_before": num_before} if num_before else {}),
        "validation": info.metrics,
        "wall_s": round(time.monotonic() - started_s, 1),
        "fingerprint": info.fingerprint(),
    }


def _write_bundle(attempt: Attempt[TuneConfig], ended: list[TrialRecord], best: TrialRecord) -> BundleInfo:
    """The best trial's bundle, as bertray train writes it, and all trials."""
    from bertray.training.checkpoints import Checkpoints

    trial = train_config(attempt.config, best.number)
    checkpoints = Checkpoints(attempt.run.trial_checkpoints(best.number))
    progress = checkpoints.latest()
    assert progress is not None and progress.is_done, "the best trial's weights are missing"
    return attempt.write_bundle(
        trial, checkpoints, progress, lambda folder: write_trials(folder, attempt.config, ended, best)
    )
