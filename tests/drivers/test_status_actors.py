"""What workers log is seen where the job was started, though their stderr is not."""

import logging
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from bertray.drivers import cluster
from bertray.drivers.status_actors import LogBook, RunBoard, news_of
from bertray.drivers.train_on_ray import _run
from bertray.drivers.workers import BoardWatcher, set_up_process
from bertray.training.watcher import News
from tests.kills import wait_for


def stop_the_job(_: News) -> None:
    """A person, while ranks of Ray Train wait for one that has ended."""
    raise KeyboardInterrupt


@pytest.fixture
def hanging_board(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of a run that never ends by itself, and whose driver would wait for ever."""
    monkeypatch.setattr("bertray.model.runtime.ModelThread.submit", lambda *_: Future())
    monkeypatch.setattr("bertray.drivers.attempt.STOP_S", 1e9)
    return cluster.start_board(RunBoard)


def test_a_stop_waits_for_no_worker_that_has_not_begun(hanging_board: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        _run(SimpleNamespace(fit=None), hanging_board, stop_the_job)


def test_a_stop_waits_for_the_checkpoint_and_for_no_rank_that_hangs(hanging_board: Any) -> None:
    board = hanging_board
    ray.get(board.steps.remote([], 1))

    def save_when_told() -> None:
        wait_for(lambda: ray.get(board.steps.remote([], 1)), "the stop")
        time.sleep(0.5)
        ray.get(board.saved.remote(0))

    with ThreadPoolExecutor(1) as rank_0:
        rank_0.submit(save_when_told)
        with pytest.raises(KeyboardInterrupt):
            _run(SimpleNamespace(fit=None), board, stop_the_job)
        assert not ray.get(board.at_work.remote())


def test_a_worker_stops_at_the_first_step_after_the_signal(ray_cluster: str) -> None:
    board = cluster.start_board(RunBoard)
    watcher = BoardWatcher(board)
    assert not watcher.steps([], 1)
    ray.get(board.stop.remote())
    wait_for(lambda: watcher.steps([], 1), "the board's answer, which may be late once", timeout_s=1)


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before_s)


@pytest.mark.usefixtures("busy_threads")
def test_threads_log_while_an_answer_takes_what_they_have_logged() -> None:
    """Two units of an actor are at work at once."""
    num_threads, num_lines = 4, 2000

    def log(book: LogBook, thread: int) -> None:
        for line in range(num_lines):
            book.log(logging.INFO, f"{thread} {line}")

    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(20):
            book, taken = LogBook(), list[tuple[int, str]]()
            at_work = [pool.submit(log, book, thread) for thread in range(num_threads)]
            while not all(one.done() for one in at_work):
                taken += book.logged()
            taken += book.logged()
            assert len(taken) == len(set(taken)) == num_threads * num_lines


def test_what_workers_log_is_logged_once_by_the_driver(ray_cluster: str, caplog: pytest.LogCaptureFixture) -> None:
    def work(board: object, rank: int) -> None:
        assert set_up_process(board) == torch.device("cpu")
        log = logging.getLogger("bertray.model.attention")
        log.debug("of no interest")
        log.warning("batches will be padded: torch %s", "2.13")
        log.info("rank %d", rank)

    board = cluster.start_board(RunBoard)
    task = ray.remote(work)
    caplog.set_level(logging.INFO, "bertray")

    def is_logged(message: str) -> bool:
        news_of(board)
        return message in caplog.text

    for rank in range(2):
        ray.get(task.remote(board, rank))
        wait_for(partial(is_logged, f"rank {rank}"), "what a worker logs")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "batches will be padded: torch 2.13"),
        ("INFO", "rank 0"),
        ("INFO", "rank 1"),
    ]
