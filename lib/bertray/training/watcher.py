"""Who is told how a run goes, and may ask it to end: the loop on one side, the driver on the other.

    loop, rank 0  --- steps, epochs --->  Board  --- news --->  driver
                  <--- shall it end? ---         <--- stop ---

A `Board` is used by two threads of one process, or lies in a Ray actor (`drivers.status_actors`).
"""

from __future__ import annotations

import threading
from typing import NamedTuple, Protocol

from bertray.training.tracking import StepRecord

# How long a driver that is stopped waits for a step and a checkpoint of a large model: what stops jobs gives half a
# minute.
STOP_S = 25.0


class Watcher(Protocol):
    """Who is told how a run goes."""

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        """New steps, maybe none, of so many in all. Returns whether the run shall write a checkpoint and end."""

    def epoch(self, metrics: dict[str, float]) -> None:
        """Metrics of an epoch."""


class News(NamedTuple):
    """What a run has told since the last look."""

    records: list[StepRecord]
    epochs: list[dict[str, float]]
    num_steps: int  # of the whole run


class Board:
    """Where a loop says how far it is, and its driver looks; a `Watcher`."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._records: list[StepRecord] = []
        self._epochs: list[dict[str, float]] = []
        self._num_steps, self._shall_stop = 0, False

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        """New steps, of so many in all; returns whether the run shall end."""
        with self._turn:
            self._records += records
            self._num_steps = num_steps
            return self._shall_stop

    def epoch(self, metrics: dict[str, float]) -> None:
        """Metrics of an epoch."""
        with self._turn:
            self._epochs.append(metrics)

    def stop(self) -> None:
        """Let the run write a checkpoint and end."""
        with self._turn:
            self._shall_stop = True

    def news(self) -> News:
        """What was told since the last call."""
        with self._turn:
            news = News(self._records, self._epochs, self._num_steps)
            self._records, self._epochs = [], []
            return news
