"""From a data set to the bundle of the best of many trials: the driver's side of a search.

1. check     data set, encoder, output, cluster, and the options of every trial, before any time is spent
2. tokenise  training and validation rows, once for all trials                    [training.token_files]
3. search    trials that have not ended, each in a process of its own under Ray Tune [drivers.trial_worker];
             ASHA prunes those that fall behind
4. record    what became of a trial, when it ends; only the best one's weights stay
5. bundle    of the best trial, as jobs.train would have written it, with a table of all trials

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
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from bertray.bundle.info import EVENTS_FOLDER, BundleInfo
from bertray.data.dataset import Dataset
from bertray.drivers import cluster
from bertray.drivers.status_actors import StopBoard, show_logged
from bertray.drivers.train import STOP_S
from bertray.drivers.trial_worker import run_trial, trial_checkpoints
from bertray.errors import BertrayError, RequestError, UnavailableError
from bertray.model.pretrained import load_tokenizer
from bertray.progress import ProgressBar
from bertray.reports.terminal import print_trials
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.training.checkpoints import Checkpoints
from bertray.training.config import TuneConfig
from bertray.training.export import write_bundle
from bertray.training.preflight import check_data, check_origin, check_output, with_absolute_places
from bertray.training.run_folder import TrainingRun
from bertray.training.token_files import write_rows
from bertray.training.tracking import Tracker
from bertray.training.trials import Status, TrialRecord, best_of, best_of_all, options_of, train_config, write_trials

_log = logging.getLogger(__name__)

# Of the trials that reach a rung one of so many goes on, and the next rung is so many times as far.
_REDUCTION_FACTOR = 3


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
    tokenizer, encoder_config = load_tokenizer(config.encoder, config.max_length, config.overlap)
    config = with_absolute_places(config, dataset, output)
    column_tokenizer = ColumnTokenizer(tokenizer.backend_tokenizer, config.max_length, config.overlap)
    records = _Records(run, config)
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
            with cluster.session():
                _run_trials(config, dataset, run, records, lock.number)
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
    records: _Records,
    best: TrialRecord,
) -> BundleInfo:
    """The best trial's bundle, with event files as jobs.train writes them, and all trials."""
    trial = train_config(config, best.number)
    checkpoints = Checkpoints(trial_checkpoints(run, best.number))
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


class _Records:
    """What became of trials, in storage and here.

    Attributes:
        ended: by number.
    """

    def __init__(self, run: TrainingRun, config: TuneConfig) -> None:
        self._run, self._config = run, config
        self.ended: list[TrialRecord] = []

    def read(self) -> None:
        """Take up what a search before has left, and remove what it has left half-written."""
        self._run.checkpoints.remove_unfinished()
        # All, also those beyond --num-trials, which may be lower now: the best may be among them.
        for name in self._names():
            self.ended.append(TrialRecord.model_validate_json((self._run.checkpoints / name).read_bytes()))
        for number in self.missing():
            Checkpoints(trial_checkpoints(self._run, number), self._config.keep_checkpoints).remove_unfinished()
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
                trial_checkpoints(self._run, one.number).remove()

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


def _run_trials(config: TuneConfig, dataset: Dataset, run: TrainingRun, records: _Records, lock_number: int) -> None:
    """Run the trials that are missing.

    Raises:
        RequestError: the device, the model or the memory cannot do what the options ask for.
        BertrayError: some were ended by something else than their options; the others have ended and are recorded.
    """
    placement = cluster.place(config.device, config.num_concurrent, "--num-concurrent")
    missing = records.missing()
    _log.info(
        "%d trials of fine-tuning %s on %d rows of %d labels; at a time: %d, each with %s",
        len(missing),
        config.encoder,
        dataset.num_rows("train"),
        len(dataset.labels),
        placement.num_processes,
        placement.share,
    )
    board = cluster.start_board(StopBoard)
    settings = {
        "configs": {number: train_config(config, number).model_dump() for number in missing},
        "labels": dataset.labels,
        "problem_type": dataset.problem_type,
        "lock_number": lock_number,
        "use_gpu": placement.use_gpu,
        "num_threads": placement.cpus_each,
    }
    events = _Events()
    # Tune's own writers of results, and its lines that name a folder which goes: everything is in the records.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, settings=settings, board=board),
            {"CPU": placement.cpus_each, **({"GPU": 1} if placement.use_gpu else {})},
        ),
        param_space={"number": tune.grid_search(missing)},
        tune_config=tune.TuneConfig(
            scheduler=Rungs(config, records.ended), max_concurrent_trials=placement.num_processes
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            verbose=0,
            callbacks=[events],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            **cluster.storage(run.location / "ray"),
        ),
    )
    done = cluster.in_background(tuner.fit)
    try:
        with ProgressBar("search", config.num_trials, "trials") as bar:
            while True:
                is_done = bool(wait([done], timeout=0.5).done)
                show_logged(board)
                if refusal := ray.get(board.refusal.remote()):
                    _save_trials(board, events)
                    raise RequestError(refusal)
                _take_up(events, config, records)
                bar.update(len(records.ended), f"{len(events.running)} at work")
                if is_done:
                    break
    except (KeyboardInterrupt, SystemExit):
        _log.info("stopping: trials write their checkpoints; a second signal ends it at once")
        _save_trials(board, events)
        raise
    causes = [getattr(error, "cause", error) for error in done.result().errors]
    if causes:
        reason = (str(causes[0]).strip() or type(causes[0]).__name__).splitlines()[-1]
        raise BertrayError(
            f"{len(causes)} of {len(missing)} trials were lost {config.max_failures + 1} times: {reason}. The same "
            "command tries them again"
        )
    assert not records.missing(), "Tune has ended with trials that have not"


def _take_up(events: _Events, config: TuneConfig, records: _Records) -> None:
    """Show and record what Tune has told since the last time."""
    while events.epochs:
        number, epoch = events.epochs.popleft()
        _log.info(
            "trial %d, epoch %d of %d: train loss %.4f, macro-F1 %.4f, %.0f s",
            number,
            epoch["epoch"],
            options_of(config, number)["epochs"],
            *(epoch[key] for key in ("train_loss", "f1_macro", "wall_s")),
        )
    while events.ended:
        result = events.ended.popleft()
        status: Status = "failed" if result["failure"] else "done" if result["is_done"] else "pruned"
        number = result["number"]
        record = TrialRecord(
            number=number,
            options=options_of(config, number),
            status=status,
            **{name: result[name] for name in ("history", "best_epoch", "failure")},
        )
        records.add(record)
        _log.info("trial %d: %s%s", number, status, f" ({record.failure})" if record.failure else "")


def _save_trials(board: Any, events: _Events) -> None:
    """Have the trials at work write a checkpoint, and wait for it as long as there is time."""
    board.stop.remote()
    deadline_s = time.monotonic() + STOP_S
    while events.running & ray.get(board.at_work.remote()) and time.monotonic() < deadline_s:
        time.sleep(0.1)


class _Events(tune.Callback):
    """What Tune's thread tells and the main thread takes up, which may wait for storage, and fail.

    Attributes:
        running: numbers of the trials at work.
        epochs: number of the trial, metrics of the epoch.
        ended: last reports.
    """

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.epochs: deque[tuple[int, dict[str, float]]] = deque()
        self.ended: deque[dict[str, Any]] = deque()
        self._num_told: dict[int, int] = {}  # epochs of a trial; after a lost node it reports some again

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(trial.config["number"])

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number, history = result["number"], result["history"]
        self.epochs.extend((number, epoch) for epoch in history[self._num_told.get(number, 0) :])
        self._num_told[number] = len(history)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.config["number"])
        if "number" in trial.last_result:  # else it could not begin
            self.ended.append(trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.discard(trial.config["number"])


class Rungs(ASHAScheduler):
    """ASHA by macro-F1 that spares the first trial, so that a search never ends worse than its defaults.

    Args:
        ended: trials of the same search, which take their places on the rungs.
    """

    def __init__(self, config: TuneConfig, ended: Sequence[TrialRecord]) -> None:
        super().__init__(
            time_attr="epoch",
            metric="f1_macro",
            mode="max",
            max_t=config.max_epochs,
            grace_period=config.grace_epochs,
            reduction_factor=_REDUCTION_FACTOR,
        )
        for record in ended:
            stand_in = SimpleNamespace(trial_id=f"ended-{record.number}")
            self.on_trial_add(None, stand_in)
            for epoch in record.history:
                super().on_trial_result(None, stand_in, epoch)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # A rung that the trial stands on is passed over; one that it passed before an interruption is not.
        decisions = [super(Rungs, self).on_trial_result(tune_controller, trial, epoch) for epoch in result["history"]]
        # The weights of the last epoch are not in storage yet: a trial that is done ends by itself.
        if result["number"] == 0 or result["is_done"] or TrialScheduler.STOP not in decisions:
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.STOP)
