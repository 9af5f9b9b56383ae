"""Score units so that the model need not wait: it runs in one thread, while others read, tokenise and write.

    submit(unit)   the unit's shards side by side, each in a thread of its own:
                   read a step, tokenise  ──►  the model's thread  ──►  columns, write, put
                   read the next one, …

Texts that are read and not yet written take at most `MAX_STEPS` steps. No Ray.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self, TypeVar

from bertray.bundle.isolated import Predictor
from bertray.scoring.score_shard import STEPS_AT_ONCE
from bertray.scoring.score_unit import UnitScorer
from bertray.scoring.units import Outcome, Unit
from bertray.storage.location import FileInfo

# Units at once: while the last shards of one are written, the model has those of the next.
UNITS_AT_ONCE = 2
MAX_STEPS = UNITS_AT_ONCE * STEPS_AT_ONCE
# Tiny shards wait for the storage rather than for the model: four requests of 0.1 s each. All actors together have so
# many at once: they then ask S3 for less than the 5,500 reads and 3,500 writes a second that it allows a prefix.
_SHARDS_AT_ONCE, _SHARDS_OF_ALL = 32, 512
# Text that a byte of Parquet may hold; a shard that has more is read in steps all the same.
_GROWTH = 4

Result = TypeVar("Result")


def shards_at_once(num_actors: int) -> int:
    """How many shards an actor has at once, of so many actors."""
    return max(UNITS_AT_ONCE, min(_SHARDS_AT_ONCE, _SHARDS_OF_ALL // num_actors))


class Pipeline:
    """Scores units with one model; a context manager.

    Args:
        step_bytes: see `score_shard.score_shard`.
        num_shards: at once.
    """

    def __init__(
        self, scorer: UnitScorer, predictor: Predictor, step_bytes: int, num_shards: int = _SHARDS_AT_ONCE
    ) -> None:
        self._scorer, self._predictor, self._step_bytes = scorer, predictor, step_bytes
        self._units = ThreadPoolExecutor(UNITS_AT_ONCE, "unit")
        self._shards = ThreadPoolExecutor(num_shards, "shard")
        self._free_bytes, self._freed = MAX_STEPS * step_bytes, threading.Condition()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Begin nothing more, and wait for what is being done."""
        self._units.shutdown(wait=False, cancel_futures=True)
        self._shards.shutdown(cancel_futures=True)

    def submit(self, unit: Unit, *, is_suspect: bool = False) -> Future[list[Outcome]]:
        """Score a unit; see `UnitScorer.score`."""
        run = map if is_suspect else self._run
        return self._units.submit(self._scorer.score, unit, self._predictor, is_suspect=is_suspect, run=run)

    def _run(self, work: Callable[[FileInfo], Result], shards: tuple[FileInfo, ...]) -> Iterator[Result]:
        def bounded(shard: FileInfo) -> Result:
            with self._held(min(STEPS_AT_ONCE * self._step_bytes, _GROWTH * shard.size_bytes)):
                return work(shard)

        return self._shards.map(bounded, shards)

    @contextmanager
    def _held(self, num_bytes: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: self._free_bytes >= num_bytes)
            self._free_bytes -= num_bytes
        try:
            yield
        finally:
            with self._freed:
                self._free_bytes += num_bytes
                self._freed.notify_all()
