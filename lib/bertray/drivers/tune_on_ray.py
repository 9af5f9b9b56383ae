"""The trials of a search under Ray Tune: identified by their numbers, pruned by ASHA, recorded when they end."""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from bertray.drivers import cluster
from bertray.drivers.attempt import Attempt, follow, log_epoch, log_start
from bertray.drivers.status_actors import RunBoard, news_of
from bertray.drivers.workers import run_trial
from bertray.errors import BertrayError
from bertray.progress import ProgressBar
from bertray.tasks.task import TASKS
from bertray.training.config import TuneConfig
from bertray.training.trials import Records, Status, TrialRecord, options_of, train_config
from bertray.types import ProblemType


@cluster.session()
def run_trials(attempt: Attempt[TuneConfig], records: Records) -> None:
    """Run the trials that are missing.

    Raises:
        RequestError: the device, the model or the memory cannot do what the options ask for.
        BertrayError: a trial raised an error; or some were lost too often, and the others have ended and are recorded.
    """
    config, missing, problem_type = attempt.config, records.missing(), attempt.dataset.problem_type
    placement = cluster.place(config.device, config.num_concurrent, "--num-concurrent")
    log_start(
        config, attempt.dataset, f"{len(missing)} trials, {placement.num_processes} at a time, each", placement.share
    )
    board = cluster.start_board(RunBoard)
    events = _Events()
    # Without Tune's own result files, and its lines that name a folder which will be removed.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    tasks = {number: attempt.task(train_config(config, number), number) for number in missing}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(run_trial, tasks=tasks, board=board),
            {"CPU": placement.cpus_each, "GPU": int(placement.use_gpu)},
        ),
        param_space={"number": tune.grid_search(missing)},
        tune_config=tune.TuneConfig(
            scheduler=Rungs(config, records.ended, TASKS[problem_type].best_metric),
            max_concurrent_trials=placement.num_processes,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            verbose=0,
            callbacks=[events],
            failure_config=tune.FailureConfig(max_failures=config.max_failures),
            **cluster.storage(attempt.run.location / "ray"),
        ),
    )
    with ProgressBar("search", config.num_trials, "trials") as bar:

        def num_at_work() -> int:
            return len(ray.get(board.at_work.remote()) - events.ended)

        def look() -> None:
            news_of(board)  # logs what the trials log
            _record(events, config, records, problem_type)
            bar.update(len(records.ended), f"{num_at_work()} at work")

        found = follow(tuner.fit, look, board.stop.remote, num_at_work)
    if found.errors:
        cause = getattr(found.errors[0], "cause", found.errors[0])
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
        raise BertrayError(
            f"{len(found.errors)} of {len(missing)} trials were lost {config.max_failures + 1} times: {reason}. The "
            "same command tries them again"
        )
    assert not records.missing(), "Tune ended before all trials did"


class _Events(tune.Callback):
    """What Tune's thread reports; the driver reads it in another thread, because storage may be slow or fail."""

    def __init__(self) -> None:
        self.results: deque[tuple[bool, dict[str, Any]]] = deque()  # whether a trial has ended, and its last report
        self.ended: set[int] = set()  # numbers of trials
        self.num_logged: dict[int, int] = {}  # epochs of a trial; after a lost node it reports some again

    def on_trial_result(self, *, result: dict[str, Any], **info: Any) -> None:
        self.results.append((False, result))

    def on_trial_complete(self, *, trial: Any, **info: Any) -> None:
        self.ended.add(trial.config["number"])
        self.results.append((True, trial.last_result))


def _record(events: _Events, config: TuneConfig, records: Records, problem_type: ProblemType) -> None:
    """Log the epochs and record the trials that Tune has reported since the last call."""
    while events.results:
        has_ended, result = events.results.popleft()
        if result["refusal"]:
            raise result["refusal"]
        number, history = result["number"], result["history"]
        options = options_of(config, number)
        for epoch in history[events.num_logged.get(number, 0) :]:
            log_epoch(epoch, f"trial {number}, epoch {epoch['epoch']:.0f} of {options['epochs']}", problem_type)
        events.num_logged[number] = len(history)
        if has_ended:
            status: Status = "failed" if result["failure"] else "done" if result["is_done"] else "pruned"
            told = {name: result[name] for name in ("history", "best_epoch", "failure")}
            told["metric"] = TASKS[problem_type].best_metric
            records.add(TrialRecord(number=number, options=options, status=status, **told))


class Rungs(ASHAScheduler):
    """ASHA by one metric. It never prunes the first trial, so that a search never ends worse than its defaults.

    Args:
        ended: trials of the same search that have ended; they count on the rungs.
    """

    def __init__(self, config: TuneConfig, ended: Sequence[TrialRecord], metric: str = "f1_macro") -> None:
        super().__init__(
            time_attr="epoch",
            metric=metric,
            mode="max",
            max_t=config.max_epochs,
            reduction_factor=3,  # one of 3 trials passes a rung (epochs 1, 3, 9), and the next is 3 times as far
        )
        for record in ended:
            stand_in = SimpleNamespace(trial_id=f"ended-{record.number}")
            self.on_trial_add(None, stand_in)
            for epoch in record.history:
                super().on_trial_result(None, stand_in, epoch)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        # All epochs: after an interruption the rungs lack earlier ones. A rung ignores an epoch that it has.
        decisions = [super(Rungs, self).on_trial_result(tune_controller, trial, epoch) for epoch in result["history"]]
        # A trial that is done ends by itself: the weights of its last epoch are not in storage yet.
        if result["number"] == 0 or result["is_done"] or TrialScheduler.STOP not in decisions:
            return str(TrialScheduler.CONTINUE)
        return str(TrialScheduler.STOP)
