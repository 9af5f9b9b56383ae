"""An output belongs to one archive, of which a part may be scored by itself."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.drivers.forecast import preview
from bertray.drivers.score import ScoreResult, score
from bertray.errors import LockedError, RequestError
from bertray.scoring.archive import list_shards, probe, remember
from bertray.scoring.config import ScoreConfig
from bertray.scoring.runs import Runs
from bertray.storage.location import Location
from tests.conftest import write_shard
from tests.stub_pool import stub_pool


@pytest.fixture
def config(tiny_bundle: Path, tmp_path: Path) -> ScoreConfig:
    for day in ("monday", "tuesday"):
        (tmp_path / "archive" / day).mkdir(parents=True)
        for part in "01":
            write_shard(tmp_path / "archive" / day / f"{part}.parquet", [f"{day} text {row}" for row in range(40)])
    places = {"input": tmp_path / "archive", "output": tmp_path / "scored", "bundle": tiny_bundle}
    return ScoreConfig(**{name: str(place) for name, place in places.items()})


def run(config: ScoreConfig, source: Path | str = "", **options: Any) -> ScoreResult:
    changed = config.model_copy(update={**({"input": str(source)} if source else {}), **options})
    return score(changed, open_pool=stub_pool())


def predicted(config: ScoreConfig) -> list[str]:
    return [info.path for info in (Location.of(config.output) / "predictions").files()]


def test_another_archive_is_refused_until_it_is_said_to_be_the_same(config: ScoreConfig, tmp_path: Path) -> None:
    run(config, tmp_path / "archive" / "monday")
    before = (tmp_path / "scored" / "predictions" / "0.parquet").read_bytes()
    for source in ("archive/tuesday", "archive/tuesday/0.parquet"):  # a 0.parquet, too
        with pytest.raises(RequestError, match=r"holds predictions of .*monday, and --input .* lies outside of it"):
            run(config, tmp_path / source)
        with pytest.raises(RequestError, match="lies outside of it"):
            preview(config.model_copy(update={"input": str(tmp_path / source)}))
    assert (tmp_path / "scored" / "predictions" / "0.parquet").read_bytes() == before

    (tmp_path / "archive" / "monday").rename(tmp_path / "moved")
    with pytest.raises(RequestError, match=r"--input-moved needs the whole archive .* name its folder"):
        run(config, tmp_path / "moved" / "0.parquet", input_moved=True)
    assert run(config, tmp_path / "moved", input_moved=True).summary["num_shards_skipped"] == 2
    assert run(config, tmp_path / "moved").summary["num_shards_skipped"] == 2
    assert json.loads((tmp_path / "scored" / "archive.json").read_text()) == {"archive": str(tmp_path / "moved")}


def test_the_first_run_binds_the_output_though_it_is_of_one_shard(config: ScoreConfig, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    run(config, archive / "monday" / "0.parquet")
    before = (tmp_path / "scored" / "predictions" / "0.parquet").read_bytes()
    for source in ("tuesday/0.parquet", "tuesday"):
        with pytest.raises(
            RequestError, match=r"holds predictions of .*monday, .* lies outside .* --output, or if all"
        ):
            run(config, archive / source)
    write_shard(archive / "monday" / "sub" / "2.parquet", ["a text"])
    for source, has_moved in ((archive, False), (archive, True), (archive / "monday" / "sub", True)):
        with pytest.raises(
            RequestError, match=r"monday, which is still there: .* under other names\. Name .*monday or"
        ):
            run(config, source, input_moved=has_moved)
    assert (tmp_path / "scored" / "predictions" / "0.parquet").read_bytes() == before
    summary = run(config, archive / "monday").summary
    assert (summary["num_shards_skipped"], summary["num_shards_committed"]) == (1, 2)
    assert predicted(config) == ["0.parquet", "1.parquet", "sub/2.parquet"]


def test_an_output_that_names_no_archive_yet_is_gone_on_with(config: ScoreConfig, tmp_path: Path) -> None:
    """As earlier versions left it after runs over single shards."""
    run(config, tmp_path / "archive" / "monday" / "0.parquet")
    (tmp_path / "scored" / "archive.json").unlink()
    assert run(config, tmp_path / "archive" / "monday").summary["num_shards_skipped"] == 1


def test_many_predictions_are_pruned_only_when_that_is_said_again(
    config: ScoreConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(60):
        write_shard(tmp_path / "archive" / f"day={number // 15}" / f"{number:02d}.parquet", ["a text"])
    run(config)
    for number in range(10):
        (tmp_path / "archive" / "day=0" / f"{number:02d}.parquet").unlink()
    assert run(config, prune=True).summary["num_outputs_pruned"] == 10  # not more than 10
    for number in range(10, 25):
        (tmp_path / "archive" / f"day={number // 15}" / f"{number:02d}.parquet").unlink()
    scored = run(config, prune=True)
    assert (scored.summary["num_outputs_pruned"], len(predicted(config))) == (0, 54)
    assert re.search(r"has removed nothing: 15 of 54 predictions files .* say --prune-many", caplog.text)
    assert run(config, prune_many=True).summary["num_outputs_pruned"] == 15
    folders = [path.name for path in (tmp_path / "scored" / "predictions").iterdir()]
    assert sorted(folders) == ["day=1", "day=2", "day=3", "monday", "tuesday"]  # day=0 is empty now
    for number in range(25, 30):  # and 5 of 39 are few, however few
        (tmp_path / "archive" / "day=1" / f"{number:02d}.parquet").unlink()
    assert run(config, prune=True).summary["num_outputs_pruned"] == 5


def test_of_two_first_runs_at_once_one_archive_stays(config: ScoreConfig, tmp_path: Path) -> None:
    output = Location.of(config.output)
    first, same, other = (
        list_shards(Location.of(str(tmp_path / "archive" / day)), output) for day in ("monday", "monday", "tuesday")
    )
    for archive in (first, same):
        remember(archive, output)
    with pytest.raises(LockedError, match=r"another run has just scored another archive to .*: choose another --outpu"):
        remember(other, output)
    assert json.loads((tmp_path / "scored" / "archive.json").read_text()) == {"archive": first.root.uri}


def test_a_part_of_the_archive_leaves_the_parts_of_other_shards(config: ScoreConfig, tmp_path: Path) -> None:
    (tmp_path / "archive" / "monday" / "1.parquet").rename(tmp_path / "later.parquet")
    run(config)
    (tmp_path / "later.parquet").rename(tmp_path / "archive" / "monday" / "1.parquet")
    other = tmp_path / "scored" / "staging" / "tuesday" / "part-00000-of-00004.parquet"
    other.parent.mkdir(parents=True)
    other.touch()
    run(config, tmp_path / "archive" / "monday", accept=True)
    assert other.exists()
    write_shard(tmp_path / "archive" / "monday" / "2.parquet", ["a text"])
    run(config, accept=True)
    assert not (tmp_path / "scored" / "staging").exists()


def test_a_part_keeps_the_names_that_its_shards_have_in_the_whole(config: ScoreConfig, tmp_path: Path) -> None:
    (tmp_path / "archive" / "monday" / "1.parquet").rename(tmp_path / "later.parquet")
    run(config)
    (tmp_path / "later.parquet").rename(tmp_path / "archive" / "monday" / "1.parquet")
    for source, num_scored in (("monday/1.parquet", 1), ("monday", 0), ("tuesday", 0)):
        summary = run(config, tmp_path / "archive" / source, accept=True).summary
        assert (summary["num_shards_committed"], summary["num_shards_gone"]) == (num_scored, 0)
        with pytest.raises(RequestError, match=r"--prune needs the whole archive as --input, and .* is a part of it"):
            run(config, tmp_path / "archive" / source, prune=True)
    assert predicted(config) == [f"{day}/{part}.parquet" for day in ("monday", "tuesday") for part in "01"]
    summary = run(config, prune=True).summary
    assert (summary["num_shards_skipped"], summary["num_outputs_pruned"]) == (4, 0)


def test_one_shard_by_itself_lets_nothing_pass_that_was_held(config: ScoreConfig, tmp_path: Path) -> None:
    run(config)
    write_shard(tmp_path / "archive" / "odd.parquet", ["x"] * 400)
    held = run(config).verdict
    assert held is not None and held.is_held
    write_shard(tmp_path / "archive" / "wednesday.parquet", [f"tuesday text {row}" for row in range(40)])
    alone = run(config, tmp_path / "archive" / "wednesday.parquet").verdict
    assert alone is not None and alone.is_held  # what nobody has looked at is judged with it


def test_columns_are_looked_for_in_shards_of_all_ages(config: ScoreConfig, tmp_path: Path) -> None:
    for number in range(20):
        write_shard(tmp_path / "archive" / f"{number:02d}.parquet", ["a text"])
    new = {"text": ["a text"], "language": ["en"]}
    pq.write_table(pa.table(new), tmp_path / "archive" / "zz.parquet")
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "archive" / "00.parquet")
    archive = list_shards(Location.of(config.input), Location.of(config.output))
    probe(archive, config.model_copy(update={"keep_columns": ["language"]}))
    with pytest.raises(RequestError, match=r"^00\.parquet: 2 columns 'text'; the shard has text, text\. Choose with"):
        probe(archive, config.model_copy(update={"keep_columns": ["language", "author"]}))
    # What the probe lets pass is the shard's own failure, and in a plan one that cannot be read.
    for number in range(1, 20):
        (tmp_path / "archive" / f"{number:02d}.parquet").unlink()
    assert preview(config)["num_shards_unreadable"] == 1
    (failure,) = run(config).failures
    assert failure == {"path": "00.parquet", "reason": "2 columns 'text'; the shard has text, text"}


def test_a_short_night_says_nothing_of_the_rate(
    config: ScoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config)
    runs = Runs(Location.of(config.output))
    nights = [(60.0, 3600.0, True), (60.0, 20.0, True), (60.0, 0.0, False), (0.0, 3600.0, False)]
    for number, (long_enough_s, wall_s, is_kept) in enumerate(nights):
        monkeypatch.setattr("bertray.drivers.score._LONG_ENOUGH_S", long_enough_s)
        announced = runs.latest()
        assert announced is not None and announced.rate is not None
        earlier = announced.rate.model_copy(update={"wall_s": wall_s})
        runs.announce(announced.model_copy(update={"rate": earlier}))
        write_shard(tmp_path / "archive" / f"{number}.parquet", ["a text"])
        run(config, accept=True)
        announced = runs.latest()
        assert announced is not None and announced.rate is not None
        assert (announced.rate == earlier) == is_kept
    assert 0 < announced.rate.wall_s < 20


def test_a_folder_may_be_a_column_to_keep(config: ScoreConfig, tmp_path: Path) -> None:
    (tmp_path / "archive" / "monday").rename(tmp_path / "archive" / "day=monday")
    (tmp_path / "archive" / "tuesday").rename(tmp_path / "archive" / "day=tuesday")
    assert run(config, keep_columns=["day"]).summary["num_shards_committed"] == 4
    file = tmp_path / "scored" / "predictions" / "day=tuesday" / "1.parquet"
    assert set(pq.ParquetFile(file).read()["day"].to_pylist()) == {"tuesday"}
