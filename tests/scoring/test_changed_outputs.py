"""What a run makes of an output that is not as the last run left it, or of an archive whose shards changed names."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.__main__ import command
from bertray.drivers.score import ScoreResult, score
from bertray.drivers.score import run as run_job
from bertray.errors import LockedError, RequestError
from bertray.schema import RECORD_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest
from bertray.scoring.publish import is_under_way
from bertray.scoring.verify import verify
from bertray.storage.location import Location
from bertray.storage.lock import RunLock
from bertray.storage.outputs import without_paths
from tests.conftest import write_shard
from tests.kills import dying_after
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
        with dying_after(1, monkeypatch):
            run(config)
        assert is_under_way(Location.of(config.output))

    return die


# One name for two shards, one after the other.


@pytest.mark.parametrize(
    ("first", "second", "prune"), [("part-0", "part-0.parquet", True), ("x.parq", "x.parq.parquet", False)]
)
def test_a_shard_whose_file_went_to_another_is_not_done(
    first: str, second: str, prune: bool, config: ScoreConfig, archive: Path, output: Path
) -> None:
    for name, other in ((first, second), (second, first), (first, second)):
        write_shard(archive / name, [f"{name} text"])
        (archive / other).unlink(missing_ok=True)
        assert run(config, prune=prune).summary["num_shards_committed"] >= 1
        assert recorded(output) == sorted(["a.parquet", "b.parquet", "day/c.parquet", name])
        assert not problems(output)
        (found,) = (output / "predictions").glob("[px]*")
        assert pq.read_schema(found).metadata[b"bertray.shard"].decode() == name


def test_pruning_forgets_a_shard_whose_name_has_gone_to_one_that_fails(
    config: ScoreConfig, archive: Path, output: Path
) -> None:
    write_shard(archive / "part-0", ["a text"])
    run(config)
    (archive / "part-0").unlink()
    (archive / "part-0.parquet").write_bytes(b"not Parquet")
    assert run(config, prune=True).summary["num_outputs_pruned"] == 1
    assert "part-0" not in recorded(output) and not problems(output)


# Files that become folders.


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_file_that_becomes_a_folder_needs_prune(
    is_reversed: bool, config: ScoreConfig, archive: Path, output: Path
) -> None:
    file, folder = archive / "a.parquet", archive / "a.parquet" / "part-0.parquet"
    before, after = (folder, file) if is_reversed else (file, folder)
    file.unlink()
    write_shard(before, ["a text"])
    run(config)
    shutil.rmtree(file) if is_reversed else file.unlink()
    write_shard(after, ["a text"])
    with pytest.raises(RequestError, match=r"predictions/a\.parquet is in the way of .* and say --prune$"):
        score(config, open_pool=None)
    with pytest.raises(RequestError, match="name the whole archive as --input, and say --prune"):
        run(config, input=str(after))
    assert not problems(output) and not (output / "staging").exists()
    assert run(config, prune=True).summary["num_shards_committed"] == 1
    assert str(after.relative_to(archive)) in recorded(output) and not problems(output)


def test_many_files_that_become_folders_need_prune_many(config: ScoreConfig, archive: Path, output: Path) -> None:
    for number in range(12):
        write_shard(archive / f"{number}.parquet", ["a text"])
    run(config)
    for number in range(12):
        (archive / f"{number}.parquet").unlink()
        write_shard(archive / f"{number}.parquet" / "part-0.parquet", ["a text"])
    with pytest.raises(RequestError, match=r"and say --prune$"):
        run(config)
    with pytest.raises(RequestError, match=r"say --prune-many; else move it away$"):
        run(config, prune=True)  # which removes nothing
    run(config, prune_many=True)
    assert not problems(output)


def test_shards_whose_predictions_need_a_file_and_a_folder_of_one_name_are_refused(
    config: ScoreConfig, archive: Path
) -> None:
    write_shard(archive / "part-0", ["a text"])
    write_shard(archive / "part-0.parquet" / "deep" / "x.parquet", ["a text"])
    with pytest.raises(
        RequestError, match=r"'part-0' would be a file where those of 'part-0\.parquet/deep/x\.parquet'"
    ):
        run(config)


# Staged files.


@pytest.mark.parametrize("is_new", [True, False])
def test_a_staged_file_that_is_gone_is_scored_again(
    is_new: bool,
    config: ScoreConfig,
    archive: Path,
    output: Path,
    die_while_moving: Callable[[ScoreConfig], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    if not is_new:
        run(config)
    for name in ("a", "b"):
        write_shard(archive / f"{name}.parquet", [f"{name} other text {row}" for row in range(9)])
    die_while_moving(config)
    shutil.rmtree(output / "staging")
    assert run(config).summary["num_shards_committed"] == (2 if is_new else 1)
    assert "staged files are gone, such as that of " in caplog.text
    assert not problems(output) and not is_under_way(Location.of(str(output)))
    assert {name: pq.ParquetFile(output / "predictions" / name).metadata.num_rows for name in recorded(output)} == {
        "a.parquet": 9,
        "b.parquet": 9,
        "day/c.parquet": 5,
    }


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


def test_it_is_said_that_what_another_request_has_staged_is_removed(
    config: ScoreConfig, archive: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "bertray")
    run(config)
    write_shard(archive / "d.parquet", ["x"] * 400)
    assert run(config, accept=False).is_held
    run(config, precision="fp32", rescore=True)
    assert "removing 1 staged files of another request" in caplog.text


# Clocks.


def test_records_are_later_than_those_before_though_a_clock_is_set_back(
    config: ScoreConfig, archive: Path, output: Path
) -> None:
    run(config)
    manifest = Manifest(Location.of(str(output)))
    ahead = pa.repeat(
        pa.scalar(datetime.now(UTC) + timedelta(days=9), RECORD_SCHEMA.field("committed_at").type),
        len(recorded(output)),
    )
    records = manifest.latest(RECORD_SCHEMA)
    manifest.replace(
        "later",
        records.set_column(records.schema.get_field_index("committed_at"), "committed_at", ahead).cast(RECORD_SCHEMA),
    )
    write_shard(archive / "a.parquet", ["another text"])
    run(config)
    assert not problems(output)
    assert run(config).summary["num_shards_skipped"] == 3


def test_a_held_run_of_a_clock_that_was_ahead(
    config: ScoreConfig, archive: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    write_shard(archive / "d.parquet", ["x"] * 400)
    with monkeypatch.context() as patch:
        ahead = datetime.now(UTC) + timedelta(days=9)
        patch.setattr("bertray.drivers.score.new_run_id", lambda: ahead.strftime("%Y%m%dT%H%M%S.%fZ"))
        patch.setattr("bertray.scoring.runs.datetime", type("Ahead", (), {"now": lambda _: ahead}))
        assert run(config, accept=False).is_held
    write_shard(archive / "b.parquet", ["b text"] * 9)
    run(config)
    assert not problems(output)  # no record is of a later run than the announced
    assert len(recorded(output)) == 4
    write_shard(archive / "e.parquet", ["a text"])
    assert run(config).summary["num_shards_skipped"] == 4
    assert not problems(output)


# Forgotten options.


def test_a_part_says_what_to_do_if_the_rest_is_of_another_request(config: ScoreConfig, archive: Path) -> None:
    run(config)
    part = {"input": str(archive / "day"), "precision": "fp32", "rescore": True}
    for name in ("a", "b"):
        (archive / f"{name}.parquet").write_bytes(b"not Parquet")
    run(config, precision="fp32", rescore=True)
    with pytest.raises(RequestError, match=r"2 other shards .*, with --prune if they have left it, and mend those"):
        run(config, **part)
    for name in ("a", "b"):
        (archive / f"{name}.parquet").unlink()
    run(config, precision="fp32", rescore=True, prune=True)
    assert run(config, **part).summary["num_shards_skipped"] == 1


@pytest.mark.parametrize("has_run_folder", [True, False])
def test_new_shards_are_not_scored_with_forgotten_options(
    has_run_folder: bool, config: ScoreConfig, archive: Path, output: Path
) -> None:
    run(config, keep_columns=["document_id"])
    shutil.rmtree(archive)
    write_shard(archive / "new.parquet", ["a text"])
    if not has_run_folder:
        shutil.rmtree(output / "runs" / latest(output)["run_id"])
    with pytest.raises(
        RequestError,
        match=r"keep_columns: \['document_id'\] -> \[\]: .* 1 shards .* now be scored with these, 0 of",
    ):
        run(config)
    assert run(config, rescore=True).summary["num_shards_committed"] == 1


@pytest.mark.parametrize("is_old", [False, True])
def test_engine_auto_is_torch(
    is_old: bool, config: ScoreConfig, output: Path, make_bundle: Callable[..., Path]
) -> None:
    run(config)
    if is_old:
        (output / "runs/latest.json").write_text(json.dumps({**latest(output), "request": None}))
    assert run(config, engine="torch", bundle=str(make_bundle(seed=1))).summary["num_shards_committed"] == 3


# What latest.json says.


def test_what_is_older_follows_from_the_records(config: ScoreConfig, archive: Path, output: Path) -> None:
    for number in range(35):
        write_shard(archive / "many" / f"{number}.parquet", ["a text"])
    run(config)
    for number in range(35):
        (archive / "many" / f"{number}.parquet").write_bytes(b"not Parquet")
    failed = run(config)  # only failures
    assert (failed.summary["num_shards_older"], len(failed.older)) == (35, 30)
    published = latest(output)["published"]
    assert (published["num_shards_older"], len(published["older"])) == (35, 30)
    (archive / "b.parquet").unlink()
    run(config, prune=True)
    assert latest(output)["published"]["num_shards_older"] == 35
    write_shard(archive / "a.parquet", ["another text"])
    assert run(config, input=str(archive / "a.parquet")).summary["num_shards_older"] == 35  # outside of this part
    assert latest(output)["published"]["num_shards_older"] == 35
    for number in range(34):
        write_shard(archive / "many" / f"{number}.parquet", ["another text"])
    assert run(config).older == ["many/34.parquet"]
    (archive / "many" / "34.parquet").unlink()
    run(config)
    assert latest(output)["published"]["num_shards_older"] == 0 and not problems(output)


def test_an_announcement_that_says_the_same_is_not_written_again(
    config: ScoreConfig, archive: Path, output: Path
) -> None:
    run(config)
    (archive / "a.parquet").write_bytes(b"not Parquet")
    assert run(config).summary["num_shards_older"] == 1
    before = (output / "runs/latest.json").stat()
    assert run(config).summary["num_shards_older"] == 1
    after = (output / "runs/latest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_older_shards_are_shown(config: ScoreConfig, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config)
    (archive / "a.parquet").write_bytes(b"not Parquet")
    assert run_job(config, open_pool=stub_pool()).exit_code == 3
    assert "older shards" in capsys.readouterr().err


def test_an_announcement_that_was_removed_is_made_again(
    config: ScoreConfig, archive: Path, output: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(config)
    before = latest(output)
    (output / "runs/latest.json").unlink()
    with pytest.raises(
        RequestError, match=r"3 records and no runs/latest\.json: the next bertray score announces them"
    ):
        problems(output)
    run(config)
    assert "announcing again 3 recorded shards" in caplog.text
    after = latest(output)
    assert (after["run_id"], after["published"]["profile"]) == (before["run_id"], before["published"]["profile"])
    assert not problems(output)


def test_what_left_the_archive_is_checked_too(config: ScoreConfig, archive: Path, output: Path) -> None:
    run(config)
    (archive / "a.parquet").unlink()
    write_shard(archive / "d.parquet", ["a text"])
    run(config)
    published = latest(output)["published"]
    assert (published["num_shards"], published["num_shards_gone"]) == (3, 1)
    assert not problems(output)
    manifest = Manifest(Location.of(str(output)))
    manifest.replace("later", without_paths(manifest.latest(RECORD_SCHEMA), ["a.parquet"]))
    assert "runs/latest.json: it says 4 shards; there are 3 records" in problems(output)


# Damaged files.


@pytest.mark.parametrize(
    ("file", "content", "next_step"),
    [
        ("runs/latest.json", b"", "Remove it and run bertray score again: it announces anew"),
        ("runs/latest.json", b"[]", "Remove it and run bertray score again: it announces anew"),
        ("runs/latest.json", b"{", "Remove it and run bertray score again: it announces anew"),
        ("runs/latest.json", b"\xff", "Remove it and run bertray score again: it announces anew"),
        ("archive.json", b"[]", "Remove it, and name the whole archive as --input once"),
        ("archive.json", b"{}", "Remove it, and name the whole archive as --input once"),
        ("manifest/*.parquet", b"", "Remove it, run bertray verify --repair, then bertray score"),
        ("manifest/*.parquet", b"PAR1", "Remove it, run bertray verify --repair, then bertray score"),
        (
            "staged/*.parquet",
            b"PAR1",
            "Remove it and run bertray score again: it records the staged files again",
        ),
        ("publishing/intent.json", b"{}", "Remove .*publishing, run bertray verify --repair, then bertray score"),
        ("publishing/records.parquet", b"", "Remove .*publishing, run bertray verify --repair, then bertray score"),
    ],
)
def test_a_damaged_file_is_named_with_the_next_step(
    file: str,
    next_step: str,
    content: bytes,
    config: ScoreConfig,
    archive: Path,
    output: Path,
    die_while_moving: Callable[[ScoreConfig], None],
) -> None:
    run(config)
    for name in ("a", "b"):
        write_shard(archive / f"{name}.parquet", ["x"] * 400)
    if file.startswith("publishing"):
        die_while_moving(config)
    elif file.startswith("staged"):
        assert run(config, accept=False).is_held
    found = max(output.glob(file))
    found.write_bytes(content)
    with pytest.raises(RequestError, match=rf"{found} is damaged, or no file of bertray's\. {next_step}"):
        run(config)
    Location.of(str(found.parent if file.startswith("publishing") else found)).remove()
    if file.startswith(("manifest", "publishing")):
        verify(Location.of(str(output)), repair=True)
    result = run(config)
    assert not result.failures and recorded(output) == ["a.parquet", "b.parquet", "day/c.parquet"]
    assert not problems(output)


# Verify.


@pytest.mark.parametrize("spoil", [lambda file: file.unlink(), lambda file: file.write_bytes(b"PAR1"), "page"])
def test_a_file_that_does_not_hold_is_scored_again_after_a_repair(
    spoil: Any, config: ScoreConfig, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config)
    file = output / "predictions/a.parquet"
    if spoil == "page":
        content = bytearray(file.read_bytes())
        content[4:40] = bytes(36)
        file.write_bytes(content)
    else:
        spoil(file)
    assert command("verify")(["--output", str(output)]) == 1
    assert "with --repair the records of the files that do not hold are dropped" in " ".join(
        capsys.readouterr().err.split()
    )
    assert recorded(output) == ["a.parquet", "b.parquet", "day/c.parquet"]
    assert command("verify")(["--output", str(output), "--repair"]) == 1
    assert json.loads(capsys.readouterr().out)["num_records_dropped"] == 1
    assert recorded(output) == ["b.parquet", "day/c.parquet"]
    assert problems(output) == (["a.parquet: it has no record"] if file.exists() else [])
    assert run(config).summary["num_shards_committed"] == 1
    assert not problems(output)


def test_what_cannot_be_read_now_is_not_repaired(
    config: ScoreConfig, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    opened = Location.open

    def refuse(place: Location) -> Any:
        if place.name == "a.parquet":
            return (Location.of(place.path) / "no/folder").open()  # a file where a folder should be
        return opened(place)

    monkeypatch.setattr(Location, "open", refuse)
    assert problems(output)[0].startswith("a.parquet: storage refused ")
    with pytest.raises(RequestError, match="storage refused "):
        verify(Location.of(str(output)), repair=True)
    assert len(recorded(output)) == 3


def test_labels_and_errors_are_those_of_the_record(config: ScoreConfig, archive: Path, output: Path) -> None:
    write_shard(archive / "e.parquet", ["a text", None, "b text"])
    run(config)
    file = output / "predictions/e.parquet"
    whole = pq.ParquetFile(file).read()
    for name, values, problem in (
        ("label", ["b", None, "b"], "0 rows have the label a, its record says 1"),
        ("error", [None, None, None], "0 rows have an error, its record says 1"),
    ):
        column = pa.array(values, pa.string())
        pq.write_table(whole.set_column(whole.column_names.index(name), name, column), file)
        assert problems(output) == [f"e.parquet: {problem}"]


def test_verify_waits_for_a_run_that_is_publishing(
    config: ScoreConfig, output: Path, die_while_moving: Callable[[ScoreConfig], None]
) -> None:
    die_while_moving(config)
    place = Location.of(str(output))
    for repair in (False, True):
        with pytest.raises(LockedError, match=r"a run is publishing to .*: verify when it is done"):
            verify(place, repair=repair)
    run(config)
    with RunLock(place, "other").held():
        assert not problems(output)  # what is published does not change while a run scores
        with pytest.raises(LockedError, match="run other holds"):
            verify(place, repair=True)


# Refusals.


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
        with pytest.raises(RequestError, match=rf"--output .*{inner} is inside another output, {output}: choose"):
            run(config, output=f"{output}/{inner}")


def test_an_input_that_is_not_there_is_said_before_it_is_another_archive(config: ScoreConfig, tmp_path: Path) -> None:
    run(config)
    with pytest.raises(RequestError, match=r"--input .*nowhere does not exist: check the path"):
        run(config, input=str(tmp_path / "nowhere"))
