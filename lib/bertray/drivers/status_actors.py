"""Where processes that train meet their driver. Light to import, because Ray also loads it in processes of its own.

process  --- steps, epochs, what it logs --->  RunBoard, an actor  --- news --->  driver
         <--- stop? ------------------------                       <--- stop ---
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from logging.handlers import QueueHandler
from typing import Any

import ray

from bertray.training.tracking import StepRecord
from bertray.training.watcher import Board, News

_log = logging.getLogger(__name__)


class LogBook:
    """Levels and messages of several workers or threads; a repeated message counts once."""

    def __init__(self) -> None:
        self._logged: dict[tuple[int, str], bool] = {}  # whether `logged` has returned it

    def log(self, level: int, message: str) -> None:
        self._logged.setdefault((level, message), False)

    def logged(self) -> list[tuple[int, str]]:
        """The messages since the last call."""
        # Of a copy, because other threads go on logging.
        news = [one for one, is_taken in self._logged.copy().items() if not is_taken]
        self._logged |= dict.fromkeys(news, True)
        return news


def log_to(log: Any) -> None:
    """Send what this worker logs to a `LogBook`, and to stderr.

    Args:
        log: `LogBook.log`, or its `remote`: called with a level and a message.
    """
    logger = logging.getLogger("bertray")
    logger.handlers[:] = [_Handler(log), logging.StreamHandler()]
    logger.setLevel(logging.INFO)


def show(lines: Iterable[tuple[int, str]]) -> None:
    """Log the messages of a book here, in the driver."""
    for level, message in lines:
        _log.log(level, "%s", message)


class _Handler(QueueHandler):
    """Formats records, with their stacks, in this process; a failure to log does not end the work."""

    def enqueue(self, record: logging.LogRecord) -> None:
        log: Any = self.queue
        log(record.levelno, record.getMessage())


class RunBoard(Board, LogBook):
    """A `Board` as a Ray actor, for trials and folds, known by their numbers, and for rank 0 of a run: number 0."""

    def __init__(self) -> None:
        Board.__init__(self)
        LogBook.__init__(self)
        self._at_work: set[int] = set()
        self._last_steps: dict[int, int] = {}

    def steps(self, records: list[StepRecord], num_steps: int, number: int = 0) -> bool:
        """See `Board`."""
        self._at_work.add(number)
        if records:
            self._last_steps[number] = records[-1].step
        return super().steps(records, num_steps)

    def num_steps_taken(self) -> int:
        """The steps of all numbers; a fold that began again counts from its new first step."""
        return sum(self._last_steps.values())

    def saved(self, number: int) -> None:
        """A checkpoint is in storage, and no more steps follow."""
        self._at_work.discard(number)

    def at_work(self) -> set[int]:
        """The numbers that have taken steps and not said that they saved; some of them may have ended."""
        return self._at_work


def news_of(board: Any) -> News:
    """The news of a `RunBoard`; logs here, in the driver, what workers have logged since the last call."""
    show(ray.get(board.logged.remote()))
    news: News = ray.get(board.news.remote())
    return news


def train_on_worker(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker: `workers.run`, with its arguments as settings."""
    from bertray.drivers.workers import run  # not above: Ray's controller loads this module, and needs no torch

    run(**settings)
