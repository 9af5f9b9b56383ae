"""What verify finds: every way in which a published file and its record may differ."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.__main__ import command
from bertray.drivers.score import score
from bertray.errors import RequestError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.verify import verify
from bertray.storage.location import Location
from tests.conftest import write_shard
from tests.stub_pool import stub_pool


@pytest.fixture
def output(tiny_bundle: Path, tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_shard(tmp_path / "archive" / f"{name}.parquet", [f"{name} text {row}" for row in range(5)])
    places = {"bundle": tiny_bundle, "input": tmp_path / "archive", "output": tmp_path / "scored"}
    score(ScoreConfig(**{name: str(place) for name, place in places.items()}), open_pool=stub_pool())
    return tmp_path / "scored"


def problems(output: Path, num_sampled: int | None = None) -> list[dict[str, str]]:
    return verify(Location.of(str(output)), num_sampled)[1]


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    pq.write_table(change(pq.ParquetFile(file).read()), file)


def test_an_output_as_it_was_published(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, found = verify(Location.of(str(output)))
    assert (facts["num_shards"], facts["num_files_read"], facts["num_problems"], found) == (3, 3, 0, [])
    assert verify(Location.of(str(output)), 2)[0]["num_files_read"] == 2
    assert command("verify")(["--output", str(output)]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_an_output_that_has_published_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no runs/latest\.json: bertray score has published nothing there"):
        problems(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "path", "problem"),
    [
        (lambda folder: (folder / "a.parquet").unlink(), "a.parquet", "not found"),
        (lambda folder: (folder / "a.parquet").write_bytes(b"PAR1"), "a.parquet", "not a readable Parquet file"),
        (
            lambda folder: shutil.copy(folder / "b.parquet", folder / "a.parquet"),
            "a.parquet",
            "bertray.shard is 'b.parq",
        ),
        (lambda folder: shutil.copy(folder / "b.parquet", folder / "d.parquet"), "d.parquet", "it has no record"),
        (lambda folder: rewrite(folder / "a.parquet", lambda rows: rows[:4]), "a.parquet", "it has 4 rows, its record"),
        (lambda folder: rewrite(folder / "a.parquet", lambda rows: rows[::-1]), "a.parquet", "its rows are not 0, 1"),
    ],
)
def test_files_that_are_not_what_was_published(
    spoil: Callable[[Path], object], path: str, problem: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(output / "predictions")
    (found,) = problems(output)
    assert found["path"] == path
    assert problem in found["problem"]
    assert command("verify")(["--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"] == [found]
    assert path in captured.err


def test_an_announcement_that_does_not_fit(output: Path) -> None:
    file = output / "runs" / "latest.json"
    latest = json.loads(file.read_text())
    for changed, problem in (
        ({"run_id": "20200101T000000.000000Z"}, "is later than the announced 20200101"),
        ({"published": {**latest["published"], "num_shards": 4}}, "it says 4 shards; there are 3 records"),
        ({"published": {**latest["published"], "profile": latest["profile"] | {"num_rows": 9}}}, "its profile is not"),
    ):
        file.write_text(json.dumps({**latest, **changed}))
        assert all(problem in one["problem"] for one in problems(output)) and problems(output)
