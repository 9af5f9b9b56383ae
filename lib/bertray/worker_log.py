"""What workers log, on its way to the driver: their stderr is a file of Ray's.

worker: logger  --- log_to --->  LogBook, in the worker or in a Ray actor  --- logged --->  driver: show
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

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
