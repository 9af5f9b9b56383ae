"""`ray job submit`, as README.md says it, to a cluster of one node with token authentication."""

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import ROOT

BIN = Path(sys.executable).parent
pytestmark = pytest.mark.services

NUM_ROWS = 12  # of each of the two shards
NUM_START_ATTEMPTS, START_TIMEOUT_S, SUBMIT_TIMEOUT_S = 3, 60, 240


class Head(NamedTuple):
    """A running head node."""

    port: int  # of the dashboard and its job server
    token: str
    environment: dict[str, str]  # for commands that are to reach it


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` on loopback; ends its own processes and no others."""
    # Not tmp_path: Ray's sockets lie below, and the path of a socket ends at 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="br", dir="/tmp"))
    token = secrets.token_hex(32)
    token_path = folder / "token"
    token_path.touch(mode=0o600)
    token_path.write_text(token, encoding="ascii")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BERTRAY_"))} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # so that a job's `python` is the one of this environment
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray takes 127.0.0.1 for this machine's address in the network
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # else it waits 30 s for actors of jobs that have ended
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = None
    try:
        for _ in range(NUM_START_ATTEMPTS):
            process, port = start(folder, environment)
            if answers(process, port, token):
                break
            stop(process)
        else:
            raise AssertionError(f"no job server: {(folder / 'log').read_text()}")
        yield Head(port, token, environment)
    finally:
        if process:
            stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a head node; returns its first process and the port of its job server."""
    port, client_port = free_ports(2)
    options = {
        "num-cpus": 4,
        "object-store-memory": 150_000_000,  # bytes
        "temp-dir": folder / "ray",
        "node-ip-address": "127.0.0.1",
        "dashboard-host": "127.0.0.1",
        "dashboard-port": port,
        "ray-client-server-port": client_port,  # needed by nothing here, but there is no way to leave it out
        # 0: any free port.
        "port": 0,
        "dashboard-agent-listen-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [BIN / "ray", "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its processes are a group, which has the number of the first
        )
    return process, port


def answers(process: subprocess.Popen[bytes], port: int, token: str) -> bool:
    """Wait for the job server; False where it does not come, as when another process took the port meanwhile."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        if job_api_status(port, token) == 200:
            return True
        time.sleep(0.2)
    return False


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a head node and whatever it started: not `ray stop`, which ends every cluster of this machine."""
    process.terminate()  # ends the others in order
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=20)
    with suppress(ProcessLookupError):  # what is left of them
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def job_api_status(port: int, token: str | None) -> int | None:
    """HTTP status of a listing of jobs; None where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()


UPLOADED = ("--working-dir", ".", "--runtime-env", "jobs/runtime_env.yaml")


def submit(head: Head, *entrypoint: object, code: tuple[str, ...] = UPLOADED) -> subprocess.CompletedProcess[str]:
    """Submit a job with the code of the checkout; or with none, to run what is installed."""
    address = f"http://127.0.0.1:{head.port}"
    return subprocess.run(
        ["ray", "job", "submit", *code, "--address", address, "--", *map(str, entrypoint)],
        cwd=ROOT,
        env=head.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SUBMIT_TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for shard in ("0.parquet", "deeper/1.parquet"):
        path = folder / shard
        path.parent.mkdir(exist_ok=True)
        documents = [f"{shard}-{row}" for row in range(NUM_ROWS)]
        texts = [f"document {row} about Python and SQL" for row in range(NUM_ROWS)]
        pq.write_table(pa.table({"document_id": documents, "text": texts}), path)
    return folder


def test_the_installed_command_scores_an_archive_as_a_job(head, tiny_bundle, archive, tmp_path):
    output = tmp_path / "scored"
    done = submit(
        head,
        *("bertray", "score", "--bundle", tiny_bundle, "--input", archive, "--output", output),
        *("--num-actors", 1, "--keep-columns", "document_id"),
        code=(),
    )
    assert done.returncode == 0, done.stdout
    (summary,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"output"'))
    assert (summary["num_shards_committed"], summary["num_shards_failed"]) == (2, 0)
    assert (summary["num_rows"], summary["num_rows_error"]) == (2 * NUM_ROWS, 0)
    for shard in ("0.parquet", "deeper/1.parquet"):
        predictions = pq.ParquetFile(output / "predictions" / shard).read()
        assert predictions["document_id"].to_pylist() == [f"{shard}-{row}" for row in range(NUM_ROWS)]
        assert set(predictions["label"].to_pylist()) <= {"a", "b", "c"}


def test_a_bad_request_fails_the_job_and_says_why(head, archive, tmp_path):
    missing = tmp_path / "no-bundle"
    # The job's own `python` and the uploaded package, beside the request: a submission takes seconds.
    where = "import os, sys, bertray; print('runs', sys.prefix, os.path.relpath(bertray.__file__), flush=True); "
    request = f"from jobs.score import main; sys.exit(main(['--bundle={missing}', '--input={archive}', '--output=/x']))"
    failed = submit(head, "python", "-c", where + request)
    assert failed.returncode == 1, failed.stdout
    assert "failed with exit code 2" in failed.stdout
    assert f"error: {missing} is no model bundle: it does not exist" in failed.stdout
    assert f"runs {sys.prefix} lib/bertray/__init__.py" in failed.stdout
    assert "Traceback" not in failed.stdout


def test_without_the_token_the_job_server_refuses(head):
    assert job_api_status(head.port, None) == 401
    assert job_api_status(head.port, secrets.token_hex(32)) == 403
    assert job_api_status(head.port, head.token) == 200


def test_only_code_is_uploaded(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    runtime_env = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text(encoding="utf-8"))
    # A working tree as it grows, in small.
    code = ["jobs/score.py", "jobs/runtime_env.yaml", "lib/bertray/__init__.py", "score.yaml"]
    rest = [
        *(".env", ".git/config", ".venv/bin/python", "demo/archive/0.parquet", "bundle/model.safetensors", "x"),
        *("notebooks/01-model.ipynb", "lib/bertray.egg-info/PKG-INFO", "lib/bertray/__pycache__/a.pyc", "README.md"),
    ]
    for name in code + rest:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "tree"), package, include_gitignore=True, excludes=runtime_env["excludes"])
    with zipfile.ZipFile(package) as archive:
        assert sorted(archive.namelist()) == sorted(code)
