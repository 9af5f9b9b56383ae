"""The one thread that a process's model runs in; what a container lets it use."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from bertray.model import runtime
from bertray.model.runtime import model_thread, num_cpus


def test_everything_runs_in_one_thread_of_its_own() -> None:
    thread = model_thread()
    seen = {thread.submit(threading.get_ident).result() for _ in range(5)}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_a_result_and_an_exception_come_through() -> None:
    thread = model_thread()
    assert thread.submit(max, 2, 3).result() == 3
    with pytest.raises(ZeroDivisionError):
        thread.submit(divmod, 1, 0).result()
    assert thread.submit(max, 3, 4).result() == 4  # it goes on


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
