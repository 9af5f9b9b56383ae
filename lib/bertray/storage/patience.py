"""How long to wait: for storage that does not answer, and for a process that makes no progress, which is ended."""

from __future__ import annotations

import faulthandler
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TypeVar

from bertray.errors import UnavailableError

_log = logging.getLogger(__name__)

# Longer than most outages of a store; a run that ended would lose the start of its actors.
MAX_AWAY_S = 1800.0
_MAX_WAIT_S = 30.0
# To arm faulthandler starts a thread.
_ARM_INTERVAL_S = 1.0
_lock = threading.Lock()
_timeout_s = _armed_s = 0.0
_num_blocks = 0

Result = TypeVar("Result")


@contextmanager
def watched(timeout_s: float) -> Iterator[None]:
    """End this process, with its threads' stacks on stderr, if the block goes on so long without `alive`.

    Threads may be in such blocks at once; the progress of one counts for all.
    """
    global _timeout_s, _armed_s, _num_blocks
    with _lock:
        _num_blocks += 1
        _timeout_s, _armed_s = timeout_s, -math.inf
    alive()
    try:
        yield
    finally:
        with _lock:
            _num_blocks -= 1
            if not _num_blocks:
                _timeout_s = 0.0
                faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """Say that work goes on, in a block that is `watched`; elsewhere it does nothing."""
    global _armed_s
    with _lock:
        if _timeout_s and time.monotonic() - _armed_s > _ARM_INTERVAL_S:
            _armed_s = time.monotonic()
            # Not to sys.stderr, which may be no file, as in a notebook.
            faulthandler.dump_traceback_later(_timeout_s, exit=True, file=2)


def patiently(work: Callable[[], Result], is_ended: threading.Event | None = None) -> Result:
    """The result of `work`, which is repeated while the storage does not answer, for up to `MAX_AWAY_S`.

    Args:
        is_ended: when it is set, nobody needs the result any more.
    """
    began_s, wait_s = time.monotonic(), 1.0
    since = datetime.now(UTC)
    while True:
        try:
            return work()
        except UnavailableError as error:
            if error.why != "away" or time.monotonic() - began_s > MAX_AWAY_S or (is_ended and is_ended.is_set()):
                raise
            _log.warning(
                "warning: the storage does not answer since %s UTC; trying again in %.0f s: %s",
                f"{since:%H:%M:%S}",
                wait_s,
                error,
            )
        alive()
        is_ended.wait(wait_s) if is_ended else time.sleep(wait_s)
        wait_s = min(2 * wait_s, _MAX_WAIT_S)
