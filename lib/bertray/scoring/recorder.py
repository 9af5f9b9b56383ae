"""The books of a scoring run: what becomes of its shards is taken in as it comes, and written down now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from bertray.progress import ProgressBar
from bertray.scoring.archive import Archive
from bertray.scoring.manifest import Committed, Manifest
from bertray.scoring.runs import Rate, Runs
from bertray.scoring.units import STAGING_FOLDER, Outcome, Work, stale
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock

_log = logging.getLogger(__name__)

# Committed shards are recorded at least so often; a crash costs the work since.
_RECORD_INTERVAL_S = 5.0


class Recorder:
    """What has become of the shards of one run so far.

    Attributes:
        failures: of every shard that failed, its path and the reason.
    """

    def __init__(
        self, manifest: Manifest, runs: Runs, run_id: str, output: Location, request_fingerprint: str, lock: RunLock
    ) -> None:
        self._manifest, self._runs, self._run_id, self._fingerprint = manifest, runs, run_id, request_fingerprint
        self._staging = output / STAGING_FOLDER
        self._lock = lock
        self.failures: list[dict[str, str]] = []
        self._unrecorded: list[Outcome] = []  # of whole shards
        self._merged: list[FileInfo] = []  # of these, those that were put together from parts
        self._num_committed = 0
        # Of committed shards.
        self._num_rows = self._num_rows_error = self._num_rows_review = self._num_tokens = 0
        # Of what this run has scored itself, parts of shards included.
        self._num_tokens_run = self._num_tokens_repeated = self._num_rows_repeated = 0
        self._num_parts_taken_up = 0
        self._precisions: set[str] = set()
        self._scoring_s = 0.0

    def begin(self, replaced: list[str]) -> None:
        """Call when all is ready to score. The records of files that are to be replaced go first.

        A run that ends before their new records are written leaves files of both kinds: only those that have a record
        count as done, whatever is asked for next.
        """
        if replaced:
            self._manifest.forget(self._run_id, replaced)

    def staged(self) -> set[str]:
        """Parts of shards that lie staged, also from runs before."""
        return {info.path for info in self._staging.files((".parquet",))}

    def remove_stale(self, work: Work, archive: Archive) -> None:
        """Remove staged parts that nothing will be merged from; of a part of the archive, those of its own shards."""
        listed = archive.paths()
        for path in stale(work, self._fingerprint, self.staged()):
            if archive.is_whole or path.rpartition("/")[0] in listed:
                (self._staging / path).remove()

    def follow(self, outcomes: Iterable[Outcome], work: Work, *, is_last_pass: bool) -> list[str]:
        """Take in outcomes as they come: show progress, record what is committed; the paths of shards that changed."""
        began_s = recorded_s = time.monotonic()
        num_rows = num_pieces = 0
        changed: set[str] = set()
        failed: set[str] = set()
        self._num_parts_taken_up += sum(work.num_parts.values()) - sum(map(len, work.missing_parts.values()))
        with ProgressBar("scoring", work.num_pieces, "parts of shards" if work.num_parts else "shards") as bar:
            try:
                for outcome in outcomes:
                    is_piece = outcome.part is not None or outcome.shard not in work.num_parts
                    num_pieces += is_piece
                    if outcome.has_changed and not is_last_pass:
                        changed.add(outcome.shard.path)
                    elif outcome.failure and outcome.shard.path not in failed | changed:
                        failed.add(outcome.shard.path)
                        self._fail(outcome)
                    elif not outcome.failure:
                        self._take(outcome, is_piece)
                        if not is_piece:
                            self._merged.append(outcome.shard)
                        num_rows += outcome.counts.profile.num_rows if is_piece else 0
                    bar.update(num_pieces, f"{num_rows:,} rows")
                    if time.monotonic() - recorded_s >= _RECORD_INTERVAL_S:
                        self._record()
                        recorded_s = time.monotonic()
            finally:  # also where the run is interrupted: what is in place need not be scored again
                self._record()
                self._scoring_s += time.monotonic() - began_s
        for path in changed:
            (self._staging / path).remove()
        return sorted(changed)

    def finish(self) -> None:
        """Call when all passes are done."""
        self._manifest.finish(self._run_id)
        if not self.staged():
            self._staging.remove()  # the folders that it was made of

    def _take(self, outcome: Outcome, is_piece: bool) -> None:
        profile = outcome.counts.profile
        if is_piece:
            self._num_tokens_run += profile.num_tokens
            self._num_tokens_repeated += outcome.counts.num_tokens_repeated
            self._num_rows_repeated += outcome.counts.num_rows_repeated
        if outcome.part is None:
            self._precisions.add(outcome.precision)
            self._num_committed += 1
            self._num_rows += profile.num_rows
            self._num_rows_error += profile.num_rows_error
            self._num_rows_review += profile.num_rows_review
            self._num_tokens += profile.num_tokens
            self._unrecorded.append(outcome)

    def _fail(self, outcome: Outcome) -> None:
        self.failures.append({"path": outcome.shard.path, "reason": outcome.failure})
        self._unrecorded.append(outcome)
        _log.warning("failed: %s: %s", outcome.shard.path, outcome.failure)

    def _record(self) -> None:
        self._lock.check()  # another run may have replaced since what this one has put
        # First: what the manifest says is done has been counted. Last: a merged shard without a record is merged again.
        self._runs.append(self._run_id, self._unrecorded)
        self._manifest.append(self._run_id, [self._record_of(one) for one in self._unrecorded if not one.failure])
        for shard in self._merged:
            (self._staging / shard.path).remove()
        self._unrecorded, self._merged = [], []

    def _record_of(self, outcome: Outcome) -> Committed:
        profile = outcome.counts.profile
        return Committed(
            path=outcome.shard.path,
            size_bytes=outcome.shard.size_bytes,
            version=outcome.shard.version,
            fingerprint=self._fingerprint,
            num_rows=profile.num_rows,
            num_rows_error=profile.num_rows_error,
            num_tokens=profile.num_tokens,
            run_id=self._run_id,
            committed_at=datetime.now(UTC),
        )

    def rate(self, num_actors: int) -> Rate | None:
        """Of what this run has scored; None: nothing."""
        num_tokens = self._num_tokens_run - self._num_tokens_repeated
        if not num_tokens:
            return None
        tokens_per_s = round(num_tokens / self._scoring_s, 1)
        return Rate(
            run_id=self._run_id, tokens_per_s=tokens_per_s, num_actors=num_actors, wall_s=round(self._scoring_s, 3)
        )

    @property
    def precision(self) -> str | None:
        """What the model was run in; None: nothing was scored."""
        return "+".join(sorted(self._precisions)) or None

    def summary(self, wall_s: float) -> dict[str, Any]:
        return {
            "num_shards_committed": self._num_committed,
            "num_shards_failed": len(self.failures),
            "num_parts_taken_up": self._num_parts_taken_up,  # of large shards: staged by a run that did not finish them
            "num_rows": self._num_rows,
            "num_rows_error": self._num_rows_error,
            "num_rows_review": self._num_rows_review,
            "num_tokens": self._num_tokens,
            # Of texts that stood earlier in the same step: scored once.
            "num_rows_repeated": self._num_rows_repeated,
            "num_tokens_repeated": self._num_tokens_repeated,
            "wall_s": round(wall_s, 2),
            "rows_per_s": round(self._num_rows / wall_s, 1),
            "tokens_per_s": round((self._num_tokens_run - self._num_tokens_repeated) / wall_s, 1),
            "precision": self.precision,
        }
