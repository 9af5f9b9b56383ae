"""The nightly job on a two-node cluster: the row contract, runs that follow runs, failures that stay where they are."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from transformers import pipeline

from bertray import Bundle
from bertray.bundle.info import read_info
from bertray.drivers import actor_pool, cluster
from bertray.drivers.forecast import preview
from bertray.drivers.score import OpenPool, score
from bertray.errors import LockedError, RequestError
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest
from bertray.scoring.pool import Pool
from bertray.scoring.runs import Runs
from bertray.scoring.score_unit import Request
from bertray.scoring.staging import Staging
from bertray.scoring.units import Unit
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock
from tests.conftest import ROOT, assert_rows_add_up, write_shard
from tests.stub_pool import stub_pool

SUMMARY_KEYS = {
    "num_shards_committed",
    "num_shards_skipped",
    "num_shards_failed",
    "num_rows",
    "num_rows_error",
    "num_rows_review",
    "num_tokens",
    "wall_s",
    "rows_per_s",
    "tokens_per_s",
}


def texts_of(name: str, num_rows: int) -> list[str | None]:
    return [None if row == 2 else f"{name} text {row} " * (row % 4 + 1) for row in range(num_rows)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three good shards in Hive-style folders."""
    folder = tmp_path / "archive"
    num_rows = {"date=2026-01-05/part-0": 20, "date=2026-01-05/part-1": 1, "date=2026-01-06/part-0": 9}
    for name in num_rows:
        rows = num_rows[name]
        write_shard(folder / f"{name}.parquet", texts_of(name, rows), page=list(range(rows)))
    return folder


def run(
    archive: Path | str, output: Path | str, bundle: Path | str, open_pool: OpenPool | None = None, **options: Any
) -> tuple[dict[str, Any], list[Any]]:
    settings = {"keep_columns": ["document_id"], "num_actors": 2, "precision": "fp32", **options}
    config = ScoreConfig(bundle=str(bundle), input=str(archive), output=str(output), **settings)
    scored = score(config, open_pool=open_pool)
    assert_rows_add_up(scored.summary)
    return scored.summary, scored.failures


run_stub = partial(run, open_pool=stub_pool())  # for what has nothing to do with the model: seconds a run


def counts(summary: dict[str, Any]) -> tuple[int, int, int]:
    return tuple(summary[f"num_shards_{state}"] for state in ("committed", "skipped", "failed"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def test_every_row_of_every_shard_in_order(ray_cluster: str, archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored"
    summary, failures = run(archive, output, tiny_bundle)
    assert set(summary) >= SUMMARY_KEYS
    assert counts(summary) == (3, 0, 0)
    assert (summary["num_rows"], summary["num_rows_error"], failures) == (30, 2, [])
    assert summary["precision"] == "fp32"
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    classify = pipeline("text-classification", model=str(tiny_bundle), truncation=True)
    num_tokens = 0
    for shard in archive.rglob("*.parquet"):
        table = pq.read_table(output / "predictions" / shard.relative_to(archive), partitioning=None)
        source = pq.read_table(shard, partitioning=None)
        assert table["row"].to_pylist() == list(range(source.num_rows))
        assert table["document_id"].equals(source["document_id"])
        expected = bundle.predict(source["text"].to_pylist())
        assert table["label"].to_pylist() == [one.label for one in expected]
        assert table["error"].to_pylist() == [one.error for one in expected]
        num_tokens += sum(one.num_tokens for one in expected)
        # and the Hugging Face pipeline says the same
        rows = [row for row, one in enumerate(expected) if one.error is None]
        for row, other in zip(rows, classify([source["text"][row].as_py() for row in rows]), strict=True):
            assert table["label"][row].as_py() == other["label"]
            assert table["score"][row].as_py() == pytest.approx(other["score"], abs=1e-4)
    assert summary["num_tokens"] == num_tokens
    latest = json.loads((output / "runs" / "latest.json").read_text())
    run_folder = output / "runs" / latest["run_id"]
    assert json.loads((run_folder / "summary.json").read_text())["num_rows"] == 30
    assert json.loads((run_folder / "config.json").read_text())["config"]["text_column"] == "text"


def test_only_what_is_new_or_changed_is_scored(
    archive: Path, tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "scored"
    run_stub(archive, output, tiny_bundle)
    before = contents(output)

    with caplog.at_level("INFO", logger="bertray"):
        summary, _ = run_stub(archive, output, tiny_bundle)
    assert counts(summary) == (0, 3, 0)
    assert "nothing to do" in caplog.text
    assert contents(output) == before

    write_shard(archive / "date=2026-01-07" / "part-0.parquet", texts_of("new", 4))
    write_shard(archive / "date=2026-01-05" / "part-1.parquet", ["rewritten", "and grown"])
    summary, _ = run_stub(archive, output, tiny_bundle, accept=True)
    assert counts(summary) == (2, 2, 0)
    assert summary["num_rows"] == 6
    table = pq.read_table(output / "predictions/date=2026-01-05/part-1.parquet", partitioning=None)
    assert table.num_rows == 2


def test_another_bundle_scores_all_again_under_the_same_names(
    archive: Path, tiny_bundle: Path, make_bundle: Any, tmp_path: Path
) -> None:
    output = tmp_path / "scored"
    run_stub(archive, output, tiny_bundle)
    before = contents(output / "predictions")
    summary, _ = run_stub(archive, output, make_bundle(seed=1))
    assert counts(summary) == (3, 0, 0)
    after = contents(output / "predictions")
    assert after.keys() == before.keys()
    assert after != before


def test_a_request_that_is_refused_on_the_way_forgets_nothing(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    @contextmanager
    def no_pool(*_: object) -> Iterator[Pool]:
        raise RequestError("this machine is too small")
        yield

    output = tmp_path / "scored"
    run_stub(archive, output, tiny_bundle)
    with pytest.raises(RequestError, match="too small"):
        run(archive, output, tiny_bundle, open_pool=no_pool, keep_columns=[], rescore=True)
    assert counts(run_stub(archive, output, tiny_bundle)[0]) == (0, 3, 0)


def test_bad_shards_are_listed_and_tried_again(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    (archive / "broken.parquet").write_bytes(b"not parquet")
    pq.write_table(pa.table({"text": ["a text without an identifier"]}), archive / "bare.parquet")
    output = tmp_path / "scored"
    summary, failures = run_stub(archive, output, tiny_bundle)
    assert counts(summary) == (3, 0, 2)
    reasons = {failure["path"]: failure["reason"] for failure in failures}
    assert "not a readable Parquet file" in reasons["broken.parquet"]
    assert "no column 'document_id'; the shard has text" in reasons["bare.parquet"]
    assert not (output / "predictions" / "broken.parquet").exists()

    write_shard(archive / "broken.parquet", ["mended"])
    (archive / "bare.parquet").unlink()
    summary, failures = run_stub(archive, output, tiny_bundle)
    assert counts(summary) == (1, 3, 0)


def test_from_and_to_s3(archive: Path, tiny_bundle: Path, s3_folder: str, s3_server: str, tmp_path: Path) -> None:
    import s3fs

    s3 = s3fs.S3FileSystem()
    s3.put(f"{archive}/", f"{s3_folder}/archive/", recursive=True)
    Location.of(f"{s3_folder}/bundle").put_folder(tiny_bundle, last="bundle.json")
    places = [f"{s3_folder}/{name}" for name in ("archive", "scored", "bundle")]
    summary, _ = run(*places, num_actors=0)
    assert counts(summary) == (3, 0, 0)
    assert counts(run(*places)[0]) == (0, 3, 0)
    run(archive, tmp_path / "scored", tiny_bundle, num_actors=0)
    for path in archive.rglob("*.parquet"):
        relative = path.relative_to(archive)
        with s3.open(f"{s3_folder}/scored/predictions/{relative}") as file:
            remote = pq.ParquetFile(file).read()
        assert remote.equals(pq.ParquetFile(tmp_path / "scored" / "predictions" / relative).read())
    for path in s3.find(f"{s3_folder}/scored/runs"):
        assert b"test-secret-key" not in s3.cat(path)


def test_places_may_be_relative(
    archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert counts(run_stub("archive", "scored", os.path.relpath(tiny_bundle))[0]) == (3, 0, 0)
    (written,) = Path("scored").glob("runs/*/config.json")
    config = json.loads(written.read_text())["config"]
    # What actors get, whose working folder is another.
    assert (config["input"], config["output"], config["bundle"]) == (
        str(archive),
        f"{tmp_path}/scored",
        str(tiny_bundle),
    )


def test_a_bundle_that_is_replaced_meanwhile_is_noticed(
    tiny_bundle: Path, make_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_pool, "log_to", lambda _: None)  # this process is no worker
    monkeypatch.setattr(cluster, "assigned_cpus", lambda: 1)
    first_start = SimpleNamespace(was_current_actor_reconstructed=False, get_node_id=lambda: "a node")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: first_start)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    begun_with = read_info(Location.of(str(make_bundle(seed=2)))).fingerprint()
    config = ScoreConfig(bundle=str(tiny_bundle), input="archive", output="scored", precision="fp32")
    request = Request(config, "archive", "request", begun_with, 1, 1)
    unit = Unit(shards=(FileInfo("a.parquet", 1, "v"),)).model_dump_json()
    answer = actor_pool.ScoringActor("cpu", request, 1)(pa.table({"unit": [unit]}))
    assert "was replaced while the job ran. Run it again" in answer["outcomes"][0][0].as_py()


def test_one_shard_alone(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored"
    summary, _ = run_stub(archive / "date=2026-01-06" / "part-0.parquet", output, tiny_bundle)
    assert counts(summary) == (1, 0, 0)
    assert (output / "predictions" / "part-0.parquet").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_column": "body"}, "part-0.parquet: no column 'body'; the shard has document_id, text, page"),
        ({"text_column": "page"}, "date=2026-01-05/part-0.parquet: the text column is of type int64"),
        ({"keep_columns": ["url"]}, r"no column 'url'; .*\. Choose with --text-column and --keep-columns"),
    ],
)
def test_columns_that_no_shard_has_are_refused(
    archive: Path, tiny_bundle: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        run(archive, tmp_path / "scored", tiny_bundle, **options)
    assert not (tmp_path / "scored").exists()


def test_places_that_cannot_work_are_refused(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="lies in --"):
        run(archive, archive / "scored", tiny_bundle)
    with pytest.raises(RequestError, match="lies in --"):
        run(archive, archive.parent, tiny_bundle)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"storage refused .*file/lock"):
        run(archive, tmp_path / "file", tiny_bundle)
    with pytest.raises(RequestError, match=r"--input .*nowhere does not exist"):
        run(tmp_path / "nowhere", tmp_path / "scored", tiny_bundle)
    with pytest.raises(RequestError, match="no model bundle"):
        run(archive, tmp_path / "scored", tmp_path)


def test_a_second_run_is_refused(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored"
    with RunLock(Location.of(str(output)), "first").held(), pytest.raises(LockedError, match="run first holds"):
        run(archive, output, tiny_bundle)
    assert not (output / "predictions").exists()


def test_predictions_of_shards_that_left_are_pruned(
    archive: Path, tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "scored"
    run_stub(archive, output, tiny_bundle)
    gone = "date=2026-01-05/part-1.parquet"
    kept = (archive / gone).rename(tmp_path / "kept.parquet")
    with caplog.at_level("INFO", logger="bertray"):
        summary, _ = run_stub(archive, output, tiny_bundle)
    assert (summary["num_shards_gone"], summary["num_outputs_pruned"]) == (1, 0)
    assert "1 shards left the archive; their predictions stay" in caplog.text
    assert (output / "predictions" / gone).exists()
    summary, _ = run_stub(archive, output, tiny_bundle, prune=True)
    assert (summary["num_shards_gone"], summary["num_outputs_pruned"]) == (1, 1)
    assert not (output / "predictions" / gone).exists()
    assert (output / "predictions" / gone).parent.exists()  # with another file
    assert len(contents(output / "predictions")) == 2
    kept.rename(archive / gone)  # it comes back as it was
    summary, _ = run_stub(archive, output, tiny_bundle, prune=True)
    assert (counts(summary), summary["num_outputs_pruned"]) == ((1, 2, 0), 0)
    with pytest.raises(RequestError, match="--prune needs the whole archive as --input"):
        run_stub(archive / gone, output, tiny_bundle, prune=True)


def test_a_predictions_file_names_its_origin(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored"
    run_stub(archive, output, tiny_bundle)
    shard = archive / "date=2026-01-06" / "part-0.parquet"
    metadata = pq.read_schema(output / "predictions" / "date=2026-01-06" / "part-0.parquet").metadata
    found = {name.decode(): value.decode() for name, value in metadata.items() if name.startswith(b"bertray.")}
    assert json.loads(found.pop("bertray.versions"))["torch"] == torch.__version__
    recorded = Manifest(Location.of(str(output))).latest()["fingerprint"].to_pylist()
    assert found == {
        "bertray.shard": "date=2026-01-06/part-0.parquet",
        "bertray.shard_size_bytes": str(shard.stat().st_size),
        "bertray.shard_version": str(shard.stat().st_mtime_ns),
        "bertray.request_fingerprint": recorded[0],
    }


def test_sigterm_keeps_what_is_finished(ray_cluster: str, tiny_bundle: Path, tmp_path: Path) -> None:
    archive, output = tmp_path / "archive", tmp_path / "scored"
    for part in range(300):
        write_shard(archive / f"{part:03d}.parquet", texts_of(str(part), 40))
    places = ["--bundle", tiny_bundle, "--input", archive, "--output", output]
    command = [sys.executable, "-m", "jobs.score", *map(str, places), "--num-actors", "1", "--precision", "fp32"]
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        deadline_s = time.monotonic() + 120
        while len(staged := list(output.glob("staging/*/*.parquet"))) < 150:
            assert job.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        _, stderr = job.communicate(timeout=30)
    assert job.returncode == 143, stderr.decode()
    assert b"stopped; what was finished is kept" in stderr
    staged = list(output.glob("staging/*/*.parquet"))
    assert 150 <= len(staged) < 300 and not (output / "predictions").exists()
    assert not list(output.rglob("*.tmp"))
    num_recorded = Staging(Location.of(str(output))).records().num_rows
    assert 0 < num_recorded <= len(staged)
    summary, _ = run(archive, output, tiny_bundle, keep_columns=[], num_actors=1)  # the lock is free
    # What the driver had not heard of is taken up and counts as this run's.
    assert (summary["num_shards_staged"], summary["num_rows"]) == (num_recorded, (300 - num_recorded) * 40)
    assert Manifest(Location.of(str(output))).latest().num_rows == 300
    assert len(list(output.glob("predictions/*.parquet"))) == 300


@pytest.mark.services
def test_a_plan_is_close_and_writes_nothing(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "scored"
    for part in range(30):
        write_shard(archive / f"more-{part}.parquet", texts_of(str(part), 40 + part))
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(output)}
    planned = preview(ScoreConfig(**places))
    assert not output.exists()
    assert (planned["num_shards_new"], planned["num_shards_pending"]) == (33, 33)
    assert 8 < planned["num_shards_sampled"] <= 16  # one that is drawn twice counts once
    assert "hours_estimated" not in planned
    summary, _ = run(archive, output, tiny_bundle, keep_columns=[], precision="auto", num_actors=0)
    assert planned["num_rows_estimated"] == pytest.approx(summary["num_rows"], rel=0.3)
    assert planned["num_tokens_estimated"] == pytest.approx(summary["num_tokens"], rel=0.3)
    assert preview(ScoreConfig(**places))["num_shards_pending"] == 0

    planned = preview(ScoreConfig(**places, text_column="document_id", num_actors=4, price_per_hour=100))
    assert (planned["num_shards_anew"], planned["num_actors"]) == (33, 4)
    announced = Runs(Location.of(str(output))).latest()
    assert announced is not None and announced.rate is not None
    rate = announced.rate.tokens_per_s / summary["num_actors"]
    assert announced.rate.tokens_per_s > summary["tokens_per_s"]  # without Ray's start
    assert planned["tokens_per_s_an_actor"] == pytest.approx(rate, abs=0.1)
    hours = planned["num_tokens_estimated"] / rate / 4 / 3600
    assert planned["hours_estimated"] == pytest.approx(hours, abs=1e-3)
    assert planned["cost_estimated"] == pytest.approx(hours * 4 * 100, abs=0.01)


def test_a_plan_knows_large_shards_from_small_ones(tiny_bundle: Path, tmp_path: Path) -> None:
    """Nearly all bytes are in one shard, whose texts are longer than those of the many others."""
    for number in range(60):
        write_shard(tmp_path / "archive" / f"{number}.parquet", [f"short {number}"])
    large: list[str | None] = [
        " ".join(f"{(row * 7919 + word * 104729) % 99991}" for word in range(9)) for row in range(12_000)
    ]
    write_shard(tmp_path / "archive" / "large.parquet", large)
    facts = preview(ScoreConfig(bundle=str(tiny_bundle), input=str(tmp_path / "archive"), output=str(tmp_path / "out")))
    assert facts["num_rows_estimated"] == pytest.approx(12_060, rel=0.25)
