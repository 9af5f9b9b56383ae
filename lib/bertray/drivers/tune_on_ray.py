"""The trials of a search under Ray Tune: told apart by their number, pruned by ASHA, recorded as they end."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Sequence
from concurrent.futures import wait
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from bertray.data.dataset import Dataset
from bertray.drivers import cluster
from bertray.drivers.status_actors import StopBoard, show_logged
from bertray.drivers.trial_worker import run_trial
from bertray.errors import BertrayError, RequestError
from bertray.progress import ProgressBar
from bertray.training.config import TuneConfig
from bertray.training.run_folder import TrainingRun
from bertray.training.trials import Records, Status, TrialRecord, options_of, train_config
from bertray.training.watcher import STOP_S

_log = logging.getLogger(__name__)

# Of the trials that reach a rung one of so many goes on, and the next rung is so many times as far.
_REDUCTION_FACTOR = 3


@cluster.session()
def run_trials(config: TuneConfig, dataset: Dataset, run: TrainingRun, records: Records, lock_number: int) -> None:
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


def _take_up(events: _Events, config: TuneConfig, records: Records) -> None:
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
