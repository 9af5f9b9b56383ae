"""Units in, outcomes out, in any order: who scores them is a pool's own matter.

    Request, Work  ->  Pool.run  ->  outcomes of shards
                                 ->  outcomes of parts; when all of a shard are staged, they are merged: its outcome

`LocalPool` runs the model in one child process. `drivers.actor_pool` spreads units over a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from bertray.errors import BundleError
from bertray.scoring.score_shard import Predictor
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Outcome, Work
from bertray.storage.location import FileInfo


class Pool(Protocol):
    """Processes that score, ready to be given work.

    Attributes:
        num_processes: that hold the model.
        unit_bytes: of Parquet, that a unit for one of them should have.
    """

    num_processes: int
    unit_bytes: int

    def run(self, work: Work) -> Iterator[Outcome]:
        """Score the units and merge what is staged: an outcome for each shard and each part, in any order.

        Raises:
            BundleError: the bundle was replaced, or no process can load it.
        """


class Parts:
    """Which shards have all of their parts staged, as outcomes come in.

    Args:
        work: whose shards these are.
    """

    def __init__(self, work: Work) -> None:
        self._missing = {shard: set(parts) for shard, parts in work.missing_parts.items()}
        # Staged by a run before, which did not come to merge them.
        self.complete = [shard for shard, parts in self._missing.items() if not parts]

    def take(self, outcome: Outcome) -> FileInfo | None:
        """What became of a part, or of a shard; returns the shard if this was the last part that it lacked."""
        if outcome.part is None or outcome.failure:
            return None
        self._missing[outcome.shard].discard(outcome.part)
        return None if self._missing[outcome.shard] else outcome.shard


class LocalPool:
    """One process that holds the model, beside this one, which reads and writes; no Ray.

    A file that ends the process which reads it ends the run. The next one has the request's suspects read by processes
    of their own first, and lists that file as failed.

    Args:
        request: of the run; its `step_bytes` are those of the device that the predictor runs on.
        predictor: a `bundle.isolated.IsolatedBundle`, so that a text that ends the model's process ends nothing else.
    """

    num_processes = 1

    def __init__(self, request: Request, predictor: Predictor) -> None:
        self.unit_bytes = request.step_bytes
        self._request, self._scorer, self._predictor = request, UnitScorer(request, fatal=(BundleError,)), predictor

    def run(self, work: Work) -> Iterator[Outcome]:
        """See `Pool.run`; units are scored one after the other."""
        parts = Parts(work)
        for shard in parts.complete:
            yield self._scorer.merge(shard, work.num_parts[shard])
        for unit in work.units:
            is_suspect = any(shard.path in self._request.suspects for shard in unit.shards)
            before_read = self._request.read_in_isolation if is_suspect else None
            for outcome in self._scorer.score(unit, self._predictor, before_read):
                yield outcome
                if (ready := parts.take(outcome)) is not None:
                    yield self._scorer.merge(ready, work.num_parts[ready])
