"""Any sequence of changes to an archive, of runs, and of crashes at any commit: manifest, outputs and inputs agree.

Hypothesis looks for a sequence that breaks this; everything is real but Ray and the model (tests/stub_pool.py).
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import hypothesis.strategies as st
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from bertray.bundle.info import read_info
from bertray.drivers.score import ScoreResult, score
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import Manifest, fingerprint
from bertray.scoring.publish import is_under_way
from bertray.scoring.verify import verify
from bertray.storage.location import Location
from bertray.storage.lock import RunLock
from tests.conftest import write_shard
from tests.stub_pool import stub_pool

NAMES = ("a.parquet", "b.parquet", "2026/c.parquet", "2026/d.parquet")
BROKEN = b"not Parquet"
# Shards of more than three times so many bytes are cut: those of some hundred rows are.
UNIT_BYTES = 1500

texts = st.lists(st.sampled_from(["", "one text", "other words", "x" * 40]), max_size=4)
num_rows = st.sampled_from([0, 1, 3, 400])
# Two requests to one output: what one leaves half done, the other must not take for its own.
requests = st.sampled_from([["document_id"], []])


# A process that ends does not clean up; what is held here does not, either.
NEVER_CLOSED: list[ExitStack] = []


class Crash(BaseException):
    """As if the process had ended here."""


@contextmanager
def crash_after(num_changes: int, *, during: bool) -> Iterator[None]:
    """The process ends with the next change of the storage after so many: before that is visible, or right after it."""
    left = [num_changes]
    staged, create, remove, move = Location.staged, Location.create, Location.remove, Location.move

    @contextmanager
    def is_last() -> Iterator[None]:
        left[0] -= 1
        if left[0] < 0 and during:
            raise Crash
        yield
        if left[0] < 0:
            raise Crash

    @contextmanager
    def staged_or_crash(location: Location) -> Iterator[Path]:
        with ExitStack() as stack:
            path = stack.enter_context(staged(location))
            yield path
            try:
                with is_last():
                    stack.close()
            except Crash:
                NEVER_CLOSED.append(stack.pop_all())
                raise

    def create_or_crash(location: Location, data: bytes) -> bool:
        with is_last():
            return create(location, data)

    def remove_or_crash(location: Location, *, is_file: bool = False) -> None:
        with is_last():
            remove(location, is_file=is_file)

    def move_or_crash(location: Location, target: Location) -> bool:
        with is_last():
            return move(location, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Location, "move", move_or_crash)
        patch.setattr(Location, "staged", staged_or_crash)
        patch.setattr(Location, "create", create_or_crash)
        patch.setattr(Location, "remove", remove_or_crash)
        patch.setattr(RunLock, "held", held_by_the_dead)
        yield


@contextmanager
def held_by_the_dead(lock: RunLock) -> Iterator[RunLock]:
    """As if by another process of this machine, which is gone when the next run looks."""
    machine = lock._record.process.rpartition(" ")[0]
    lock._record = lock._record.model_copy(update={"process": f"{machine} 0"})
    lock._take()
    yield lock
    lock._release()


class Nights(RuleBasedStateMachine):
    """An archive, its output, and what should be in both."""

    bundle: Path

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bertray-nights-"))
        self.archive, self.output = self.folder / "archive", self.folder / "scored"
        self.archive.mkdir()
        self.clock = 0
        self.is_settled = False
        self.keep_columns = ["document_id"]  # of the last run
        self.earlier: dict[str, tuple[bytes, int]] = {}  # what a shard was before: its content and time
        (self.archive / ".keep").touch()
        self.write("a.parquet", ["one text"], 3)
        self.write("2026/c.parquet", ["one text", "other words"], 400)

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def paths(self) -> dict[str, Path]:
        return {str(path.relative_to(self.archive)): path for path in sorted(self.archive.rglob("*.parquet"))}

    @rule(name=st.sampled_from(NAMES), words=texts, times=num_rows)
    def write(self, name: str, words: list[str], times: int) -> None:
        """Add or change a shard."""
        self.clock += 1
        rows: list[str | None] = [
            f"{word} {row} {self.clock}" if word else None for row in range(times) for word in words
        ]
        self.put_aside(name)
        write_shard(self.archive / name, rows)
        self.is_settled = False

    def put_aside(self, name: str) -> None:
        path = self.archive / name
        if path.exists():
            self.earlier[name] = path.read_bytes(), path.stat().st_mtime_ns

    @precondition(lambda self: self.earlier)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Put an earlier version of a shard back, with its time, as from a backup."""
        name = data.draw(st.sampled_from(sorted(self.earlier)))
        content, mtime_ns = self.earlier[name]
        self.put_aside(name)
        (self.archive / name).write_bytes(content)
        os.utime(self.archive / name, ns=(mtime_ns, mtime_ns))
        self.is_settled = False

    @precondition(lambda self: (self.archive / "2026/c.parquet").exists())
    @rule()
    def rewrite(self) -> None:
        """A large shard, with as many rows as it had in the beginning: parts of the old one would fit."""
        self.write("2026/c.parquet", ["one text", "other words"], 400)

    @rule(name=st.sampled_from(NAMES))
    def corrupt(self, name: str) -> None:
        (self.archive / name).parent.mkdir(exist_ok=True)
        self.put_aside(name)
        (self.archive / name).write_bytes(BROKEN)
        self.is_settled = False

    @precondition(lambda self: len(self.paths()) > 1)
    @rule(name=st.sampled_from(NAMES))
    def delete(self, name: str) -> None:
        (self.archive / name).unlink(missing_ok=True)
        if not self.paths():
            self.write(name, ["one text"], 1)
        self.is_settled = False

    @rule(prune=st.booleans(), keep_columns=requests)
    def run(self, prune: bool, keep_columns: list[str]) -> None:
        scored = self.score(prune, keep_columns)
        assert {failure["path"] for failure in scored.failures} <= {
            name for name, path in self.paths().items() if path.read_bytes() == BROKEN
        }
        self.is_settled = True
        if prune:
            assert set(self.outputs()) <= set(self.paths())

    @rule(num_changes=st.integers(0, 25), during=st.booleans(), prune=st.booleans(), keep_columns=requests)
    def crash(self, num_changes: int, during: bool, prune: bool, keep_columns: list[str]) -> None:
        self.is_settled = False
        try:
            with crash_after(num_changes, during=during):
                self.score(prune, keep_columns)
        except Crash:
            return
        self.is_settled = True

    def config(self, prune: bool = False) -> ScoreConfig:
        return ScoreConfig(
            bundle=str(self.bundle),
            input=str(self.archive),
            output=str(self.output),
            keep_columns=self.keep_columns,
            prune=prune,
            max_error_fraction=1,
            max_distance=1,
            max_mean_change=2,
            rescore=True,
        )

    def score(self, prune: bool, keep_columns: list[str]) -> ScoreResult:
        self.keep_columns = keep_columns
        return score(self.config(prune), open_pool=stub_pool(UNIT_BYTES))

    def outputs(self) -> dict[str, Path]:
        folder = self.output / "predictions"
        return {str(path.relative_to(folder)): path for path in folder.rglob("*.parquet")}

    @invariant()
    def whatever_is_visible_is_whole(self) -> None:
        """A predictions file, at any moment, can be read, and has rows 0, 1, 2, ... of one version of its shard."""
        if not hasattr(self, "output"):
            return
        for path in self.outputs().values():
            table = pq.ParquetFile(path).read()
            assert table["row"].to_pylist() == list(range(len(table)))
            assert int(table.schema.metadata[b"bertray.shard_size_bytes"]) > 0

    @invariant()
    def every_record_describes_its_file(self) -> None:
        """At any moment but amid a publication, which the next run completes."""
        if not hasattr(self, "output") or is_under_way(Location.of(str(self.output))):
            return
        for record in Manifest(Location.of(str(self.output))).latest().to_pylist():
            table = pq.ParquetFile(self.outputs()[record["path"]]).read()
            found = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
            assert found["bertray.request_fingerprint"] == record["fingerprint"]
            assert found["bertray.shard_version"] == record["version"]
            assert (found["bertray.shard_size_bytes"], len(table)) == (str(record["size_bytes"]), record["num_rows"])

    @invariant()
    def what_is_done_is_what_the_archive_has(self) -> None:
        """After a run that went to its end."""
        if not getattr(self, "is_settled", False):
            return
        output = Location.of(str(self.output))
        request = fingerprint(read_info(Location.of(str(self.bundle))), self.config())
        latest = Manifest(output).latest()
        done = {row["path"]: row for row in latest.to_pylist()}
        for name, path in self.paths().items():
            if path.read_bytes() == BROKEN:
                continue
            source, found = pq.ParquetFile(path).read(), pq.ParquetFile(self.outputs()[name]).read()
            assert found.schema.metadata[b"bertray.request_fingerprint"].decode() == request
            assert ("document_id" in found.column_names) == bool(self.keep_columns)
            if self.keep_columns:
                assert found["document_id"].equals(source["document_id"])
            for text, label, error in zip(
                source["text"].to_pylist(), found["label"].to_pylist(), found["error"].to_pylist(), strict=True
            ):
                assert (label, error) == ((text[0], None) if text else (None, "text is empty"))
            assert (done[name]["num_rows"], done[name]["fingerprint"]) == (source.num_rows, request)
            assert (done[name]["size_bytes"], done[name]["version"]) == (
                path.stat().st_size,
                str(path.stat().st_mtime_ns),
            )
        assert set(done) <= set(self.outputs())
        self.nothing_is_left_to_announce()
        scored = self.score(False, self.keep_columns)  # twice is once, but for what is broken
        assert scored.summary["num_shards_committed"] == 0
        assert scored.summary["num_shards_failed"] == sum(path.read_bytes() == BROKEN for path in self.paths().values())

    def nothing_is_left_to_announce(self) -> None:
        found = verify(Location.of(str(self.output)))[1] if self.outputs() else []
        assert not found
        assert not list(self.output.rglob("*.tmp"))
        assert not [path for name in ("staging", "staged", "publishing") for path in (self.output / name).rglob("*")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_sequence_of_nights(tiny_bundle: Path) -> None:
    Nights.bundle = tiny_bundle
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Nights, settings=settings(max_examples=20, stateful_step_count=15, deadline=None)
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("is_gone_later", [False, True])
def test_a_crash_after_any_change_leaves_nothing_staged(during: bool, is_gone_later: bool, tiny_bundle: Path) -> None:
    """Of one shard in parts: where its record was written last, or where it is gone when all others are staged."""
    Nights.bundle = tiny_bundle
    num_changes, has_crashed = 0, True
    while has_crashed:
        nights = Nights()
        nights.start()
        if not is_gone_later:
            nights.delete("a.parquet")
        nights.crash(num_changes, during, prune=False, keep_columns=["document_id"])
        num_changes, has_crashed = num_changes + 1, not nights.is_settled
        if is_gone_later and has_crashed:
            nights.delete("2026/c.parquet")
        nights.run(prune=False, keep_columns=["document_id"])
        assert not [path for path in (nights.output / "staging").rglob("*") if path.is_file()]
        nights.teardown()
    assert num_changes > 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("is_restored", [False, True])
def test_a_crash_amid_another_request_or_version_leaves_no_file_that_counts_as_done(
    is_restored: bool, tiny_bundle: Path
) -> None:
    """After any change of the second run the first request is asked for again, or the first version is put back."""
    Nights.bundle = tiny_bundle
    num_changes, has_crashed = 0, True
    while has_crashed:
        nights = Nights()
        nights.start()
        nights.run(prune=False, keep_columns=["document_id"])
        before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in nights.paths().items()}
        if is_restored:
            for name in before:
                nights.write(name, ["other words", "x"], 2)
        nights.crash(num_changes, True, prune=False, keep_columns=["document_id"] if is_restored else [])
        num_changes, has_crashed = num_changes + 1, not nights.is_settled
        for name, (content, mtime_ns) in before.items():
            (nights.archive / name).write_bytes(content)
            os.utime(nights.archive / name, ns=(mtime_ns, mtime_ns))
        nights.run(prune=False, keep_columns=["document_id"])
        nights.what_is_done_is_what_the_archive_has()
        nights.teardown()
    assert num_changes > 5
