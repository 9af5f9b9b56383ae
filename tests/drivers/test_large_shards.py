"""Shards that are cut into parts: merged, taken up by the next run, and nothing of it left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.drivers import actor_pool
from bertray.drivers.score import OpenPool, ScoreResult, score
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest
from bertray.scoring.pool import Pool
from bertray.scoring.score_unit import Request
from bertray.scoring.units import Outcome, Work
from bertray.storage.location import FileInfo, Location
from tests.conftest import ROOT, assert_rows_add_up, write_shard
from tests.stub_pool import stub_pool

PART_BYTES = 2000


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(actor_pool, "STEP_BYTES", {"cpu": PART_BYTES})
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large shard of several row groups, and a small one."""
    folder = tmp_path_factory.mktemp("original")
    write_shard(folder / "small.parquet", ["one", None, "three"])
    texts = [f"text {row} says {row**3}" for row in (row - row % 10 // 9 for row in range(1000))]  # every tenth twice
    large = pa.table({"document_id": [f"{row}" for row in range(1000)], "text": texts})
    (folder / "date=2026-01-05").mkdir()
    pq.write_table(large, folder / "date=2026-01-05" / "large.parquet", row_group_size=300, compression="none")
    return folder


@pytest.fixture
def archive(original: Path, tmp_path: Path) -> Path:
    """To be changed."""
    return shutil.copytree(original, tmp_path / "archive")


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: str, original: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ScoreResult, Path]:
    """A run over it, and its output."""
    output = tmp_path_factory.mktemp("undisturbed") / "scored"
    return run(original, output, tiny_bundle), output


def run(archive: Path, output: Path, bundle: Path, open_pool: OpenPool | None = None) -> ScoreResult:
    places = {"bundle": str(bundle), "input": str(archive), "output": str(output)}
    config = ScoreConfig(**places, num_actors=2, precision="fp32", keep_columns=["document_id"])
    scored = score(config, open_pool=open_pool)
    assert_rows_add_up(scored.summary)
    return scored


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in (output / "predictions").rglob("*.parquet")}


def test_a_large_shard_is_scored_in_parts(undisturbed: tuple[ScoreResult, Path], original: Path) -> None:
    scored, output = undisturbed
    assert (scored.summary["num_shards_committed"], scored.summary["num_rows"], scored.failures) == (2, 1003, [])
    found = pq.ParquetFile(output / "predictions" / "date=2026-01-05" / "large.parquet")
    num_parts = -(-(original / "date=2026-01-05" / "large.parquet").stat().st_size // PART_BYTES)
    assert num_parts > 10
    assert found.metadata.num_row_groups >= num_parts
    assert found.read()["row"].to_pylist() == list(range(1000))
    assert not (output / "staging").exists()
    manifest = Manifest(Location.of(str(output))).latest()
    assert sum(manifest["num_tokens"].to_pylist()) == scored.summary["num_tokens"]


def test_a_large_shard_that_cannot_be_read_to_its_end(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    open_pool = stub_pool(PART_BYTES)
    output, shard = tmp_path / "scored", archive / "date=2026-01-05" / "large.parquet"
    whole = shard.read_bytes()
    broken = bytearray(whole)
    start = pq.ParquetFile(shard).metadata.row_group(2).column(1).data_page_offset
    broken[start : start + 40] = bytes(40)
    shard.write_bytes(broken)
    scored = run(archive, output, tiny_bundle, open_pool)
    assert scored.summary["num_shards_committed"] == 1
    (failure,) = scored.failures
    assert failure["path"] == "date=2026-01-05/large.parquet"
    num_staged = len(list(output.glob("staging/*/*.parquet")))
    assert num_staged > 5
    info = shard.stat()
    shard.write_bytes(whole)
    os.utime(shard, ns=(info.st_atime_ns, info.st_mtime_ns))  # as if the disk had been at fault, not the file
    scored = run(archive, output, tiny_bundle, open_pool)
    assert (scored.summary["num_shards_committed"], scored.failures) == (1, [])
    assert scored.summary["num_parts_taken_up"] == num_staged
    assert not (output / "staging").exists()


def test_parts_of_a_killed_run_are_taken_up(
    undisturbed: tuple[ScoreResult, Path], tiny_bundle: Path, original: Path, tmp_path: Path
) -> None:
    output = tmp_path / "scored"
    driver = (
        "import sys; from bertray.drivers import actor_pool; from jobs import score; "
        f"actor_pool.STEP_BYTES = {{'cpu': {PART_BYTES}}}; sys.exit(score.main())"
    )
    options = ["--num-actors", "1", "--precision", "fp32", "--keep-columns", "document_id"]
    places = ["--bundle", tiny_bundle, "--input", original, "--output", output]
    command = [sys.executable, "-c", driver, *map(str, places), *options]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE) as job:
        deadline_s = time.monotonic() + 120
        while len(list(output.glob("staging/*/*.parquet"))) < 4:
            assert job.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
    wait_for_the_actors_end(output)
    num_staged = len(list(output.glob("staging/*/*.parquet")))
    assert num_staged >= 4
    scored = run(original, output, tiny_bundle)
    assert (scored.failures, scored.summary["num_parts_taken_up"]) == ([], num_staged)
    assert scored.summary["num_rows_repeated"] == undisturbed[0].summary["num_rows_repeated"] > 50
    assert contents(output) == contents(undisturbed[1])
    assert not (output / "staging").exists()


def wait_for_the_actors_end(output: Path) -> None:
    """Ray ends the actors of a driver that was killed within seconds; until then they go on with their unit."""
    num_files, deadline_s = -1, time.monotonic() + 30
    while num_files != (num_files := len(list(output.rglob("*.parquet")))):
        assert time.monotonic() < deadline_s
        time.sleep(1)


def test_a_large_shard_that_is_rewritten_meanwhile(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    shard = archive / "date=2026-01-05" / "large.parquet"
    num_passes = []

    class Rewriting:
        """A pool, and somebody who writes a shard anew while it is read."""

        def __init__(self, pool: Pool) -> None:
            self._pool, self.num_processes, self.unit_bytes = pool, pool.num_processes, pool.unit_bytes

        def run(self, work: Work) -> Iterator[Outcome]:
            num_passes.append(len(work.units))
            for index, outcome in enumerate(self._pool.run(work)):
                if len(num_passes) == 1 and index == 3:
                    write_shard(shard, [f"other text {row} says {row**3}" for row in range(300)])
                yield outcome

    @contextmanager
    def rewriting(request: Request, pending: list[FileInfo]) -> Iterator[Pool]:
        with stub_pool(PART_BYTES)(request, pending) as pool:
            yield Rewriting(pool)

    scored = run(archive, tmp_path / "scored", tiny_bundle, rewriting)
    assert scored.failures == []
    assert len(num_passes) == 2
    found = pq.ParquetFile(tmp_path / "scored/predictions/date=2026-01-05/large.parquet").read()
    assert found["document_id"].to_pylist() == [f"large-{row}" for row in range(300)]
    write_shard(archive / "new.parquet", ["a text"])
    summary = run(archive, tmp_path / "scored", tiny_bundle, stub_pool()).summary
    assert (summary["num_shards_skipped"], summary["num_shards_committed"]) == (2, 1)
    assert not (tmp_path / "scored" / "staging").exists()  # nor what was staged of the shard as it was
