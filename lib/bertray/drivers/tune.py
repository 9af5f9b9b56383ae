"""From a data set to the bundle of the best of many trials: the driver's side of a search.

1. check     data set, encoder, output, cluster, and the options of every trial, before any time is spent
2. tokenise  training and validation rows, once for all trials                    [training.token_files]
3. search    trials that have not ended, each in a process of its own under Ray Tune [drivers.trial_worker];
             ASHA prunes those that fall behind
4. record    what became of a trial, when it ends; only the best one's weights stay
5. bundle    of the best trial, as bertray train would have written it, with a table of all trials

    .bundle.tuning/
      lock/, rows/, run.json       as of a training run                           [training.run_folder]
      checkpoints/0003/            what trial 3 goes on from                      [training.checkpoints]
      checkpoints/0003.json        what became of trial 3

A search that ended before its bundle was made is gone on with by the same command: trials with a record are not run
again, others go on from their checkpoints. `Tuner.restore` is not used for that: in Ray 2.60 it forgets the scheduler's
rungs, so that the trials after an interruption are measured against none before it, and what it knows of a trial is
seconds old where the driver was killed. Here rungs are filled again from the records.

ASHA: Li et al., A System for Massively Parallel Hyperparameter Tuning, 2020; here each rung is decided on as soon as a
trial reaches it, and a trial that is pruned does not come back. Trials that are meant to take more epochs have higher
learning rates at the same epoch, which rungs do not correct for.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from bertray.bundle.info import EVENTS_FOLDER, BundleInfo
from bertray.cli import JobResult, keep_ray_on_loopback
from bertray.data.dataset import Dataset
from bertray.model.sources import encoder_folder
from bertray.reports.terminal import print_trials
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.training.config import TuneConfig
from bertray.training.preflight import check_data, check_origin, check_output, with_absolute_places
from bertray.training.run_folder import TrainingRun
from bertray.training.tracking import Tracker
from bertray.training.trials import Records, TrialRecord, best_of_all, train_config, write_trials

_log = logging.getLogger(__name__)


def run(config: TuneConfig) -> JobResult:
    """The job of the command line."""
    return JobResult(search(config))


def search(config: TuneConfig) -> dict[str, Any]:
    """Search, or go on with a search, and write the best trial's bundle; returns the summary.

    Raises:
        RequestError: something about options, data, encoder, output or cluster does not fit; nothing was started.
        LockedError: another search is at work on the same output.
        BertrayError: no trial ran to its end; or some were ended by something else than their options.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    run = TrainingRun(output, "tuning")
    check_output(output, config, run)
    dataset = Dataset.open(config.data)
    check_data(dataset, config)
    encoder_folder(config.encoder)  # is there; it may have to be downloaded
    # From here on torch and transformers, which take seconds to import.
    from bertray.model.pretrained import load_tokenizer
    from bertray.tokenization.tokenizer import ColumnTokenizer
    from bertray.training.token_files import write_rows

    tokenizer, encoder_config = load_tokenizer(config.encoder, config.max_length, config.overlap)
    config = with_absolute_places(config, dataset, output)
    column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
    records = Records(run, config)
    with RunLock(run.location, new_run_id()).held() as lock, records.told_what_is_left(lock):
        data_fingerprint = dataset.fingerprint()
        if run.can_go_on(config, data_fingerprint):
            records.read()
        else:
            check_origin(config.encoder, data_fingerprint)
            write_rows(run.rows, dataset, column_tokenizer, encoder_config)
            run.begin(config, data_fingerprint)
        num_before = len(records.ended)
        if records.missing():
            keep_ray_on_loopback()
            from bertray.drivers.tune_on_ray import run_trials

            run_trials(config, dataset, run, records, lock.number)
        best = best_of_all(records.ended)
        print_trials(records.ended)
        lock.check()
        check_output(output, config, run)  # once more: hours have passed
        run.begin_bundle()
        info = _write_bundle(config, dataset, data_fingerprint, run, records, best)
        lock.remove_output()
    return {
        "output": str(output),
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


def _write_bundle(
    config: TuneConfig,
    dataset: Dataset,
    data_fingerprint: str,
    run: TrainingRun,
    records: Records,
    best: TrialRecord,
) -> BundleInfo:
    """The best trial's bundle, with event files as bertray train writes them, and all trials."""
    from bertray.training.checkpoints import Checkpoints
    from bertray.training.export import write_bundle

    trial = train_config(config, best.number)
    checkpoints = Checkpoints(run.trial_checkpoints(best.number))
    progress = checkpoints.latest()
    assert progress is not None and progress.is_done, "the best trial's weights are not there"
    output = Location.of(config.output)
    with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
        events = Path(temporary) / EVENTS_FOLDER
        options = trial.model_dump(mode="json")
        with Tracker(events, None, trial.mlflow_experiment, output.name, options) as tracker:
            tracker.steps(progress.records)
            for epoch in progress.history:
                tracker.epoch(int(epoch["step"]), epoch)
        return write_bundle(
            trial,
            dataset,
            data_fingerprint,
            output,
            progress,
            checkpoints.load_best(progress),
            events,
            add_files=lambda folder: write_trials(folder, config, records.ended),
        )
