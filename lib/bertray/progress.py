"""Progress on stderr: a bar on a terminal, a line every ten seconds in a log; both show the time left."""

from __future__ import annotations

import logging
import math
import sys
import time
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


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
