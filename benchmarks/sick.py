"""What a scoring run does with a sick machine, made for real: one of two nodes fails at everything, or S3 is away.

    python -m benchmarks.sick                          all of it: about 15 minutes on 2 cores
    python -m benchmarks.sick --only gpu keys --away-s 60

    breaking   the model raises an error on any text          gpu    torch says that the GPU is gone
    deadly     any text ends the process by SIGSEGV           disk   the node's temporary folder is a full tmpfs
    hanging    the model makes no progress                    keys   S3 says of the node's keys that they have expired
    away       for five minutes S3 resets every connection, whoever asks

Archive, bundle and output are on S3 (moto, on loopback). Every run must end with exit code 0 and the rows of an
undisturbed run, name no other node, and lose no more than 3 tries each time that an actor starts on it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.chaos import Stage, check, finish, predictions, same_rows, say, verified, wait_for
from benchmarks.results import ROOT, write_result
from benchmarks.tiny import tiny_bundle, word_archive
from tests.faults.s3_proxy import FaultyProxy

SHARDS = [*[50] * 40, *[2000] * 12]
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
FAULTS = ("breaking", "deadly", "hanging", "gpu", "disk", "keys")
UNIT_TIMEOUT_S = 20
MAX_FAILURES = 9  # 3 a start of an actor, and 3 starts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*FAULTS, "away"], default=[*FAULTS, "away"])
    parser.add_argument("--away-s", type=float, default=300.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bertray-sick-") as name:
        folder = Path(name)
        bundle, archive = tiny_bundle(folder / "bundle"), word_archive(folder / "archive", SHARDS)
        stage = Stage(folder, bundle, archive, {}, 0, 0, random.Random(0))
        started_s = time.monotonic()
        finish(stage.command(folder / "undisturbed"))
        wall_s = time.monotonic() - started_s
        stage = Stage(folder, bundle, archive, predictions(folder / "undisturbed"), wall_s, 0, random.Random(0))
        lines = ["| fault | what held | last error of the node |", "|---|---|---|"]
        with _store(stage) as endpoint:
            for fault in options.only:
                done = _away(stage, endpoint, options.away_s) if fault == "away" else _sick(stage, endpoint, fault)
                lines.append(f"| {fault} | {' | '.join(done)} |")
                say(lines[-1])
    subject = "all" if len(options.only) == len(FAULTS) + 1 else "-".join(options.only)
    write_result("sick", subject, "\n".join(lines), {"undisturbed_wall_s": wall_s, "away_s": options.away_s})


@contextmanager
def _store(stage: Stage) -> Iterator[str]:
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": endpoint}
    store = s3fs.S3FileSystem()
    store.mkdir("bertray")
    store.put(f"{stage.archive}/", "bertray/archive/", recursive=True)
    store.put(f"{stage.bundle}/", "bertray/bundle/", recursive=True)
    yield endpoint
    server.stop()


def _command(stage: Stage, output: str) -> list[str]:
    command = stage.command(output, "s3://bertray/archive")
    return ["s3://bertray/bundle" if word == str(stage.bundle) else word for word in command]


def _sick(stage: Stage, endpoint: str, fault: str) -> tuple[str, str]:
    """One of two nodes has the fault."""
    from ray.cluster_utils import Cluster

    output = f"s3://bertray/{fault}"
    with _environment(stage, endpoint, fault) as variables:
        ray = {"num_cpus": 1, "object_store_memory": 150_000_000}
        cluster = Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **ray})
        try:
            cluster.add_node(env_vars=variables, **ray)
            command = [*_command(stage, output), "--unit-timeout", str(UNIT_TIMEOUT_S)]
            started_s = time.monotonic()
            summary = finish(command, {"RAY_ADDRESS": cluster.address})
            wall_s = time.monotonic() - started_s
        finally:
            cluster.shutdown()
    check(len(summary["sick_nodes"]) <= 1, f"another node is named, too: {summary['sick_nodes']}")
    # None: its actor was started again on the other node, which had nothing left to do.
    node = next(iter(summary["sick_nodes"]), {"num_failures": 0, "last": "-"})
    check(summary["num_shards_failed"] == 0, f"shards failed: {summary}")
    check(node["num_failures"] <= MAX_FAILURES, f"more than {MAX_FAILURES} failures: {node}")
    _same(stage, fault, output)
    return (
        f"exit code 0, same rows; {node['num_failures']} tries failed there; {wall_s:.0f} s, undisturbed on this "
        f"machine alone {stage.wall_s:.0f} s",
        node["last"][:100],
    )


@contextmanager
def _environment(stage: Stage, endpoint: str, fault: str) -> Iterator[dict[str, str]]:
    """The variables of a node that has the fault."""
    if fault == "keys":
        with FaultyProxy(endpoint, share=1, kinds=["expired_token"]) as (proxy, _):
            yield {"AWS_ENDPOINT_URL": proxy}
    elif fault == "disk":
        place = stage.output("full-disk")
        place.mkdir()
        subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], check=True)
        try:
            (place / "filling").write_bytes(b"x" * 56_000)
            yield {"TMPDIR": str(place)}
        finally:
            subprocess.run(["/bin/umount", str(place)], check=False)
    else:
        path = os.pathsep.join([str(ROOT / "tests" / "faults"), os.environ.get("PYTHONPATH", "")])
        yield {"PYTHONPATH": path, "BERTRAY_SICK": fault}


def _away(stage: Stage, endpoint: str, away_s: float) -> tuple[str, str]:
    """S3 goes away in the middle of a run, for actors and driver."""
    output = "s3://bertray/away"
    proxy = FaultyProxy(endpoint, kinds=["reset"]).start()
    command = _command(stage, output)
    clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = {**clean, "AWS_ENDPOINT_URL": proxy.endpoint}
    log: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None and job.stderr is not None
        reading = threading.Thread(target=log.extend, args=[job.stderr], daemon=True)
        reading.start()
        wait_for(lambda: _num_staged() > 10)
        proxy.share = 1
        time.sleep(away_s)
        proxy.share = 0
        printed = job.stdout.read()
    reading.join()
    text = "".join(log)
    check(job.returncode == 0, f"the run ended with {job.returncode}: {text[-3000:]}")
    summary = json.loads(printed.splitlines()[-1])
    check(summary["num_shards_failed"] == 0, f"shards failed: {summary}")
    said = re.search(r"the storage does not answer since [0-9:]+ UTC", text)
    check(said is not None, f"the log does not say since when: {text[-3000:]}")
    _same(stage, "away", output)
    proxy.close()
    assert said is not None
    return f"{away_s:.0f} s: exit code 0, same rows; {proxy.counts['reset']} resets", said.group()


def _num_staged() -> int:
    import s3fs

    return len(s3fs.S3FileSystem(use_listings_cache=False).find("bertray/away/staging"))


def _same(stage: Stage, name: str, output: str) -> None:
    import s3fs

    store = s3fs.S3FileSystem(use_listings_cache=False)
    verified(output)
    path = output.removeprefix("s3://")
    check(not store.find(f"{path}/staging"), "staged files were left")
    store.get(f"{path}/predictions/", f"{stage.output(name)}/predictions/", recursive=True)
    same_rows(stage, stage.output(name))


if __name__ == "__main__":
    main()
