"""Hold every published file against its record, and the records against runs/latest.json. Changes nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from bertray.errors import RequestError, ShardError
from bertray.schema import RECORD_SCHEMA, ROW
from bertray.scoring.listing import PREDICTIONS, predictions_name, squeezed
from bertray.scoring.manifest import Manifest
from bertray.scoring.publish import is_under_way
from bertray.scoring.runs import Runs, profile_of
from bertray.scoring.shard_reader import opened
from bertray.storage.location import Location

_NUM_READERS = 32


def verify(output: Location, num_sampled: int | None = None) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Check what `bertray score` has published.

    Args:
        num_sampled: read so many files, drawn at random, instead of all.

    Returns:
        Counts of what was checked, and `path` and `problem` of what does not hold.

    Raises:
        RequestError: nothing was ever published there.
    """
    latest = Runs(output).latest()
    if latest is None:
        raise RequestError(f"{output} has no runs/latest.json: bertray score has published nothing there")
    records = Manifest(output).latest(RECORD_SCHEMA)
    rows = records.select(["path", "size_bytes", "version", "fingerprint", "num_rows", "run_id"]).to_pylist()
    present = {info.path for info in (output / PREDICTIONS).files((".parquet",))}
    recorded = {squeezed(predictions_name(row["path"])) for row in rows}
    problems = [
        *_of_announcement(output, records, latest.published),
        *({"path": path, "problem": "it has no record"} for path in present if squeezed(path) not in recorded),
        *(
            {"path": row["path"], "problem": f"run {row['run_id']} is later than the announced {latest.run_id}"}
            for row in rows
            if row["run_id"] > latest.run_id
        ),
    ]
    if num_sampled is not None:
        rows = random.Random(0).sample(rows, min(num_sampled, len(rows)))
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        found = list(readers.map(partial(_of_file, output / PREDICTIONS), rows))
    problems += [{"path": row["path"], "problem": one} for row, one in zip(rows, found, strict=True) if one]
    facts = {"run_id": latest.run_id, "num_shards": len(records), "num_files_read": len(rows)}
    return {**facts, "num_problems": len(problems)}, sorted(problems, key=lambda one: one["path"])


def _of_announcement(output: Location, records: Any, published: Any) -> Iterator[dict[str, str]]:
    where = "runs/latest.json"
    if is_under_way(output):
        yield {"path": where, "problem": "a run died while it published: the next bertray score completes it"}
    elif published is not None:
        if published.num_shards > len(records):
            yield {"path": where, "problem": f"it says {published.num_shards} shards; there are {len(records)} records"}
        elif published.num_shards == len(records) and published.profile != profile_of(records):
            yield {"path": where, "problem": "its profile is not the sum of the records'"}


def _of_file(folder: Location, record: dict[str, Any]) -> str:
    """What is wrong with a file; empty: nothing."""
    expected = {
        "bertray.shard": record["path"],
        "bertray.shard_size_bytes": str(record["size_bytes"]),
        "bertray.shard_version": record["version"],
        "bertray.request_fingerprint": record["fingerprint"],
    }
    try:
        with opened(folder / predictions_name(record["path"])) as file:
            facts = {name.decode(): value.decode() for name, value in (file.metadata.metadata or {}).items()}
            for name, value in expected.items():
                if facts.get(name) != value:
                    return f"{name} is {facts.get(name)!r}, its record says {value!r}"
            if file.metadata.num_rows != record["num_rows"]:
                return f"it has {file.metadata.num_rows} rows, its record says {record['num_rows']}"
            if not np.array_equal(file.read([ROW])[ROW].to_numpy(), np.arange(record["num_rows"])):
                return "its rows are not 0, 1, 2, …"
    except ShardError as error:
        return str(error)
    return ""
