"""What is announced, what is held back, and how a person lets it through."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.cli import run_job
from bertray.drivers.score import run as score_job
from bertray.drivers.score import score
from bertray.metrics.profile import Profile
from bertray.schema import MANIFEST_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.runs import Runs
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from tests.conftest import write_shard
from tests.stub_pool import Stub, stub_pool


@pytest.fixture
def places(tiny_bundle: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "archive").mkdir()
    options = {"--bundle": tiny_bundle, "--input": tmp_path / "archive", "--output": tmp_path / "scored"}
    return [str(word) for option in options.items() for word in option]


def night(tmp_path: Path, name: str, letters: str, num_rows: int = 400) -> None:
    """A night's new shard, of texts with these first letters."""
    texts: list[str | None] = [f"{letters[row % len(letters)]} text {row % 50}" for row in range(num_rows)]
    write_shard(tmp_path / "archive" / f"{name}.parquet", texts)


def job(arguments: list[str]) -> int:
    """The command line, with a stub in the place of the model."""
    return run_job("score", ScoreConfig, partial(score_job, open_pool=stub_pool()), arguments)


def run(places: list[str], capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    code = job([*places, *options])
    captured = capsys.readouterr()
    return code, json.loads(captured.out.splitlines()[-1]), captured.err


def announced(tmp_path: Path) -> str:
    latest = Runs(Location.of(str(tmp_path / "scored"))).latest()
    return latest.run_id if latest else ""


def test_a_night_unlike_the_last_is_held_until_a_person_accepts_it(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night(tmp_path, "monday", "aabc")
    code, summary, _ = run(places, capsys)
    assert (code, summary["gate"]) == (0, "passed")
    monday = announced(tmp_path)
    assert monday == summary["run_id"]

    night(tmp_path, "tuesday", "xyyy")
    code, summary, stderr = run(places, capsys)
    assert (code, summary["gate"], announced(tmp_path)) == (5, "held", monday)
    (reason,) = summary["held_because"]
    assert reason == "label mix moved by 0.989 (limit 0.3) against what was announced last: y 0.0% → y 75.0%"
    assert "held: nothing is published; what was scored waits in staging/:" in stderr
    assert "--accept" in stderr
    held = json.loads((tmp_path / "scored" / "runs" / summary["run_id"] / "summary.json").read_text())
    assert [one["what"] for one in held["movements"] if one["is_beyond"]] == ["label mix"]
    assert not (tmp_path / "scored" / "predictions" / "tuesday.parquet").exists()

    code, summary, stderr = run(places, capsys)  # nothing to do, but still nobody has looked
    assert (code, summary["gate"], summary["num_shards_committed"]) == (5, "held", 0)
    assert announced(tmp_path) == monday

    code, summary, _ = run(places, capsys, "--accept")
    assert (code, summary["gate"]) == (0, "accepted")
    assert announced(tmp_path) == summary["run_id"]
    assert (tmp_path / "scored" / "predictions" / "tuesday.parquet").exists()
    code, summary, _ = run(places, capsys)
    assert (code, summary["gate"], summary["run_id"]) == (0, None, None)

    night(tmp_path, "wednesday", "xyyy")  # what was accepted is what the next night is held against
    assert run(places, capsys)[:1] == (0,)


def test_what_is_mended_is_no_longer_held(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night(tmp_path, "monday", "aabc")
    run(places, capsys)
    night(tmp_path, "tuesday", "x")
    assert run(places, capsys)[0] == 5
    night(tmp_path, "tuesday", "aabc")
    code, summary, _ = run(places, capsys)
    assert (code, summary["gate"], summary["num_shards_new"]) == (0, "passed", 1)
    night(tmp_path, "wednesday", "x")
    assert run(places, capsys)[0] == 5
    (tmp_path / "archive" / "wednesday.parquet").unlink()
    assert run(places, capsys)[0] == 0


def test_errors_and_failed_shards(places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "archive" / "empty.parquet", [""] * 30 + ["a text"] * 10)
    write_shard(tmp_path / "archive" / "good.parquet", ["a text"] * 20)
    code, summary, stderr = run(places, capsys, "--max-error-fraction", "0.4")
    assert (code, summary["error_fraction"]) == (5, 0.5)
    assert summary["held_because"] == ["50.0% of rows have an error (limit 40.0%)"]
    assert "empty.parquet" in stderr
    assert "30 of 40" in stderr
    assert "good.parquet" not in stderr
    assert run(places, capsys, "--max-error-fraction", "0.5")[0] == 0

    for number in range(3):
        (tmp_path / "archive" / f"broken-{number}.parquet").write_bytes(b"not Parquet")
    write_shard(tmp_path / "archive" / "new.parquet", ["a text"])
    code, _, stderr = run(places, capsys)
    assert code == 5  # not 3: that is the lesser message
    assert "broken-0.parquet" in stderr
    assert run(places, capsys, "--accept")[0] == 3  # they fail again
    assert run(places, capsys, "--max-error-fraction", "1")[0] == 3


def test_the_bundles_validation_rows(
    places: list[str], tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle that was validated on other texts than the archive has."""
    texts = pa.array([f"{'aabc'[row % 4]} text {row % 50}".encode() for row in range(400)])
    validation = Profile.of(Stub().predict_column(texts))
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    info = json.loads((tiny_bundle / BUNDLE_FILE).read_text())
    (bundle / BUNDLE_FILE).write_text(json.dumps({**info, "validation_profile": validation.model_dump()}))
    places = [*places, "--bundle", str(bundle)]
    night(tmp_path, "monday", "bccc")
    code, summary, _ = run(places, capsys)
    assert code == 5
    assert all("against the bundle's validation rows" in reason for reason in summary["held_because"])
    assert run(places, capsys, "--accept")[0] == 0
    night(tmp_path, "tuesday", "bccc")  # a person has accepted that this archive differs from them
    assert run(places, capsys)[0] == 0
    night(tmp_path, "wednesday", "aaaa")  # but it must not move by itself
    assert run(places, capsys)[0] == 5


def test_runs_that_died_are_judged_too(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    night(tmp_path, "monday", "aabc")
    run(places, capsys)
    night(tmp_path, "tuesday", "xxxx")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bertray.drivers.score.judge", interrupt)
        score(ScoreConfig(bundle=places[1], input=places[3], output=places[5]), open_pool=stub_pool())
    night(tmp_path, "wednesday", "aabc", num_rows=20)
    code, summary, _ = run(places, capsys)
    assert (code, summary["num_shards_committed"], summary["num_rows"]) == (5, 1, 20)
    assert "against what was announced last: x 0.0% → x 95.2%" in summary["held_because"][0]


def test_a_night_without_rows_does_not_end_the_comparison(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night(tmp_path, "monday", "aabc")
    run(places, capsys)
    write_shard(tmp_path / "archive" / "tuesday.parquet", [])
    assert run(places, capsys)[:1] == (0,)
    night(tmp_path, "wednesday", "xxxx")
    assert run(places, capsys)[0] == 5


def test_a_broken_file_is_no_reason_to_hold_the_others_for_ever(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night(tmp_path, "monday", "aabc")
    (tmp_path / "archive" / "broken.parquet").write_bytes(b"not Parquet")
    code, summary, _ = run(places, capsys, "--max-error-fraction", "0.5")
    assert (code, summary["gate"], summary["error_fraction"]) == (3, "passed", 0.5)
    code, summary, _ = run(places, capsys)  # a quiet night
    assert (code, summary["gate"], summary["num_shards_failed"]) == (3, None, 1)
    (tmp_path / "archive" / "another.parquet").write_bytes(b"not Parquet")
    assert run(places, capsys)[:1] == (3,)
    night(tmp_path, "tuesday", "aabc")
    code, summary, _ = run(places, capsys)
    assert (code, summary["gate"], summary["error_fraction"]) == (3, "passed", 0.5)  # of another and tuesday


def test_a_request_that_scores_all_again_says_in_what_it_differs(
    places: list[str], make_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    night(tmp_path, "monday", "aabc")
    run(places, capsys)
    assert job([*places, "--precision", "fp32"]) == 2
    stderr = capsys.readouterr().err
    assert (
        "precision: 'auto' -> 'fp32': " in stderr and "1 shards (0.0 MB) would now be scored with these, 1 of" in stderr
    )
    log = run(places, capsys, "--precision", "fp32", "--rescore")[2]
    assert "1 shards to score (1 scored before by another request, precision: 'auto' -> 'fp32'), 0 done" in log
    places[1] = str(make_bundle(seed=1))
    log = run(places, capsys, "--precision", "fp32", "--accept")[2]
    assert "(1 scored before by another request, another bundle, column, engine or precision), 0 done" in log
    for file in (tmp_path / "scored" / "runs").glob("*/config.json"):
        file.unlink()
    assert job(places) == 2  # latest.json knows the options, too
    assert "precision: 'fp32' -> 'auto': " in capsys.readouterr().err
    runs = Runs(Location.of(str(tmp_path / "scored")))
    latest = runs.latest()
    assert latest
    runs.announce(latest.model_copy(update={"request": None}))  # as of an earlier version
    assert "another request, another bundle, column, engine or precision)" in run(places, capsys)[2]


def test_a_clock_that_is_behind(places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    night(tmp_path, "monday", "aabc")
    run(places, capsys)
    runs = Runs(Location.of(str(tmp_path / "scored")))
    latest = runs.latest()
    assert latest
    runs.announce(latest.model_copy(update={"run_id": "29990101T000000.000000Z"}))
    assert job(places) == 2
    assert "29990101T000000.000000Z" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_latest_describes_all_that_is_published(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also what an earlier version has published, whose records have no profile."""
    scored = tmp_path / "scored"
    night(tmp_path, "monday", "aabc")
    run(places, capsys)
    (records,) = (scored / "manifest").glob("*.parquet")
    pq.write_table(pq.read_table(records).select(MANIFEST_SCHEMA.names), records)
    night(tmp_path, "tuesday", "abc", num_rows=300)
    night(tmp_path, "wednesday", "abc", num_rows=300)
    assert run(places, capsys)[1]["num_shards_committed"] == 2
    night(tmp_path, "thursday", "abc", num_rows=30)
    (tmp_path / "archive" / "tuesday.parquet").write_bytes(b"not Parquet")
    code, summary, _ = run(places, capsys)
    assert (code, summary["num_shards_older"]) == (3, 1)
    latest = Runs(Location.of(str(scored))).latest()
    assert latest is not None and latest.published is not None
    published = latest.published
    assert latest.profile.num_rows == 30
    assert (published.num_shards, published.num_shards_without_profile, published.profile.num_rows) == (4, 1, 630)
    assert (published.num_shards_older, published.older) == (1, ["tuesday.parquet"])
    assert (published.labels, published.length_edges[:3]) == (("a", "b", "c"), (1, 2, 4))
    assert (len(published.score_edges), published.score_edges[1]) == (21, 0.05)
    assert (scored / "predictions" / "tuesday.parquet").exists()
