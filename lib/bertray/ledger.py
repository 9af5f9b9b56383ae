"""Which shards are done, and how one becomes done.

1. The predictions file of a shard is put in one atomic step under a name that follows from the shard's:
       input/date=2026-01-05/part-0.parquet  ->  output/predictions/date=2026-01-05/part-0.parquet
2. Its record goes into the manifest: output/manifest/<run-id>-00000.parquet; at the end of the run its files are
   merged into output/manifest/<run-id>.parquet.

A shard is done when the manifest holds its path, size and version under the fingerprint of the request. A crash
between 1 and 2 costs the work of a shard and nothing else: the next run writes the same file again.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq

from bertray.bundle import BundleInfo
from bertray.config import ScoreConfig
from bertray.schema import MANIFEST_SCHEMA, PREDICTIONS_VERSION
from bertray.storage import FileInfo, Location


def fingerprint(info: BundleInfo, config: ScoreConfig) -> str:
    """What predictions depend on beside the shard: bundle, columns, engine, precision, the output's form."""
    request = {
        "bundle": info.fingerprint(),
        "text_column": config.text_column,
        "keep_columns": config.keep_columns,
        "precision": config.precision,
        "version": PREDICTIONS_VERSION,
    }
    if config.engine == "openvino":  # added later: what torch has scored stays scored
        request["engine"] = config.engine
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Committed:
    """The manifest's record of a shard whose predictions are in place; fields as in `schema.MANIFEST_SCHEMA`."""

    path: str
    size_bytes: int
    version: str
    fingerprint: str
    num_rows: int
    num_rows_error: int
    num_tokens: int
    run_id: str
    committed_at: datetime


class Manifest:
    """The records of an output folder.

    Args:
        output: the folder of `jobs.score --output`.
    """

    def __init__(self, output: Location) -> None:
        self._folder = output / "manifest"
        self._written: list[Location] = []

    def done(self, request_fingerprint: str) -> set[tuple[str, int, str]]:
        """(path, size, version) of every shard committed under this fingerprint and not since under another."""
        tables = []
        for info in self._folder.files((".parquet",)):
            table = pq.read_table(io.BytesIO((self._folder / info.path).read_bytes()), schema=MANIFEST_SCHEMA)
            tables.append(table)
        if not tables:
            return set()
        columns = (
            pa.concat_tables(tables).sort_by("committed_at").select(["path", "size_bytes", "version", "fingerprint"])
        )
        # The latest record of a path tells what its predictions file holds now.
        latest = {path: rest for path, *rest in zip(*(column.to_pylist() for column in columns), strict=True)}
        return {
            (path, size_bytes, version)
            for path, (size_bytes, version, recorded) in latest.items()
            if recorded == request_fingerprint
        }

    def append(self, run_id: str, records: list[Committed]) -> None:
        """Record shards as done, in one file; none: no file. Call after their predictions are in place."""
        if not records:
            return
        file = self._folder / f"{run_id}-{len(self._written):05d}.parquet"
        _put_records(file, records)
        self._written.append(file)

    def finish(self, run_id: str, records: list[Committed]) -> None:
        """Merge what `append` wrote into one file, so that the next run reads one a run. A crash here harms nothing."""
        if not records:
            return
        _put_records(self._folder / f"{run_id}.parquet", records)
        for file in self._written:
            file.remove()
        self._written = []


def _put_records(file: Location, records: list[Committed]) -> None:
    table = pa.Table.from_pylist([asdict(record) for record in records], schema=MANIFEST_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    file.put(buffer.getvalue())


def pending(shards: list[FileInfo], done: set[tuple[str, int, str]]) -> list[FileInfo]:
    """Shards that have no predictions, or whose content has changed since."""
    return [shard for shard in shards if (shard.path, shard.size_bytes, shard.version) not in done]


def new_run_id() -> str:
    """Sortable by time, unique enough for one output: 20260105T031500.123456Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
