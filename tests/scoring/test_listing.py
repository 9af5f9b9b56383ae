"""Which files are shards, what is left out and counted, tables, lists of files, and names that do not fit."""

import io
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.drivers.forecast import preview
from bertray.drivers.score import score
from bertray.errors import RequestError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.listing import check_names, listed_shards, predictions_name, shards_of
from bertray.scoring.manifest import Manifest
from bertray.scoring.runs import Runs
from bertray.scoring.units import staged_path
from bertray.storage.location import FileInfo, Location
from tests.conftest import write_shard
from tests.stub_pool import stub_pool


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "local":
        return Location.of(str(tmp_path / "archive"))
    return Location.of(request.getfixturevalue("s3_folder"))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_shard(tmp_path_factory.mktemp("shard") / "x", ["a text", "b text"]).read_bytes()


def run(config: ScoreConfig, **options: Any) -> dict[str, Any]:
    changed = config.model_copy(update={**options, "accept": True})
    return score(changed, open_pool=stub_pool()).summary


def config_of(tiny_bundle: Path, source: Location, output: Path | Location, **options: Any) -> ScoreConfig:
    return ScoreConfig(bundle=str(tiny_bundle), input=str(source), output=str(output), **options)


SHARDS = ("_day=5/part-0.parquet", "a.parq", "b.PQ", "c/d.parquet", "e/part-0", "export.2026", "name with. dots")


def test_shards_are_told_by_their_names_or_first_bytes(
    folder: Location, parquet: bytes, tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (*SHARDS, ".part-0.parquet.crc", "_SUCCESS", "_temporary/0/part-0.parquet", "c/_x=1", "d.csv.gz"):
        (folder / name).put(parquet)
    (folder / "README").put(b"no Parquet")
    (folder / "empty").put(b"")
    config = config_of(tiny_bundle, folder, tmp_path / "scored")
    shards = [name for name in SHARDS if name != "name with. dots"]  # as in `.csv`: other than Parquet
    with caplog.at_level("INFO", logger="bertray"):
        planned = preview(config)
    assert (planned["num_shards_new"], planned["num_files_hidden"], planned["num_files_other"]) == (6, 4, 4)
    example = r"left out: 4 .* with . or _, such as '\.part-0\.parquet\.crc', 4 other than .*, such as 'README'"
    assert re.search(example.replace("with . or _", "begins with . or _"), caplog.text)
    summary = run(config)
    assert (summary["num_shards_committed"], summary["num_files_hidden"], summary["num_files_other"]) == (6, 4, 4)
    predicted = [info.path for info in Location.of(str(tmp_path / "scored/predictions")).files()]
    assert predicted == sorted(name if name.endswith(".parquet") else f"{name}.parquet" for name in shards)
    summary = run(config, prune=True)
    assert (summary["num_shards_skipped"], summary["num_outputs_pruned"]) == (6, 0)


@pytest.mark.parametrize(
    ("files", "source", "message"),
    [
        ([], "archive/nowhere", r"--input .*/nowhere does not exist: check the path"),
        ([], "archive", r"--input .*/archive is an empty folder: check the path"),
        (
            ["a.csv", "b/c.CSV", "_SUCCESS"],
            "archive",
            r"--input .* holds no Parquet file, but 1 .* '_SUCCESS', 2 .*, such as 'a\.csv'\. Shards are Parquet files",
        ),
        (["a.csv"], "archive/a.csv", r"a\.csv is no Parquet file\. Shards are Parquet files: write them.*read_csv"),
    ],
)
def test_no_shard_at_all(files: list[str], source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    for file in files:
        Location.of(str(tmp_path / "archive" / file)).put(b"text\nx\n")
    with pytest.raises(RequestError, match=message):
        shards_of(Location.of(str(tmp_path / source)))


DELTA, HUDI = "t/_delta_log/00000000000000000000.json", "t/.hoodie/hoodie.properties"
ICEBERG = "t/metadata/00000-0a.metadata.json"


@pytest.mark.parametrize(
    ("sign", "kind", "sources"),
    [
        (DELTA, "Delta", ["", "t", "t/data", "t/data/day=5", "t/data/day=5/a.parquet"]),
        (HUDI, "Hudi", ["", "t", "t/data/day=5", "t/data/day=5/a.parquet"]),
        (ICEBERG, "Iceberg", ["", "t", "t/data", "t/data/day=5", "t/data/day=5/a.parquet"]),
        (ICEBERG.replace("json", "json.gz"), "Iceberg", ["", "t/data"]),
    ],
)
def test_a_table_is_refused_by_name(folder: Location, parquet: bytes, sign: str, kind: str, sources: list[str]) -> None:
    (folder / "t/data/day=5/a.parquet").put(parquet)
    (folder / sign).put(b"{}")
    for source in sources:
        with pytest.raises(RequestError, match=rf"{re.escape(str(folder))}/t is an? {kind} table: .* --shards"):
            shards_of(folder / source if source else folder)


@pytest.mark.parametrize("sign", [ICEBERG, "t/metadata/v3.metadata.json", "t/_spark_metadata/0"])
def test_a_table_whose_data_lies_in_no_folder_of_that_name(sign: str, tmp_path: Path, parquet: bytes) -> None:
    """As tables have it that were migrated from Hive, and the sinks of Spark's streams."""
    for name in ("t/day=5/a.parquet", sign):
        (Location.of(str(tmp_path)) / name).put(parquet)
    with pytest.raises(RequestError, match=r"/t is an? (Iceberg|Spark streaming) table"):
        shards_of(Location.of(str(tmp_path / "t")))


def test_what_only_looks_like_a_table(tmp_path: Path, parquet: bytes) -> None:
    archive = Location.of(str(tmp_path))
    for name in ("metadata/x.metadata.json", "data.parquet", "a_delta_log/b.parquet", "x/metadata/data/a.parquet"):
        (archive / name).put(parquet)
    assert len(shards_of(archive).shards) == 3


def test_a_list_of_shards_is_the_whole_archive(
    folder: Location, parquet: bytes, tiny_bundle: Path, tmp_path: Path
) -> None:
    for name in (DELTA, "t/a b%20c.parquet", "t/day=5/b", "t/dead.parquet"):
        (folder / name).put(parquet)
    table, listed = folder / "t", tmp_path / "live.txt"
    listed.write_bytes(f"\ufeff{table}/a b%20c.parquet\r\n\r\nday=5/b\r\n".encode())
    config = config_of(tiny_bundle, table, tmp_path / "scored", shards=str(listed))
    assert run(config)["num_shards_committed"] == 2
    listed.write_text(f"{'file://' if table.is_local else ''}{table}/dead.parquet\nday=5/b")
    summary = run(config, prune=True)
    assert [summary[f"num_{name}"] for name in ("shards_committed", "shards_skipped", "outputs_pruned")] == [1, 1, 1]
    predicted = [info.path for info in Location.of(str(tmp_path / "scored/predictions")).files()]
    assert predicted == ["day=5/b.parquet", "dead.parquet"]
    with pytest.raises(RequestError, match="--shards needs the whole archive as --input"):
        run(config, input=str(table / "dead.parquet"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.parquet\n\ngone.parquet", r"line 3: 'gone\.parquet' is not in --input .*/archive, or is hidden"),
        (b"_x/a.parquet", r"line 1: '_x/a\.parquet' is not in --input .*, or is hidden"),
        (b"/etc/passwd", r"line 1: '/etc/passwd' lies outside of --input"),
        (b"a.parquet\n../b.parquet", r"line 2: '\.\./b\.parquet' lies outside of --input"),
        (b"s3://bucket/a.parquet", r"line 1: 's3://bucket/a\.parquet' lies outside of --input"),
        (b".", r"line 1: '\.' lies outside of --input"),
        (b"a.parquet\nx/../a.parquet", r"line 2: 'x/\.\./a\.parquet' stands in line 1, too"),
        (b"\n \n", r"lists no path"),
        (b"caf\xe9", r"is no UTF-8 text"),
    ],
)
def test_a_list_that_does_not_fit(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("a.parquet", "_x/a.parquet"):
        write_shard(tmp_path / "archive" / name, ["a"])
    (tmp_path / "b.parquet").touch()
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(RequestError, match=rf"--shards .*/list.* ?{message}"):
        listed_shards(Location.of(str(tmp_path / "archive")), Location.of(str(tmp_path / "list")))


ODD = ("quote'\".parquet", "new\nline.parquet", " # 100%?.parquet", "a=b/[x]*.parquet", "😀;&.parq", "~", "ü" * 123)
LONG = ("l" * 247 + ".parquet", "报" * 82 + ".parquet", "n" * 255, "n" * 254 + "o", "报" * 85)


def test_names_of_any_kind_get_their_predictions(folder: Location, parquet: bytes, tiny_bundle: Path) -> None:
    archive, output = folder, folder.parent() / "scored"
    names = [name for name in (*ODD, *LONG) if folder.is_local or "\n" not in name]  # moto's server knows no such key
    for name in names:
        (archive / name).put(parquet)
    config, num_shards = config_of(tiny_bundle, archive, output), len(names)
    assert run(config)["num_shards_committed"] == num_shards
    summary = run(config, prune=True)
    assert (summary["num_shards_skipped"], summary["num_outputs_pruned"]) == (num_shards, 0)
    assert set(Manifest(output).latest()["path"].to_pylist()) == set(names)
    for name in names:
        file = output / "predictions" / predictions_name(name)
        assert pq.read_schema(io.BytesIO(file.read_bytes())).metadata[b"bertray.shard"].decode() == name
    assert not [file.path for file in output.all_files() if file.path.endswith(".tmp")]
    (archive / LONG[-1]).remove()
    assert run(config, prune=True)["num_outputs_pruned"] == 1
    assert len(Manifest(output).latest()) == num_shards - 1
    announced = Runs(output).latest()
    assert announced is not None and announced.profile.num_rows == 2 * num_shards


def test_what_is_left_half_written_of_a_long_name_is_removed(tmp_path: Path) -> None:
    place, other = (Location.of(str(tmp_path / ("n" * 254 + end))) for end in "ab")
    with pytest.raises(ZeroDivisionError), place.staged() as path, other.staged() as kept:
        for one in (path, kept):
            one.write_bytes(b"half")
        place.remove_unfinished()
        assert (path.exists(), kept.exists()) == (False, True)
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("output", "paths", "message"),
    [
        ("/o", ["a//b.parquet", "a/b.parquet"], r"'a//b\.parquet' and 'a/b\.parquet' would have one name"),
        ("s3://b/o", ["/a.parquet", "a.parquet"], r"'/a\.parquet' and 'a\.parquet' would have one name"),
        ("s3://b/o", ["x/a", "x/a.parquet"], r"'x/a' and 'x/a\.parquet' would have one name: rename one"),
        ("/o", ["a.parq", "a.parq.parquet"], r"'a\.parq' and 'a\.parq\.parquet' would have one name"),
        ("s3://b/o", ["a/./b.parquet"], r"'a/\./b\.parquet' has \. or \.\. in its name"),
        ("s3://b/o", ["../b.parquet"], r"'\.\./b\.parquet' has \. or \.\. in its name, .*: rename it"),
        (
            "/o",
            ["x/" + "l" * 248 + ".parquet"],
            r"'l+\.parquet' has 256 bytes, and a name in /o/predictions may have 255",
        ),
        ("s3://b/out", ["k/" * 500 + "12345.parquet"], r"has 1013 bytes, and a name in .* may have 1008: rename"),
    ],
)
def test_names_that_do_not_fit_the_output(output: str, paths: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_names([FileInfo(path, 1, "v") for path in paths], Location.of(output))


def test_names_that_fit(tmp_path: Path) -> None:
    paths = ["A.parquet", "a.parquet", "a//b.parquet", "a/c.parquet", "..a/b..parquet", "k/" * 500 + ".parquet"]
    check_names([FileInfo(path, 1, "v") for path in paths], Location.of("s3://b/out"))


def test_names_that_are_one_where_case_does_not_count(parquet: bytes, tiny_bundle: Path, tmp_path: Path) -> None:
    archive, output = Location.of(str(tmp_path / "archive")), tmp_path / "scored"
    for name in ("A.parquet", "a.parquet"):
        (archive / name).put(parquet)
    output.mkdir()
    (output / "LOCK").symlink_to(output / "lock")  # as on a file system that takes both for one
    with pytest.raises(RequestError, match=r"'A\.parquet' and 'a\.parquet' would have one name"):
        run(config_of(tiny_bundle, archive, output))
    assert not (output / "predictions").exists() and not (output / "archive.json").exists()


@pytest.mark.parametrize("is_local", [True, False])
def test_an_empty_name_in_a_key(
    s3_folder: str, parquet: bytes, tiny_bundle: Path, tmp_path: Path, is_local: bool
) -> None:
    archive = Location.of(s3_folder)
    (archive / "a//b.parquet").put(parquet)
    config = config_of(tiny_bundle, archive, tmp_path / "scored" if is_local else archive.parent() / "scored")
    assert run(config)["num_shards_committed"] == 1
    summary = run(config, prune=True)
    assert (summary["num_shards_skipped"], summary["num_outputs_pruned"]) == (1, 0)
    (archive / "a/b.parquet").put(parquet)
    with pytest.raises(RequestError, match="would have one name"):
        run(config)


def test_links_out_of_the_archive_are_read_and_lead_no_output_away(tiny_bundle: Path, tmp_path: Path) -> None:
    disk, archive = tmp_path / "disk", tmp_path / "archive"
    write_shard(disk / "day" / "a.parquet", ["a text"])
    archive.mkdir()
    (archive / "year").symlink_to(disk)
    (archive / "b.parquet").symlink_to(disk / "day" / "a.parquet")
    before = sorted(disk.rglob("*"))
    assert run(config_of(tiny_bundle, Location.of(str(archive)), tmp_path / "scored"))["num_shards_committed"] == 2
    predictions = tmp_path / "scored" / "predictions"
    assert sorted(path for path in predictions.rglob("*") if path.is_file()) == [
        predictions / "b.parquet",
        predictions / "year" / "day" / "a.parquet",
    ]
    assert sorted(disk.rglob("*")) == before and not any(path.is_symlink() for path in predictions.rglob("*"))


def test_long_keys_of_s3(s3_folder: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """Of 1,024 bytes, bucket not included; the shard is cut into parts."""
    archive, output = Location.of(f"{s3_folder}/a"), f"{s3_folder}/o"
    num_before = len("folder/o/predictions/")
    name = "p" * (1024 - num_before - len(".parquet")) + ".parquet"
    with (archive / name).staged() as path:
        pq.write_table(pa.table({"text": [f"text {row}" for row in range(2000)]}), path)
    for part in (staged_path(FileInfo(one, 1, "v"), "f", 0, 3) for one in (name, "a.parquet")):
        assert len(f"folder/o/staging/{part}") <= 1024  # moto's server takes longer ones
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=output, accept=True)
    assert score(config, open_pool=stub_pool(1500)).summary["num_shards_committed"] == 1
    assert score(config, open_pool=stub_pool()).summary["num_shards_skipped"] == 1
