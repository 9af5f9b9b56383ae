"""Found by every Python process that has this folder on PYTHONPATH: bertray notes what it does when.

BERTRAY_TRACE             a folder: every process appends a line for every call in TRACED to a file of its own:
                          {"what": "plan", "pid": 47, "start_s": 12.1, "end_s": 13.2, "cpu_s": 0.9, "rows": 0}
                          Seconds are those of time.monotonic(), which all processes of a Linux machine share;
                          cpu_s: processor time of the process until then
BERTRAY_STUB_S_A_ROW      seconds; where it is set, no model is loaded: a stub sleeps so long for every row
BERTRAY_STUB_UNITS        anything: units are not scored, nor read; every shard of them has an outcome at once
BERTRAY_STUB_UNIT_SHARDS  how many tiny shards share a unit at most
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# What is noted, by module; beside the calls, how long the module took to import.
TRACED = {
    "bertray.scoring.archive": ("list_shards",),
    "bertray.scoring.manifest": ("Manifest.latest", "plan"),
    "bertray.scoring.runs": ("Recorder._take",),
    "bertray.scoring.units": (),
    "bertray.drivers.cluster": (),
    "bertray.bundle.bundle": ("Bundle.load", "Bundle.answer_tokens"),
    "bertray.scoring.score_unit": ("UnitScorer.score",),
    "bertray.drivers.actor_pool": ("ScoringActor.__init__", "ScoringActor._begin", "ActorPool._dataset"),
}


class _Tracing(MetaPathFinder):
    """Lets the modules be found as always, and changes them when they have been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in TRACED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            start_s = time.monotonic()
            load(module)
            _note(f"import {name}", start_s)
            _change(module)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def _change(module: ModuleType) -> None:
    stub_s_a_row, unit_shards = os.environ.get("BERTRAY_STUB_S_A_ROW"), os.environ.get("BERTRAY_STUB_UNIT_SHARDS")
    if module.__name__ == "bertray.bundle.bundle" and stub_s_a_row is not None:
        module.Bundle.load = staticmethod(functools.partial(_stub(), s_a_row=float(stub_s_a_row)))
    if module.__name__ == "bertray.scoring.units" and unit_shards is not None:
        module._MAX_UNIT_SHARDS = int(unit_shards)  # type: ignore[attr-defined]
    if module.__name__ == "bertray.scoring.score_unit" and os.environ.get("BERTRAY_STUB_UNITS"):
        module.UnitScorer.score = lambda _, unit, *__, **___: [module.Outcome(shard=shard) for shard in unit.shards]
    if module.__name__ == "bertray.drivers.cluster":
        module.session = _traced_session(module.session)
    for what in TRACED[module.__name__]:
        *owners, name = what.split(".")
        owner = getattr(module, owners[0]) if owners else module
        call = _traced(getattr(owner, name), what)
        setattr(owner, name, staticmethod(call) if what == "Bundle.load" else call)


def _stub() -> type[Any]:
    """A class that stands in for a loaded bundle."""
    import pyarrow as pa

    from bertray.bundle.info import read_info
    from bertray.schema import PREDICTION_SCHEMA
    from bertray.storage.location import Location

    class Stub:
        """Says of every row the same, after a time that is proportional to the rows."""

        precision = "stub"
        schema = PREDICTION_SCHEMA

        def __init__(self, uri: str, *_: object, s_a_row: float, **__: object) -> None:
            self.info, self._s_a_row = read_info(Location.of(uri)), s_a_row
            self._turn = threading.Lock()

        def predict_column(self, texts: pa.Array) -> pa.Table:
            with self._turn:
                self._run(texts)
            row = {"label": self.info.labels[0], "score": 1.0, "review": False}
            row |= {"num_tokens": 1, "truncated": False, "error": None}
            columns = [pa.repeat(pa.scalar(row[field.name], field.type), len(texts)) for field in PREDICTION_SCHEMA]
            return pa.table(columns, schema=PREDICTION_SCHEMA)

        def _run(self, texts: pa.Array) -> None:
            time.sleep(len(texts) * self._s_a_row)

    Stub._run = _traced(Stub._run, "Bundle.predict_column")  # type: ignore[method-assign]
    return Stub


def _traced(call: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def traced(*args: Any, **kwargs: Any) -> Any:
        start_s = time.monotonic()
        try:
            return call(*args, **kwargs)
        finally:
            _note(what, start_s, rows=len(args[-1]) if what == "Bundle.predict_column" else 0)

    return traced


def _traced_session(
    session: Callable[[], AbstractContextManager[None]],
) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def traced() -> Iterator[None]:
        start_s = time.monotonic()
        with session():
            _note("enter session", start_s)
            yield
            start_s = time.monotonic()
        _note("leave session", start_s)

    return traced


def _note(what: str, start_s: float, rows: int = 0) -> None:
    folder = os.environ.get("BERTRAY_TRACE")
    if folder:
        times = {"start_s": start_s, "end_s": time.monotonic(), "cpu_s": time.process_time()}
        span = {"what": what, "pid": os.getpid(), **times, "rows": rows}
        with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(span) + "\n")


sys.meta_path.insert(0, _Tracing())
