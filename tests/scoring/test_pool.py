"""The pool of one process, with a real model in its child, beside the bundle in this process."""

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray import Bundle, BundleError, RequestError, ScoreConfig, score
from bertray.__main__ import command
from bertray.errors import UnavailableError
from bertray.progress import ProgressBar
from bertray.scoring import score_unit
from bertray.scoring.manifest import Manifest
from bertray.scoring.pool import LocalPool
from bertray.scoring.score_unit import Request
from bertray.scoring.units import Counts, Outcome, Unit, Work, divide, staged_path
from bertray.scoring.verify import verify
from bertray.storage import patience
from bertray.storage.location import FileInfo, Location
from tests.conftest import write_shard
from tests.kills import wait_for
from tests.stub_pool import Stub, stub_pool


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("a", "b/c"):
        write_shard(tmp_path / "archive" / f"{name}.parquet", [f"{name} {row}" for row in range(20)] + [None, ""])
    return tmp_path / "archive"


@pytest.mark.services
def test_it_scores_what_the_bundle_says(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    config = ScoreConfig(**places, num_actors=0, precision="fp32", keep_columns=["document_id"])
    scored = score(config)
    assert (scored.failures, scored.is_held) == ([], False)
    assert (scored.summary["num_rows"], scored.summary["num_rows_error"]) == (44, 4)
    assert (scored.summary["precision"], scored.summary["num_actors"]) == ("fp32", 1)
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    for name in ("a", "b/c"):
        source, found = (
            pq.read_table(tmp_path / place / f"{name}.parquet") for place in ("archive", "scored/predictions")
        )
        assert found.select(bundle.schema.names).equals(bundle.predict_column(source["text"]))
        assert found["document_id"].equals(source["document_id"])
    assert score(config).summary["num_shards_skipped"] == 2


@pytest.mark.services
def test_the_driver_loads_neither_torch_nor_ray(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from bertray.__main__ import main; code = main(sys.argv[1:]); "
        "print(code, *sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    options = {"--bundle": tiny_bundle, "--input": archive, "--output": tmp_path / "scored", "--num-actors": 0}
    words = [str(word) for option in options.items() for word in option]
    done = subprocess.run([sys.executable, "-c", code, "score", *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0", done.stderr


@pytest.mark.services
def test_what_the_child_cannot_do_is_its_message(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    with pytest.raises(RequestError, match=r"--device cuda: torch .* sees no GPU here"):
        score(ScoreConfig(**places, num_actors=0, device="cuda"))
    assert not (tmp_path / "scored" / "predictions").exists()


def test_a_model_that_can_no_longer_be_loaded_ends_the_run(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    class Gone(Stub):
        def predict_column(self, texts: pa.Array) -> pa.Table:
            raise BundleError("it was replaced")

    @contextmanager
    def open_pool(request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
        yield LocalPool(request, Gone())

    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    with pytest.raises(BundleError, match="it was replaced"):
        score(ScoreConfig(**places), open_pool=open_pool)


@contextmanager
def pool_of(model: Stub, request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
    yield LocalPool(request, model)


class Sick(Stub):
    """Fails on any text."""

    def predict_column(self, texts: pa.Array) -> pa.Table:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_machine_that_fails_three_times_ends_the_run(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    for number in range(9):
        write_shard(archive / f"{number}.parquet", ["text"])
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    with pytest.raises(UnavailableError, match=r"no machine is left that can score.*No space left on device"):
        score(config, open_pool=partial(pool_of, Sick()))
    assert score(config, open_pool=stub_pool()).summary["num_shards_committed"] == 11


def test_when_a_run_is_stopped_over_an_outcome_nothing_is_at_work_any_more(
    archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before what is half-written is removed, and the lock released."""

    class Slow(Stub):
        def predict_column(self, texts: pa.Array) -> pa.Table:
            time.sleep(0.05)
            return super().predict_column(texts)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    def note(place: Location) -> None:
        assert place.name == "staging"
        now = set(threading.enumerate()) - before
        at_work.append([thread.name for thread in now if thread.name.startswith("shard")])

    before, at_work = set(threading.enumerate()), list[list[str]]()
    for number in range(40):
        write_shard(archive / f"{number:02d}.parquet", ["text"])
    monkeypatch.setattr(ProgressBar, "update", stop)
    monkeypatch.setattr(Location, "remove_unfinished", note)
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    with pytest.raises(KeyboardInterrupt):
        score(config, open_pool=partial(pool_of, Slow()))
    assert at_work == [[]]


def test_what_the_machine_could_not_do_is_tried_three_times(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    class Flaky(Stub):
        def __init__(self, num_failures: int) -> None:
            self.num_failures = num_failures

        def predict_column(self, texts: pa.Array) -> pa.Table:
            if texts[0].as_py() == b"a 0" and self.num_failures:
                self.num_failures -= 1
                raise MemoryError("no memory")
            return super().predict_column(texts)

    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    scored = score(config, open_pool=partial(pool_of, Flaky(2)))
    assert (scored.failures, scored.summary["num_shards_committed"]) == ([], 2)
    (at_fault,) = scored.summary["sick_nodes"]
    assert (at_fault["num_failures"], at_fault["last"]) == (2, "MemoryError: no memory")
    other = config.model_copy(update={"output": str(tmp_path / "other")})
    scored = score(other, open_pool=partial(pool_of, Flaky(3)))
    assert scored.failures == [{"path": "a.parquet", "reason": "MemoryError: no memory"}]
    assert scored.summary["num_shards_committed"] == 1


def test_a_machine_that_gives_up_amid_a_unit_says_over_what(
    archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage goes away after the first of two shards that are one unit."""

    class Away(Stub):
        num_left = 1

        def predict_column(self, texts: pa.Array) -> pa.Table:
            self.num_left -= 1
            if self.num_left < 0:
                raise UnavailableError.because("away", "cannot reach s3://bucket")
            return super().predict_column(texts)

    for number in range(30):
        write_shard(archive / f"{number:02d}.parquet", ["text"])
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    monkeypatch.setattr(patience, "MAX_AWAY_S", 0)
    with pytest.raises(UnavailableError, match=rf"can score\. {socket.gethostname()}: cannot reach s3://bucket\. What"):
        score(config, open_pool=partial(pool_of, Away()))
    summary = score(config, open_pool=stub_pool()).summary
    assert (summary["num_shards_staged"], summary["num_shards_committed"]) == (1, 31)


def test_what_another_unit_has_done_counts_when_a_machine_gives_up(
    archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first unit gives up when a shard of the second one is staged."""
    names, output = ("a.parquet", "b/c.parquet"), tmp_path / "scored"
    shards = [replace(Location.of(str(archive / name)).info(), path=name) for name in names]

    class Away(Stub):
        def predict_column(self, texts: pa.Array) -> pa.Table:
            if texts[0].as_py() == b"a 0":
                wait_for(lambda: (output / "staging" / staged_path(shards[1], "request")).exists(), "the other shard")
                raise UnavailableError.because("away", "cannot reach s3://bucket")
            return super().predict_column(texts)

    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(output))
    pool = LocalPool(Request(config, str(archive), "request", "bundle", 0, 1000), Away())
    monkeypatch.setattr(patience, "MAX_AWAY_S", 0)
    outcomes = list[Outcome]()
    with pytest.raises(UnavailableError, match="no machine is left"):
        for outcome in pool.run(Work(units=[Unit(shards=(shard,)) for shard in shards])):
            outcomes.append(outcome)
    assert [(one.shard, one.of if one.failure else "") for one in outcomes] == [(shards[0], "place"), (shards[1], "")]


@pytest.mark.parametrize("are_staged", [False, True])
def test_a_machine_that_gives_up_over_a_merge_begins_nothing_else(
    are_staged: bool, archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has waited for the storage for half an hour, and would for each other shard."""
    listed = [
        replace(Location.of(str(write_shard(archive / name, [f"text {row}" for row in range(400)]))).info(), path=name)
        for name in ("x.parquet", "y.parquet")
    ]
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    pool = LocalPool(Request(config, str(archive), "request", "bundle", 0, 1000), Stub())
    staged = set[str]()
    if are_staged:
        for unit in divide(listed, pool.unit_bytes, 1, "request", staged).units:
            staged.add(staged_path(unit.shards[0], "request", unit.part, unit.num_parts))
    work = divide(listed, pool.unit_bytes, 1, "request", staged)
    assert len(work.complete()) == (2 if are_staged else 0)
    monkeypatch.setattr(patience, "MAX_AWAY_S", 0)
    merged = list[str]()

    def away(shard: Any, *_: Any, **__: Any) -> Any:
        merged.append("")
        raise UnavailableError.because("away", "cannot reach s3://bucket")

    monkeypatch.setattr(score_unit, "merge_parts", away)
    outcomes = list[Outcome]()
    with pytest.raises(UnavailableError, match=r"no machine is left that can score.*cannot reach s3://bucket"):
        for outcome in pool.run(work):
            outcomes.append(outcome)
    assert len(merged) == 1
    assert [(one.of, one.part) for one in outcomes if one.failure] == [("place", None)]


def test_whose_fault_a_refusal_is_does_not_depend_on_what_is_new(
    archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One new shard, which may not be read: the shards of the nights before tell that others may."""
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    score(config, open_pool=stub_pool())
    write_shard(archive / "new.parquet", ["text"])
    open_shard = Location.open

    def refuse(place: Location) -> Any:
        if place.name == "new.parquet":
            raise UnavailableError(f"no permission for {place.name}")
        return open_shard(place)

    monkeypatch.setattr(Location, "open", refuse)
    scored = score(config, open_pool=stub_pool())
    assert scored.failures == [{"path": "new.parquet", "reason": "no permission for new.parquet"}]
    assert scored.summary["sick_nodes"] == []


def test_parts_that_fail_in_one_pass_are_one_try(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    class Flaky(Stub):
        num_failures = 3

        def predict_column(self, texts: pa.Array) -> pa.Table:
            if texts[0].as_py().startswith(b"text") and self.num_failures:
                self.num_failures -= 1
                raise MemoryError("no memory")
            return super().predict_column(texts)

    @contextmanager
    def open_pool(request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
        pool = LocalPool(replace(request, step_bytes=300), Flaky())
        pool.unit_bytes = 1000
        yield pool

    write_shard(archive / "large.parquet", [f"text {row}" for row in range(400)])
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    scored = score(config, open_pool=open_pool)
    assert (scored.failures, scored.summary["num_shards_committed"]) == ([], 3)
    assert [one["num_failures"] for one in scored.summary["sick_nodes"]] == [1]


def test_what_was_not_tried_comes_first_in_the_next_pass(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    begun = list[list[str]]()

    class Sick(LocalPool):
        def run(self, work: Work) -> Generator[Outcome, None, None]:
            begun.append([unit.shards[0].path for unit in work.units])
            first = work.units[0].shards[0]
            failed = [Outcome(shard=first, failure="full", of="place")]
            yield from failed if len(begun) == 1 else super().run(work)

    @contextmanager
    def open_pool(request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
        yield Sick(request, Stub())

    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    assert score(config, open_pool=open_pool).failures == []
    assert begun == [["a.parquet", "b/c.parquet"], ["b/c.parquet", "a.parquet"]]


def test_what_a_pass_has_staged_and_not_reported_counts(archive: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """A pass that ends because of a sick node leaves what others were doing; the next one scores none of it again."""

    class Early(LocalPool):
        num_passes = 0

        def run(self, work: Work) -> Generator[Outcome, None, None]:
            self.num_passes += 1
            list(super().run(work))
            yield from ()

    pools = list[Early]()

    @contextmanager
    def open_pool(request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
        pools.append(Early(replace(request, step_bytes=300), Stub()))
        pools[-1].unit_bytes = 1500
        yield pools[-1]

    write_shard(archive / "large.parquet", [f"text {row}" for row in range(400)])
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    scored = score(config.model_copy(update={"max_error_fraction": 1}), open_pool=open_pool)
    assert [pool.num_passes for pool in pools] == [1]
    assert (scored.summary["num_shards_committed"], scored.summary["num_rows"]) == (3, 444)
    assert not (tmp_path / "scored" / "staging").exists()  # the parts of what was merged, too


def test_what_is_reported_before_the_storage_is_away_is_reported_once(
    archive: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, waits = Manifest.append, list[float]()

    def away_once(book: Manifest, run_id: str, records: pa.Table) -> None:
        if len(records) and not waits:
            raise UnavailableError.because("away", "cannot reach s3://bucket")
        append(book, run_id, records)

    monkeypatch.setattr(Manifest, "append", away_once)
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    config = ScoreConfig(bundle=str(tiny_bundle), input=str(archive), output=str(tmp_path / "scored"))
    assert score(config, open_pool=stub_pool()).summary["num_shards_committed"] == 2
    reports = [pq.read_table(file)["path"] for file in (tmp_path / "scored").glob("runs/*/shards-*")]
    assert sorted(path.as_py() for report in reports for path in report) == ["a.parquet", "b/c.parquet"]


@pytest.mark.parametrize(
    ("name", "num_staged"),
    [
        ("config.json", 0),
        ("records.parquet", 2),
        ("intent.json", 2),
        ("a.parquet", 0),
        ("latest.json", 0),
    ],
)
def test_storage_that_is_away_when_a_run_begins_or_publishes_ends_it_and_the_next_goes_on(
    name: str,
    num_staged: int,
    archive: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is away when this file is to be put, or moved to."""
    staged, move = Location.staged, Location.move

    def check(place: Location) -> None:
        if place.name == name:
            raise UnavailableError.because("away", f"cannot reach {place}. Check AWS_ENDPOINT_URL")

    monkeypatch.setattr("bertray.drivers.score.pool_of", stub_pool())
    options = {"--bundle": tiny_bundle, "--input": archive, "--output": tmp_path / "scored", "--num-actors": 0}
    words = [str(word) for option in options.items() for word in option]
    with monkeypatch.context() as patch:
        patch.setattr(Location, "staged", lambda place: check(place) or staged(place))
        patch.setattr(Location, "move", lambda place, target: check(target) or move(place, target))
        assert command("score")(words) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("error: cannot reach ") and f"{name}. Check" in said.err
    assert command("score")(words) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    num_scored = 2 if name == "config.json" else 0  # nothing is scored twice
    assert (summary["num_shards_staged"], summary["num_shards_committed"]) == (num_staged, num_scored)
    assert verify(Location.of(str(tmp_path / "scored")))[1] == []
    assert len(list((tmp_path / "scored" / "predictions").rglob("*.parquet"))) == 2


def test_a_bundle_that_is_not_there_is_said_before_the_input(tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("bundle", "input", "output")}
    with pytest.raises(BundleError, match="bundle"):
        score(ScoreConfig(**places), open_pool=stub_pool())


# Says what Ray will find in the environment when it is imported, or that it was not.
WATCHING = """
import json, os, sys
from importlib.abc import MetaPathFinder

class Watch(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "ray":
            print(os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
from bertray import ScoreConfig, score
score(ScoreConfig(**json.loads(sys.argv[1])))
print("done")
"""


@pytest.mark.services
@pytest.mark.parametrize(("num_actors", "expected"), [(1, "0"), (0, "done")])
def test_what_a_program_starts_listens_on_loopback(
    num_actors: int, expected: str, archive: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Ray reads a variable when it is imported; the command line's own start is tested with a cluster."""
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(tmp_path / "scored")}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", WATCHING, json.dumps(places | {"num_actors": num_actors})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected, done.stderr


def test_a_shard_is_complete_with_its_last_part() -> None:
    whole, cut = FileInfo("whole", 100, "v"), FileInfo("cut", 390, "v")
    work = divide([whole, cut], 100, 1, "request", set())
    assert work.complete() == []
    assert work.take(Outcome(shard=whole, counts=Counts())) is None
    assert [work.take(Outcome(shard=cut, part=part)) for part in (3, 0, 1)] == [None] * 3
    assert work.take(Outcome(shard=cut, part=2, failure="why")) is None
    assert work.take(Outcome(shard=cut, part=2)) == cut
