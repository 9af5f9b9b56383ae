"""The model does not wait for what others can do meanwhile; and what others do at once stays bounded."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bertray import Bundle
from bertray.bundle.isolated import Predictor
from bertray.errors import ShardError, UnavailableError
from bertray.model.runtime import ModelThread
from bertray.scoring import pipeline, score_shard, score_unit
from bertray.scoring.config import ScoreConfig
from bertray.scoring.pipeline import MAX_STEPS, Pipeline, shards_at_once
from bertray.scoring.score_unit import MAX_FAILURES_OF_PLACE, Request, UnitScorer
from bertray.scoring.shard_reader import steps
from bertray.scoring.units import Outcome, Unit
from bertray.storage.location import FileInfo, Location
from bertray.tokenization.tokenizer import TokenColumn
from tests.conftest import write_shard
from tests.stub_pool import Stub

NUM_SHARDS, TIMEOUT_S = 8, 20.0


@pytest.fixture
def shards(tmp_path: Path) -> list[FileInfo]:
    for number in range(NUM_SHARDS):
        write_shard(tmp_path / "archive" / f"{number}.parquet", [f"{number} {row}" for row in range(20)])
    root = Location.of(str(tmp_path / "archive"))
    return [(root / f"{number}.parquet").info() for number in range(NUM_SHARDS)]


@pytest.fixture
def scorer(shards: list[FileInfo], tiny_bundle: Path, tmp_path: Path) -> UnitScorer:
    archive = str(tmp_path / "archive")
    config = ScoreConfig(bundle=str(tiny_bundle), input=archive, output=str(tmp_path / "scored"))
    return UnitScorer(Request(config, archive, "request", "bundle", 0, 1 << 20))


class AtOnce:
    """How many threads are in a block at once, at most; with `wait_for`, each stays until so many are."""

    def __init__(self, wait_for: int = 0) -> None:
        self.most = self._now = 0
        self._changed, self._wait_for = threading.Condition(), wait_for

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._changed:
            self._now += 1
            self.most = max(self.most, self._now)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.most >= self._wait_for, TIMEOUT_S)
        yield
        with self._changed:
            self._now -= 1


class Counted(Stub):
    def __init__(self, at_once: AtOnce) -> None:
        self._at_once = at_once

    def predict_column(self, texts: pa.Array) -> pa.Table:
        with self._at_once():
            time.sleep(0.01)
            return super().predict_column(texts)


def scored(scorer: UnitScorer, predictor: Predictor, *units: Unit, step_bytes: int = 1 << 20) -> list[Outcome]:
    with Pipeline(scorer, predictor, step_bytes) as line:
        waiting = [line.submit(unit) for unit in units]
        return [outcome for one in waiting for outcome in one.result(TIMEOUT_S)]


def test_shards_of_a_unit_are_side_by_side_and_their_outcomes_in_order(
    scorer: UnitScorer, shards: list[FileInfo]
) -> None:
    at_once = AtOnce(wait_for=NUM_SHARDS)
    outcomes = scored(scorer, Counted(at_once), Unit(shards=tuple(shards)))
    assert [(one.shard, one.failure) for one in outcomes] == [(shard, "") for shard in shards]
    assert at_once.most == NUM_SHARDS


def test_what_is_in_memory_is_bounded_by_bytes(
    scorer: UnitScorer, shards: list[FileInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_GROWTH", 1)
    at_once = AtOnce(wait_for=MAX_STEPS)
    # Each of these shards may fill a step.
    outcomes = scored(scorer, Counted(at_once), Unit(shards=tuple(shards)), step_bytes=shards[0].size_bytes)
    assert len(outcomes) == NUM_SHARDS
    assert at_once.most == MAX_STEPS


def test_the_model_runs_in_its_thread_while_others_tokenize(
    scorer: UnitScorer, shards: list[FileInfo], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    alone = {shard: score_unit.UnitScorer.score(scorer, Unit(shards=(shard,)), bundle)[0].counts for shard in shards}
    bundle.model_thread, threads, in_model = ModelThread(), set[str](), AtOnce()
    all_tokenized, num_tokenized = threading.Event(), iter(range(1, NUM_SHARDS + 1))
    logits, encode = bundle.encoder.logits, bundle.tokenizer.encode

    def slow_logits(tokens: TokenColumn) -> np.ndarray:
        # Only if others tokenize meanwhile does this ever end.
        assert all_tokenized.wait(TIMEOUT_S)
        threads.add(threading.current_thread().name)
        with in_model():
            return logits(tokens)

    def counted_encode(texts: Any) -> TokenColumn:
        tokens = encode(texts)
        if next(num_tokenized) == NUM_SHARDS:
            all_tokenized.set()
        return tokens

    monkeypatch.setattr(bundle.encoder, "logits", slow_logits)
    monkeypatch.setattr(bundle.tokenizer, "encode", counted_encode)
    outcomes = scored(scorer, bundle, Unit(shards=tuple(shards[:5])), Unit(shards=tuple(shards[5:])))
    assert {one.shard: one.counts for one in outcomes} == alone
    assert (in_model.most, len(threads)) == (1, 1) and threads.pop().startswith("model")


def test_shards_that_fail_leave_no_step_to_the_model(
    scorer: UnitScorer, shards: list[FileInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is slow, the steps of a thousand such shards would wait in memory."""
    model, num_begun, answered = ModelThread(), Counter[str](), list[pa.Array]()

    class Slow(Stub):
        def begin_column(self, texts: pa.Array, order: float) -> Callable[[], pa.Table]:
            num_begun["steps"] += 1
            return model.submit(partial(self._answer, texts), order).result

        def _answer(self, texts: pa.Array) -> pa.Table:
            time.sleep(0.02)
            answered.append(texts)
            return self.predict_column(texts)

    def damaged(*arguments: Any) -> Iterator[pa.Table]:
        yield next(steps(*arguments))
        raise ShardError("a page cannot be read")

    monkeypatch.setattr(score_shard, "steps", damaged)
    outcomes = scored(scorer, Slow(), Unit(shards=tuple(shards)))
    assert [one.failure for one in outcomes] == ["a page cannot be read"] * NUM_SHARDS
    assert (num_begun["steps"], len(answered)) == (NUM_SHARDS, NUM_SHARDS)


def test_a_place_that_fails_costs_few_shards_a_try_however_many_are_at_once(
    scorer: UnitScorer, shards: list[FileInfo]
) -> None:
    class Full(Counted):
        def predict_column(self, texts: pa.Array) -> pa.Table:
            super().predict_column(texts)
            raise OSError(28, "No space left on device")

    outcomes = scored(scorer, Full(AtOnce(wait_for=NUM_SHARDS)), Unit(shards=tuple(shards)))
    assert [one.of for one in outcomes] == ["place"] * MAX_FAILURES_OF_PLACE
    assert "No space left on device" in scorer.gives_up


def test_what_is_suspected_is_scored_one_by_one(
    scorer: UnitScorer, shards: list[FileInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_unit, "read_in_isolation", lambda *_: None)
    at_once = AtOnce()
    with Pipeline(scorer, Counted(at_once), 1 << 20) as line:
        assert len(line.submit(Unit(shards=tuple(shards)), is_suspect=True).result(TIMEOUT_S)) == NUM_SHARDS
    assert at_once.most == 1


def test_what_nobody_waits_for_any_more_does_not_wait_for_storage(scorer: UnitScorer, shards: list[FileInfo]) -> None:
    is_away = threading.Event()

    class Away(Stub):
        def predict_column(self, _: pa.Array) -> pa.Table:
            is_away.set()
            raise UnavailableError.because("away", "cannot reach s3://bucket")

    with Pipeline(scorer, Away(), 1 << 20) as line:
        line.submit(Unit(shards=tuple(shards)))
        assert is_away.wait(TIMEOUT_S)
        scorer.is_ended.set()
        began_s = time.monotonic()
    assert time.monotonic() - began_s < TIMEOUT_S  # not `patience.MAX_AWAY_S`


def test_more_actors_have_fewer_shards_at_once_each() -> None:
    assert [shards_at_once(num_actors) for num_actors in (1, 16, 64, 5000)] == [32, 32, 8, 2]
