"""A search on a two-node cluster: the best trial's bundle is bertray train's, and it goes on after kills."""

import json
import logging
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.tune.schedulers import TrialScheduler

from bertray import Bundle
from bertray.drivers.attempt import Task
from bertray.drivers.train import train
from bertray.drivers.tune import Records, search
from bertray.drivers.tune_on_ray import Rungs
from bertray.drivers.workers import run_trial
from bertray.errors import BertrayError, LockedError, RequestError, UnavailableError
from bertray.storage.location import Location
from bertray.storage.lock import RunLock
from bertray.training.config import TrainConfig, TuneConfig
from bertray.training.run_folder import TrainingRun
from bertray.training.trials import TrialRecord, best_of, options_of, train_config
from tests.conftest import WHAT_A_DIVERGING_WORKER_LOGS
from tests.kills import end_driver, job, killing

OPTIONS: dict[str, Any] = {
    "num_trials": 4,
    "num_concurrent": 2,
    "learning_rate": 1e-4,
    "learning_rates": "1e-3:5e-3",
    "batch_sizes": "8,16",
    "epochs": 2,
    "max_epochs": 3,
    "max_length": 32,
    "precision": "fp32",
}


def config_of(dataset: str, output: Path | str, encoder: Path | str, **options: Any) -> TuneConfig:
    return TuneConfig(data=dataset, output=str(output), encoder=str(encoder), **{**OPTIONS, **options})


def test_the_best_trial_is_the_bundle_of_jobs_train(
    ray_cluster: str,
    dataset: str,
    tiny_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(dataset, tmp_path / "bundle", tiny_encoder)
    summary = search(config)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]  # nothing is left of the search

    found = json.loads((tmp_path / "bundle" / "trials.json").read_text())
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == [0, 1, 2, 3]
    assert all(trial["options"] == options_of(config, trial["number"]) for trial in trials)
    assert trials[0]["status"] == "done"  # it is never pruned
    best = trials[found["best_trial"]]
    assert best["number"] == summary["best_trial"]
    scores = [trial["history"][trial["best_epoch"] - 1]["f1_macro"] for trial in trials]
    done = [score for score, trial in zip(scores, trials, strict=True) if trial["status"] == "done"]
    assert scores[best["number"]] == max(done)
    assert max(done) > scores[0]  # at a learning rate of 1e-4 two epochs teach it nothing
    assert "macro-F1" in capsys.readouterr().err

    # bertray train with the same options, and as many threads: the same weights
    again = train_config(config, best["number"]).model_copy(update={"output": str(tmp_path / "again")})
    monkeypatch.setattr("bertray.model.runtime.num_cpus", lambda: 4)
    assert train(again.model_copy(update={"num_workers": "0"})).fingerprint == summary["fingerprint"]
    info = Bundle.load(str(tmp_path / "bundle")).info
    assert info.training == {**again.model_dump(), "output": str(tmp_path / "bundle")}
    assert set(info.files) == set(Bundle.load(str(tmp_path / "again")).info.files)


# 33 steps an epoch, of some ten milliseconds. One at a time: what ASHA prunes then follows from the options.
LONG = {
    "num_trials": 2,
    "num_concurrent": 1,
    "learning_rate": 1e-3,
    "batch_size": 4,
    "batch_sizes": "4",
    "epochs": 16,
    "min_epochs": 16,
    "max_epochs": 18,
}


def steps_kept(output: Path) -> int:
    """Of the checkpoints of all trials that have not ended."""
    folder = output.parent / f".{output.name}.tuning" / "checkpoints"
    return sum(int(path.stem.removeprefix("step-")) for path in folder.glob("*/step-*.json"))


def command(config: TuneConfig) -> list[str]:
    return job(
        "tune", **{name: value for name, value in config.model_dump().items() if name in config.model_fields_set}
    )


def facts(output: Path) -> list[dict[str, Any]]:
    """What became of all trials, but the time it took."""
    trials = json.loads((output / "trials.json").read_text())["trials"]
    for trial in trials:
        trial["history"] = [{**epoch, "wall_s": 0} for epoch in trial["history"]]
    return trials


@pytest.mark.chaos
def test_it_goes_on_after_sigint_and_kills_to_the_same_result(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    undisturbed = search(config_of(dataset, tmp_path / "whole", tiny_encoder, **LONG))
    output = tmp_path / "broken"
    config = config_of(dataset, output, tiny_encoder, **LONG)
    # No checkpoint is due before the end: the one that is kept was written because of the signal.
    log = tmp_path / "stderr.log"
    exit_code, stderr = end_driver(command(config), log, signal.SIGINT, lambda text: "trial 0, epoch 1 of 16" in text)
    assert exit_code == 130, stderr
    assert "0 finished trials and the checkpoints of others are kept in" in stderr
    assert "View detailed results" not in stderr  # in a folder of Ray's that goes with the search
    before = steps_kept(output)
    assert before >= 33
    assert not output.exists()

    config = config_of(dataset, output, tiny_encoder, **LONG, checkpoint_steps=40)
    exit_code, stderr = end_driver(command(config), log, signal.SIGKILL, lambda _: steps_kept(output) > before)
    assert exit_code == -signal.SIGKILL
    assert "continuing the search at" in stderr

    with pytest.raises(
        RequestError, match=r"an unfinished tuning run .* with other options: learning_rates .*--restart"
    ):
        search(config.model_copy(update={"learning_rates": "1e-3"}))
    before = steps_kept(output)
    with killing("ImplicitFunc", lambda: steps_kept(output) > before) as killed:
        summary = search(config)
    assert len(killed) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert facts(output) == facts(tmp_path / "whole")
    assert summary["fingerprint"] == undisturbed["fingerprint"]


@pytest.mark.chaos
def test_trials_that_have_ended_are_not_run_again(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    """More trials are added to those of a search that was stopped."""
    config = config_of(dataset, tmp_path / "bundle", tiny_encoder, num_trials=2)
    run = TrainingRun(Location.of(config.output), "tuning")
    # A search that ends between its trials and its bundle.
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RequestError, match="later"):
        patch.setattr("bertray.training.export.write_bundle", raise_request_error)
        search(config)
    assert {path.name for path in Path(run.checkpoints.path).glob("*.json")} == {"0000.json", "0001.json"}
    summary = search(config.model_copy(update={"num_trials": 3}))
    assert (summary["num_trials"], summary["num_trials_before"]) == (3, 2)


def raise_request_error(*_: Any, **__: Any) -> None:
    raise RequestError("the store is full: later")


def test_what_no_trial_can_do_ends_the_search(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    encoder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    settings = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    with pytest.raises(RequestError, match=r"lacks 16 weights"):
        search(config_of(dataset, tmp_path / "bundle", encoder, num_trials=1))
    assert not (tmp_path / ".bundle.tuning").exists()


def test_what_another_attempt_may_reach_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is reported; Tune sees the error and tries again."""

    def unreachable(*_: Any, **__: Any) -> Any:
        raise UnavailableError("cannot reach s3://bucket/.bundle.tuning/rows")

    monkeypatch.setattr("bertray.drivers.workers.set_up_process", lambda _: torch.device("cpu"))
    monkeypatch.setattr("bertray.model.pretrained.load_classifier", lambda *_: None)
    monkeypatch.setattr("bertray.training.token_files.opened", unreachable)
    config = TrainConfig(data="d", output="/nowhere/bundle")
    with pytest.raises(UnavailableError, match="cannot reach"):
        run_trial({"number": 0}, {0: Task(config, (), "single_label_classification", 1, trial=0)}, board=None)


def test_a_trial_that_diverges_is_a_result(
    ray_cluster: str, dataset: str, diverging_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bertray")
    with pytest.raises(BertrayError, match=r"none of 2 trials ran to its end \(trial 0: the loss is nan at epoch 1"):
        search(config_of(dataset, tmp_path / "bundle", diverging_encoder, num_trials=2))
    assert WHAT_A_DIVERGING_WORKER_LOGS in caplog.text
    left = [
        TrialRecord.model_validate_json(path.read_bytes())
        for path in tmp_path.glob(".bundle.tuning/checkpoints/*.json")
    ]
    assert [record.status for record in left] == ["failed", "failed"]


@pytest.mark.chaos
def test_it_writes_to_s3(ray_cluster: str, dataset: str, tiny_encoder: Path, s3_folder: str) -> None:
    search(config_of(dataset, f"{s3_folder}/bundle", tiny_encoder, num_trials=2, epochs=1, min_epochs=1, max_epochs=1))
    import s3fs

    assert s3fs.S3FileSystem().ls(s3_folder) == [f"{s3_folder.removeprefix('s3://')}/bundle"]
    assert Bundle.load(f"{s3_folder}/bundle").info.metrics["f1_macro"] > 0


def test_a_second_search_leaves_the_first_ones_folder(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    run = TrainingRun(Location.of(str(tmp_path / "bundle")), "tuning")
    with RunLock(run.location, "first").held():
        (run.rows / "train.arrow").put(b"rows")
        with pytest.raises(LockedError, match=r"run first holds .*\.bundle\.tuning since"):
            search(config_of(dataset, tmp_path / "bundle", tiny_encoder))
        assert (run.rows / "train.arrow").exists()


def test_the_best_of_more_trials_than_are_asked_for_now_stays_the_best(tmp_path: Path) -> None:
    run = TrainingRun(Location.of(str(tmp_path / "bundle")), "tuning")
    records = Records(run, config_of("data", tmp_path / "bundle", "minilm", num_trials=4))
    for number in range(4):
        history = [{"epoch": 1.0, "f1_macro": number / 10}]
        (run.trial_checkpoints(number) / "weights").put(b"weights")
        records.add(TrialRecord(number=number, options={}, status="done", history=history, best_epoch=1))
    fewer = Records(run, config_of("data", tmp_path / "bundle", "minilm", num_trials=3))
    fewer.read()
    assert [record.number for record in fewer.ended] == [0, 1, 2, 3]
    assert fewer.missing() == []
    best = best_of(fewer.ended)
    assert best is not None
    assert (run.trial_checkpoints(best.number) / "weights").exists()


class TestRungs:
    """ASHA as it is used here, without processes."""

    def decide(self, rungs: Rungs, number: int, *f1_macro: float, is_done: bool = False) -> str:
        history = [{"epoch": epoch, "f1_macro": value} for epoch, value in enumerate(f1_macro, start=1)]
        trial = SimpleNamespace(trial_id=str(number))
        if len(f1_macro) == 1:
            rungs.on_trial_add(None, trial)
        return rungs.on_trial_result(None, trial, {"number": number, "history": history, "is_done": is_done})

    def rungs(self, *ended: TrialRecord) -> Rungs:
        return Rungs(config_of("data", "bundle", "minilm", max_epochs=5), ended)

    def test_who_falls_behind_is_pruned(self) -> None:
        rungs = self.rungs()
        assert self.decide(rungs, 1, 0.8) == TrialScheduler.CONTINUE
        assert self.decide(rungs, 2, 0.7) == TrialScheduler.STOP
        assert self.decide(rungs, 3, 0.9) == TrialScheduler.CONTINUE
        # epoch 2 is no rung; epoch 3 is the next
        assert self.decide(rungs, 1, 0.8, 0.1) == TrialScheduler.CONTINUE
        assert self.decide(rungs, 3, 0.9, 0.95, 0.95) == TrialScheduler.CONTINUE
        assert self.decide(rungs, 1, 0.8, 0.1, 0.9) == TrialScheduler.STOP

    def test_neither_the_first_trial_nor_one_that_is_done(self) -> None:
        rungs = self.rungs()
        assert self.decide(rungs, 1, 0.8) == TrialScheduler.CONTINUE
        assert self.decide(rungs, 0, 0.1) == TrialScheduler.CONTINUE
        assert self.decide(rungs, 2, 0.1, is_done=True) == TrialScheduler.CONTINUE
        assert self.decide(rungs, 3, 0.1) == TrialScheduler.STOP

    def test_trials_that_ended_before_stand_on_the_rungs(self) -> None:
        history = [{"epoch": epoch, "f1_macro": 0.8} for epoch in (1, 2, 3)]
        ended = TrialRecord(number=4, options={}, status="done", history=history, best_epoch=1)
        rungs = self.rungs(ended)
        assert self.decide(rungs, 1, 0.7) == TrialScheduler.STOP
        assert self.decide(rungs, 2, 0.9) == TrialScheduler.CONTINUE
        # what was told of epoch 2 was lost with a driver
        assert self.decide(rungs, 2, 0.9, 0.9, 0.7) == TrialScheduler.STOP
