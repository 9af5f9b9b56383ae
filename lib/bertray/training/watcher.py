"""How the loop and its driver talk: the loop reports steps and epochs, the driver may stop it.

    loop, rank 0  --- steps, epochs --->  Board  --- news --->  driver
                  <--- stop? -----------         <--- stop ---

Two threads of one process share a `Board`, or it lies in a Ray actor (`drivers.status_actors`).
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

from bertray.training.tracking import StepRecord

# Time for a step and a checkpoint of a large model when a job is stopped; what stops jobs kills them after 30 s.
STOP_S = 25.0


class News(NamedTuple):
    """What a run has reported since the last call."""

    records: list[StepRecord]
    epochs: list[dict[str, float]]
    num_steps: int  # of the whole run


class Watcher(Protocol):
    """Receives what a run reports."""

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        """New steps, maybe none, of a run of `num_steps`; returns whether it shall write a checkpoint and stop."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """Metrics of a finished epoch."""


class Board:
    """A `Watcher` that keeps reports for the driver."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._records, self._epochs = list[StepRecord](), list[dict[str, float]]()
        self._num_steps, self._shall_stop = 0, False

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        with self._turn:
            self._records += records
            self._num_steps = num_steps
            return self._shall_stop

    def epoch(self, metrics: dict[str, float]) -> None:
        with self._turn:
            self._epochs.append(metrics)

    def stop(self) -> None:
        """Let the run write a checkpoint and stop."""
        self._shall_stop = True

    def news(self) -> News:
        """Reports since the last call."""
        with self._turn:
            news = News(self._records, self._epochs, self._num_steps)
            self._records, self._epochs = [], []
            return news
