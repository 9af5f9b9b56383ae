"""One run at a time on an output: the run that creates the next lock file holds the lock; a dead run's lock expires.

    output/lock/00000007.json    {"run_id": …, "host": …, "pid": …, "taken_at": …, "beat_at": …, "released_at": null}

1. take     The file with the highest number names the holder. If it is released, expired, or of a process of this
            machine that is gone: create the file of the next number. Of two rivals, one succeeds.
2. beat     Every BEAT_INTERVAL_S the holder rewrites its file. If there is a higher number, it has lost the lock.
3. release  The file stays, marked as released: a number is never used twice.

On a file system without hard links a run that dies as it takes the lock leaves an empty file, which expires likewise.
A lock expires EXPIRY_S after the last beat, so the clocks of machines with one output must agree within some seconds.
In a store without conditional puts (`If-None-Match`), two runs that start within some round trips may both take the
lock, and a warning says so; they then write the same bytes to the same names.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ValidationError

from bertray.errors import LockedError, RequestError
from bertray.storage.location import Location

_log = logging.getLogger(__name__)

FOLDER = "lock"
BEAT_INTERVAL_S = 10.0
EXPIRY_S = 60.0


class LockRecord(BaseModel, frozen=True):
    """The content of a lock file."""

    run_id: str
    host: str
    pid: int
    process: str  # distinguishes processes that had the same pid; see `_process_identity`
    taken_at: datetime
    beat_at: datetime
    released_at: datetime | None = None

    @classmethod
    def of_this_process(cls, run_id: str) -> Self:
        now = datetime.now(UTC)
        host, pid = socket.gethostname(), os.getpid()
        return cls(run_id=run_id, host=host, pid=pid, process=_process_identity(pid), taken_at=now, beat_at=now)

    @classmethod
    def of_empty_file(cls, file: Location) -> Self:
        """What is known of a run that is just starting, or died then, or with its machine."""
        at = datetime.fromtimestamp(int(file.info().version) / 1e9, UTC)
        return cls(run_id=f"of the empty file {file}", host="?", pid=0, process="", taken_at=at, beat_at=at)

    def to_bytes(self) -> bytes:
        return (self.model_dump_json(indent=2) + "\n").encode()

    def is_held(self) -> bool:
        """Whether a run holds the lock that may still be alive."""
        if self.released_at is not None or datetime.now(UTC) - self.beat_at > timedelta(seconds=EXPIRY_S):
            return False
        machine, own_machine = (name.rpartition(" ")[0] for name in (self.process, _process_identity(os.getpid())))
        # A process of this machine can be looked up, so nobody need wait until its lock expires.
        return not machine or machine != own_machine or _process_identity(self.pid) == self.process


class RunLock:
    """The lock of an output, held inside `with lock.held():`."""

    def __init__(self, output: Location, run_id: str) -> None:
        self._output = output
        self._record = LockRecord.of_this_process(run_id)
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.number = 0  # of the lock file, for `check_held` in other processes
        self.was_left_behind = False  # the previous holder died, and may have left unfinished files

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Take the lock, keep it inside the block, release it. LockedError if another run holds it."""
        self._take()
        self._beating.start()
        try:
            yield self
        finally:
            self._end_beat()
            self._release()

    def check(self) -> None:
        """See `check_held`."""
        check_held(self._output, self.number)

    def remove_output(self) -> None:
        """Remove the output folder and the lock in it. LockedError if another run has taken the lock."""
        self._end_beat()  # a beat would create the folder again
        self.check()
        self._output.remove()

    def _end_beat(self) -> None:
        self._stop.set()
        self._beating.join()

    def _take(self) -> None:
        highest, record = highest_lock(self._output)
        if record and record.is_held():
            raise LockedError(
                f"run {record.run_id} holds {self._output} since {record.taken_at:%Y-%m-%d %H:%M:%S} UTC "
                f"(process {record.pid} on {record.host}). Wait for it; if it is dead, its lock expires at "
                f"{record.beat_at + timedelta(seconds=EXPIRY_S):%H:%M:%S} UTC"
            )
        if record and record.released_at is None:
            _log.info("run %s did not release its lock; taking over", record.run_id)
            self.was_left_behind = True
        self.number = highest + 1
        file, data = _file(self._output, self.number), self._record.to_bytes()
        if not file.create(data):
            raise LockedError(f"another run has just taken {self._output}. Wait for it")
        if not file.is_exclusive(data):
            _log.warning(
                "warning: the store of %s knows no conditional put (If-None-Match), so two runs that start at once may "
                "both take its lock: start one at a time",
                self._output,
            )
        for number in _numbers(self._output):
            if number < self.number:
                _file(self._output, number).remove()

    def _release(self) -> None:
        if highest_lock(self._output)[0] == self.number:
            self._write("released_at")

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_INTERVAL_S):
            try:
                self.check()
                self._write("beat_at")
            except LockedError:
                return  # the run itself checks before it announces anything
            except RequestError as error:
                _log.warning("warning: cannot renew the run's lock: %s", error)

    def _write(self, event: str) -> None:
        """Write the lock file with the present time as the time of the event."""
        self._record = self._record.model_copy(update={event: datetime.now(UTC)})
        _file(self._output, self.number).put(self._record.to_bytes())


def check_held(output: Location, number: int) -> None:
    """Raise a LockedError if another run has taken the lock. Call before you put or announce something."""
    highest, record = highest_lock(output)
    if highest != number:  # it may be lower: the other run has ended and removed the folder
        other = f"run {record.run_id}" if record else "another run"
        raise LockedError(
            f"{other} took {output} from this run, which had shown no sign of life for {EXPIRY_S:.0f} s. What this run "
            "has finished stays; run it again when the other one is done"
        )


def highest_lock(output: Location) -> tuple[int, LockRecord | None]:
    """Number and content of the lock file with the highest number; 0 and None if there is none."""
    highest = max(_numbers(output), default=0)
    if highest == 0:
        return 0, None
    file = _file(output, highest)
    data = file.read_bytes()
    if file.is_local and not data.strip(b"\0"):
        return highest, LockRecord.of_empty_file(file)
    try:
        return highest, LockRecord.model_validate_json(data)
    except ValidationError as error:
        raise RequestError(f"{file} is no lock file; remove it") from error


def _numbers(output: Location) -> list[int]:
    stems = [info.path.removesuffix(".json") for info in (output / FOLDER).files((".json",))]
    return [int(stem) for stem in stems if stem.isdecimal()]


def _file(output: Location, number: int) -> Location:
    return output / FOLDER / f"{number:08d}.json"


def _process_identity(pid: int) -> str:
    """Boot id, process namespace and the process' start time; empty on systems without Linux' /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    try:
        # After the name in parentheses, which may hold any character: the state, and as 20th field the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = "gone" if fields[0] == "Z" else fields[19]
    except OSError:
        started = "gone"
    return f"{boot} {namespace} {started}"


def new_run_id() -> str:
    """An id that sorts by time and is unique in one output: 20260105T031500.123456Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
