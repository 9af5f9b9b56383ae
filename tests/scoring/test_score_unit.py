"""What is done with units of work, and with a shard that does not stay as it was listed."""

import errno
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray import Bundle
from bertray.errors import ShardError, ShardRefusedError, UnavailableError
from bertray.scoring import score_unit
from bertray.scoring.config import ScoreConfig
from bertray.scoring.score_shard import read_counts
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Outcome, Unit, staged_path
from bertray.storage import patience
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock
from tests.conftest import write_shard


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(str(tiny_bundle), "fp32")


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_shard(tmp_path / "archive" / f"{name}.parquet", [f"{name} {row}" for row in range(20)])
    return tmp_path / "archive"


@pytest.fixture
def scorer(archive: Path, tiny_bundle: Path) -> UnitScorer:
    places = {"bundle": str(tiny_bundle), "input": str(archive), "output": str(archive.parent / "scored")}
    config = ScoreConfig(**places, unit_timeout=7.0)
    request = Request(config, str(archive), "request", "bundle", 0, 1 << 20, samples=("a.parquet", "b.parquet"))
    return UnitScorer(request, fatal=(KeyError,))


def listed(archive: Path, name: str = "a.parquet") -> FileInfo:
    return Location.of(str(archive / name)).info()


class Meanwhile:
    """Predicts as a bundle does, and does something first."""

    def __init__(self, bundle: Bundle, action: Any) -> None:
        self._bundle, self._action = bundle, action
        self.precision, self.schema = bundle.precision, bundle.schema

    def predict_column(self, texts: pa.Array) -> pa.Table:
        self._action()
        return self._bundle.predict_column(texts)


def score(scorer: UnitScorer, archive: Path, bundle: Any) -> Outcome:
    (outcome,) = scorer.score(Unit(shards=(listed(archive),)), bundle)
    if outcome.failure:
        assert not [path for path in (archive.parent / "scored").rglob("*.parquet") if path.is_file()]
    return outcome


def test_a_shard_that_fails_does_not_stop_the_next(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    missing = FileInfo("gone.parquet", 3, "v")
    outcomes = scorer.score(Unit(shards=(missing, listed(archive), listed(archive, "b.parquet"))), bundle)
    assert [outcome.shard.path for outcome in outcomes] == ["gone.parquet", "a.parquet", "b.parquet"]
    assert [bool(outcome.failure) for outcome in outcomes] == [True, False, False]
    assert outcomes[1].counts.profile.num_rows == 20
    assert (outcomes[1].precision, outcomes[1].part) == ("fp32", None)


def test_parts_are_staged_and_merged(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    shard = listed(archive)
    for part in range(3):
        (outcome,) = scorer.score(Unit(shards=(shard,), part=part, num_parts=3), bundle)
        assert (outcome.part, outcome.failure) == (part, "")
    scored = archive.parent / "scored"
    assert len(list((scored / "staging").rglob("*.parquet"))) == 3
    assert not (scored / "predictions").exists()
    merged = scorer.merge(shard, 3)
    assert (merged.part, merged.failure, merged.counts.profile.num_rows, merged.precision) == (None, "", 20, "fp32")
    whole = scored / "staging" / staged_path(shard, "request")
    assert read_counts(Location.of(str(whole))) == (merged.counts, "fp32")
    table = pq.ParquetFile(whole).read()
    assert table["row"].to_pylist() == list(range(20))
    origin = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert (origin["bertray.shard"], origin["bertray.request_fingerprint"]) == ("a.parquet", "request")
    assert json.loads(origin["bertray.versions"])["python"]
    assert list((scored / "staging").rglob("*.parquet")) == [whole]
    assert scorer.merge(shard, 3) == merged  # as when its process died before it said so


def test_what_a_process_that_died_has_half_written_is_removed(
    scorer: UnitScorer, archive: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = archive.parent / "scored" / "staging" / staged_path(listed(archive), "request")
    target.parent.mkdir(parents=True)
    half, others = (target.with_name(f".{name}.0123456789ab.tmp") for name in (target.name, f"{target.name}x"))
    looked_at: list[Location] = []
    monkeypatch.setattr(score_unit, "read_in_isolation", lambda shard, *_: looked_at.append(shard))
    for path in (half, others):
        path.write_bytes(b"half")
    scorer.score(Unit(shards=(listed(archive),)), bundle)  # another actor may be at work on what it is
    assert half.exists()
    scorer.score(Unit(shards=(listed(archive),)), bundle, is_suspect=True)
    assert [place.name for place in looked_at] == ["a.parquet"]
    assert not half.exists()
    assert others.exists()


def test_a_merge_of_what_is_not_all_there(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    scorer.score(Unit(shards=(listed(archive),), part=0, num_parts=3), bundle)
    assert "not found" in scorer.merge(listed(archive), 3).failure


def test_parts_that_cannot_be_merged_are_removed_unless_they_are_only_refused(
    scorer: UnitScorer, archive: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, staging = listed(archive), archive.parent / "scored" / "staging"
    for part in range(3):
        scorer.score(Unit(shards=(shard,), part=part, num_parts=3), bundle)
    with monkeypatch.context() as patch:
        refused = ShardRefusedError("no permission for a part")
        patch.setattr(score_unit, "merge_parts", lambda *_, **__: raise_(refused))
        assert scorer.merge(shard, 3).failure == "no permission for a part"
    assert len(list(staging.rglob("*.parquet"))) == 3
    (staging / staged_path(shard, "request", 1, 3)).write_bytes(b"PAR1")
    assert scorer.merge(shard, 3).failure.startswith("its staged parts cannot be merged, and are removed: not a read")
    assert list(staging.rglob("*.parquet")) == []


def test_a_suspect_is_read_for_no_longer_than_a_unit_may_take(
    scorer: UnitScorer, archive: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    monkeypatch.setattr(score_unit, "read_in_isolation", lambda *arguments: waits.append(arguments[-1]))
    scorer.score(Unit(shards=(listed(archive),)), bundle, is_suspect=True)
    assert waits == [7.0]


def test_a_shard_that_is_rewritten(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    rewrite = Meanwhile(bundle, lambda: write_shard(archive / "a.parquet", ["quite", "another", "shard"]))
    outcome = score(scorer, archive, rewrite)
    assert outcome.of == "version"
    assert outcome.failure.startswith("it was rewritten while it was read: ")


def test_a_shard_that_is_rewritten_so_that_it_cannot_be_read(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    listed_before = listed(archive)
    (archive / "a.parquet").write_bytes(b"half of anoth")
    (outcome,) = scorer.score(Unit(shards=(listed_before,)), bundle)
    assert outcome.of == "version"
    assert "not a readable Parquet file" in outcome.failure


def test_a_shard_that_is_rewritten_before_its_parts_are_merged(
    scorer: UnitScorer, archive: Path, bundle: Bundle
) -> None:
    shard = listed(archive)
    for part in range(3):
        scorer.score(Unit(shards=(shard,), part=part, num_parts=3), bundle)
    write_shard(archive / "a.parquet", [f"other {row}" for row in range(20)])
    assert scorer.merge(shard, 3).of == "version"
    assert not (archive.parent / "scored" / "predictions" / "a.parquet").exists()


def test_a_shard_that_goes_away(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    outcome = score(scorer, archive, Meanwhile(bundle, (archive / "a.parquet").unlink))
    assert "it went away while it was read" in outcome.failure
    assert outcome.of == "shard"


def test_all_shards_that_go_away_are_a_matter_of_the_place(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    """As a mount that is lost while a shard is read."""
    outcome = score(scorer, archive, Meanwhile(bundle, partial(shutil.rmtree, archive)))
    assert "it went away while it was read" in outcome.failure
    assert outcome.of == "place"


def test_a_shard_that_opens_and_is_refused_then_does_not_speak_for_the_others(
    scorer: UnitScorer, archive: Path, bundle: Bundle
) -> None:
    (archive / "b.parquet").unlink()
    outcome = score(scorer, archive, Meanwhile(bundle, partial(raise_, ShardRefusedError("keys expired on the way"))))
    assert (outcome.of, outcome.failure) == ("place", "keys expired on the way")


def test_nothing_is_put_after_the_lock_was_lost(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    with RunLock(Location.of(str(archive.parent / "scored")), "another").held():
        assert "run another took" in score(scorer, archive, bundle).failure


def fail(error: type[Exception]) -> None:
    raise error("broken")


class Once:
    """Fails on the texts of a shard, and not on others."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "of", "reason"),
    [
        (ValueError("broken"), "shard", "ValueError: broken"),
        (ShardError("of the shard"), "shard", "of the shard"),
        (MemoryError("no memory"), "place", "MemoryError: no memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "place", "RuntimeError: Def.*"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "place", "RuntimeError: CUDA.*"),
        (pa.ArrowMemoryError("no memory"), "place", "ArrowMemoryError: no memory"),
        (FULL, "place", "OSError: [Errno 28] No space left on device"),
        (UnavailableError("keys have expired"), "place", "keys have expired"),
    ],
)
def test_whose_fault_an_error_is(
    scorer: UnitScorer, archive: Path, bundle: Bundle, error: Exception, of: str, reason: str
) -> None:
    outcome = score(scorer, archive, Meanwhile(bundle, Once(error)))
    assert outcome.of == of
    assert re.fullmatch(reason.replace("[", r"\["), outcome.failure)
    with pytest.raises(KeyError):
        score(scorer, archive, Meanwhile(bundle, Once(KeyError())))


def test_a_place_that_fails_three_times_in_a_row_gives_up(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    broken = Meanwhile(bundle, partial(fail, ValueError))  # on any text
    for _ in range(2):
        assert score(scorer, archive, broken).of == "place"
    score(scorer, archive, bundle)
    for path in (archive.parent / "scored" / "staging").rglob("*.parquet"):
        path.unlink()
    unit = Unit(shards=(listed(archive),) * 4)
    assert [one.of for one in scorer.score(unit, broken)] == ["place"] * 4  # one shard may be hard on any machine
    assert not scorer.gives_up
    unit = Unit(shards=tuple(shard_named(archive, name) for name in "bcde"))
    assert [one.of for one in scorer.score(unit, broken)] == ["place"] * 2  # the third and fourth are not begun
    assert scorer.gives_up


def shard_named(archive: Path, name: str) -> FileInfo:
    write_shard(archive / f"{name}.parquet", ["a text"])
    return listed(archive, f"{name}.parquet")


def test_a_refusal_is_the_shards_if_others_can_be_read(
    scorer: UnitScorer, archive: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of S3: root may read any file."""
    open_shard, refused = Location.open, set[str]()

    def refuse(self: Location) -> Any:
        if self.name in refused:
            raise UnavailableError(f"no permission for {self}")
        return open_shard(self)

    monkeypatch.setattr(Location, "open", refuse)
    for name, of in (("a.parquet", "shard"), ("b.parquet", "place")):
        refused.add(name)
        assert score(scorer, archive, bundle).of == of


def test_where_nothing_is_there_the_place_is_at_fault(scorer: UnitScorer, archive: Path, bundle: Bundle) -> None:
    """As where a node has not mounted the archive."""
    before = listed(archive)
    (archive / "a.parquet").unlink()
    assert scorer.score(Unit(shards=(before,)), bundle)[0].of == "shard"
    (archive / "b.parquet").unlink()
    assert scorer.score(Unit(shards=(before,)), bundle)[0].of == "place"


def test_a_unit_waits_for_storage_that_is_away(
    scorer: UnitScorer, archive: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(patience.time, "sleep", lambda _: None)
    away = UnavailableError.because("away", "cannot reach s3://bucket")
    assert score(scorer, archive, Meanwhile(bundle, Once(away))).failure == ""
    assert "the storage does not answer since" in caplog.text
    for path in (archive.parent / "scored" / "staging").rglob("*.parquet"):
        path.unlink()
    shard, info, is_away = listed(archive), Location.info, Once(away)
    monkeypatch.setattr(Location, "info", lambda place: is_away() or info(place))  # asked before a file is put
    (outcome,) = scorer.score(Unit(shards=(shard,)), bundle)
    assert outcome.failure == ""
    monkeypatch.setattr(patience, "MAX_AWAY_S", 0)
    (outcome,) = scorer.score(Unit(shards=(listed(archive),)), Meanwhile(bundle, partial(raise_, away)))
    assert outcome.of == "place"
    assert scorer.gives_up  # the next one would wait as long


def raise_(error: Exception) -> None:
    raise error
