"""benchmarks/gpu.sh: all its parts run here, but the kernels, so that on a GPU it does not end for a typo."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.part import Part, Size
from tests.conftest import ROOT


@pytest.mark.services
def test_all_parts_run_here(tmp_path: Path) -> None:
    """In a folder of its own, each part writes what it has found; nothing fails."""
    command = [str(ROOT / "benchmarks" / "gpu.sh"), "--device", "cpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert found.keys() == script.PARTS.keys()
    assert all(one["result"] in {"passed", "measured", "skipped"} for part in found.values() for one in part)
    assert sum(one["result"] == "passed" for part in found.values() for one in part) == 28
    assert {one["what"] for one in found["engine"]} >= {"bertray, bf16, from texts", "transformers.pipeline, fp16"}


def test_a_part_that_fails_or_hangs_costs_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def falls(part: Part) -> None:
        part.check("right", lambda: 0.0, 0.1)
        part.check("off", lambda: 0.2, 0.1)
        part.check("no number", lambda: float("nan"), 0.1)
        part.check("an error", lambda: 1 / 0, 0.1)
        os._exit(7)

    def hangs(part: Part) -> None:
        part.say("begun", "measured")
        while True:
            pass

    size = Size.of("cpu", is_quick=False)
    one = Part("one", tmp_path / "one.json", "cpu", size)
    assert script.run_alone(one, falls, 60) == {"passed": 1, "failed": 4}
    assert one.found[3]["error"] == "ZeroDivisionError: division by zero"
    assert one.found[4]["what"] == "the part as a whole: exit code 7"
    other = Part("other", tmp_path / "other.json", "cpu", size)
    assert script.run_alone(other, hangs, 2) == {"measured": 1, "failed": 1}
    assert [found["what"] for found in json.loads(other.file.read_text())][-1].endswith("no end after 2 s")


def test_what_is_missing_is_said_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None if name == "pydantic" else find_spec(name))
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--only", "training", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 0
    assert "training is left out: pip install pydantic\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_cuda_alone_reaches_is_listed() -> None:
    """A module of the engine or of training that asks for CUDA is named, with the part that runs it."""
    library = ROOT / "lib" / "bertray"
    for path in (path for room in ("model", "training", "bundle") for path in (library / room).glob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        asks = any(isinstance(node, ast.Constant) and node.value == "cuda" for node in nodes)
        asks |= any(isinstance(node, ast.Attribute) and node.attr in {"cuda", "is_cuda"} for node in nodes)
        if asks and path.name != "config.py":
            assert f"{path.relative_to(library)}" in (script.__doc__ or ""), path
