"""What a run makes of an output that is not as the last run left it, or of an archive whose shards changed names."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bertray.drivers.score import ScoreResult, score
from bertray.errors import RequestError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest
from bertray.scoring.publish import is_under_way
from bertray.scoring.verify import verify
from bertray.storage.location import Location
from tests.conftest import write_shard
from tests.stub_pool import stub_pool


@pytest.fixture
def config(tiny_bundle: Path, tmp_path: Path) -> ScoreConfig:
    for name in ("a", "b", "day/c"):
        write_shard(tmp_path / "archive" / f"{name}.parquet", [f"{name} text {row}" for row in range(5)])
    places = {"bundle": tiny_bundle, "input": tmp_path / "archive", "output": tmp_path / "scored"}
    return ScoreConfig(**{name: str(place) for name, place in places.items()}, accept=True)


@pytest.fixture
def archive(config: ScoreConfig) -> Path:
    return Path(config.input)


@pytest.fixture
def output(config: ScoreConfig) -> Path:
    return Path(config.output)


def run(config: ScoreConfig, **options: Any) -> ScoreResult:
    return score(config.model_copy(update=options), open_pool=stub_pool())


def recorded(output: Path) -> list[str]:
    return sorted(Manifest(Location.of(str(output))).latest()["path"].to_pylist())


def problems(output: Path) -> list[str]:
    return [f"{one['path']}: {one['problem']}" for one in verify(Location.of(str(output)))[1]]


def latest(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "runs/latest.json").read_text()))


@pytest.fixture
def die_while_moving(monkeypatch: pytest.MonkeyPatch) -> Callable[[ScoreConfig], None]:
    """A run that dies when it has moved one file."""

    def die(config: ScoreConfig) -> None:
        move, moved = Location.move, list[str]()

        def move_or_die(source: Location, target: Location) -> bool:
            if moved:
                raise KeyboardInterrupt
            moved.append(target.name)
            return move(source, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Location, "move", move_or_die)
            run(config)
        assert is_under_way(Location.of(config.output))

    return die


def test_shards_whose_predictions_need_a_file_and_a_folder_of_one_name_are_refused(
    config: ScoreConfig, archive: Path
) -> None:
    write_shard(archive / "part-0", ["a text"])
    write_shard(archive / "part-0.parquet" / "deep" / "x.parquet", ["a text"])
    with pytest.raises(
        RequestError, match=r"'part-0' would be a file where those of 'part-0\.parquet/deep/x\.parquet'"
    ):
        run(config)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    folder = Path("/dev/shm") / f"bertray-test-{os.getpid()}"
    if not folder.parent.is_dir() or folder.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system at /dev/shm")
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def test_predictions_may_lie_on_another_file_system(
    elsewhere: Path, config: ScoreConfig, archive: Path, output: Path
) -> None:
    output.mkdir()
    (output / "predictions").symlink_to(elsewhere)
    run(config)
    assert (elsewhere / "day/c.parquet").is_file() and not problems(output)
    assert not [path for path in output.rglob("*") if path.name.endswith((".tmp", "00001.parquet"))]
    (archive / "b.parquet").unlink()
    assert run(config, prune=True).summary["num_outputs_pruned"] == 1
    assert sorted(path.name for path in elsewhere.rglob("*.parquet")) == ["a.parquet", "c.parquet"]
    Location.of(str(elsewhere / "day")).remove()
    (elsewhere / "a.parquet").unlink()
    (Location.of(str(output)) / "predictions").remove_empty_folders()  # the link stays
    assert (output / "predictions").is_dir()


def test_a_request_that_is_refused_leaves_the_archive_as_it_is(
    config: ScoreConfig, archive: Path, output: Path, tmp_path: Path
) -> None:
    run(config)
    before = (output / "archive.json").read_bytes()
    archive.rename(tmp_path / "moved")
    moved = {"input": str(tmp_path / "moved"), "input_moved": True}
    write_shard(tmp_path / "moved" / "new.parquet", ["a text"])
    with pytest.raises(RequestError, match="say --rescore"):
        run(config, **moved, precision="fp32")
    assert (output / "archive.json").read_bytes() == before
    run(config, **moved)
    assert str(tmp_path / "moved") in (output / "archive.json").read_text()


def test_an_output_in_an_output_is_refused(config: ScoreConfig, output: Path) -> None:
    run(config)
    for inner in ("predictions", "deep/er"):
        with pytest.raises(RequestError, match=rf"--output .*{inner} lies in {output}, which is an output itself"):
            run(config, output=f"{output}/{inner}")


def test_an_input_that_is_not_there_is_said_first(config: ScoreConfig, tmp_path: Path) -> None:
    run(config)
    for place in (tmp_path / "nowhere", Path(config.output) / "nowhere"):
        with pytest.raises(RequestError, match=r"--input .*nowhere does not exist: check the path"):
            run(config, input=str(place))
