"""The one thread that a process's model runs in; what a container lets it use."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest

from bertray.model import runtime
from bertray.model.runtime import ModelThread, num_cpus


def test_everything_runs_in_one_thread_of_its_own() -> None:
    thread = ModelThread()
    seen = {thread.submit(threading.get_ident).result() for _ in range(5)}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_a_result_and_an_exception_come_through() -> None:
    thread = ModelThread()
    assert thread.submit(lambda: 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        thread.submit(lambda: 1 // 0).result()
    assert thread.submit(lambda: 4).result() == 4  # it goes on


def test_of_what_waits_the_lowest_order_comes_first() -> None:
    thread, may_begin, done = ModelThread(), threading.Event(), list[str]()
    thread.submit(lambda: may_begin.wait(20))
    waiting = [thread.submit(partial(done.append, name), order) for name, order in (("b", 2), ("a", 1), ("c", 2))]
    may_begin.set()
    for one in waiting:
        one.result(20)
    assert done == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("50000 100000", 1), ("150000 100000", 1), ("max 100000", 6), ("", 6)],
)
def test_part_of_a_cpu_is_one(quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    assert num_cpus() == expected
