"""Checkpoints: a commit names what is there, whole; nothing else stays; locally and on S3."""

from pathlib import Path

import pytest
import torch

from bertray.storage.location import Location
from bertray.training.checkpoints import Checkpoints, Progress


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.of(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_folder")) / "run"


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((3, 2), value), "exp_avg/a": torch.full((3, 2), -value)}


def names(folder: Location) -> list[str]:
    return [info.path for info in folder.files()]


def test_the_latest_and_the_best(folder: Location) -> None:
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() is None
    assert not checkpoints.is_due(1)
    for step, best in ((10, 1), (20, 1), (30, 3), (40, 3)):
        is_better = best != (step - 10) // 10
        checkpoints.save(Progress(step=step, best_epoch=best), tensors(step), tensors(best) if is_better else None)
    checkpoints.wait()
    assert names(folder) == [
        "best-0003/tensors.safetensors",
        "step-00000040.json",
        "step-00000040/tensors.safetensors",
    ]
    latest = checkpoints.latest()
    assert latest == Progress(step=40, best_epoch=3)
    assert torch.equal(checkpoints.load(latest)["weights/a"], torch.full((3, 2), 40.0))
    found = checkpoints.load_best(latest)
    assert torch.equal(found["exp_avg/a"], torch.full((3, 2), -3.0)) and len(found) == 2


def test_what_was_not_committed_does_not_count_and_goes(folder: Location) -> None:
    checkpoints = Checkpoints(folder)
    checkpoints.save(Progress(step=10), tensors(1), None)
    checkpoints.wait()
    (folder / "step-00000020/tensors.safetensors").put(b"half")
    (folder / "best-0002/tensors.safetensors").put(b"half")
    again = Checkpoints(folder)
    assert again.latest() == Progress(step=10)
    again.remove_unfinished()
    assert names(folder) == ["step-00000010.json", "step-00000010/tensors.safetensors"]


def test_what_another_is_about_to_commit_stays(folder: Location) -> None:
    """A rank 0 that was taken for dead goes on beside the one that follows it."""
    late, new = Checkpoints(folder), Checkpoints(folder)
    new._put("step-00000020", tensors(2))
    new._put("best-0002", tensors(2))
    late.save(Progress(step=15, best_epoch=1), tensors(1), tensors(1))
    late.wait()
    (folder / "step-00000020.json").put(Progress(step=20, best_epoch=2).model_dump_json().encode())
    latest = new.latest()
    assert latest is not None and latest.step == 20
    assert new.load(latest)["weights/a"].min() == 2 and new.load_best(latest).keys() == tensors(2).keys()
    new.save(Progress(step=30, best_epoch=2), tensors(3), None)
    new.wait()
    assert names(folder) == [
        "best-0002/tensors.safetensors",
        "step-00000030.json",
        "step-00000030/tensors.safetensors",
    ]


def test_the_caller_may_change_its_tensors_when_saved_copies_were_given(folder: Location) -> None:
    checkpoints = Checkpoints(folder)
    given = tensors(1)
    checkpoints.save(Progress(step=1), {name: tensor.clone() for name, tensor in given.items()}, None)
    given["weights/a"].zero_()
    checkpoints.wait()
    assert checkpoints.load(Progress(step=1))["weights/a"].min() == 1


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(Location.of(str(tmp_path / "file" / "run")))
    checkpoints.save(Progress(step=1), tensors(1), None)
    with pytest.raises(ValueError, match="file"):
        checkpoints.wait()
