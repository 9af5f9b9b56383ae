"""Event files show every step once, whatever happened on the way; TensorBoard's own readers tell."""

import logging
import os
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from bertray.errors import RequestError
from bertray.training import tracking
from bertray.training.config import TrainConfig
from bertray.training.tracking import StepRecord, Tracker

CONFIG = TrainConfig(data="data", output="a/run", encoder="a|b")


def record(step: int, loss: float) -> StepRecord:
    return StepRecord(step, step / 10, loss, learning_rate=1e-5 * step, grad_norm=2.0, tokens_per_s=1000.0 + step)


def records(first: int, last: int, loss: float) -> list[StepRecord]:
    return [record(step, loss) for step in range(first, last + 1)]


def tracker(folder: Path) -> Tracker:
    return Tracker(CONFIG, folder)


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: steps and values."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    values = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in accumulator.Scalars(tag)]
    # Scripts use the first; the user interface has the second, which takes restarts in another way.
    accumulator = PluginEventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    assert [(event.step, make_ndarray(event.tensor_proto).item()) for event in accumulator.Tensors(tag)] == values
    return values


def test_what_tensorboard_shows(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "tensorboard"
    with tracker(folder) as run:
        run.steps([record(1, 1.5), record(2, float("inf"))])
        assert shown(folder, "train/loss") == [(1, 1.5), (2, float("inf"))]  # while it runs
        run.steps([])
        run.steps([record(3, 0.5)])
        others = {"epoch": 1, "train_loss": 1.0, "wall_s": 9.0, "step": 3, "num_workers": 1, "num_train_tokens": 99}
        run.epoch(3, {"loss": 0.4, "accuracy": 0.9, "f1_macro": 0.8, **others})
        run.finish({"epoch": 1, "f1_macro": 0.8}, bundle="bundle")
        run.epoch(4, {"loss": 0.0})  # nothing is written after the end
    accumulator = EventAccumulator(str(folder)).Reload()
    assert sorted(accumulator.Tags()["scalars"]) == [
        "train/grad_norm",
        "train/learning_rate",
        "train/loss",
        "train/tokens_per_s",
        "validation/accuracy",
        "validation/f1_macro",
        "validation/loss",
    ]
    assert shown(folder, "train/learning_rate") == [(1, 1e-5), (2, 2e-5), (3, 3e-5)]
    assert shown(folder, "train/tokens_per_s") == [(1, 1001.0), (2, 1002.0), (3, 1003.0)]
    assert shown(folder, "validation/loss") == [(3, 0.4)]
    (text,) = accumulator.Tensors("hparams/config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:3] == ["| option | value |", "|---|---|", "| run_name | run |"]
    assert {"| learning_rate | 5e-05 |", "| encoder | a&#124;b |", "| stride | None |"} <= set(lines)
    assert len(lines) == 3 + len(TrainConfig.model_fields)


def test_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), tracker(tmp_path) as run:
        run.steps(records(1, 10, loss=1.0))
        run.epoch(10, {"loss": 1.0})
        run.steps(records(11, 20, loss=1.0))
        run.epoch(20, {"loss": 1.0})
        raise ZeroDivisionError
    with tracker(tmp_path) as run:  # from the checkpoint of step 15, within the same second
        run.steps(records(16, 18, loss=2.0))
        run.steps(records(19, 25, loss=2.0))
        run.epoch(20, {"loss": 2.0})
    assert len(list(tmp_path.iterdir())) == 2
    assert shown(tmp_path, "train/loss") == [(step, 1.0 if step <= 15 else 2.0) for step in range(1, 26)]
    assert shown(tmp_path, "validation/loss") == [(10, 1.0), (20, 2.0)]


def test_a_run_that_is_told_again_from_its_beginning(tmp_path: Path) -> None:
    for loss in (1.0, 2.0, 3.0):
        with tracker(tmp_path) as run:
            run.steps(records(1, 10, loss))
            run.epoch(10, {"loss": loss})
    assert shown(tmp_path, "train/loss") == [(step, 3.0) for step in range(1, 11)]
    assert shown(tmp_path, "validation/loss") == [(10, 3.0)]


def test_a_run_that_is_resumed_with_nothing_left_to_do(tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        run.steps(records(1, 10, loss=1.0))
        run.epoch(10, {"loss": 1.0})
    with tracker(tmp_path) as run:
        run.finish({"loss": 1.0}, bundle="bundle")
    assert len(shown(tmp_path, "train/loss")) == 10
    assert len(shown(tmp_path, "validation/loss")) == 1


def test_workers_that_restart_under_the_same_driver(tmp_path: Path) -> None:
    with tracker(tmp_path) as run:
        run.steps(records(1, 12, loss=1.0))
        run.epoch(10, {"loss": 1.0})
        run.steps([*records(13, 14, loss=1.0), *records(6, 8, loss=2.0)])
        run.steps(records(9, 14, loss=2.0))
        run.epoch(10, {"loss": 2.0})
    assert shown(tmp_path, "train/loss") == [(step, 1.0 if step <= 5 else 2.0) for step in range(1, 15)]
    assert shown(tmp_path, "validation/loss") == [(10, 2.0)]


def test_a_run_that_is_resumed_before_validation(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        with tracker(tmp_path) as run:
            if loss == 1.0:
                run.steps(records(1, 10, loss))
            run.epoch(10, {"loss": loss})
            run.steps(records(11, 12, loss))
    assert shown(tmp_path, "validation/loss") == [(10, 2.0)]
    steps = [step for step, _ in shown(tmp_path, "train/loss")]
    assert steps == [*range(1, 10), 11, 12]  # step 10 went with the validation that stood there


def fill_the_disk_of(folder: Path) -> None:
    """What is written to the open event file from here on fails for want of space."""
    (file,) = folder.resolve().iterdir()
    (descriptor,) = [one.name for one in Path("/proc/self/fd").iterdir() if one.resolve() == file]
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, int(descriptor))
    os.close(full)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_ends_the_event_file_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tracker(tmp_path) as run:
        run.steps(records(1, 5, loss=1.0))
        fill_the_disk_of(tmp_path)
        run.steps(records(6, 9, loss=1.0))
        run.epoch(9, {"loss": 1.0})
        run.finish({"loss": 1.0}, bundle="bundle")
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert "end here, training goes on: " in warning
    assert "No space left on device" in warning
    assert [step for step, _ in shown(tmp_path, "train/loss")] == [1, 2, 3, 4, 5]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RequestError, match=r"cannot write event files to .*file/tensorboard: .*mode and owner"),
        tracker(tmp_path / "file" / "tensorboard"),
    ):
        pass


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_how_a_run_ended(error: type[BaseException] | None, status: str) -> None:
    assert tracking.status_of(error) == status
