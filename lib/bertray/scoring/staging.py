"""Predictions that are not published yet: files in staging/, and the records of whole shards in staged/."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import ShardError
from bertray.schema import MANIFEST_SCHEMA, RECORD_SCHEMA
from bertray.scoring.archive import Archive
from bertray.scoring.manifest import STAGED, Manifest, shards_in
from bertray.scoring.score_shard import read_counts
from bertray.scoring.units import STAGING_FOLDER, Outcome, staged_key, staged_path
from bertray.storage.location import FileInfo, Location
from bertray.storage.outputs import in_parallel, last_of_each_path

_log = logging.getLogger(__name__)


class Staging:
    """What is staged in the folder that `bertray score --output` names.

    Attributes:
        folder: of the files, by `staged_path`.
        book: the records of those that are whole, appended when their files are in place.
    """

    def __init__(self, output: Location) -> None:
        self.folder, self.book = output / STAGING_FOLDER, Manifest(output, STAGED)

    def files(self) -> set[str]:
        """The paths of all staged files, those of other requests too."""
        return {info.path for info in self.folder.files((".parquet",))}

    def records(self, schema: pa.Schema = MANIFEST_SCHEMA) -> pa.Table:
        """The records of staged shards, of any request, whose file is there."""
        # The files first: after a clock was set back, the record of a file that is gone may be the later one.
        records = self.book.all(schema)
        present = self.files() if len(records) else set()
        return last_of_each_path(records.filter(pa.array([path in present for path in _paths(records)], pa.bool_())))

    def records_of(self, archive: Archive, request_fingerprint: str) -> pa.Table:
        """The records of a request, in `schema.RECORD_SCHEMA`, that are about a shard as it is listed."""
        records, listed = self.records(RECORD_SCHEMA), set(archive.shards)
        records = records.filter(pc.equal(records["fingerprint"], request_fingerprint))
        return records.filter(pa.array([shard in listed for shard in shards_in(records)], pa.bool_()))

    def unrecorded(self, shards: list[FileInfo], request_fingerprint: str) -> list[Outcome]:
        """Those of the shards that have a readable staged file; what is to be recorded of it."""
        present = self.files()
        found = [shard for shard in shards if staged_path(shard, request_fingerprint) in present]

        def outcome(shard: FileInfo) -> Outcome | None:
            try:
                counts, precision = read_counts(self.folder / staged_path(shard, request_fingerprint))
            except ShardError as error:
                _log.warning("warning: the staged file of %s is not used: %s", shard.path, error)
                return None
            return Outcome(shard=shard, counts=counts, precision=precision)

        return [one for one in in_parallel(outcome, found) if one]

    def remove_stale(self, archive: Archive, kept: list[FileInfo], request_fingerprint: str) -> None:
        """Remove staged files but those of the shards to keep, and their parts.

        If `archive` is a part of it, only files that are known to be of its shards.
        """
        useful = {staged_key(staged_path(shard, request_fingerprint)) for shard in kept}
        present = self.files()
        if not archive.is_whole:
            records = self.book.latest()
            ours = pa.array(sorted(archive.paths()), pa.string())
            present &= set(_paths(records.filter(pc.is_in(records["path"], value_set=ours))))
        if stale := [path for path in present if staged_key(path) not in useful]:
            _log.info("removing %d staged files of another request, or of shards as they were before", len(stale))
            self._remove(stale)

    def finish(self, run_id: str) -> None:
        """Drop the records of files that are gone, merge the others; remove parts of what is whole."""
        if len(left := self.records(RECORD_SCHEMA)):
            self.book.replace(run_id, left)
            whole = {staged_key(path): path for path in _paths(left)}
            self._remove(path for path in self.files() if whole.get(staged_key(path), path) != path)
        else:
            self.book.remove()
        self.folder.remove_empty_folders()

    def _remove(self, paths: Iterable[str]) -> None:
        in_parallel(lambda path: (self.folder / path).remove(is_file=True), paths)


def _paths(records: pa.Table) -> list[str]:
    """The staged paths of the shards that records are of."""
    return list(map(staged_path, shards_in(records), records["fingerprint"].to_pylist()))
