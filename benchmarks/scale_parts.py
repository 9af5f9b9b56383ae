"""What benchmarks/scale.py measures in processes of their own: each prints one JSON object.

    python -m benchmarks.scale_parts engine BUNDLE ARCHIVE
    python -m benchmarks.scale_parts planning ARCHIVE OUTPUT FINGERPRINT
    python -m benchmarks.scale_parts manifest OUTPUT FINGERPRINT NUM_ACTORS
    python -m benchmarks.scale_parts report OUTPUT
    python -m benchmarks.scale_parts shards BUNDLE ARCHIVE OUTPUT
    python -m benchmarks.scale_parts publishing OUTPUT NUM_SHARDS
    python -m benchmarks.scale_parts store NUM_OBJECTS       (until its standard input ends)
    python -m benchmarks.scale_parts listing URI
    python -m benchmarks.scale_parts requests BUNDLE SHARD URI NUM_SHARDS
    python -m benchmarks.scale_parts handing BUNDLE NUM_UNITS SECONDS
    python -m benchmarks.scale_parts cluster NUM_GPUS        (until its standard input ends)

Nothing is imported before a part asks for it: what it takes is measured, or is memory of the part.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_STORE_MEMORY_BYTES = 300_000_000


def engine(bundle_path: str, archive: str) -> dict[str, float]:
    """The bundle in one process over the shards, read as the job reads them; nothing is written."""
    clock = _Clock()
    from bertray.bundle.bundle import Bundle
    from bertray.scoring.score_shard import STEP_BYTES
    from bertray.scoring.shard_reader import opened, steps
    from bertray.storage.location import Location

    clock.lap("import_s")
    bundle = Bundle.load(bundle_path, device="cpu")
    clock.lap("load_s")
    num_rows = num_tokens = 0
    for shard in Location.of(archive).files((".parquet",)):
        with opened(Location.of(archive) / shard.path) as file:
            for step in steps(file, "text", [], STEP_BYTES["cpu"]):
                num_rows += len(step)
                num_tokens += sum(bundle.predict_column(step["text"])["num_tokens"].to_pylist())
    clock.lap("predict_s")
    return {**clock.laps_s, "num_rows": num_rows, "num_tokens": num_tokens}


def planning(archive: str, output: str, fingerprint: str) -> dict[str, Any]:
    """List, read the manifest, plan; and what was asked of the file system for it."""
    from bertray.scoring.archive import list_shards
    from bertray.scoring.manifest import Manifest, plan
    from bertray.storage.location import Location

    source = Location.of(archive)
    calls = _counted(type(source.fs))
    clock = _Clock()
    shards = list_shards(source, source / "no-output").shards
    clock.lap("list_s")
    asked = dict(calls)
    latest = Manifest(Location.of(output)).latest()
    clock.lap("manifest_s")
    before = sum(calls.values())
    todo = plan(shards, latest, latest[:0], fingerprint)
    clock.lap("plan_s")
    return {
        **clock.laps_s,
        **todo.counts(),
        "calls_of_the_listing": asked,
        "num_calls_of_the_plan": sum(calls.values()) - before,
        "peak_mib": _peak_mib(),
    }


def manifest(output: str, fingerprint: str, num_actors: str) -> dict[str, Any]:
    """Load a manifest; then plan and divide an archive of the same shards, all of them once done and once pending."""
    from bertray.scoring.manifest import Manifest, plan
    from bertray.scoring.score_shard import STEP_BYTES
    from bertray.scoring.units import divide
    from bertray.storage.location import FileInfo, Location

    clock = _Clock()
    latest = Manifest(Location.of(output)).latest()
    clock.lap("load_s")
    facts: dict[str, Any] = {"num_records": len(latest), "load_peak_mib": _peak_mib()}
    columns = (latest[name].to_pylist() for name in ("path", "size_bytes", "version"))
    shards = [FileInfo(*values) for values in zip(*columns, strict=True)]
    clock = _Clock(clock)
    facts["num_done"] = plan(shards, latest, latest[:0], fingerprint).num_done
    clock.lap("plan_s")
    facts["plan_peak_mib"] = _peak_mib()
    clock = _Clock(clock)
    todo = plan(shards, latest, latest[:0], "another request")
    pending = todo.pending
    clock.lap("plan_pending_s")
    units = divide(pending, STEP_BYTES["cuda"], int(num_actors), fingerprint, set()).units
    clock.lap("divide_s")
    rows = [unit.model_dump_json() for unit in units]  # what Ray Data is given
    clock.lap("units_as_rows_s")
    facts |= {"num_units": len(units), "units_as_rows_mib": sum(map(len, rows)) / 2**20}
    return {**clock.laps_s, **facts, "divide_peak_mib": _peak_mib()}


def report(output: str) -> dict[str, Any]:
    """What a run that publishes reads for latest.json."""
    from bertray.schema import RECORD_SCHEMA
    from bertray.scoring.manifest import Manifest
    from bertray.scoring.runs import profile_of
    from bertray.storage.location import Location

    before_mib = _peak_mib()
    clock = _Clock()
    records = Manifest(Location.of(output)).latest(RECORD_SCHEMA)
    assert profile_of(records).num_rows == 1000 * len(records)
    clock.lap("report_s")
    return {**clock.laps_s, "num_shards": len(records), "before_mib": before_mib, "peak_mib": _peak_mib()}


def shards(bundle_path: str, archive: str, output: str) -> dict[str, Any]:
    """Shards through `score_shard`, with whatever Bundle.load gives: the stub, which takes no time."""
    from bertray.bundle.bundle import Bundle
    from bertray.scoring.score_shard import STEP_BYTES, score_shard
    from bertray.storage.location import Location

    bundle = Bundle.load(bundle_path)
    source, target = Location.of(archive), Location.of(output)
    found = source.files((".parquet",))
    clock = _Clock()
    num_rows = 0
    for shard in found:
        counts = score_shard(bundle, source / shard.path, target / shard.path, "text", [], STEP_BYTES["cuda"])
        num_rows += counts.profile.num_rows
    clock.lap("score_s")
    return {**clock.laps_s, "num_rows": num_rows, "num_bytes": sum(shard.size_bytes for shard in found)}


def listing(uri: str) -> dict[str, Any]:
    """One listing of a store: processor time of this process, which the store does not share."""
    from bertray.storage.location import Location

    place = Location.of(uri)
    place.exists()  # connects
    started_s = time.process_time()
    num_files = len(place.files((".parquet",)))
    return {"num_files": num_files, "cpu_s": time.process_time() - started_s}


def requests(bundle_path: str, shard: str, uri: str, num_shards: str) -> dict[str, dict[str, int]]:
    """What copies of a shard ask of S3 until their predictions are put, and then as many manifest files at the end."""
    import pyarrow as pa
    from s3fs import S3FileSystem

    from bertray.bundle.bundle import Bundle
    from bertray.schema import MANIFEST_SCHEMA, RECORD_SCHEMA
    from bertray.scoring.config import ScoreConfig
    from bertray.scoring.manifest import Manifest
    from bertray.scoring.score_unit import Request, UnitScorer
    from bertray.scoring.units import Unit
    from bertray.storage.location import Location
    from bertray.storage.lock import RunLock

    archive, output = Location.of(f"{uri}/archive"), Location.of(f"{uri}/scored")
    for number in range(int(num_shards)):
        (archive / f"part-{number:05d}.parquet").put(Path(shard).read_bytes())
    found = archive.files((".parquet",))
    calls = _counted_requests(S3FileSystem)
    with RunLock(output, "run").held() as lock:
        config = ScoreConfig(bundle=bundle_path, input=str(archive), output=str(output))
        scorer = UnitScorer(Request(config, str(archive), "request", "bundle", lock.number))
        calls.clear()
        outcomes = scorer.score(Unit(shards=tuple(found)), Bundle.load(bundle_path))
        assert not any(one.failure for one in outcomes), outcomes
        of_shards = dict(calls)
        manifest = Manifest(output)
        for one in outcomes:
            values = (*astuple(one.shard), "request", 1, 0, 1, "run", datetime.now(UTC))
            record = dict(zip(MANIFEST_SCHEMA.names, values, strict=True))
            manifest.append("run", pa.Table.from_pylist([record], RECORD_SCHEMA))
        calls.clear()
        manifest.replace("run", manifest.latest(RECORD_SCHEMA))
    return {"of_shards": of_shards, "of_manifest_files": dict(calls)}


def publishing(output: str, num_shards: str) -> dict[str, float]:
    """Publish staged files of 5 kB, a hundred a folder."""
    import pyarrow as pa

    from bertray.schema import MANIFEST_SCHEMA, RECORD_SCHEMA
    from bertray.scoring.publish import publish
    from bertray.scoring.runs import Announcement
    from bertray.scoring.staging import Staging
    from bertray.scoring.units import staged_path
    from bertray.storage.location import MAX_CONNECTIONS, FileInfo, Location

    place, request, now = Location.of(output), "f" * 64, datetime.now(UTC)
    staging = Staging(place)
    found = [FileInfo(f"part={number // 100:05d}/{number:07d}.parquet", 9, "v") for number in range(int(num_shards))]
    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        list(pool.map(lambda shard: (staging.folder / staged_path(shard, request)).put(b"x" * 5000), found))
    values = [
        dict(zip(MANIFEST_SCHEMA.names, (*astuple(one), request, 1, 0, 1, "run", now), strict=True)) for one in found
    ]
    records = pa.Table.from_pylist(values, RECORD_SCHEMA)
    staging.book.append("run", records)
    clock, cpu_s = _Clock(), time.process_time()
    publish(place, records, Announcement(run_id="run"))
    clock.lap("publish_s")
    return {**clock.laps_s, "cpu_s": time.process_time() - cpu_s}


def store(num_objects: str) -> None:
    """moto's S3 on loopback, with a bucket of small objects."""
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    backend = s3_backends["123456789012"]["aws"]  # moto's own account
    backend.create_bucket("bench", "us-east-1")
    for number in range(int(num_objects)):
        backend.put_object("bench", f"archive/part={number // 1000:05d}/shard-{number:07d}.parquet", b"PAR1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _serve({"endpoint": f"http://{host}:{port}"})
    server.stop()


def handing(bundle: str, num_units: str, wall_s: str) -> dict[str, float]:
    """Units go to the pool of actors, until the seconds after the first one is done are over."""
    from bertray.bundle.info import read_info
    from bertray.drivers import actor_pool, cluster, ray_address
    from bertray.scoring.config import ScoreConfig
    from bertray.scoring.score_unit import Request
    from bertray.scoring.units import divide
    from bertray.storage.location import FileInfo, Location

    ray_address.prepare()
    config = ScoreConfig(bundle=bundle, input="/archive", output="/scored", device="cuda")
    request = Request(config, config.input, "request", read_info(Location.of(bundle)).fingerprint(), 0)
    before_mib = _peak_mib()
    # None of them shares a unit with another one.
    shards = [
        FileInfo(f"day={n // 1000:04d}/part-{n:07d}.parquet", 60 << 20, f"{n:032x}") for n in range(int(num_units))
    ]
    with cluster.session():
        pool = actor_pool.ActorPool(request, shards)
        work = divide(shards, pool.unit_bytes, pool.num_processes, request.fingerprint, set())
        outcomes = pool.run(work)
        started_s = time.monotonic()
        while next(outcomes) and time.monotonic() - started_s < float(wall_s):
            pass  # meanwhile actors start, on the same cores
        began_s, began_cpu_s, num_done = time.monotonic(), time.process_time(), 0
        while time.monotonic() - began_s < float(wall_s) and next(outcomes, None):
            num_done += 1
        spent_s, spent_cpu_s = time.monotonic() - began_s, time.process_time() - began_cpu_s
        outcomes.close()
    return {
        "num_units": len(work.units),
        "num_a_s": num_done / spent_s,
        "cpu_share": spent_cpu_s / spent_s,
        "before_mib": before_mib,
        "peak_mib": _peak_mib(),
    }


def cluster(num_gpus: str) -> None:
    """A Ray of one node that says it has GPUs, and a CPU for each of them."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=int(num_gpus),
        num_gpus=int(num_gpus),
        object_store_memory=_STORE_MEMORY_BYTES,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level="ERROR",
        log_to_driver=False,
    )
    _serve({"address": context.address_info["gcs_address"]})
    ray.shutdown()


class _Clock:
    """Laps by name.

    Args:
        before: a clock whose laps this one goes on with; what has passed meanwhile is nobody's.
    """

    def __init__(self, before: _Clock | None = None) -> None:
        self.laps_s: dict[str, float] = before.laps_s if before else {}
        self._lap_s = time.perf_counter()

    def lap(self, name: str) -> None:
        now_s = time.perf_counter()
        self.laps_s[name], self._lap_s = now_s - self._lap_s, now_s


def _counted(file_system: type[Any]) -> Counter[str]:
    """From now on, calls of a file system's methods, but those that it makes itself."""
    from bertray.storage import local

    calls: Counter[str] = Counter()
    here = threading.local()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            is_outer = not getattr(here, "is_inside", False)
            calls[name] += is_outer
            here.is_inside = True
            try:
                return method(*args, **kwargs)
            finally:
                here.is_inside = not is_outer

        return counted

    for name in ("find", "ls", "walk", "glob", "info", "exists", "isfile", "isdir", "open", "cat_file", "modified"):
        setattr(file_system, name, counting(name, getattr(file_system, name)))
    local.find = counting("find", local.find)
    return calls


def _counted_requests(file_system: type[Any]) -> Counter[str]:
    """From now on, what is asked of S3."""
    calls: Counter[str] = Counter()
    ask = file_system._call_s3

    async def counted(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        calls[method] += 1
        return await ask(self, method, *args, **kwargs)

    file_system._call_s3 = counted
    return calls


def _peak_mib() -> float:
    """Of this process's resident memory since it was started (Linux). What getrusage says includes the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _serve(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    parts = (engine, planning, manifest, report, shards, listing, requests, publishing, store, handing, cluster)
    facts = {part.__name__: part for part in parts}[sys.argv[1]](*sys.argv[2:])
    if facts is not None:
        print(json.dumps(facts))
