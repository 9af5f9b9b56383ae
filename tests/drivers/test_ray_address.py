"""A RAY_ADDRESS that leads to no Ray is refused at once, by every job that would start Ray."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray

from bertray.__main__ import main
from bertray.drivers import cluster, ray_address
from bertray.errors import RequestError
from tests.conftest import write_shard

NEXT_STEP = r"\. Unset it to use this machine alone, or set it to HOST:PORT of a head node"


@pytest.fixture(autouse=True)
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[str]:
    """The address of a web server, as Ray's dashboard is one."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def refusal(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RequestError, match=NEXT_STEP) as caught:
        ray_address.prepare()
    said = str(caught.value)
    assert said.startswith(f"RAY_ADDRESS={address} ") and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("http://127.0.0.1:8265", "ray job submit --address http://127.0.0.1:8265 sends"),
        ("https://ray.example", "ray job submit --address https://ray.example sends"),
        ("ray://127.0.0.1:10001", "is for Ray Client"),
        ("127.0.0.1:10001", "is for Ray Client"),
        ("127.0.0.1:9", "leads to no Ray: 127.0.0.1:9: [Errno 111] Connection refused"),
        ("[::1]:9", "leads to no Ray"),
        ("127.0.0.1", "is no HOST:PORT"),
        ("127.0.0.1:port", "leads to no Ray"),
        ("no-such-host.invalid:6379", "leads to no Ray"),
    ],
)
def test_an_address_that_leads_nowhere(monkeypatch: pytest.MonkeyPatch, address: str, why: str) -> None:
    assert why in refusal(monkeypatch, address)


def test_auto_without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)  # another test's
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    assert "finds no Ray on this machine" in refusal(monkeypatch, "auto")
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: "127.0.0.1:9")  # it has ended
    assert "leads to no Ray: 127.0.0.1:9: [Errno 111]" in refusal(monkeypatch, "auto")


def test_something_else_answers(monkeypatch: pytest.MonkeyPatch, web: str, silent: str) -> None:
    monkeypatch.setattr(ray_address, "_TIMEOUT_S", 0.3)
    assert "something else answers" in refusal(monkeypatch, web)
    assert "timed out" in refusal(monkeypatch, silent)


def test_a_cluster_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch, ray_cluster: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    ray_address.prepare()
    assert ray_address.cluster_address() == ray_cluster


@pytest.mark.parametrize("address", [None, "", "local"])
def test_no_cluster(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    ray_address.prepare()
    assert ray_address.cluster_address() is None
    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"


def test_what_ray_shall_not_do_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_ENABLE_UV_RUN_RUNTIME_ENV", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    ray_address.prepare()
    assert os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"  # copy the working folder under `uv run`
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/proc/no-home")
    ray_address.prepare()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64  # keep a token in a home that is not there


def test_a_cluster_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_version(**_: object) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", other_version)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # of the connection that other tests share
    with (
        pytest.raises(
            RequestError, match=r"^RAY_ADDRESS=10\.0\.0\.1:6379 cannot be used: .*: Ray: 2\.9\.0" + NEXT_STEP
        ),
        cluster.session(),
    ):
        pass


@pytest.mark.parametrize("job", ["score", "train", "tune", "audit"])
def test_every_job_that_starts_ray_refuses_first(
    job: str, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "archive" / "part.parquet", ["text"])
    what = ["--bundle", str(tiny_bundle), "--input", str(tmp_path / "archive")]
    if job != "score":
        what = ["--data", str(tmp_path / "dataset"), "--encoder", "minilm"]
    output = tmp_path / "output"
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    started_s = time.monotonic()
    assert main([job, *what, "--output", str(output)]) == 2
    assert time.monotonic() - started_s < 10
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: RAY_ADDRESS=http://127.0.0.1:8265 is where ray")
    assert not (output / "runs").exists()


def test_a_job_without_ray_asks_nobody(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    what = ["--data", str(tmp_path / "dataset"), "--encoder", "minilm", "--num-workers", "0"]
    assert main(["train", *what, "--output", str(tmp_path / "output")]) == 2
    assert "no finished data set" in capsys.readouterr().err
