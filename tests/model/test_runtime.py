"""The one thread that a process's model runs in."""

from __future__ import annotations

import threading

import pytest

from bertray.model.runtime import ModelThread


def test_everything_runs_in_one_thread_of_its_own() -> None:
    thread = ModelThread()
    seen = {thread.run(threading.get_ident) for _ in range(5)}
    assert len(seen) == 1
    assert threading.get_ident() not in seen


def test_a_result_and_an_exception_come_through() -> None:
    thread = ModelThread()
    assert thread.run(max, 2, 3) == 3
    with pytest.raises(ZeroDivisionError):
        thread.run(divmod, 1, 0)
    assert thread.run(max, 3, 4) == 4  # it goes on
