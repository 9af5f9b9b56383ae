"""Ending processes at the right moment: what tests of what comes after share."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from bertray.storage.location import Location
from tests.conftest import ROOT


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited for {what} in vain"
        time.sleep(0.05)


def job(name: str, **options: Any) -> list[str]:
    """The command line of a job."""
    flags = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", f"jobs.{name}", *flags]


def end_driver(command: list[str], log: Path, sent: int, when: Callable[[str], bool]) -> tuple[int, str]:
    """Begin or go on, and send the driver a signal when what it has written to stderr, or left in storage, says so.

    Returns:
        Its exit code and all of stderr, which is kept in `log`.
    """
    with log.open("w") as stderr:
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        wait_for(lambda: when(log.read_text()) or driver.poll() is not None, "the driver")
        driver.send_signal(sent)
        return driver.wait(timeout=60), log.read_text()


def titled(title: str) -> list[psutil.Process]:
    """The processes below this one with these words in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that has just ended
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextmanager
def killing(title: str, when: Callable[[], bool], limit: int | None = None) -> Iterator[list[int]]:
    """During the block, at some moment, kill -9 the processes below this one that have these words in their title.

    Yields:
        A list that will hold the ids of those that were killed; `limit` of them at most.
    """
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: when() and bool(titled(title)), f"the moment to kill {title}")
        for process in titled(title)[:limit]:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        killer.join()


@contextmanager
def dying_after(num_moves: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What publishes in the block is interrupted when it has moved so many files."""
    move, moved = Location.move, list[str]()

    def move_or_die(source: Location, target: Location) -> bool:
        if len(moved) >= num_moves:
            raise KeyboardInterrupt
        moved.append(target.name)
        return move(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Location, "move", move_or_die)
        yield
