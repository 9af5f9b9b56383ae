"""The nightly job: every shard of an archive that has no predictions yet gets them.

1. lock      one run at a time on an output                                            [bertray.run_lock]
2. plan      one listing of the input, held against the manifest                       [bertray.planning]
3. stream    units of pending shards -> a pool of actors, each with the model in memory [bertray.pool]
4. score     the shard becomes a predictions file, put in one atomic step              [actor, bertray.shards]
5. commit    the shard's record goes into the manifest                                 [bertray.ledger]
6. report    runs/<run-id>/config.json, plan.json and summary.json, then runs/latest.json

What fails with a shard is listed with its path and reason; the others go on. Running again is the recovery. Here
nothing is imported that takes time: a run that has nothing to do starts neither Ray nor torch.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from bertray.archive import list_shards, probe, resolved
from bertray.bundle_folder import BundleInfo, read_info
from bertray.config import ScoreConfig
from bertray.errors import RequestError
from bertray.ledger import Committed, Manifest, fingerprint, new_run_id
from bertray.planning import Plan, plan
from bertray.progress import ProgressBar
from bertray.run_lock import RunLock
from bertray.storage import FileInfo, Location
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Committed shards are recorded at least so often; a crash costs the work since.
_RECORD_INTERVAL_S = 5.0


def score(config: ScoreConfig) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Score what is pending; returns the summary and, for every shard that failed, its path and reason.

    Raises:
        RequestError: bundle, input, output or columns do not fit; nothing was started.
        LockedError: another run is at work on this output, or has taken it from this one.
    """
    started_s = time.monotonic()
    config, source, output = resolved(config)
    info = read_info(Location.of(config.bundle))
    archive, shards = list_shards(source)
    run_id = new_run_id()
    if config.prune and archive != source:
        raise RequestError(f"--prune needs the whole archive as --input, and {source} is one shard: leave it out")
    probe(archive, shards, config)
    with RunLock(output, run_id).held() as lock:
        manifest = Manifest(output)
        request_fingerprint = fingerprint(info, config)
        todo = plan(shards, manifest.latest(), request_fingerprint)
        _log_plan(todo, config)
        run = _Run(manifest, run_id, request_fingerprint, lock)
        engine: dict[str, Any] = {"engine": "openvino" if config.engine == "openvino" else "torch"}
        if todo.pending:
            # Written first: what cannot be written is found out before any work, and a crashed run leaves its request.
            _put_json(output / "runs" / run_id / "config.json", _request(config, info))
            _put_json(output / "runs" / run_id / "plan.json", {**todo.counts(), "pending_bytes": todo.pending_bytes})
            _log.info("scoring %.1f MB in run %s", todo.pending_bytes / 1e6, run_id)
            from bertray import cluster, pool  # Ray and torch: seconds, which a run with nothing to do need not take

            engine = pool.prepare_engine(config, output)
            with cluster.session():
                placement = pool.place(config, len(todo.pending))
                outcomes = pool.outcomes(config, info, archive, output, todo.pending, placement, lock.number)
                run.follow(outcomes, len(todo.pending))
            engine["num_actors"] = placement.num_processes
        else:
            _log.info("nothing to do: every shard is committed under this bundle and these columns")
        num_pruned = _prune(output, manifest, run_id, shards) if config.prune else 0
        summary = {
            "output": str(output),
            "run_id": run_id if todo.pending else None,
            **todo.counts(),
            "num_outputs_pruned": num_pruned,
            **run.summary(time.monotonic() - started_s),
            **engine,
        }
        if todo.pending:
            lock.check()
            _put_json(output / "runs" / run_id / "summary.json", {**summary, "failures": run.failures})
            _put_json(output / "runs" / "latest.json", {"run_id": run_id})
    return summary, run.failures


def _log_plan(todo: Plan, config: ScoreConfig) -> None:
    reasons = [
        f"{len(shards)} {reason}"
        for shards, reason in (
            (todo.new, "new"),
            (todo.changed, "changed"),
            (todo.anew, "scored before with another bundle, column, engine or precision"),
        )
        if shards
    ]
    why = f" ({', '.join(reasons)})" if reasons else ""
    _log.info("%d shards to score%s, %d done before", len(todo.pending), why, todo.num_done)
    if todo.gone and not config.prune:
        _log.info("%d shards left the archive; their predictions stay (--prune removes them)", len(todo.gone))


def _prune(output: Location, manifest: Manifest, run_id: str, shards: list[FileInfo]) -> int:
    """Remove predictions of shards that the archive has no more; their number.

    The manifest forgets them first: after a crash in between, files that nobody lists are left, for the next time.
    """
    present = {shard.path for shard in shards}
    extra = [info.path for info in (output / "predictions").files((".parquet",)) if info.path not in present]
    if extra:
        manifest.forget(run_id, extra)
        for path in extra:
            (output / "predictions" / path).remove()
        _log.info("removed %d predictions files of shards that left the archive", len(extra))
    return len(extra)


class _Run:
    """What has become of the shards of one run so far."""

    def __init__(self, manifest: Manifest, run_id: str, request_fingerprint: str, lock: RunLock) -> None:
        self._manifest, self._run_id, self._fingerprint, self._lock = manifest, run_id, request_fingerprint, lock
        self.committed: list[Committed] = []
        self._num_recorded = 0
        self.failures: list[dict[str, str]] = []
        self._num_repeated = {"num_rows_repeated": 0, "num_tokens_repeated": 0}
        self._precisions: set[str] = set()

    def follow(self, outcomes: Iterable[dict[str, Any]], num_shards: int) -> None:
        """Take in outcomes as they come: show progress, record what is committed."""
        recorded_s, num_rows = time.monotonic(), 0
        with ProgressBar("scoring", num_shards, "shards") as bar:
            try:
                for outcome in outcomes:
                    self._take(outcome)
                    num_rows += outcome["num_rows"]
                    bar.update(len(self.committed) + len(self.failures), f"{num_rows:,} rows")
                    if time.monotonic() - recorded_s >= _RECORD_INTERVAL_S:
                        self._record()
                        recorded_s = time.monotonic()
            finally:  # also where the run is interrupted: what is in place need not be scored again
                self._record()
        self._manifest.finish(self._run_id)

    def _record(self) -> None:
        self._lock.check()  # another run may have replaced since what this one has put
        self._manifest.append(self._run_id, self.committed[self._num_recorded :])
        self._num_recorded = len(self.committed)

    def _take(self, outcome: dict[str, Any]) -> None:
        if outcome["failure"]:
            self.failures.append({"path": outcome["path"], "reason": outcome["failure"]})
            _log.warning("failed: %s: %s", outcome["path"], outcome["failure"])
            return
        self._precisions.add(outcome["precision"])
        for name in self._num_repeated:
            self._num_repeated[name] += outcome[name]
        self.committed.append(
            Committed(
                path=outcome["path"],
                size_bytes=outcome["size_bytes"],
                version=outcome["version"],
                fingerprint=self._fingerprint,
                num_rows=outcome["num_rows"],
                num_rows_error=outcome["num_rows_error"],
                num_tokens=outcome["num_tokens"],
                run_id=self._run_id,
                committed_at=datetime.now(UTC),
            )
        )

    def summary(self, wall_s: float) -> dict[str, Any]:
        num_rows = sum(record.num_rows for record in self.committed)
        num_tokens = sum(record.num_tokens for record in self.committed)
        return {
            "num_shards_committed": len(self.committed),
            "num_shards_failed": len(self.failures),
            "num_rows": num_rows,
            "num_rows_error": sum(record.num_rows_error for record in self.committed),
            "num_tokens": num_tokens,
            **self._num_repeated,  # texts that stood earlier in the same step: scored once
            "wall_s": round(wall_s, 2),
            "rows_per_s": round(num_rows / wall_s, 1),
            "tokens_per_s": round((num_tokens - self._num_repeated["num_tokens_repeated"]) / wall_s, 1),
            "precision": "+".join(sorted(self._precisions)) or None,
        }


def _request(config: ScoreConfig, info: BundleInfo) -> dict[str, Any]:
    return {"config": config.model_dump(), "bundle_fingerprint": info.fingerprint(), "versions": versions()}


def _put_json(file: Location, content: dict[str, Any]) -> None:
    file.put((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
