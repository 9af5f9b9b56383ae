"""A model's child process and its parent, without a process: what ends, hangs and fails at will.

Real processes are in test_isolated.py.
"""

import json
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch

from bertray.bundle import isolated
from bertray.bundle.info import BundleInfo, read_info
from bertray.bundle.isolated import IsolatedBundle, ModelSpec
from bertray.errors import BundleError, ShardError, UnavailableError
from bertray.model import runtime
from bertray.schema import OTHER_IDS
from bertray.storage.location import Location
from tests.stub_pool import Stub

TEXTS = pa.array([b"a text"], pa.large_binary())


@pytest.fixture
def info(tiny_bundle: Path) -> BundleInfo:
    return read_info(Location.of(str(tiny_bundle)))


@pytest.fixture
def spec(tiny_bundle: Path) -> ModelSpec:
    return ModelSpec(str(tiny_bundle), "torch", "fp32", "cpu", "", 1, timeout_s=7.0)


# The parent.

Behaviour = Callable[[Connection, threading.Event], object]


@pytest.fixture
def child_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[Behaviour], None]:
    """In the place of a process: a thread that does this, with its end of the pipe and until it is killed."""

    def patch(behave: Behaviour) -> None:
        class Child:
            def __init__(self, _: list[str], *, pass_fds: list[int], **__: Any) -> None:
                self._pipe, self._is_killed = Connection(os.dup(pass_fds[0])), threading.Event()
                self._thread = threading.Thread(target=self._run)
                self._thread.start()

            def _run(self) -> None:
                with self._pipe, suppress(EOFError, OSError):
                    behave(self._pipe, self._is_killed)

            def kill(self) -> None:
                self._is_killed.set()

            def wait(self) -> int:
                self._thread.join()
                return -signal.SIGKILL if self._is_killed.is_set() else 1

        monkeypatch.setattr(isolated.subprocess, "Popen", Child)

    return patch


def test_a_text_that_processes_die_over_by_chance_costs_no_row(
    spec: ModelSpec, info: BundleInfo, child_that: Callable[[Behaviour], None]
) -> None:
    """Something outside ends two children that have it; the third one lives."""
    asked = list[pa.Array]()

    def behave(pipe: Connection, _: threading.Event) -> None:
        pipe.send(("fp32", "cpu", info.fingerprint()))
        while True:
            texts = pipe.recv()
            if texts.equals(TEXTS):
                asked.append(texts)
                if len(asked) < 3:
                    return
            pipe.send(Stub().predict_column(texts))

    child_that(behave)
    with IsolatedBundle(spec) as bundle:
        found = bundle.predict_column(TEXTS)
    assert (found["label"].to_pylist(), found["error"].to_pylist()) == (["a"], [None])
    assert len(asked) == 3


def test_slices_go_alone_and_one_with_other_ids_makes_all_be_scored_again(
    spec: ModelSpec, info: BundleInfo, child_that: Callable[[Behaviour], None]
) -> None:
    texts = pa.array(
        [b"deadly", *(b"text %d" % row + b"." * 1000 for row in range(30)), b"other ids"], pa.large_binary()
    )
    sizes = list[int]()

    def behave(pipe: Connection, _: threading.Event) -> None:
        pipe.send(("fp32", "cpu", info.fingerprint()))
        while True:
            asked = pickle.loads(data := pipe.recv_bytes())
            if len(asked) == 2:
                sizes.append(len(data))
            if b"deadly" in asked.to_pylist():
                return
            table = Stub().predict_column(asked)
            has_other_ids = b"other ids" in asked.to_pylist()
            pipe.send(table.replace_schema_metadata({OTHER_IDS: b""}) if has_other_ids else table)

    child_that(behave)
    with IsolatedBundle(spec) as bundle:
        found = bundle.predict_column(texts)
    assert found["error"].null_count == len(texts) - 1 == 31 and found["error"][0].is_valid
    assert OTHER_IDS in found.schema.metadata
    assert len(sizes) == 16 and max(sizes) < 3000  # of 32 KB


def test_a_model_that_takes_too_long_to_load_is_given_up(
    spec: ModelSpec, child_that: Callable[[Behaviour], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    child_that(lambda _, is_killed: is_killed.wait(3))
    monkeypatch.setattr(isolated, "LOAD_TIMEOUT_S", 0.1)
    with pytest.raises(BundleError, match=r"the process that was to load .* was ended by SIGKILL"):
        IsolatedBundle(spec).predict_column(TEXTS)


# The child.


class Model(Stub):
    """Raises these errors first, and notes whether somebody watches."""

    def __init__(self, info: BundleInfo, errors: list[Exception]) -> None:
        self.info, self.encoder, self._errors = info, SimpleNamespace(), iter(errors)
        self.is_watched = False
        self.was_watched = list[bool]()

    def predict_column(self, texts: pa.Array) -> pa.Table:
        self.was_watched.append(self.is_watched)
        for error in self._errors:
            raise error
        return super().predict_column(texts)


@pytest.fixture
def answered(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """What a child with this model answers to texts."""

    def answered(model: Model, *texts: pa.Array) -> list[Any]:
        @contextmanager
        def watched(timeout_s: float) -> Iterator[None]:
            model.is_watched = timeout_s == spec.timeout_s
            try:
                yield
            finally:
                model.is_watched = False

        ours, theirs = Pipe()
        with ours, theirs, socket.socket(fileno=os.dup(ours.fileno())) as end:
            for text in texts:
                ours.send(text)
            end.shutdown(socket.SHUT_WR)
            monkeypatch.setattr(sys, "argv", ["", json.dumps(asdict(spec)), str(os.dup(theirs.fileno()))])
            monkeypatch.setattr(isolated.signal, "signal", lambda *_: None)
            monkeypatch.setattr(runtime, "keep_freed_memory", lambda: None)
            monkeypatch.setattr(isolated, "watched", watched)
            monkeypatch.setattr(ModelSpec, "load", lambda _: model)
            isolated.main()
            return [ours.recv() for _ in range(1 + len(texts))][1:]

    return answered


def test_a_gpu_error_ends_the_child(info: BundleInfo, answered: Callable[..., list[Any]]) -> None:
    """Whoever asked sees its end; on that GPU the process would fail on every later text."""
    with pytest.raises(torch.AcceleratorError, match="ECC"):
        answered(Model(info, [torch.AcceleratorError("CUDA error: uncorrectable ECC error")]), TEXTS)


@pytest.mark.parametrize(
    ("errors", "kind", "said"),
    [
        ([ValueError("broken")], ShardError, "ValueError: broken"),
        ([ValueError("broken")] * 2, UnavailableError, "the model does not run here: ValueError: broken"),
        ([torch.OutOfMemoryError("CUDA out of memory.")], UnavailableError, "OutOfMemoryError: CUDA out of memory."),
        ([OSError("no space left on device")], UnavailableError, "OSError: no space left on device"),
    ],
)
def test_the_child_says_whose_fault_an_error_is_and_is_watched_as_it_finds_out(
    info: BundleInfo, answered: Callable[..., list[Any]], errors: list[Exception], kind: type[Exception], said: str
) -> None:
    model = Model(info, errors)
    error, predictions = answered(model, TEXTS, TEXTS)
    assert (type(error), str(error)) == (kind, said)
    assert predictions["label"].to_pylist() == ["a"]  # it goes on
    assert model.was_watched and all(model.was_watched)
