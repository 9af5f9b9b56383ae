"""Scoring without Ray and without a model: everything else of a run is what it always is, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from bertray.bundle.info import BundleInfo
from bertray.drivers import actor_pool, cluster
from bertray.schema import PREDICTION_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.manifest import fingerprint
from bertray.scoring.score_unit import UnitScorer
from bertray.scoring.units import Outcome, Work, divide
from bertray.storage.location import FileInfo, Location


class Stub:
    """Says of every text its first letter, and of an empty one an error."""

    precision = "none"
    schema = PREDICTION_SCHEMA

    def predict_column(self, texts: pa.Array) -> pa.Table:
        return pa.Table.from_pylist([_predicted(text) for text in texts.to_pylist()], schema=PREDICTION_SCHEMA)


def _predicted(text: bytes | None) -> dict[str, Any]:
    if not text:
        return {
            "label": None,
            "score": None,
            "review": False,
            "num_tokens": 0,
            "truncated": False,
            "error": "text is empty",
        }
    return {
        "label": text[:1].decode(),
        "score": 1 / (1 + len(text) % 7),
        "review": False,
        "num_tokens": len(text),
        "truncated": False,
        "error": None,
    }


class InProcessPool:
    """A `actor_pool.Pool` of no actors; parts are of `unit_bytes`."""

    unit_bytes = 2 << 20

    def __init__(
        self, config: ScoreConfig, info: BundleInfo, archive: Location, _: cluster.Placement, lock_number: int
    ) -> None:
        self._fingerprint = fingerprint(info, config)
        self._scorer = UnitScorer(config, str(archive), self._fingerprint, lock_number, 300)

    def divide(self, shards: list[FileInfo], staged: set[str]) -> Work:
        return divide(shards, self.unit_bytes, 1, self._fingerprint, staged)

    def outcomes(self, work: Work) -> Iterator[Outcome]:
        missing = {shard: set(parts) for shard, parts in work.missing_parts.items()}
        for unit in work.units:
            for outcome in self._scorer.score(unit, Stub()):
                yield outcome
                if outcome.part is not None and not outcome.failure:
                    missing[outcome.shard].discard(outcome.part)
        for shard, parts in missing.items():
            if not parts:
                yield self._scorer.merge(shard, work.num_parts[shard])


@contextmanager
def without_ray(unit_bytes: int = 2 << 20) -> Iterator[None]:
    """Inside the block `score.score` needs neither Ray nor the bundle's model."""

    @contextmanager
    def no_session() -> Iterator[None]:
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "session", no_session)
        patch.setattr(actor_pool, "place", lambda *_: cluster.Placement(1, False, 1))
        patch.setattr(actor_pool, "Pool", InProcessPool)
        patch.setattr(InProcessPool, "unit_bytes", unit_bytes)
        yield
