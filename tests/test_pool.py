"""What an actor does with a shard that does not stay as it was listed."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray import Bundle
from bertray.config import ScoreConfig
from bertray.errors import LockedError, ShardChangedError, ShardError
from bertray.pool import ScoringActor, units_of
from bertray.run_lock import RunLock
from bertray.storage import FileInfo, Location
from tests.conftest import write_shard


def sizes(units: list[list[FileInfo]]) -> list[list[int]]:
    return [[shard.size_bytes for shard in unit] for unit in units]


def shards_of(*sizes_bytes: int) -> list[FileInfo]:
    return [FileInfo(f"{index}", size_bytes, "v") for index, size_bytes in enumerate(sizes_bytes)]


def test_small_shards_share_a_task() -> None:
    tiny = units_of(shards_of(*[1000] * 1_000_000), 2 << 20, 8)
    assert len(tiny) == 3907  # of 256 each
    assert [shard.path for unit in tiny[:2] for shard in unit] == [str(index) for index in range(512)]
    mixed = [30, 30, 50, 200, 10, 10] * 20
    found = sizes(units_of(shards_of(*mixed), 100, 1))
    assert found[:3] == [[30, 30], [50], [200]]
    assert [size for unit in found for size in unit] == mixed


def test_few_shards_are_spread_over_the_actors() -> None:
    assert sizes(units_of(shards_of(*[1] * 20), 100, 4)) == [[1]] * 20
    assert sizes(units_of(shards_of(*[1] * 128), 100, 4)) == [[1, 1]] * 64
    assert units_of([], 100, 4) == []


@pytest.fixture
def actor(tiny_bundle: Path, tmp_path: Path) -> Any:
    """An actor without Ray around it."""
    actor = ScoringActor.__new__(ScoringActor)
    actor._bundle = Bundle.load(str(tiny_bundle), "fp32")
    actor._config = ScoreConfig(
        bundle=str(tiny_bundle), input=str(tmp_path / "archive"), output=str(tmp_path / "scored")
    )
    actor._step_bytes, actor._origin = 1 << 20, {"bertray.versions": "{}"}
    actor._lock_number, actor._held_s = 0, -float("inf")
    return actor


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    (tmp_path / "archive").mkdir()
    return write_shard(tmp_path / "archive" / "a.parquet", ["one text", "another"])


def score(actor: Any, shard: Path) -> tuple[FileInfo, pa.Table]:
    place, output = Location.of(str(shard)), shard.parent.parent / "out.parquet"
    listed, _ = actor._score_shard(actor._bundle, place.info(), place, Location.of(str(output)))
    return listed, pq.read_table(output)


def meanwhile(actor: Any, monkeypatch: pytest.MonkeyPatch, *actions: Any) -> None:
    """While a shard is read, do the next of these."""
    predict, left = actor._bundle.predict_column, list(actions)

    def predict_column(column: pa.Array) -> pa.Table:
        if left:
            left.pop(0)()
        return predict(column)

    monkeypatch.setattr(actor._bundle, "predict_column", predict_column)


def test_a_shard_that_is_rewritten_is_read_again(actor: Any, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(actor, monkeypatch, lambda: write_shard(shard, ["quite", "another", "shard"]))
    listed, table = score(actor, shard)
    assert table["row"].to_pylist() == [0, 1, 2]
    assert listed == Location.of(str(shard)).info()
    assert table.schema.metadata[b"bertray.shard_version"].decode() == listed.version


def test_a_shard_that_is_rewritten_all_the_time_is_given_up(
    actor: Any, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile(actor, monkeypatch, *[lambda: write_shard(shard, ["again"])] * 9)
    with pytest.raises(ShardChangedError, match=r"it was rewritten while it was read: \d+ bytes, version \d+; now"):
        score(actor, shard)
    assert not (shard.parent.parent / "out.parquet").exists()


def test_a_shard_that_goes_away(actor: Any, shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meanwhile(actor, monkeypatch, shard.unlink)
    with pytest.raises(ShardError, match="it went away while it was read"):
        score(actor, shard)


def test_nothing_is_put_after_the_lock_was_lost(actor: Any, shard: Path) -> None:
    with (
        RunLock(Location.of(actor._config.output), "another").held(),
        pytest.raises(LockedError, match="run another took"),
    ):
        score(actor, shard)
    assert not (shard.parent.parent / "out.parquet").exists()
