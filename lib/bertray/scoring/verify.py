"""Hold every published file against its record, and the records against runs/latest.json.

Changes nothing, unless it is to drop the records of files that do not hold: then the next run scores these shards
again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import LockedError, RequestError, ShardError, ShardRefusedError, UnavailableError
from bertray.metrics.profile import Profile, given_labels
from bertray.schema import ERROR, LABEL, LABELS, RECORD_SCHEMA, ROW, VALUE
from bertray.scoring.listing import PREDICTIONS, predictions_name, squeezed
from bertray.scoring.manifest import Manifest
from bertray.scoring.publish import described_anew, is_under_way
from bertray.scoring.runs import Announcement, Published, Runs, profile_of
from bertray.scoring.score_shard import misfit
from bertray.scoring.shard_reader import opened
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.storage.outputs import in_parallel, without_paths


def verify(
    output: Location, num_sampled: int | None = None, *, repair: bool = False
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Check what `bertray score` has published.

    Args:
        num_sampled: read so many files, drawn at random, instead of all.
        repair: drop the records of files that do not hold.

    Returns:
        Counts of what was checked, and `path` and `problem` of what does not hold.

    Raises:
        RequestError: nothing is announced there; or a file cannot be read now, and might have to be repaired.
        LockedError: a run is publishing, or died while it did; with `repair`, one uses the output.
    """
    latest = _announced(output)
    run_id = new_run_id()
    with RunLock(output, run_id).held() if repair else nullcontext() as lock:
        if lock and lock.was_left_behind:
            output.remove_unfinished()
        facts, problems, broken = _checked(output, latest, num_sampled, can_skip=not repair)
        if Runs(output).latest() != latest or is_under_way(output):
            raise LockedError(f"a run has published to {output} meanwhile: verify again")
        if lock:
            lock.check()
            facts |= {"num_records_dropped": len(broken)}
        if lock and broken:
            records = without_paths(Manifest(output).latest(RECORD_SCHEMA), broken)
            Manifest(output).replace(run_id, records)
            Runs(output).announce(described_anew(latest, records))
    return {**facts, "num_problems": len(problems)}, sorted(problems, key=lambda one: one["path"])


def _announced(output: Location) -> Announcement:
    if is_under_way(output):
        raise LockedError(
            f"a run is publishing to {output}: verify when it is done; if it died, the next bertray score completes it"
        )
    if latest := Runs(output).latest():
        return latest
    if num_records := len(Manifest(output).latest()):
        raise RequestError(
            f"{output} has {num_records} records and no runs/latest.json: the next bertray score announces them again"
        )
    raise RequestError(f"{output} has no runs/latest.json: bertray score has published nothing there")


def _checked(
    output: Location, latest: Announcement, num_sampled: int | None, *, can_skip: bool
) -> tuple[dict[str, Any], list[dict[str, str]], list[str]]:
    """Counts, problems, and the shards whose file does not hold. `can_skip`: what cannot be read is a problem, too."""
    records = Manifest(output).latest(RECORD_SCHEMA)
    names = ["path", "size_bytes", "version", "fingerprint", "num_rows", "num_rows_error", "run_id", "labels"]
    rows = records.select(names).to_pylist()
    present = {info.path for info in (output / PREDICTIONS).files((".parquet",))}
    recorded = {squeezed(predictions_name(row["path"])) for row in rows}
    problems = [
        *_of_announcement(records, latest.published),
        *({"path": path, "problem": "it has no record"} for path in present if squeezed(path) not in recorded),
        *(
            {"path": row["path"], "problem": f"run {row['run_id']} is later than the announced {latest.run_id}"}
            for row in rows
            if row["run_id"] > latest.run_id
        ),
    ]
    if num_sampled is not None:
        rows = random.Random(0).sample(rows, min(num_sampled, len(rows)))
    found = in_parallel(partial(_of_file, output / PREDICTIONS, can_skip=can_skip), rows)
    of_files = [{"path": row["path"], "problem": one} for row, one in zip(rows, found, strict=True) if one]
    facts = {"run_id": latest.run_id, "num_shards": len(records), "num_files_read": len(rows)}
    return facts, problems + of_files, [one["path"] for one in of_files]


def _of_announcement(records: pa.Table, published: Published | None) -> Iterator[dict[str, str]]:
    where = "runs/latest.json"
    if published is not None:
        num_gone, profile = published.num_shards_gone, published.profile
        num_shards = published.num_shards + (num_gone or 0)
        if num_shards > len(records) or (num_gone is not None and num_shards < len(records)):
            yield {"path": where, "problem": f"it says {num_shards} shards; there are {len(records)} records"}
        elif num_shards == len(records) and not _agree(profile + (published.profile_gone or Profile()), records):
            yield {"path": where, "problem": "its profile is not the sum of the records'"}


def _agree(profile: Profile, records: pa.Table) -> bool:
    """Whether a profile is the sum of the records', but for the rounding of sums in another order."""
    one, two = dict(profile), dict(profile_of(records))
    return all(
        math.isclose(one[name], two[name], rel_tol=1e-9) if isinstance(one[name], float) else one[name] == two[name]
        for name in one
    )


def _of_file(folder: Location, record: dict[str, Any], *, can_skip: bool) -> str:
    """What is wrong with a file; empty: nothing."""
    try:
        with opened(folder / predictions_name(record["path"])) as file:
            return _of_content(file, record)
    except (ShardError, UnavailableError, pa.ArrowException, OSError) as error:
        cause = error.__cause__ if isinstance(error, ShardRefusedError) else error
        if not can_skip and isinstance(cause, UnavailableError) and cause.why != "missing":
            raise UnavailableError(str(error)) from error  # the file may well hold
        return str(error)


def _of_content(file: pq.ParquetFile, record: dict[str, Any]) -> str:
    shard = FileInfo(record["path"], record["size_bytes"], record["version"])
    if problem := misfit(file, shard, record["fingerprint"]):
        return problem
    if file.metadata.num_rows != record["num_rows"]:
        return f"it has {file.metadata.num_rows} rows, its record says {record['num_rows']}"
    answer = VALUE if VALUE in file.schema_arrow.names else LABEL
    if missing := {ROW, answer, ERROR} - set(file.schema_arrow.names):
        return f"it has no column {min(missing)}"
    names = [name for name in (ROW, LABEL, LABELS, ERROR) if name in file.schema_arrow.names]
    table = file.read(names, use_threads=False)
    if not np.array_equal(table[ROW].to_numpy(), np.arange(record["num_rows"])):
        return "its rows are not 0, 1, 2, …"
    scored = table.filter(table[ERROR].is_null())
    if (num_rows_error := len(table) - len(scored)) != record["num_rows_error"]:
        return f"{num_rows_error} rows have an error, its record says {record['num_rows_error']}"
    counted = {row["values"]: row["counts"] for row in pc.value_counts(given_labels(scored)).to_pylist()}
    recorded = counted if record["labels"] is None else dict(record["labels"])  # old records have none
    for label in sorted({*counted, *recorded}, key=str):
        if counted.get(label, 0) != recorded.get(label, 0):
            return f"{counted.get(label, 0)} rows have the label {label}, its record says {recorded.get(label, 0)}"
    return ""
