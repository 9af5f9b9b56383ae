"""Archives and manifests for benchmarks/scale.py: many, and made in seconds."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.tiny import word_archive
from bertray.schema import MANIFEST_SCHEMA, NUM_LENGTH_BINS, NUM_SCORE_BINS, RECORD_SCHEMA
from bertray.scoring.manifest import Manifest
from bertray.scoring.runs import Announcement, Runs
from bertray.storage.location import Location
from bertray.storage.lock import new_run_id

SHARDS_A_FOLDER = 1000
TINY_ROWS, STUB_ROWS = 4, 250  # of a shard
NUM_LABELS = 10  # of a shard


def linked_archive(folder: Path, num_shards: int, num_rows: int) -> Path:
    """As many shards as asked for, a thousand a folder: hard links of one file a folder."""
    folder.parent.mkdir(exist_ok=True)
    shard = next(word_archive(folder.parent / "one-shard", [num_rows]).iterdir())
    for start in range(0, num_shards, SHARDS_A_FOLDER):
        part = folder / f"part={start // SHARDS_A_FOLDER:04d}"
        part.mkdir(parents=True)
        first = shutil.copyfile(shard, part / f"shard-{start:07d}.parquet")
        for number in range(start + 1, min(start + SHARDS_A_FOLDER, num_shards)):
            (part / f"shard-{number:07d}.parquet").hardlink_to(first)
    return folder


def tiny_archive(folder: Path, num_shards: int) -> Path:
    return linked_archive(folder, num_shards, TINY_ROWS)


def stub_archive(folder: Path, num_shards: int) -> Path:
    return linked_archive(folder, num_shards, STUB_ROWS)


def commit_shards(archive: Path, output: Path, request: str, share: float = 1.0) -> None:
    """Make the first shards of an archive done, and announced."""
    run_id, now = new_run_id(), datetime.now(UTC)
    shards = Location.of(str(archive)).files((".parquet",))
    records = [
        dict(zip(MANIFEST_SCHEMA.names, (*astuple(shard), request, TINY_ROWS, 0, TINY_ROWS, run_id, now), strict=True))
        for shard in shards[: round(share * len(shards))]
    ]
    place = Location.of(str(output))
    Manifest(place).replace(run_id, pa.Table.from_pylist(records, RECORD_SCHEMA))
    Runs(place).announce(Announcement(run_id=run_id))


def write_manifest(output: Path, paths: list[str], request: str, run_id: str) -> int:
    """A manifest with a record of each path, as runs leave it; its bytes."""
    count = len(paths)
    columns: dict[str, Any] = {
        "path": pa.array(paths),
        "size_bytes": pa.array(np.arange(count) + 20_000_000),
        "version": pa.array([hashlib.md5(path.encode(), usedforsecurity=False).hexdigest() for path in paths]),
        "fingerprint": pa.repeat(request, count),
        "num_rows": pa.repeat(1000, count),
        "num_rows_error": pa.repeat(0, count),
        "num_tokens": pa.array(np.arange(count) + 200_000),
        "run_id": pa.repeat(run_id, count),
        "committed_at": pa.array(np.arange(count) + 1_700_000_000_000_000, pa.timestamp("us", tz="UTC")),
    }
    rng = np.random.default_rng(0)
    columns["labels"] = pa.MapArray.from_arrays(
        np.arange(count + 1, dtype=np.int32) * NUM_LABELS,
        pa.array([f"label {number}" for number in range(NUM_LABELS)]).take(
            pa.array(np.arange(count * NUM_LABELS) % NUM_LABELS)
        ),
        pa.array(rng.integers(200, size=count * NUM_LABELS)),
    )
    for name, num_bins in (("scores", NUM_SCORE_BINS), ("lengths", NUM_LENGTH_BINS)):
        bins = pa.array(rng.integers(200, size=count * num_bins, dtype=np.int32))
        columns[name] = pa.FixedSizeListArray.from_arrays(bins, num_bins)
    columns["precision"] = pa.repeat("bf16", count)
    for field in RECORD_SCHEMA:
        if field.name not in columns:
            columns[field.name] = pa.array(rng.integers(1000, size=count)).cast(field.type)
    file = output / "manifest" / f"{run_id}.parquet"
    file.parent.mkdir(parents=True)
    table = pa.table([columns[name] for name in RECORD_SCHEMA.names], schema=RECORD_SCHEMA)
    pq.write_table(table, file, compression="zstd")
    return file.stat().st_size
