"""What counts as done, and what makes it pending again."""

from dataclasses import astuple
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bertray.bundle.info import read_info
from bertray.schema import MANIFEST_SCHEMA, RECORD_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest, fingerprint, plan
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import new_run_id
from bertray.storage.outputs import without_paths

SHARDS = [FileInfo("a.parquet", 10, "v1"), FileInfo("b.parquet", 20, "v1")]


def record(shard: FileInfo, request: str, minute: int = 0) -> dict[str, Any]:
    committed_at = datetime(2026, 1, 5, tzinfo=UTC) + timedelta(minutes=minute)
    values = (*astuple(shard), request, 5, 1, 99, "run", committed_at)
    return dict(zip(MANIFEST_SCHEMA.names, values, strict=True))


def records(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist([*rows], RECORD_SCHEMA)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.of(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_folder"))


def pending(output: Location, shards: list[FileInfo], request: str = "f") -> list[FileInfo]:
    return plan(shards, Manifest(output).latest(), MANIFEST_SCHEMA.empty_table(), request).pending


def test_an_empty_output_has_nothing_done(output: Location) -> None:
    assert Manifest(output).latest().equals(MANIFEST_SCHEMA.empty_table())
    assert pending(output, SHARDS) == SHARDS


def test_records_outlive_the_run_and_content_decides(output: Location) -> None:
    manifest = Manifest(output)
    manifest.append("run", records(record(SHARDS[0], "f")))
    manifest.append("run", records(record(SHARDS[1], "f")))
    assert pending(output, SHARDS) == []
    rewritten, grown = FileInfo("a.parquet", 10, "v2"), FileInfo("b.parquet", 21, "v1")
    assert pending(output, [rewritten, grown]) == [rewritten, grown]


def test_records_that_replace_all_are_one_file(output: Location) -> None:
    manifest = Manifest(output)
    for minute, shard in enumerate([*SHARDS, SHARDS[0]]):
        manifest.append("run", records(record(shard, f"f{minute}", minute)))
    Manifest(output).append("empty", records())
    assert len((output / "manifest").files()) == 3
    manifest.replace("run", manifest.latest(RECORD_SCHEMA))
    assert [info.path for info in (output / "manifest").files()] == ["run.parquet"]
    assert sorted(Manifest(output).latest()["fingerprint"].to_pylist()) == ["f1", "f2"]
    manifest.replace("run", records(record(SHARDS[1], "f")))  # the same file again
    assert pending(output, SHARDS) == SHARDS[:1]


def test_another_request_makes_everything_pending_also_on_the_way_back(output: Location) -> None:
    Manifest(output).append("run1", records(record(SHARDS[0], "old", minute=0)))
    assert pending(output, SHARDS[:1], "new") == SHARDS[:1]
    Manifest(output).append("run2", records(record(SHARDS[0], "new", minute=1)))
    assert pending(output, SHARDS[:1], "new") == []
    # the predictions file now holds the new request's rows
    assert pending(output, SHARDS[:1], "old") == SHARDS[:1]


def test_what_has_no_record_any_more_is_not_done(output: Location) -> None:
    manifest = Manifest(output)
    manifest.append("run", records(*(record(shard, "f") for shard in SHARDS)))
    manifest.replace("later", without_paths(manifest.latest(RECORD_SCHEMA), ["a.parquet", "never.parquet"]))
    assert Manifest(output).latest()["path"].to_pylist() == ["b.parquet"]
    assert pending(output, SHARDS) == SHARDS[:1]


def test_the_fingerprint_follows_the_request(tiny_bundle: Path) -> None:
    info = read_info(Location.of(str(tiny_bundle)))

    def of(**options: object) -> str:
        return fingerprint(info, ScoreConfig(**{"bundle": "b", "input": "i", "output": "o", **options}))

    assert of() == of(input="elsewhere", output="elsewhere", num_actors=7, bundle="copied", device="cpu")
    assert of() == of(engine="torch")
    different = [
        *(of(), of(text_column="body"), of(keep_columns=["x"]), of(precision="fp32")),
        *(of(engine="openvino"), of(engine="openvino", precision="int8")),
    ]
    assert len(set(different)) == 6


def test_run_ids_sort_by_time() -> None:
    first, second = new_run_id(), new_run_id()
    assert first < second
