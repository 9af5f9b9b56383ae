"""One run at a time on an output: whoever creates the next lock file holds it, and one that a dead run left expires.

    output/lock/00000007.json    {"run_id": …, "host": …, "pid": …, "taken_at": …, "beat_at": …, "released_at": null}

1. take     the file of the highest number tells who holds the lock. Released, expired, or of a process of this machine
            that is gone: create the file of the next number, in which one of two rivals succeeds
2. beat     every BEAT_INTERVAL_S the holder writes its file anew, after a look whether a higher number is there: then
            it was taken for dead, and must stop
3. release  the file stays, marked: a number is never given twice

A holder is taken for dead when its last beat is older than EXPIRY_S. Clocks of machines that score to one output must
agree within some seconds. A store without conditional creation (`If-None-Match`) leaves a gap of a round trip in which
two runs that start at once may both go on; they then write the same bytes to the same names.
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

from pydantic import BaseModel, ConfigDict, ValidationError

from bertray.errors import LockedError, RequestError
from bertray.storage.location import Location

_log = logging.getLogger(__name__)

FOLDER = "lock"
BEAT_INTERVAL_S = 10.0
EXPIRY_S = 60.0


class LockRecord(BaseModel):
    """What a lock file holds."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    host: str
    pid: int
    process: str  # tells this process from an earlier one of the same number; see `_process_identity`
    taken_at: datetime
    beat_at: datetime
    released_at: datetime | None = None

    @classmethod
    def of_this_process(cls, run_id: str) -> Self:
        now = datetime.now(UTC)
        host, pid = socket.gethostname(), os.getpid()
        return cls(run_id=run_id, host=host, pid=pid, process=_process_identity(pid), taken_at=now, beat_at=now)

    def is_held(self) -> bool:
        """Whether a run that may still be alive holds it."""
        if self.released_at is not None or datetime.now(UTC) - self.beat_at > timedelta(seconds=EXPIRY_S):
            return False
        return not self._is_known_to_be_dead()

    def _is_known_to_be_dead(self) -> bool:
        """Whether it was a process of this machine, and is gone: then nobody need wait for the expiry."""
        machine = self.process.rpartition(" ")[0]
        own_machine = _process_identity(os.getpid()).rpartition(" ")[0]
        return bool(machine) and machine == own_machine and _process_identity(self.pid) != self.process


class RunLock:
    """The lock of an output, held inside `with lock.held():`.

    Args:
        output: the folder of `bertray score --output`.

    Attributes:
        number: of the lock file, for `check_held` in other processes.
        was_left_behind: the run that held it before died, and may have left files behind that it had not finished.
    """

    def __init__(self, output: Location, run_id: str) -> None:
        self._output = output
        self._record = LockRecord.of_this_process(run_id)
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.number = 0
        self.was_left_behind = False

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Take the lock; keep it inside the block; release it.

        Raises:
            LockedError: another run holds it.
        """
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
        """Remove the folder with the lock in it, if it is to last no longer than the run.

        Raises:
            LockedError: it is another run's by now; it stays.
        """
        self._end_beat()  # which would make the folder anew
        self.check()
        self._output.remove()

    def _end_beat(self) -> None:
        self._stop.set()
        self._beating.join()

    def _take(self) -> None:
        highest, record = highest_lock(self._output)
        if record is not None and record.is_held():
            expires_at = record.beat_at + timedelta(seconds=EXPIRY_S)
            raise LockedError(
                f"run {record.run_id} holds {self._output} since {record.taken_at:%Y-%m-%d %H:%M:%S} UTC "
                f"(process {record.pid} on {record.host}). Wait for it; if it is dead, its lock expires at "
                f"{expires_at:%H:%M:%S} UTC"
            )
        if record is not None and record.released_at is None:
            _log.info("run %s left its lock behind; taking over", record.run_id)
            self.was_left_behind = True
        self.number = highest + 1
        if not _file(self._output, self.number).create(_as_bytes(self._record)):
            raise LockedError(f"another run has just taken {self._output}. Wait for it")
        for number in _numbers(self._output):
            if number < self.number:
                _file(self._output, number).remove()

    def _release(self) -> None:
        if highest_lock(self._output)[0] == self.number:
            self._write(self._record.model_copy(update={"released_at": datetime.now(UTC)}))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_INTERVAL_S):
            try:
                self.check()
                self._write(self._record.model_copy(update={"beat_at": datetime.now(UTC)}))
            except LockedError:
                return  # whoever is about to announce something finds it out too
            except RequestError as error:
                _log.warning("warning: the run's lock could not be renewed: %s", error)

    def _write(self, record: LockRecord) -> None:
        self._record = record
        _file(self._output, self.number).put(_as_bytes(record))


def check_held(output: Location, number: int) -> None:
    """Call before something is put in place or announced.

    Raises:
        LockedError: the lock was lost: its holder was held up for so long that another run took it for dead.
    """
    highest, record = highest_lock(output)
    if highest != number:  # lower where the other run has ended meanwhile, and its folder went with it
        other = f"run {record.run_id}" if record else "another run"
        raise LockedError(
            f"{other} took {output} from this run, which had not been heard of for {EXPIRY_S:.0f} s. What this one has "
            "committed stays; run it again when that one is done"
        )


def highest_lock(output: Location) -> tuple[int, LockRecord | None]:
    """The highest lock file's number and content; 0 where there is none."""
    highest = max(_numbers(output), default=0)
    if highest == 0:
        return 0, None
    file = _file(output, highest)
    try:
        return highest, LockRecord.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise RequestError(f"{file} is no lock file; remove it") from error


def _numbers(output: Location) -> list[int]:
    stems = [info.path.removesuffix(".json") for info in (output / FOLDER).files((".json",))]
    return [int(stem) for stem in stems if stem.isdecimal()]


def _file(output: Location, number: int) -> Location:
    return output / FOLDER / f"{number:08d}.json"


def _as_bytes(record: LockRecord) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


def _process_identity(pid: int) -> str:
    """This boot of this machine, its process namespace, and when the process started; empty where Linux tells not."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
    try:
        # What follows the name in parentheses, which may hold anything: the state, and as 20th the time of the start.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = "gone" if fields[0] == "Z" else fields[19]
    except OSError:
        started = "gone"
    return f"{boot} {namespace} {started}"


def new_run_id() -> str:
    """Sortable by time, unique enough for one output: 20260105T031500.123456Z."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
