"""Progress on stderr: a bar on a terminal, a line every ten seconds in a log; both show the time left.

And the end of a process that makes none.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0

# To arm faulthandler starts a thread.
_ARM_INTERVAL_S = 1.0
_timeout_s = _armed_s = 0.0


@contextmanager
def watched(timeout_s: float) -> Iterator[None]:
    """End this process, with its threads' stacks on stderr, if the block goes on so long without `alive`."""
    global _timeout_s, _armed_s
    _timeout_s, _armed_s = timeout_s, -math.inf
    alive()
    try:
        yield
    finally:
        _timeout_s = 0.0
        faulthandler.cancel_dump_traceback_later()


def alive() -> None:
    """Say that work goes on, in a block that is `watched`; elsewhere it does nothing."""
    global _armed_s
    if _timeout_s and time.monotonic() - _armed_s > _ARM_INTERVAL_S:
        _armed_s = time.monotonic()
        # Not to sys.stderr, which may be no file, as in a notebook.
        faulthandler.dump_traceback_later(_timeout_s, exit=True, file=2)


class ProgressBar:
    """Shows how much of `total` is done; use as a context manager.

    Args:
        unit: what is counted, in the plural, for log lines.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._unit = unit
        self._bar = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "{task.fields[note]}",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
            # The rate is an average since the first step was done, so that it excludes start-up.
            speed_estimate_period=math.inf,
            get_time=time.monotonic,
        )
        self._task_id = self._bar.add_task(title, total=total, note="")
        self._logged_s = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bar.disable:  # stopped in a log, rich would print an empty line
            self._bar.stop()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that `done` units are finished, with a note; `total` replaces the total unless it is 0 or None."""
        self._bar.update(self._task_id, completed=done, total=total or None, note=note)
        (task,) = self._bar.tasks
        left_s, now_s = task.time_remaining, time.monotonic()
        if self._bar.disable and done and left_s is not None and now_s - self._logged_s >= LOG_INTERVAL_S:
            self._logged_s = now_s
            left = timedelta(seconds=left_s)
            _log.info("%s: %d of %d %s, about %s left %s", task.description, done, task.total, self._unit, left, note)
