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
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

import ray
import ray.data
import torch
from ray.util.annotations import RayDeprecationWarning

from bertray import cluster
from bertray.bundle import Bundle, BundleInfo, read_info
from bertray.config import ScoreConfig
from bertray.errors import BundleError, RequestError, ShardError
from bertray.ledger import Committed, Manifest, fingerprint, new_run_id, pending
from bertray.openvino_engine import load_prepared, prepare
from bertray.process import ModelThread
from bertray.progress import ProgressBar
from bertray.shards import STEP_BYTES, read_schema, score_shard
from bertray.storage import FileInfo, Location
from bertray.text import check_text_type
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Of the output: models that were exported for another engine than torch.
ENGINE_FOLDER = "engine"
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
    # Actors may run in other folders: from here on places are absolute.
    places = {name: str(Location.of(getattr(config, name))) for name in ("bundle", "input", "output")}
    config = config.model_copy(update=places)
    source, output = Location.of(config.input), Location.of(config.output)
    info = read_info(Location.of(config.bundle))
    if source.contains(output) or output.contains(source):
        raise RequestError(
            f"--input {source} and --output {output} lie in each other: predictions would be scored or shards replaced"
        )
    archive, shards = _list_shards(source)
    run_id = new_run_id()
    request_fingerprint = fingerprint(info, config)
    manifest = Manifest(output)
    todo = pending(shards, manifest.done(request_fingerprint))
    _log.info("%d shards, %d to score, %d done before", len(shards), len(todo), len(shards) - len(todo))

    run = _Run(manifest, run_id, request_fingerprint)
    engine: dict[str, Any] = {"engine": "openvino" if config.engine == "openvino" else "torch"}
    if todo:
        _probe(archive, todo, config)
        # Written first: what cannot be written is found out before any work, and a crashed run leaves its request.
        _put_json(output / "runs" / run_id / "config.json", _request(config, info))
        if config.engine == "openvino":
            # Once, here: actors on other nodes find it beside the predictions, and so does the next run.
            engine = prepare(config.bundle, config.precision, output / ENGINE_FOLDER).summary()
        _log.info("scoring %.1f MB in run %s", sum(shard.size_bytes for shard in todo) / 1e6, run_id)
        with cluster.session():
            run.follow(_stream(config, info, archive, output, todo), len(todo))
    else:
        _log.info("nothing to do: every shard is committed under this bundle and these columns")

    summary = {
        "output": str(output),
        "run_id": run_id if todo else None,
        "num_shards_skipped": len(shards) - len(todo),
        **run.summary(time.monotonic() - started_s),
        **engine,
    }
    if todo:
        _put_json(output / "runs" / run_id / "summary.json", {**summary, "failures": run.failures})
        _put_json(output / "runs" / "latest.json", {"run_id": run_id})
    return summary, run.failures


class _Run:
    """What has become of the shards of one run so far."""

    def __init__(self, manifest: Manifest, run_id: str, request_fingerprint: str) -> None:
        self._manifest, self._run_id, self._fingerprint = manifest, run_id, request_fingerprint
        self.committed: list[Committed] = []
        self.failures: list[dict[str, str]] = []
        self._num_repeated = {"num_rows_repeated": 0, "num_tokens_repeated": 0}
        self._precisions: set[str] = set()

    def follow(self, outcomes: Iterable[dict[str, Any]], num_shards: int) -> None:
        """Take in outcomes as they come: show progress, record what is committed."""
        num_recorded, recorded_s, num_rows = 0, time.monotonic(), 0
        with ProgressBar("scoring", num_shards, "shards") as bar:
            try:
                for outcome in outcomes:
                    self._take(outcome)
                    num_rows += outcome["num_rows"]
                    bar.update(len(self.committed) + len(self.failures), f"{num_rows:,} rows")
                    if time.monotonic() - recorded_s >= _RECORD_INTERVAL_S:
                        self._manifest.append(self._run_id, self.committed[num_recorded:])
                        num_recorded, recorded_s = len(self.committed), time.monotonic()
            finally:  # also where the run is interrupted: what is in place need not be scored again
                self._manifest.append(self._run_id, self.committed[num_recorded:])
        self._manifest.finish(self._run_id, self.committed)

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
            schema = read_schema(archive / shard.path)
        except ShardError:
            continue  # the run itself lists it as failed
        names = schema.names
        if all(name in names for name in wanted):
            try:
                check_text_type(schema.field(config.text_column).type)
            except ShardError as error:
                seen = seen or f"{shard.path}: {error}"
                continue
            return
        missing = next(name for name in wanted if name not in names)
        seen = seen or f"no column {missing!r} in {shard.path}; it has {', '.join(names)}"
    if seen:
        raise RequestError(f"{seen}. Choose with --text-column and --keep-columns")


def _stream(
    config: ScoreConfig, info: BundleInfo, archive: Location, output: Location, shards: list[FileInfo]
) -> Iterator[dict[str, Any]]:
    """Run the actor pool over the shards; yields one outcome a shard, as they finish."""
    device = "cpu" if config.engine == "openvino" else config.device
    placement = cluster.place(device, config.num_actors, "--num-actors")
    num_actors = min(placement.num_processes, len(shards))
    _log.info("actors: %d, each with %s", num_actors, placement.share)
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
            fn_constructor_kwargs={
                "config": config.model_dump(),
                "device": "cuda" if placement.use_gpu else "cpu",
                "fingerprint": info.fingerprint(),
            },
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

    def __init__(self, config: dict[str, Any], device: Literal["cpu", "cuda"], fingerprint: str) -> None:
        self._thread = ModelThread()
        self._thread.run(self._load, config, device, fingerprint)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return self._thread.run(self._score, batch)

    def _load(self, config: dict[str, Any], device: Literal["cpu", "cuda"], fingerprint: str) -> None:
        self._config = ScoreConfig.model_construct(**config)
        self._step_bytes = STEP_BYTES[device]
        assigned = ray.get_runtime_context().get_assigned_resources()
        num_threads = max(1, int(assigned.get("CPU", 1)))
        if device == "cpu":
            torch.set_num_threads(num_threads)
        if self._config.engine == "openvino":
            cache = Location.of(self._config.output) / ENGINE_FOLDER
            self._bundle = load_prepared(self._config.bundle, self._config.precision, cache, num_threads)
        else:
            assert self._config.precision != "int8"  # bertray.config has checked it
            self._bundle = Bundle.load(self._config.bundle, self._config.precision, device)
        if self._bundle.info.fingerprint() != fingerprint:
            raise BundleError(f"the bundle {self._config.bundle} was replaced while the job ran. Run it again")

    def _score(self, batch: dict[str, Any]) -> dict[str, Any]:
        unit = {name: values[0] for name, values in batch.items()}
        outcome = {
            "path": str(unit["path"]),
            "size_bytes": int(unit["size_bytes"]),
            "version": str(unit["version"]),
            "num_rows": 0,
            "num_rows_error": 0,
            "num_rows_repeated": 0,
            "num_tokens": 0,
            "num_tokens_repeated": 0,
            "precision": self._bundle.encoder.precision,
            "failure": "",
        }
        try:
            counts = score_shard(
                self._bundle,
                Location.of(str(unit["shard"])),
                Location.of(str(unit["predictions"])),
                self._config.text_column,
                list(self._config.keep_columns),
                self._step_bytes,
            )
            outcome |= vars(counts)
        except ShardError as error:
            outcome["failure"] = str(error)
        except torch.AcceleratorError:
            raise  # a GPU that has failed once fails every later shard: those are not at fault
        except Exception as error:  # whatever it is, it is this shard's: it is listed, and the others go on
            _log.exception("unexpected failure of %s", outcome["path"])
            outcome["failure"] = f"{type(error).__name__}: {error}"
        return {name: [value] for name, value in outcome.items()}


def _request(config: ScoreConfig, info: BundleInfo) -> dict[str, Any]:
    return {"config": config.model_dump(), "bundle_fingerprint": info.fingerprint(), "versions": versions()}


def _put_json(file: Location, content: dict[str, Any]) -> None:
    file.put((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
