"""Progress: a bar on a terminal and under a notebook's cell, a line every ten seconds in a log. All say what's left."""

from __future__ import annotations

import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)

LOG_INTERVAL_S, _CELL_INTERVAL_S = 10.0, 0.5


class ProgressBar:
    """Shows how much of `total` is done; use as a context manager.

    Args:
        unit: what is counted, in the plural, for log lines.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._unit = unit
        self._console = Console(stderr=True)
        self._bar = Progress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "{task.fields[note]}",
            TimeElapsedColumn(),
            "left",
            TimeRemainingColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
            # The rate is an average since the first step was done, so that it excludes start-up.
            speed_estimate_period=math.inf,
            get_time=time.monotonic,
        )
        self._task_id = self._bar.add_task(title, total=total, note="")
        (self._task,) = self._bar.tasks
        self._cell: Any = None  # the output under a notebook's cell
        self._shown_s = time.monotonic()
        self._is_logged = False

    def __enter__(self) -> Self:
        self._bar.start()
        if self._console.is_jupyter:
            from IPython.display import display

            # Rich would do this with widgets, which not every notebook has and no saved one shows.
            self._cell = display(self._bar, display_id=True)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if not self._bar.disable:  # stopped in a log, rich would print an empty line
            self._bar.stop()
        elif self._cell:
            self._cell.update(self._bar)
        elif self._is_logged and error is None:
            self._log(f"{timedelta(seconds=round(self._task.elapsed or 0))} in all")

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Show that `done` units are finished, with a note; `total` replaces the total unless it is 0 or None."""
        self._bar.update(self._task_id, completed=done, total=total or None, note=note)
        if not self._bar.disable:
            return
        waited_s = time.monotonic() - self._shown_s
        if self._cell and waited_s >= _CELL_INTERVAL_S:
            self._cell.update(self._bar)
            self._shown_s = time.monotonic()
        elif not self._cell and done and waited_s >= LOG_INTERVAL_S and self._task.time_remaining is not None:
            self._log(f"about {timedelta(seconds=self._task.time_remaining)} left {note}")
            self._shown_s, self._is_logged = time.monotonic(), True

    def _log(self, rest: str) -> None:
        task = self._task
        _log.info("%s: %d of %d %s, %s", task.description, task.completed, task.total, self._unit, rest)
