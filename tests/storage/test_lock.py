"""One run at a time on an output, and none locked out for ever."""

import errno
import multiprocessing
import os
import signal
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from bertray.errors import LockedError, RequestError
from bertray.storage import lock
from bertray.storage.location import Location
from bertray.storage.lock import LockRecord, RunLock, check_held


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return Location.of(str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_folder"))


def files(output: Location) -> list[str]:
    return [info.path for info in (output / "lock").files()]


def leave_behind(output: Location, **changes: object) -> None:
    """The lock of a run that did not release it."""
    record = LockRecord.of_this_process("earlier").model_copy(update=changes)
    (output / "lock" / "00000003.json").put(record.model_dump_json().encode())


def take(output: Location, run_id: str) -> None:
    with RunLock(output, run_id).held():
        pass


def test_a_second_run_is_told_who_holds_the_lock(output: Location) -> None:
    with RunLock(output, "first").held() as lock:
        lock.check()
        with pytest.raises(LockedError, match=rf"run first holds .* since .* UTC \(process {os.getpid()} on "):
            take(output, "second")
        assert files(output) == ["00000001.json"]
    with RunLock(output, "third").held():
        assert files(output) == ["00000002.json"]
    with RunLock(output, "fourth").held():
        pass
    assert files(output) == ["00000003.json"]


def test_a_lock_expires(output: Location) -> None:
    leave_behind(output, process="another boot", beat_at=datetime.now(UTC) - timedelta(seconds=lock.EXPIRY_S - 5))
    with pytest.raises(LockedError, match=r"run earlier holds .* if it is dead, its lock expires at"):
        take(output, "later")
    leave_behind(output, process="another boot", beat_at=datetime.now(UTC) - timedelta(seconds=lock.EXPIRY_S + 5))
    with RunLock(output, "later").held():
        assert files(output) == ["00000004.json"]


def test_of_two_that_take_over_one_wins(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_behind(output, process="another boot", beat_at=datetime.now(UTC) - timedelta(hours=1))
    rival = RunLock(output, "rival")
    seen = lock.highest_lock(output)
    with RunLock(output, "winner").held():
        with monkeypatch.context() as patched:
            patched.setattr(lock, "highest_lock", lambda _: seen)  # it looked before the winner took the lock
            with pytest.raises(LockedError, match="another run has just taken"), rival.held():
                pass
        assert files(output) == ["00000004.json"]


def _hold(folder: str, is_held: Event) -> None:
    with RunLock(Location.of(folder), "killed").held():
        is_held.set()
        time.sleep(600)


def test_a_killed_run_of_this_machine_is_known_to_be_dead(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    is_held = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), is_held))
    process.start()
    assert is_held.wait(60) and process.pid
    with pytest.raises(LockedError, match="run killed holds"), RunLock(Location.of(str(tmp_path)), "next").held():
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with RunLock(Location.of(str(tmp_path)), "next").held() as lock:
        lock.check()


def test_a_run_that_was_taken_for_dead_stops(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertray.storage.lock.BEAT_INTERVAL_S", 0.05)
    with RunLock(output, "held up").held() as lock:
        other = LockRecord.of_this_process("other")
        assert (output / "lock" / "00000002.json").create(other.model_dump_json().encode())
        with pytest.raises(LockedError, match=r"run other took .* from this run"):
            lock.check()
        with pytest.raises(LockedError):
            check_held(output, lock.number)
    assert LockRecord.model_validate_json((output / "lock" / "00000002.json").read_bytes()) == other


def test_the_folder_of_a_run_goes_with_it_unless_another_has_taken_it(output: Location) -> None:
    with RunLock(output, "whole").held() as lock:
        (output / "rows").put(b"rows")
        lock.remove_output()
    assert not output.exists()
    with RunLock(output, "held up").held() as lock:
        (output / "rows").put(b"rows")
        other = LockRecord.of_this_process("other")
        assert (output / "lock" / "00000002.json").create(other.model_dump_json().encode())
        with pytest.raises(LockedError, match=r"run other took"):
            lock.remove_output()
    assert (output / "rows").exists()


def test_a_run_that_was_taken_for_dead_notices_though_the_other_has_ended(output: Location) -> None:
    with RunLock(output, "held up").held() as lock:
        (output / "lock").remove()
        with pytest.raises(LockedError, match=r"another run took"):
            lock.check()


def test_the_holder_beats(output: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertray.storage.lock.BEAT_INTERVAL_S", 0.05)
    with RunLock(output, "run").held():
        first = LockRecord.model_validate_json((output / "lock" / "00000001.json").read_bytes()).beat_at
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            if LockRecord.model_validate_json((output / "lock" / "00000001.json").read_bytes()).beat_at > first:
                break
            time.sleep(0.02)
        else:
            pytest.fail("no beat in 30 s")


def test_a_file_that_is_no_lock(output: Location) -> None:
    (output / "lock" / "00000001.json").put(b"nonsense")
    with pytest.raises(RequestError, match=r"00000001.json is no lock file; remove it"):
        take(output, "run")


@pytest.mark.parametrize("content", [b"", bytes(300)])
def test_a_run_that_died_as_it_took_the_lock_leaves_an_empty_file(tmp_path: Path, content: bytes) -> None:
    """Without hard links; after a power cut a file may hold zeros."""
    output = Location.of(str(tmp_path))
    (output / "lock" / "00000003.json").put(content)
    with pytest.raises(LockedError, match=r"run of the empty file .*00000003\.json holds .* its lock expires at"):
        take(output, "early")
    long_ago = time.time() - lock.EXPIRY_S - 5
    os.utime(tmp_path / "lock" / "00000003.json", (long_ago, long_ago))
    with RunLock(output, "later").held() as taken:
        assert taken.was_left_behind
        assert files(output) == ["00000004.json"]


def test_the_lock_works_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    output = Location.of(str(tmp_path))
    for run_id in ("first", "next"):
        with RunLock(output, run_id).held() as taken:
            taken.check()
            with pytest.raises(LockedError, match=f"run {run_id} holds"):
                take(output, "rival")
