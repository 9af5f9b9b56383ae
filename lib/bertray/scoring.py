"""The nightly job: every shard of an archive that has no predictions yet gets them.

1. plan      one listing of the input, less what the manifest holds                    [driver]
2. stream    one row of a Ray Dataset for every pending shard -> a pool of actors, each with the model in memory
3. score     the shard becomes a predictions file, put in one atomic step              [actor, bertray.shards]
4. commit    the shard's record goes into the manifest                                 [driver, bertray.ledger]
5. report    runs/<run-id>/config.json and summary.json, then runs/latest.json

What fails with a shard is listed with its path and reason; the others go on. Running again is the recovery.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from bertray import cluster
from bertray.bundle import Bundle, BundleInfo, read_info, versions
from bertray.config import ScoreConfig
from bertray.errors import RequestError, ShardError
from bertray.ledger import Committed, Manifest, fingerprint, new_run_id, pending
from bertray.progress import ProgressBar
from bertray.shards import read_schema, score_shard
from bertray.storage import FileInfo, Location

_log = logging.getLogger(__name__)

# How many shards are looked into before Ray is started, to refuse a request that cannot succeed.
_NUM_PROBED_SHARDS = 5
# Committed shards are recorded at least so often; a crash costs the work since.
_RECORD_INTERVAL_S = 5.0
_MAX_ACTOR_RESTARTS = 3


def score(config: ScoreConfig) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Score what is pending; returns the summary and, for every shard that failed, its path and reason.

    Raises:
        RequestError: bundle, input, output or columns do not fit; nothing was started.
    """
    started_s = time.monotonic()
    source, output = Location.of(config.input), Location.of(config.output)
    info = read_info(Location.of(config.bundle))
    if source.contains(output):
        raise RequestError(f"--output {output} lies inside --input {source}: the next run would score predictions")
    archive, shards = _list_shards(source)
    run_id = new_run_id()
    request_fingerprint = fingerprint(info, config)
    manifest = Manifest(output)
    todo = pending(shards, manifest.done(request_fingerprint))
    _log.info("%d shards, %d to score, %d done before", len(shards), len(todo), len(shards) - len(todo))

    committed: list[Committed] = []
    failures: list[dict[str, str]] = []
    if todo:
        _probe(archive, todo, config)
        num_bytes = sum(shard.size_bytes for shard in todo)
        _log.info("scoring %.1f MB in run %s", num_bytes / 1e6, run_id)
        with cluster.session(), ProgressBar("scoring", len(todo), "shards") as bar:
            num_recorded, recorded_s, num_rows = 0, time.monotonic(), 0
            try:
                for outcome in _stream(config, archive, output, todo):
                    if outcome["failure"]:
                        failures.append({"path": outcome["path"], "reason": outcome["failure"]})
                        _log.warning("failed: %s: %s", outcome["path"], outcome["failure"])
                    else:
                        committed.append(_record(outcome, request_fingerprint, run_id))
                        num_rows += outcome["num_rows"]
                    bar.update(len(committed) + len(failures), f"{num_rows:,} rows")
                    if time.monotonic() - recorded_s >= _RECORD_INTERVAL_S:
                        manifest.append(run_id, committed[num_recorded:])
                        num_recorded, recorded_s = len(committed), time.monotonic()
            finally:  # also where the run is interrupted: what is in place need not be scored again
                manifest.append(run_id, committed[num_recorded:])
    else:
        _log.info("nothing to do: every shard is committed under this bundle and these columns")

    summary = _summarise(
        output, run_id if todo else None, len(shards) - len(todo), committed, failures, time.monotonic() - started_s
    )
    if todo:
        _write_run(output, run_id, config, info, summary, failures)
    return summary, failures


def _list_shards(source: Location) -> tuple[Location, list[FileInfo]]:
    """The archive's root and its shards; one shard alone has its folder as root."""
    if source.is_file():
        return source.parent(), [source.info()]
    shards = source.files((".parquet",))
    if not shards:
        raise RequestError(f"no .parquet file at {source}. --input takes a folder of shards at any depth, or one shard")
    return source, shards


def _probe(archive: Location, shards: list[FileInfo], config: ScoreConfig) -> None:
    """Refuse now what would fail on every shard.

    Raises:
        RequestError: none of the first shards has the columns asked for.
    """
    wanted = [config.text_column, *config.keep_columns]
    seen = ""
    for shard in shards[:_NUM_PROBED_SHARDS]:
        try:
            names = read_schema(archive / shard.path).names
        except ShardError:
            continue  # the run itself lists it as failed
        if all(name in names for name in wanted):
            return
        missing = next(name for name in wanted if name not in names)
        seen = seen or f"no column {missing!r} in {shard.path}; it has {', '.join(names)}"
    if seen:
        raise RequestError(f"{seen}. Choose with --text-column and --keep-columns")


def _stream(
    config: ScoreConfig, archive: Location, output: Location, shards: list[FileInfo]
) -> Iterator[dict[str, Any]]:
    """Run the actor pool over the shards; yields one outcome a shard, as they finish."""
    placement = cluster.place(config.device, config.num_actors, "--num-actors")
    num_actors = min(placement.num_processes, len(shards))
    _log.info("%d %s actors", num_actors, "GPU" if placement.use_gpu else f"CPU ({placement.cpus_each} threads)")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # one bar, ours
    units = [
        {
            "path": shard.path,
            "size_bytes": shard.size_bytes,
            "version": shard.version,
            "shard": str(archive / shard.path),
            "predictions": str(output / "predictions" / shard.path),
        }
        for shard in shards
    ]
    with warnings.catch_warnings():
        # In Ray 2.60 restarts can be bounded only through arguments that 2.64 will take in another form.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # One row is one shard and one block: Ray neither mixes nor splits shards, and a retry repeats one alone.
        dataset = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
            ScoringActor,
            fn_constructor_kwargs={"config": config.model_dump()},
            batch_size=1,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=num_actors, max_tasks_in_flight_per_actor=2),
            num_cpus=0 if placement.use_gpu else placement.cpus_each,
            num_gpus=1 if placement.use_gpu else 0,
            # By default a shard that kills its actor would be tried for ever.
            max_restarts=_MAX_ACTOR_RESTARTS,
            max_task_retries=_MAX_ACTOR_RESTARTS,
        )
    yield from dataset.iter_rows()


class ScoringActor:
    """Holds the model; called with one unit of work at a time."""

    def __init__(self, config: dict[str, Any]) -> None:
        import torch

        self._config = ScoreConfig.model_construct(**config)
        assigned = ray.get_runtime_context().get_assigned_resources()
        if not assigned.get("GPU"):
            torch.set_num_threads(max(1, int(assigned.get("CPU", 1))))
        self._bundle = Bundle.load(self._config.bundle, self._config.precision)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = {name: values[0] for name, values in batch.items()}
        outcome = {
            "path": str(unit["path"]),
            "size_bytes": int(unit["size_bytes"]),
            "version": str(unit["version"]),
            "num_rows": 0,
            "num_rows_error": 0,
            "num_tokens": 0,
            "failure": "",
        }
        try:
            counts = score_shard(
                self._bundle,
                Location.of(str(unit["shard"])),
                Location.of(str(unit["predictions"])),
                self._config.text_column,
                list(self._config.keep_columns),
            )
            outcome |= vars(counts)
        except ShardError as error:
            outcome["failure"] = str(error)
        except Exception as error:  # whatever it is, it is this shard's: it is listed, and the others go on
            _log.exception("unexpected failure of %s", outcome["path"])
            outcome["failure"] = f"{type(error).__name__}: {error}"
        return {name: [value] for name, value in outcome.items()}


def _record(outcome: dict[str, Any], request_fingerprint: str, run_id: str) -> Committed:
    return Committed(
        path=outcome["path"],
        size_bytes=outcome["size_bytes"],
        version=outcome["version"],
        fingerprint=request_fingerprint,
        num_rows=outcome["num_rows"],
        num_rows_error=outcome["num_rows_error"],
        num_tokens=outcome["num_tokens"],
        run_id=run_id,
        committed_at=datetime.now(UTC),
    )


def _summarise(
    output: Location,
    run_id: str | None,
    num_skipped: int,
    committed: list[Committed],
    failures: list[dict[str, str]],
    wall_s: float,
) -> dict[str, Any]:
    num_rows = sum(record.num_rows for record in committed)
    num_tokens = sum(record.num_tokens for record in committed)
    return {
        "output": str(output),
        "run_id": run_id,
        "num_shards_committed": len(committed),
        "num_shards_skipped": num_skipped,
        "num_shards_failed": len(failures),
        "num_rows": num_rows,
        "num_rows_error": sum(record.num_rows_error for record in committed),
        "num_tokens": num_tokens,
        "wall_s": round(wall_s, 2),
        "rows_per_s": round(num_rows / wall_s, 1),
        "tokens_per_s": round(num_tokens / wall_s, 1),
    }


def _write_run(
    output: Location,
    run_id: str,
    config: ScoreConfig,
    info: BundleInfo,
    summary: dict[str, Any],
    failures: list[dict[str, str]],
) -> None:
    written = {
        "config.json": {
            "config": config.model_dump(),
            "bundle_fingerprint": info.fingerprint(),
            "versions": versions(),
        },
        "summary.json": {**summary, "failures": failures},
    }
    for name, content in written.items():
        (output / "runs" / run_id / name).put((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    (output / "runs" / "latest.json").put((json.dumps({"run_id": run_id}) + "\n").encode())
