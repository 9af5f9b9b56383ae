"""Where the workers of a training run and its driver meet; light to import, for more processes than the workers do.

rank 0    --- steps, epochs --->  Board, an actor  --- news --->  driver
          <--- stop? -----------                   <--- stop ---
any rank  --- what it logs ---->                   ----------->
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import ray

from bertray.training.tracking import StepRecord
from bertray.training.watcher import Board

_log = logging.getLogger(__name__)


class LogBook:
    """Levels and messages; what several workers say, or one again, counts once."""

    def __init__(self) -> None:
        self._logged: dict[tuple[int, str], bool] = {}  # whether it was taken

    def log(self, level: int, message: str) -> None:
        self._logged.setdefault((level, message), False)

    def logged(self) -> list[tuple[int, str]]:
        """Since the last call."""
        news = [one for one, is_taken in self._logged.items() if not is_taken]
        self._logged |= dict.fromkeys(news, True)
        return news


def log_to(log: Callable[[int, str], object]) -> None:
    """Let this process, a worker, tell what it logs, beside writing it to stderr.

    Args:
        log: of a `LogBook`, or its `remote`.
    """
    logger = logging.getLogger("bertray")
    logger.handlers[:] = [_Handler(log), logging.StreamHandler()]
    logger.setLevel(logging.INFO)


def show(lines: Iterable[tuple[int, str]]) -> None:
    """Log here, in the driver, what a book holds."""
    for level, message in lines:
        _log.log(level, "%s", message)


class _Handler(logging.Handler):
    def __init__(self, log: Callable[[int, str], object]) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log(record.levelno, record.getMessage())
        except Exception:  # what is logged shall end no work; logging's own way to say so
            self.handleError(record)


def train_on_worker(settings: dict[str, Any]) -> None:
    """Entry point of a Ray Train worker; see `bertray.drivers.train_worker.run`."""
    from bertray.drivers.train_worker import run  # the controller reads this function too, and needs no model

    run(settings)


def show_logged(board: Any) -> None:
    """Log here, in the driver, what workers have told the board since the last call."""
    show(ray.get(board.logged.remote()))


class RunBoard(Board, LogBook):
    """A `Board` of a training run as a Ray actor, with what workers log."""

    def __init__(self) -> None:
        Board.__init__(self)
        LogBook.__init__(self)
        self._is_at_work = False

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        """See `Board`."""
        self._is_at_work = True
        return super().steps(records, num_steps)

    def stopped(self) -> None:
        """The checkpoint is in storage."""
        self._is_at_work = False

    def is_at_work(self) -> bool:
        """Whether rank 0 has taken steps, and has not said that it stopped."""
        return self._is_at_work


class StopBoard(LogBook):
    """Where the driver says that trials shall write a checkpoint and end, and they that they have; a Ray actor."""

    def __init__(self) -> None:
        super().__init__()
        self._shall_stop = False
        self._at_work: set[int] = set()
        self._refusal: str | None = None

    def stop(self) -> None:
        self._shall_stop = True

    def shall_stop(self, number: int) -> bool:
        """A trial asks, which is at work."""
        self._at_work.add(number)
        return self._shall_stop

    def saved(self, number: int) -> None:
        """A trial's checkpoint is in storage, and it takes no more steps."""
        self._at_work.discard(number)

    def refuse(self, reason: str) -> None:
        """A trial cannot begin, and no other attempt could."""
        self._refusal = reason

    def refusal(self) -> str | None:
        """Why the search cannot go on."""
        return self._refusal

    def at_work(self) -> set[int]:
        """Trials that have begun, and have not said that they saved; also some that have ended."""
        return self._at_work


class FoldBoard(LogBook):
    """Where folds say how far they are; a Ray actor."""

    def __init__(self) -> None:
        super().__init__()
        self._step_of_fold: dict[int, int] = {}
        self._num_steps = 1

    def post(self, fold: int, step: int, num_steps: int) -> None:
        """A fold, maybe begun again, has taken so many of its steps."""
        self._step_of_fold[fold], self._num_steps = step, max(self._num_steps, num_steps)

    def steps(self) -> tuple[int, int]:
        """Steps of all folds so far, and those of the longest fold in all."""
        return sum(self._step_of_fold.values()), self._num_steps
