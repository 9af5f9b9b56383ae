"""What a run has to do, and why."""

from datetime import UTC, datetime

import pyarrow as pa
import pytest

from bertray.schema import MANIFEST_SCHEMA
from bertray.scoring.manifest import Plan, plan
from bertray.storage.location import FileInfo

NOW = datetime(2026, 1, 5, tzinfo=UTC)


def manifest(*records: tuple[str, int, str, str]) -> pa.Table:
    rows = [(*record, 1, 0, 9, "run", NOW) for record in records]
    return pa.Table.from_pylist([dict(zip(MANIFEST_SCHEMA.names, row, strict=True)) for row in rows], MANIFEST_SCHEMA)


def test_reasons() -> None:
    recorded = manifest(
        ("done", 5, "v1", "f"),
        ("grown", 5, "v1", "f"),
        ("rewritten", 5, "v1", "f"),
        ("old", 5, "v1", "g"),
        ("gone", 1, "v", "f"),
    )
    archive = [
        *(FileInfo("done", 5, "v1"), FileInfo("grown", 6, "v1"), FileInfo("new", 7, "v1")),
        *(FileInfo("old", 5, "v1"), FileInfo("rewritten", 5, "v2")),
    ]
    nothing = manifest()
    found = plan(archive, recorded, nothing, "f")
    assert found == Plan([archive[2]], [archive[1], archive[4]], [archive[3]], [], 1, ["gone"])
    assert [shard.path for shard in found.pending] == ["grown", "new", "old", "rewritten"]
    assert found.pending_bytes == 6 + 7 + 5 + 5
    assert found.counts() == {
        "num_shards_new": 1,
        "num_shards_changed": 2,
        "num_shards_anew": 1,
        "num_shards_staged": 0,
        "num_shards_skipped": 1,
        "num_shards_gone": 1,
    }


@pytest.mark.parametrize("num_records", [0, 1])
def test_an_empty_listing(num_records: int) -> None:
    recorded = manifest(*[("a", 1, "v", "f")] * num_records)
    assert plan([], recorded, manifest(), "f") == Plan(gone=["a"] * num_records)


def test_what_is_staged_is_not_scored_again() -> None:
    published = manifest(("old", 5, "v1", "g"), ("done", 5, "v1", "f"))
    staged = manifest(
        ("old", 5, "v1", "f"),
        ("new", 7, "v1", "f"),
        ("rewritten", 5, "v1", "f"),
        ("other", 5, "v1", "g"),
        ("done", 5, "v1", "g"),
    )
    archive = [
        FileInfo(name, 7 if name == "new" else 5, "v2" if name == "rewritten" else "v1")
        for name in ("done", "new", "old", "other", "rewritten")
    ]
    found = plan(archive, published, staged, "f")
    assert (found.staged, found.pending, found.num_done) == ([archive[1], archive[2]], [archive[3], archive[4]], 1)
