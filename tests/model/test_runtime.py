"""The one thread that a process's model runs in."""

from __future__ import annotations

import threading

import pytest

from bertray.model.runtime import model_thread


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
