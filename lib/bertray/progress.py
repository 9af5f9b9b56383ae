"""Progress on stderr: a bar with the time left on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_log = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class ProgressBar:
    """Shows how much of `total` is done; use as a context manager.

    Args:
        title: what is being done.
        total: in steps, shards or whatever `update` counts.
        unit: its plural, for log lines.
    """

    def __init__(self, title: str, total: int, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=total, note="")
        self._logged = time.monotonic()
        # When the first step was seen done: start-up is no part of the rate.
        self._first: tuple[float, int] | None = None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, note: str = "", total: int | None = None) -> None:
        """Say how much is done in all, anything else worth knowing at the moment, and a total that was found out."""
        self._total = total or self._total
        if self._bar:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
            return
        now = time.monotonic()
        if done and self._first is None:
            self._first = now, done
        if self._first and done > self._first[1] and now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            first_s, first_done = self._first
            left_s = (now - first_s) / (done - first_done) * (self._total - done)
            _log.info(
                "%s: %d of %d %s, about %s left %s", self._title, done, self._total, self._unit, _clock(left_s), note
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
