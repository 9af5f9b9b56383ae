"""Publish what is staged, in steps that the next run can complete.

1. intend    publishing/records.parquet, then publishing/intent.json: which files, and what will be announced
2. move      staging/…/<key>….parquet -> predictions/<path>, many at a time: renamed on a disk, copied by S3
3. record    the records of these files, from staged/ to manifest/
4. announce  runs/latest.json
5. tidy up   what S3 has copied, the intent

The gate has spoken before step 1. A process that dies later leaves an intent, and the next run completes it before it
does anything else, whatever it is asked for. While there is an intent, files of predictions/ may be newer than their
records. `prune` takes back what is published of shards that left the archive.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import ShardError
from bertray.schema import RECORD_SCHEMA
from bertray.scoring.archive import Archive
from bertray.scoring.listing import PREDICTIONS, predictions_name, squeezed
from bertray.scoring.manifest import Manifest, plan, shards_in
from bertray.scoring.runs import MAX_LISTED_SHARDS, Announcement, Published, Runs, profile_of
from bertray.scoring.score_shard import misfit
from bertray.scoring.shard_reader import opened
from bertray.scoring.staging import Staging
from bertray.scoring.units import staged_path
from bertray.storage.location import MAX_CONNECTIONS, FileInfo, Location
from bertray.storage.outputs import last_of_each_path, put_records, read_records, readable, without_paths

_log = logging.getLogger(__name__)

_PUBLISHING, _INTENT, _RECORDS = "publishing", "intent.json", "records.parquet"
# Renames take 0.1 ms each and requests to a store 100 ms.
_NUM_MOVES_LOCAL, _NUM_MOVES_REMOTE = 4, MAX_CONNECTIONS
# --prune removes more of the predictions files only with --prune-many: half an archive is more often lost than left.
_MAX_PRUNED, _MAX_PRUNED_FRACTION = 10, 0.2


def describe(
    archive: Archive,
    records: pa.Table,
    request_fingerprint: str,
    announced: Announcement | None,
    answers: dict[str, Any],
) -> Published:
    """What predictions/ holds of the archive.

    Args:
        records: all that there will be, in `schema.RECORD_SCHEMA`; see `merged`.
        answers: see `Task.answers`.
        announced: where it calls shards older outside of a part of the archive, they still are.
    """
    gone = records[:0]
    if archive.is_whole:
        is_present = pc.is_in(records["path"], value_set=pa.array(sorted(archive.paths()), pa.string()))
        gone, records = records.filter(pc.invert(is_present)), records.filter(is_present)
    todo = plan(archive.shards, records, records[:0], request_fingerprint)
    older, num_unlisted = [shard.path for shard in (*todo.changed, *todo.anew)], 0
    if not archive.is_whole and announced and (before := announced.published):
        older += set(before.older) - archive.paths()
        num_unlisted = before.num_shards_older - len(before.older)  # taken to be outside
    return Published(
        **_sums(records),
        num_shards_older=len(older) + num_unlisted,
        older=sorted(older)[:MAX_LISTED_SHARDS],
        num_shards_gone=len(gone),
        profile_gone=profile_of(gone),
        **answers,
    )


def _sums(records: pa.Table) -> dict[str, Any]:
    return {
        "num_shards": len(records),
        "num_shards_without_profile": records["scores"].null_count,
        "profile": profile_of(records),
    }


def described_anew(announcement: Announcement, records: pa.Table) -> Announcement:
    """The announcement when other records are left, of which nobody knows whether their shards are in the archive."""
    if (before := announcement.published) is None:
        return announcement
    older = [path for path in before.older if path in set(records["path"].to_pylist())]
    num_shards_older = before.num_shards_older - len(before.older) + len(older)
    changed = {**_sums(records), "older": older, "num_shards_older": num_shards_older}
    published = before.model_copy(update={**changed, "num_shards_gone": None, "profile_gone": None})
    return announcement.model_copy(update={"published": published})


def announced_again(output: Location, answers: dict[str, Any]) -> Announcement | None:
    """Announce all that has a record, because latest.json has been removed; None: nothing has."""
    records = Manifest(output).latest(RECORD_SCHEMA)
    if not len(records):
        return None
    run_id = pc.max(records["run_id"]).as_py()
    _log.warning("warning: %s has no runs/latest.json: announcing again %d recorded shards", output, len(records))
    published = Published(**_sums(records), num_shards_older=0, older=[], **answers)
    announcement = Announcement(run_id=run_id, profile=published.profile, published=published)
    Runs(output).announce(announcement)
    return announcement


def merged(before: pa.Table, new: pa.Table) -> pa.Table:
    """The records when new ones are published, in `schema.RECORD_SCHEMA`."""
    paths = set(new["path"].to_pylist())
    names = set(map(_place, paths))
    # Their predictions give way to those of a new shard of another path, as `part-0` to `part-0.parquet`.
    replaced = [path for path in before["path"].to_pylist() if _place(path) in names and path not in paths]
    return without_paths(last_of_each_path(pa.concat_tables([before, new])), replaced)


def _place(path: str) -> str:
    return squeezed(predictions_name(path))


def publish(output: Location, records: pa.Table, announcement: Announcement) -> None:
    """Publish staged files and announce them.

    Args:
        records: of the files, in `schema.RECORD_SCHEMA`.
    """
    folder = output / _PUBLISHING
    # A clock may have been set back: the last record of a path counts, and no record is of a later run than announced.
    last = pc.max(Manifest(output).latest()["committed_at"]).as_py()
    now = max(datetime.now(UTC), last + timedelta(microseconds=1)) if last else datetime.now(UTC)
    committed_at = pa.repeat(pa.scalar(now, RECORD_SCHEMA.field("committed_at").type), len(records))
    run_ids = pc.min_element_wise(records["run_id"], announcement.run_id)
    columns = dict(zip(records.column_names, records.columns, strict=True))
    records = pa.table({**columns, "committed_at": committed_at, "run_id": run_ids}, schema=RECORD_SCHEMA)
    put_records(folder / _RECORDS, records)
    (folder / _INTENT).put(announcement.model_dump_json(indent=2).encode() + b"\n")
    _complete(output, records, announcement)


def complete(output: Location) -> None:
    """Complete the publication that a run has begun, if there is one.

    Raises:
        RequestError: a file of it is damaged.
    """
    folder = output / _PUBLISHING
    if not (folder / _INTENT).exists():
        folder.remove()  # records without an intent: the run died before anything was moved
        return
    next_step = f"Remove {folder}, run bertray verify --repair, then bertray score: it scores again what was moved"
    with readable(folder / _INTENT, next_step):
        announcement = Announcement.model_validate_json((folder / _INTENT).read_bytes())
    records = read_records([folder / _RECORDS], RECORD_SCHEMA, next_step)
    _log.info("completing what run %s began to publish: %d shards", announcement.run_id, len(records))
    _complete(output, records, announcement)


def _complete(output: Location, records: pa.Table, announcement: Announcement) -> None:
    staging, manifest = Staging(output), Manifest(output)
    shards, fingerprints = shards_in(records), records["fingerprint"].to_pylist()
    sources = [staging.folder / path for path in map(staged_path, shards, fingerprints)]
    targets = [output / PREDICTIONS / predictions_name(shard.path) for shard in shards]
    with ThreadPoolExecutor(_NUM_MOVES_LOCAL if output.is_local else _NUM_MOVES_REMOTE) as pool:
        is_in_place = list(pool.map(_moved, sources, targets, shards, fingerprints))
        list(pool.map(Location.sync_names, {folder.path: folder for folder in map(Location.parent, targets)}.values()))
        left_out = [shard.path for shard, is_there in zip(shards, is_in_place, strict=True) if not is_there]
        records = merged(manifest.latest(RECORD_SCHEMA), records.filter(pa.array(is_in_place, pa.bool_())))
        manifest.replace(announcement.run_id, records)
        if left_out:
            _log.warning(
                "warning: %d staged files are gone, such as that of %s: scoring these shards again",
                len(left_out),
                min(left_out),
            )
            announcement = described_anew(announcement, records)
        Runs(output).announce(announcement)
        if not output.is_local:
            list(pool.map(partial(Location.remove, is_file=True), sources))
    staging.finish(announcement.run_id)
    folder = output / _PUBLISHING
    (folder / _INTENT).remove()  # before the records: without an intent they mean nothing
    folder.remove()


def _moved(source: Location, target: Location, shard: FileInfo, request_fingerprint: str) -> bool:
    """Move a staged file; False: it is gone, and was not moved before."""
    if source.move(target):
        return True
    try:
        with opened(target) as file:
            return not misfit(file, shard, request_fingerprint)
    except ShardError:
        return False


def prune(output: Location, run_id: str, archive: Archive, request_fingerprint: str, *, many: bool) -> int:
    """Remove the predictions of shards that have left the archive, unless they are too many; return how many.

    latest.json and the manifest forget them first: after a crash in between, the files are extra again and the next run
    removes them.
    """
    folder, manifest, runs = output / PREDICTIONS, Manifest(output), Runs(output)
    records = manifest.latest(RECORD_SCHEMA)
    paths, present = archive.paths(), {_place(shard.path) for shard in archive.shards}
    gone = [path for path in records["path"].to_pylist() if path not in paths]
    # A shard may have left its file's name to one that failed.
    present -= {_place(path) for path in gone} - {_place(path) for path in paths & set(records["path"].to_pylist())}
    files = [info.path for info in folder.files((".parquet",))]
    extra = [path for path in files if squeezed(path) not in present]
    if not many and len(extra) > max(_MAX_PRUNED, _MAX_PRUNED_FRACTION * len(files)):
        _log.warning(
            "--prune has removed nothing: %d of %d predictions files are of shards that left the archive. If that is "
            "right, say --prune-many",
            len(extra),
            len(files),
        )
        return 0
    if gone:
        left = without_paths(records, gone)
        if (latest := runs.latest()) and latest.published:
            answers = latest.published.model_dump(include={"labels", "score_edges"})
            published = describe(archive, left, request_fingerprint, latest, answers)
            runs.announce(latest.model_copy(update={"published": published}))
        manifest.replace(run_id, left)
    for path in extra:
        (folder / path).remove(is_file=True)
    folder.remove_empty_folders()
    if extra:
        _log.info("removed %d predictions files of shards that left the archive", len(extra))
    return len(extra)


def is_under_way(output: Location) -> bool:
    """Whether a run has begun to publish and not completed it."""
    return (output / _PUBLISHING / _INTENT).exists()
