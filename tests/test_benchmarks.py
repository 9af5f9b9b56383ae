"""benchmarks.scale: its arithmetic, and that its stub and trace still fit the library."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from benchmarks import tiny
from benchmarks.scale_actors import busy_share, where_time_goes
from benchmarks.scale_figures import Line
from benchmarks.scale_runs import STUB, Span
from bertray import Bundle
from tests.conftest import ROOT, write_shard


def span(pid: int, start_s: float, end_s: float) -> Span:
    return Span("", pid, start_s, end_s, cpu_s=0, rows=0)


def test_where_the_time_of_actors_goes() -> None:
    # Actor 1 is at work from the first second to the last, actor 2 starts late and ends early; units overlap.
    units = [span(1, 0, 4), span(2, 2, 9), span(1, 3, 10), span(2, 6, 8)]
    predictions = [span(1, 1, 4), span(2, 3, 5), span(1, 5, 9), span(2, 6, 9)]
    window_s, shares = where_time_goes(units, predictions)
    assert window_s == 10
    assert {what: round(20 * share) for what, share in shares.items()} == {
        "the model": 12,
        "not yet at work": 2,
        "no work left": 1,
        "the model waits": 5,
    }
    assert sum(shares.values()) == pytest.approx(1)
    assert busy_share(units, predictions) == pytest.approx((2 + 2 + 4 + 3) / 14)  # from 2 to 9


def test_a_line_says_whether_its_target_is_met() -> None:
    assert Line("a", 3.21, "s", at_most=4).row() == "| a | 3.21 s | ≤ 4 | met |"
    assert Line("a", 89.96, "%", at_least=90).row() == "| a | 90.0 % | ≥ 90 | missed |"
    assert Line("a", 1234.5, "MiB").row() == "| a | 1,234 MiB |  |  |"


def test_what_is_traced_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))  # the stub adds itself
    specification = importlib.util.spec_from_file_location("benchmarks.stub", STUB / "sitecustomize.py")
    assert specification is not None and specification.loader is not None
    stub = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(stub)
    for module, names in stub.TRACED.items():
        for name in names:
            assert callable(reduce(getattr, name.split("."), importlib.import_module(module)))
    assert isinstance(importlib.import_module("bertray.scoring.units")._MAX_UNIT_SHARDS, int)


@pytest.mark.services
def test_the_stub_stands_in_for_a_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "archive" / "part.parquet", ["one", "two", "one"])
    (tmp_path / "trace").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(STUB),
        "BERTRAY_TRACE": str(tmp_path / "trace"),
        "BERTRAY_STUB_S_A_ROW": "0.01",
    }
    places = [str(tiny_bundle), str(tmp_path / "archive"), str(tmp_path / "scored")]
    command = [sys.executable, "-m", "benchmarks.scale_parts", "shards", *places]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["num_rows"] == 3
    (trace,) = (tmp_path / "trace").iterdir()
    spans = [Span(**json.loads(line)) for line in trace.read_text().splitlines()]
    predicted = next(one for one in spans if one.what == "Bundle.predict_column")
    assert predicted.rows == 2  # of three, two are distinct
    assert predicted.wall_s >= 0.02


def test_the_bundle_of_random_weights_is_one(tmp_path: Path) -> None:
    (prediction,) = Bundle.load(str(tiny.tiny_bundle(tmp_path / "bundle"))).predict(["a text"])
    assert prediction.label in ("a", "b", "c")
