"""The one thread that a process's model runs in; what a container lets it use."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from bertray.model import runtime
from bertray.model.runtime import available_bytes, model_thread, num_cpus


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
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    assert num_cpus() == expected


def test_free_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=8_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr(runtime, "_CGROUP", tmp_path)
    assert available_bytes() == 8_000
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1900\ninactive_file 1000\nactive_file 100\n")
    for limit, expected in (("max", 8_000), ("5000", 3_000), ("90000", 8_000)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert available_bytes() == expected
