"""Publish what is staged, in steps that the next run can complete.

1. intend    publishing/records.parquet, then publishing/intent.json: which files, and what will be announced
2. move      staging/<path>/<key>.parquet -> predictions/<path>, many at a time: renamed on a disk, copied by S3
3. record    the records of these files, from staged/ to manifest/
4. announce  runs/latest.json
5. tidy up   what S3 has copied, the intent

The gate has spoken before step 1. A process that dies later leaves an intent, and the next run completes it before it
does anything else, whatever it is asked for. While there is an intent, files of predictions/ may be newer than their
records.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from bertray.schema import RECORD_SCHEMA
from bertray.scoring.archive import Archive
from bertray.scoring.listing import PREDICTIONS, predictions_name
from bertray.scoring.manifest import Manifest, shards_in
from bertray.scoring.runs import MAX_LISTED_SHARDS, Announcement, Published, Runs, profile_of
from bertray.scoring.staging import Staging
from bertray.storage.location import MAX_CONNECTIONS, Location
from bertray.storage.outputs import last_of_each_path, put_records, read_records

_log = logging.getLogger(__name__)

_PUBLISHING, _INTENT, _RECORDS = "publishing", "intent.json", "records.parquet"
# Renames take 0.1 ms each and requests to a store 100 ms.
_NUM_MOVES_LOCAL, _NUM_MOVES_REMOTE = 4, MAX_CONNECTIONS


def describe(archive: Archive, before: pa.Table, new: pa.Table, older: list[str], labels: tuple[str, ...]) -> Published:
    """What predictions/ will hold of the archive.

    Args:
        before, new: records in `schema.RECORD_SCHEMA`, published before and now.
        older: the shards whose new version or request could not be scored.
    """
    records = last_of_each_path(pa.concat_tables([before, new]))
    if archive.is_whole:
        present = pa.array(sorted(archive.paths()), pa.string())
        records = records.filter(pc.is_in(records["path"], value_set=present))
    return Published(
        num_shards=len(records),
        num_shards_older=len(older),
        older=older[:MAX_LISTED_SHARDS],
        num_shards_without_profile=records["scores"].null_count,
        profile=profile_of(records),
        labels=labels,
    )


def publish(output: Location, records: pa.Table, announcement: Announcement) -> None:
    """Publish staged files and announce them.

    Args:
        records: of the files, in `schema.RECORD_SCHEMA`.
    """
    folder = output / _PUBLISHING
    now = pa.repeat(pa.scalar(datetime.now(UTC), RECORD_SCHEMA.field("committed_at").type), len(records))
    records = records.set_column(
        RECORD_SCHEMA.get_field_index("committed_at"), RECORD_SCHEMA.field("committed_at"), now
    )
    put_records(folder / _RECORDS, records)
    (folder / _INTENT).put(announcement.model_dump_json(indent=2).encode() + b"\n")
    _complete(output, records, announcement)


def complete(output: Location) -> str | None:
    """Complete the publication that a run has begun; returns that run's id, or None if there is none."""
    folder = output / _PUBLISHING
    if not (folder / _INTENT).exists():
        folder.remove()  # records without an intent: the run died before anything was moved
        return None
    announcement = Announcement.model_validate_json((folder / _INTENT).read_bytes())
    records = read_records([folder / _RECORDS], RECORD_SCHEMA)
    _log.info("completing what run %s began to publish: %d shards", announcement.run_id, len(records))
    _complete(output, records, announcement)
    return announcement.run_id


def _complete(output: Location, records: pa.Table, announcement: Announcement) -> None:
    staging = Staging(output)
    sources = list(map(staging.place_of, shards_in(records), records["fingerprint"].to_pylist()))
    targets = [output / PREDICTIONS / predictions_name(path) for path in records["path"].to_pylist()]
    with ThreadPoolExecutor(_NUM_MOVES_LOCAL if output.is_local else _NUM_MOVES_REMOTE) as pool:
        list(pool.map(Location.move, sources, targets))
        list(pool.map(Location.sync_names, {folder.path: folder for folder in map(Location.parent, targets)}.values()))
        manifest = Manifest(output)
        manifest.append(announcement.run_id, records)
        manifest.finish(announcement.run_id)
        Runs(output).announce(announcement)
        if not output.is_local:
            list(pool.map(partial(Location.remove, is_file=True), sources))
    staging.finish(announcement.run_id)
    folder = output / _PUBLISHING
    (folder / _INTENT).remove()  # before the records: without an intent they mean nothing
    folder.remove()


def is_under_way(output: Location) -> bool:
    """Whether a run has begun to publish and not completed it."""
    return (output / _PUBLISHING / _INTENT).exists()
