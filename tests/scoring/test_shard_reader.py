"""Reading a shard in a child process: who is at fault if that ends, fails or hangs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from bertray.errors import ShardError, ShardRefusedError, UnavailableError
from bertray.scoring import shard_reader
from bertray.scoring.shard_reader import opened, read_in_isolation
from bertray.storage.location import Location
from tests.conftest import write_shard


@pytest.fixture
def shard(tmp_path: Path) -> Location:
    return Location.of(str(write_shard(tmp_path / "a.parquet", [f"text {row}" for row in range(20)])))


def test_a_file_that_hangs_fails_its_shard(tmp_path: Path) -> None:
    """As on a mount that is gone: nobody writes into this pipe."""
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(ShardError, match=r"^the process that read it made no progress for 1 s$"):
        read_in_isolation(Location.of(str(tmp_path / "a.parquet")), "text", [], 1 << 20, timeout_s=0.6)


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ([0], None),
        ([3], None),  # an error of the reader; the next one says it
        ([1, 0], None),  # something else may have been at fault
        ([-9, 3], None),
        ([1, 1], "made no progress for 5 s"),
        ([-9, -11], "was ended by SIGSEGV"),
    ],
)
def test_twice_is_no_accident(
    shard: Location, codes: list[int], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(codes)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, next(left)))
    if said:
        with pytest.raises(ShardError, match=said):
            read_in_isolation(shard, "text", [], 1 << 20, timeout_s=5.0)
    else:
        read_in_isolation(shard, "text", [], 1 << 20, timeout_s=5.0)
    assert list(left) == []


@pytest.mark.parametrize(
    "error", [ShardError("no Parquet"), UnavailableError("no memory"), OSError("broken pipe"), KeyError("text")]
)
def test_any_error_of_the_reader_is_left_to_the_next_one(
    shard: Location, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Location) -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["", json.dumps([shard.uri, "text", [], 1 << 20, 600.0])])
    monkeypatch.setattr(shard_reader, "opened", fail)
    with pytest.raises(SystemExit) as caught:
        shard_reader.main()
    assert caught.value.code == 3  # not 1, the watchdog's


def test_a_reader_is_watched_and_every_step_is_progress(shard: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[object]()

    @contextmanager
    def watched(timeout_s: float) -> Iterator[None]:
        done.append(timeout_s)
        yield
        done.append("ended")

    monkeypatch.setattr(sys, "argv", ["", json.dumps([shard.uri, "text", [], 30, 7.0])])
    monkeypatch.setattr(shard_reader, "watched", watched)
    monkeypatch.setattr(shard_reader, "alive", lambda: done.append("alive"))
    shard_reader.main()
    assert done[0] == 7.0 and done[-1] == "ended"
    assert done.count("alive") > 2


@pytest.mark.parametrize(
    ("error", "kind", "why"),
    [
        (UnavailableError.because("missing", "not found"), ShardRefusedError, None),
        (UnavailableError.because("refused", "no permission"), ShardRefusedError, None),
        (UnavailableError.because("away", "cannot reach s3://bucket"), UnavailableError, "away"),
        (pa.ArrowMemoryError("malloc of size 64 failed"), UnavailableError, "refused"),
        (OSError(5, "Input/output error"), ShardRefusedError, None),
        (pa.ArrowInvalid("no Parquet magic bytes"), ShardError, None),
    ],
)
def test_what_an_error_of_a_file_is(
    shard: Location, error: Exception, kind: type[Exception], why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(shard_reader, "ShardFile", fail)
    with pytest.raises(kind) as caught, opened(shard):
        pass
    assert type(caught.value) is kind and getattr(caught.value, "why", None) == why
