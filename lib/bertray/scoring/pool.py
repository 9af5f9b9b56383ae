"""Processes that score units: what a run asks of them, and the pool of this machine.

    Request, Work  ->  Pool.run  ->  staged files; outcomes of shards and of parts, in any order

`LocalPool` runs the model in one child process. `drivers.actor_pool` spreads units over a Ray cluster.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Protocol

from bertray.bundle.isolated import Predictor
from bertray.errors import BundleError, UnavailableError
from bertray.scoring.pipeline import UNITS_AT_ONCE, Pipeline
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Outcome, Work
from bertray.storage.location import FileInfo


class Pool(Protocol):
    """Processes that hold the model and score."""

    num_processes: int
    unit_bytes: int  # Parquet bytes of a unit

    def run(self, work: Work) -> Generator[Outcome, None, None]:
        """Score the units and merge what is staged; an outcome for each shard and each part, in any order.

        It may end before all units have an outcome, because a place has failed too often; the next call goes on
        without that place. BundleError if no process can load the bundle; UnavailableError if no place is left.
        """


def none_is_left(reasons: dict[str, str]) -> UnavailableError:
    """The error to raise if every place has failed too often; their last reasons by node."""
    said = "; ".join(f"{node}: {reason}" for node, reason in reasons.items())
    return UnavailableError(
        f"no machine is left that can score. {said}. What is staged stays: mend this, and run again"
    )


class LocalPool:
    """Scores in this process, with the model in one child process (a `bundle.isolated.IsolatedBundle`); no Ray.

    A file that crashes this process ends the run. The next run reads its suspects in child processes first, and lists
    that file as failed.

    Args:
        interrupt: ends what the predictor is doing.
    """

    num_processes = 1

    def __init__(self, request: Request, predictor: Predictor, interrupt: Callable[[], None] = lambda: None) -> None:
        self.unit_bytes = request.step_bytes
        self._request, self._scorer = request, UnitScorer(request, fatal=(BundleError,))
        self._predictor, self._interrupt = predictor, interrupt

    def run(self, work: Work) -> Generator[Outcome, None, None]:
        """See `Pool.run`."""
        for shard in work.complete():
            yield from self._merged(shard, work)
        with Pipeline(self._scorer, self._predictor, self._request.step_bytes) as pipeline:
            try:
                for outcomes in self._answers(pipeline, work):
                    for outcome in outcomes:
                        yield outcome
                        if (ready := work.take(outcome)) is not None:
                            yield from self._merged(ready, work)
                self._check()
            except BaseException:  # also Ctrl-C
                self._scorer.is_ended.set()
                self._interrupt()
                raise

    def _merged(self, shard: FileInfo, work: Work) -> Iterator[Outcome]:
        if outcome := self._scorer.merge(shard, work.num_parts[shard]):
            yield outcome
        self._check()

    def _answers(self, pipeline: Pipeline, work: Work) -> Iterator[list[Outcome]]:
        waiting = deque[Future[list[Outcome]]]()
        for unit in work.units:
            if self._scorer.gives_up:  # what is at work has outcomes that count, and need not wait for the storage
                self._scorer.is_ended.set()
                break
            is_suspect = any(shard.path in self._request.suspects for shard in unit.shards)
            waiting.append(pipeline.submit(unit, is_suspect=is_suspect))
            if len(waiting) > UNITS_AT_ONCE:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _check(self) -> None:
        if self._scorer.gives_up:
            raise none_is_left({socket.gethostname(): self._scorer.gives_up})
