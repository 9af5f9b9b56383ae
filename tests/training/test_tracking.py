"""What TensorBoard shows of a bundle's event file; its own readers tell."""

from io import FileIO
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from bertray.training.config import TrainConfig
from bertray.training.tracking import StepRecord, write_event_file

CONFIG = TrainConfig(data="data", output="a/run", encoder="a|b")
RECORDS = [
    StepRecord(step, step / 10, loss, learning_rate=1e-5 * step, grad_norm=2.0, tokens_per_s=1000.0 + step)
    for step, loss in ((1, 1.5), (2, float("inf")), (3, 0.5))
]
OTHERS = {"epoch": 1, "train_loss": 1.0, "wall_s": 9.0, "step": 3, "num_workers": 1, "num_train_tokens": 99}
HISTORY = [{"loss": 0.4, "accuracy": 0.9, "f1_macro": 0.8, **OTHERS}]


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows: steps and values."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    values = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in accumulator.Scalars(tag)]
    # Scripts use the first; the user interface has the second.
    accumulator = PluginEventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    assert [(event.step, make_ndarray(event.tensor_proto).item()) for event in accumulator.Tensors(tag)] == values
    return values


def test_what_tensorboard_shows(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    write_event_file(folder, CONFIG, RECORDS, HISTORY)
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
    assert shown(folder, "train/loss") == [(1, 1.5), (2, float("inf")), (3, 0.5)]
    assert shown(folder, "train/learning_rate") == [(1, 1e-5), (2, 2e-5), (3, 3e-5)]
    assert shown(folder, "train/tokens_per_s") == [(1, 1001.0), (2, 1002.0), (3, 1003.0)]
    assert shown(folder, "validation/loss") == [(3, 0.4)]
    (text,) = accumulator.Tensors("hparams/config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert lines[:3] == ["| option | value |", "|---|---|", "| run_name | run |"]
    assert {"| learning_rate | 5e-05 |", "| encoder | a&#124;b |", "| stride | None |"} <= set(lines)
    assert len(lines) == 3 + len(TrainConfig.model_fields)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: FileIO("/dev/full", "w"))
    with pytest.raises(OSError, match="No space left on device"):
        write_event_file(tmp_path / "tensorboard", CONFIG, RECORDS, HISTORY)
