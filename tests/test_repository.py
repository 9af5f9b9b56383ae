"""Rules of the repository: rooms, what is documented, what is shown."""

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
from bertray.__main__ import COMMANDS, config_class
from tests.conftest import ROOT

LIBRARY = ROOT / "lib" / "bertray"
HEAVY = {"torch", "transformers", "ray"}

# A line a room, lowest first: a room imports those above it in this list, but what is excepted; and of torch (with
# transformers) and Ray those that are named. A new module is entered nowhere.
ROOMS: dict[str, dict[str, set[str]]] = {
    "root": {},
    "storage": {},
    "formats": {},
    "tokenization": {"not": {"storage", "formats"}},
    "metrics": {"not": {"storage", "formats", "tokenization"}},
    "tasks": {"not": {"storage"}},
    "data": {},
    "model": {"needs": {"torch"}},
    "bundle": {"needs": {"torch"}},
    "training": {"needs": {"torch"}},
    "scoring": {"not": {"training", "model"}},
    "reports": {},
    "drivers": {"needs": {"torch", "ray"}},
}
# Of rooms that need torch, what does without: it is imported before a request is checked, or where no model runs.
LIGHT = {
    "model": {"sources", "files", "outputs"},
    "bundle": {"info", "card", "predictions", "guard", "isolated"},
    "training": {"config", "preflight", "trials", "run_folder", "tracking", "watcher", "mlflow_client"},
}


@cache
def imports(path: Path) -> dict[str, bool]:
    """Every module that a file imports, and whether it does so at its top, rather than inside a function."""
    tree = ast.parse(path.read_text())
    at_top = {id(node) for node in tree.body}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            found[name] = found.get(name, False) or id(node) in at_top
    return found


def room_of(path: Path) -> str:
    return "root" if path.parent == LIBRARY else path.parent.name


def rooms_of(found: dict[str, bool]) -> set[str]:
    """The rooms of this project that are among imported modules."""
    parts = [module.split(".") for module in found if module.startswith("bertray.")]
    return {part[1] if (LIBRARY / part[1]).is_dir() else "root" for part in parts}


MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.name not in ("__init__.py", "__main__.py"))


def test_every_room_has_its_line() -> None:
    assert {room_of(path) for path in MODULES} == set(ROOMS)
    assert {path.parent.name for path in LIBRARY.glob("*/__init__.py")} == set(ROOMS) - {"root"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{room_of(path)}.{path.stem}")
def test_imports_run_down(path: Path) -> None:
    room, found = room_of(path), imports(path)
    rule, order = ROOMS[room], list(ROOMS)
    allowed = set(order[: order.index(room) + 1]) - rule.get("not", set())
    assert rooms_of(found) <= allowed
    packages = {module.split(".")[0]: at_top for module, at_top in found.items()}
    assert "jobs" not in packages
    needs = rule.get("needs", set())
    assert "ray" in needs or "ray" not in packages
    assert "torch" in needs or not {"torch", "transformers"} & set(packages)


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "root"])
def test_a_room_is_a_docstring_that_names_its_modules(room: str) -> None:
    tree = ast.parse((LIBRARY / room / "__init__.py").read_text())
    assert len(tree.body) == 1
    doc = ast.get_docstring(tree)
    assert doc and "Imports" in doc
    assert [path.stem for path in MODULES if room_of(path) == room and not re.search(rf"\b{path.stem}\b", doc)] == []


def loaded(*modules: str) -> set[str]:
    """Of torch, transformers and Ray, what a process has loaded that imports these modules."""
    code = f"import sys, {', '.join(modules)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_rooms_without_torch_and_ray_load_neither() -> None:
    names = [f"bertray.{room_of(path)}.{path.stem}" for path in MODULES if "needs" not in ROOMS[room_of(path)]]
    names += [f"bertray.{room}.{module}" for room, modules in LIGHT.items() for module in modules]
    assert loaded(*(name.replace("bertray.root.", "bertray.") for name in names)) == set()


def test_the_driver_of_a_run_loads_no_torch() -> None:
    assert loaded("bertray.drivers.score") == set()  # nor Ray, where there is nothing to do
    assert loaded("bertray.drivers.score", "bertray.drivers.actor_pool") == {"ray"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_request_is_checked_before_torch_and_ray_are_loaded(name: str) -> None:
    assert loaded(COMMANDS[name][1].partition(":")[0]) == set()


def test_what_every_command_loads_is_quick() -> None:
    """Each of these takes a tenth of a second or more, and every child process would take it too."""
    slow = {"scipy.optimize", "scipy.stats", "sklearn", "pandas", "cleanlab", "matplotlib"}
    code = f"import sys, bertray.bundle.info; print(*sorted({slow!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_bare_engine_needs_few_packages() -> None:
    """It is measured on GPU machines that have torch, transformers and pyarrow alone; nanotoken may be missing."""
    needed, todo, seen = set(), ["model.encoder", "tokenization.tokenizer"], set()
    while todo:
        module = todo.pop()
        seen.add(module)
        found = imports(LIBRARY / f"{module.replace('.', '/')}.py")
        needed |= {name.split(".")[0] for name in found}
        own = {name.removeprefix("bertray.") for name in found if name.startswith("bertray.")} - seen
        todo += [name for name in own if (LIBRARY / f"{name.replace('.', '/')}.py").is_file()]
    assert needed - set(sys.stdlib_module_names) == {
        "bertray",
        "nanotoken",
        "numpy",
        "pyarrow",
        "tokenizers",
        "torch",
        "transformers",
    }


def test_no_parquet_is_read_by_arrows_threads() -> None:
    """They may abort a process that exits soon after: see `scoring.shard_reader.ShardFile`."""
    found = []
    for path in sorted((ROOT / "lib").rglob("*.py")):
        text = path.read_text()
        for call in ast.walk(ast.parse(text)) if "pyarrow.parquet" in text else ():
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            name, called = call.func.attr, ast.unparse(call.func.value)
            is_parquet = "ParquetFile(" in called or called in ("parquet", "file")
            if name in ("iter_batches", "read_row_group", "read_row_groups") or (name == "read" and is_parquet):
                found += [f"{path}:{call.lineno}"] * ("use_threads=False" not in ast.unparse(call))
            elif name == "read_table":
                found.append(f"{path}:{call.lineno}")
    assert found == []


# Whether a row has one label or several, as code would ask it, and where that may be: in the rooms of the tasks and of
# the arithmetic below them, and where each task has an entry or an option.
WHICH_TASK = r"(single|multi)_label(?!s)|problem_type (==|!=|in) ['(]|LABELS (not )?in |thresholds is |\.ndim [=!]="
MAY_ASK = {"tasks", "metrics", "root.types", "root.schema", "data.config", "training.loss"}


def test_only_tasks_differ_by_problem_type() -> None:
    asking = set()
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):  # a docstring may
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body[0] = ast.Pass()
        if re.search(WHICH_TASK, ast.unparse(tree)):
            asking.add(f"{room_of(path)}.{path.stem}")
    allowed = {name for name in asking if {name, name.split(".")[0]} & MAY_ASK}
    assert asking == allowed


def test_jobs_do_not_import_each_other() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        assert not [module for module in imports(path) if module.split(".")[0] == "jobs"], path


def test_help_and_bad_options_load_neither_torch_nor_ray() -> None:
    assert loaded(*(f"jobs.{name}" for name in COMMANDS)) == set()


def test_public_things_are_documented() -> None:
    for path in [*LIBRARY.rglob("*.py"), *(ROOT / "jobs").glob("[a-z]*.py")]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if path.parent.name == "jobs":
                    continue
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_shows_commands_that_its_options_allow(name: str) -> None:
    doc = config_class(name).__doc__ or ""
    assert f"    bertray {name}" in doc
    check_commands(doc)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{one.name}" for one in ROOT.glob("docs/*.md"))]
)
def test_a_page_shows_only_options_that_exist(page: str) -> None:
    check_commands((ROOT / page).read_text())


def check_commands(text: str) -> None:
    """Every flag of every `bertray NAME …` and `python -m jobs.NAME …` in a text is an option of that job."""
    for name, rest in re.findall(rf"(?:bertray |python -m jobs\.)({'|'.join(COMMANDS)})\b((?:[^\n\\`]|\\\n)*)", text):
        allowed = {f"--{option.replace('_', '-')}" for option in config_class(name).model_fields}
        assert set(re.findall(r"--[a-z][a-z-]+", rest)) <= allowed | {"--config", "--help"}, (name, rest)


def test_every_option_says_what_it_is() -> None:
    for name in COMMANDS:
        for option, field in config_class(name).model_fields.items():
            assert field.description, f"{name}.{option}"


def test_the_readme_names_every_room_and_target() -> None:
    readme = (ROOT / "README.md").read_text()
    for room in set(ROOMS) - {"root"}:
        assert f"  {room}/" in readme
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
