"""Rules of the repository: layers, what is documented, what is shown."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

import bertray
from bertray import config, training_config
from bertray.config import JobConfig
from tests.conftest import ROOT

LIBRARY = ROOT / "lib" / "bertray"

# A module may import those above it, as data passes; nothing imports upwards.
LAYERS = [
    "errors",
    "versions",
    "choices",
    "option_types",
    "schema",
    "profile",
    "config",
    "training_config",
    "cli",
    "s3",
    "local_files",
    "storage",
    "bundle_folder",
    "labelled",
    "cleaning",
    "splits",
    "dataset",
    "ragged",
    "windows",
    "text",
    "wordpiece",
    "tokenization",
    "packing",
    "training_batches",
    "training_rows",
    "metrics",
    "calibration",
    "label_issues",
    "gate",
    "baseline",
    "trials",
    "report",
    "mlflow_run",
    "tracking",
    "curves",
    "progress",
    "shard_reader",
    "archive",
    "records",
    "ledger",
    "planning",
    "run_lock",
    "work",
    "runs",
    "bookkeeping",
    "shards",
    "scorer",
    "rectangles",
    "attention",
    "first_tokens",
    "prepacked",
    "process",
    "layout",
    "encoder",
    "bundle",
    "openvino_graph",
    "openvino_engine",
    "pretrained",
    "evaluation",
    "ranks",
    "flat_weights",
    "adamw_kernel",
    "adamw",
    "dropout",
    "learner",
    "objective",
    "optimizer",
    "checkpoints",
    "training_run",
    "finetuning",
    "bundle_writer",
    "synthetic",
    "preview",
    "isolated",
    "actor",
    "worker_log",
    "cluster",
    "training_worker",
    "training_board",
    "trial_worker",
    "training",
    "tuning",
    "cross_validation",
    "label_audit",
    "pool",
    "scoring",
]
# The engine also runs, and is measured, on a machine without Ray; what is above it needs no torch either.
WITHOUT_TORCH = LAYERS[: LAYERS.index("rectangles")]
WITHOUT_RAY = LAYERS[: LAYERS.index("cluster")]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def modules(folder: Path) -> dict[str, set[str]]:
    return {path.stem: imports(path) for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def test_every_module_has_a_layer() -> None:
    assert set(LAYERS) == set(modules(LIBRARY))


@pytest.mark.parametrize("name", LAYERS)
def test_imports_run_one_way(name: str) -> None:
    found = modules(LIBRARY)[name]
    own = {module.split(".")[1] for module in found if module.startswith("bertray.")}
    allowed = set(LAYERS[: LAYERS.index(name)])
    assert own & set(LAYERS) <= allowed
    packages = {module.split(".")[0] for module in found}
    assert "jobs" not in packages
    if name in WITHOUT_RAY:
        assert "ray" not in packages
    if name in WITHOUT_TORCH:
        assert not packages & {"torch", "transformers"}


def test_a_run_with_nothing_to_do_imports_neither_ray_nor_torch() -> None:
    command = (
        "import sys, bertray.scoring; print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_driver_of_a_run_imports_no_torch() -> None:
    command = "import sys, bertray.scoring, bertray.pool; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_bare_engine_needs_few_packages() -> None:
    """It is measured on GPU machines that have torch, transformers and pyarrow alone."""
    needed, todo = set(), ["encoder", "tokenization"]
    while todo:
        found = modules(LIBRARY)[todo.pop()]
        needed |= {module.split(".")[0] for module in found}
        todo += [module.split(".")[1] for module in found if module.startswith("bertray.") and module.count(".") == 1]
    assert needed - set(sys.stdlib_module_names) == {
        "bertray",
        "numpy",
        "pyarrow",
        "tokenizers",
        "torch",
        "transformers",
    }


def test_training_and_scoring_do_not_know_each_other() -> None:
    assert "bertray.training" not in modules(LIBRARY)["scoring"]
    assert "bertray.scoring" not in modules(LIBRARY)["training"]


def test_jobs_do_not_import_each_other() -> None:
    for name, found in modules(ROOT / "jobs").items():
        assert not [module for module in found if module.split(".")[0] == "jobs"], name


def test_help_and_bad_options_import_neither_torch_nor_ray() -> None:
    import subprocess

    code = "import jobs.train, jobs.score, sys; print([name for name in ('torch', 'ray') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def test_public_things_are_documented() -> None:
    for path in [*LIBRARY.glob("*.py"), *(ROOT / "jobs").glob("[a-z]*.py")]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if path.parent.name == "jobs":
                    continue
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_a_job_opens_with_commands_that_its_options_allow(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m jobs.{path.stem}" in doc
    check_commands(doc)


def test_the_readme_shows_only_options_that_exist() -> None:
    check_commands((ROOT / "README.md").read_text())


OPTIONS = (vars(config) | vars(training_config)).values()


def check_commands(text: str) -> None:
    """Every flag of every `python -m jobs.NAME …` in a text is an option of that job."""
    configs = {one.__doc__.split(":")[0]: one for one in OPTIONS if is_job(one)}
    for job, rest in re.findall(r"python -m (jobs\.[a-z]+)((?:[^\n\\]|\\\n)*)", text):
        allowed = {f"--{name.replace('_', '-')}" for name in configs[job].model_fields} | {"--config", "--help"}
        assert set(re.findall(r"--[a-z][a-z-]+", rest)) <= allowed, (job, rest)


def is_job(one: object) -> bool:
    return isinstance(one, type) and issubclass(one, JobConfig) and one is not JobConfig


def test_every_option_says_what_it_is() -> None:
    for one in filter(is_job, OPTIONS):
        for name, field in one.model_fields.items():
            assert field.description, f"{one.__name__}.{name}"


def test_the_readme_names_every_module_and_target() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in LAYERS:
        assert f"{name}.py" in readme
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    for target in targets.group(1).split():
        assert target in readme


def test_ci_runs_what_a_person_types() -> None:
    run = (ROOT / ".ci" / "run").read_text()
    assert [line for line in run.splitlines() if line.startswith("make")] == ["make check", "make test"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert steps == ["make check", "make test"]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == bertray.__version__
    assert f"## {bertray.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(one for extra in extras for one in extra)]:
        name = re.split(r"[\[<>=;]", requirement)[0].lower()
        assert name == "bertray" or name in pinned, requirement
