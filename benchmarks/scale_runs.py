"""How benchmarks/scale.py runs jobs and parts of them: in processes of their own, which note what they do and when."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import ROOT
from bertray.bundle.info import read_info
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import fingerprint
from bertray.storage.location import Location

STUB = ROOT / "benchmarks" / "stub"

NUM_GPUS = 8
_MAX_WALL_S = 3600.0  # of a process


@dataclass(frozen=True)
class Bench:
    """Where a measurement works, and how much of everything it takes."""

    folder: Path
    bundle: Path
    share: float

    def some(self, number: int, at_least: int = 1) -> int:
        return max(at_least, round(self.share * number))


class Span(NamedTuple):
    """A line of the trace, see stub/sitecustomize.py; seconds of time.monotonic()."""

    what: str
    pid: int
    start_s: float
    end_s: float
    cpu_s: float  # of the process, until its end
    rows: int

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s


class Ran(NamedTuple):
    """A run of bertray score: its summary, its process's times, its trace by what was called, in the order of time."""

    summary: dict[str, Any]
    start_s: float
    end_s: float
    spans: dict[str, list[Span]]

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s

    def first(self, what: str) -> Span:
        return self.spans[what][0]


def fingerprint_of(bench: Bench, archive: Path, output: Path) -> str:
    """Of the request that `_score` makes."""
    config = ScoreConfig(bundle=str(bench.bundle), input=str(archive), output=str(output))
    return fingerprint(read_info(Location.of(str(bench.bundle))), config)


def on_gpus(num_actors: int) -> tuple[str, ...]:
    return ("--device", "cuda", "--num-actors", str(num_actors))


def score_command(bench: Bench, archive: Path | str, output: Path | str, *options: object) -> list[str]:
    arguments = ["--bundle", bench.bundle, "--input", archive, "--output", output, *options]
    return [sys.executable, "-m", "jobs.score", *map(str, arguments)]


def score(
    bench: Bench, archive: Path | str, output: Path | str, *options: object, environment: dict[str, str] | None = None
) -> Ran:
    environment = environment or traced(bench)
    trace = Path(environment["BERTRAY_TRACE"])
    for file in trace.iterdir():
        file.unlink()
    command = score_command(bench, archive, output, *options)
    start_s = time.monotonic()
    done = run_command(command, environment)
    end_s = time.monotonic()
    return Ran(json.loads(done.splitlines()[-1]), start_s, end_s, spans_of(trace))


def spans_of(trace: Path) -> dict[str, list[Span]]:
    """What was noted, by what was called, in the order of time."""
    spans: dict[str, list[Span]] = defaultdict(list)
    lines = (line for file in trace.iterdir() for line in file.read_text().splitlines())
    for span in sorted((Span(**json.loads(line)) for line in lines), key=lambda span: span.start_s):
        spans[span.what].append(span)
    return spans


def traced(bench: Bench) -> dict[str, str]:
    """The environment of processes that note what they do."""
    trace = bench.folder / "trace"
    trace.mkdir(exist_ok=True)
    path = os.pathsep.join(filter(None, [str(STUB), os.environ.get("PYTHONPATH")]))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**environment, "PYTHONPATH": path, "BERTRAY_TRACE": str(trace)}


@contextmanager
def fake_gpus(bench: Bench, s_a_row: float, **more: str) -> Iterator[dict[str, str]]:
    """A Ray with as many GPUs as `NUM_GPUS`, on loopback; the environment of a job that is to run on it."""
    token = bench.folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {
        **traced(bench),
        **more,
        "BERTRAY_STUB_S_A_ROW": str(s_a_row),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # as bertray.cli does it
    }
    with serving("cluster", NUM_GPUS, environment=environment) as facts:
        yield {**environment, "RAY_ADDRESS": facts["address"]}


@contextmanager
def serving(part: str, *arguments: object, environment: dict[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """A part that runs until the block ends; what it says when it is ready."""
    with _serving(["benchmarks.scale_parts", part, *map(str, arguments)], environment) as facts:
        yield facts


@contextmanager
def slow_store(s_a_request: float) -> Iterator[dict[str, str]]:
    """An S3 store that takes its time; the environment of processes that use it."""
    with _serving(["benchmarks.slow_store", str(s_a_request)]) as facts:
        yield s3_environment(facts["endpoint"])


def s3_environment(endpoint: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"AWS_ENDPOINT_URL": endpoint, **keys}


@contextmanager
def _serving(module: list[str], environment: dict[str, str] | None = None) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-m", *module]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stdin is not None
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.stdin.close()  # it ends when this does
            server.wait(_MAX_WALL_S)


def run_part(part: str, *arguments: object, environment: dict[str, str] | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.scale_parts", part, *map(str, arguments)]
    facts: dict[str, Any] = json.loads(run_command(command, environment).splitlines()[-1])
    return facts


def run_timed_part(part: str, *arguments: object) -> dict[str, float]:
    started_s = time.monotonic()
    facts = run_part(part, *arguments)
    return {**facts, "wall_s": time.monotonic() - started_s}


def run_command(command: list[str], environment: dict[str, str] | None) -> str:
    """What the command prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=_MAX_WALL_S
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def by_process(spans: list[Span]) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        found[span.pid].append(span)
    return found
