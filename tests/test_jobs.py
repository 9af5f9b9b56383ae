"""The jobs as a person types them: help, answers, mistakes."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bertray
from bertray.__main__ import COMMANDS, command, main
from bertray.config import JobConfig
from bertray.data.config import PrepareConfig
from bertray.drivers.config import EvaluateConfig, PredictConfig
from bertray.scoring.config import ScoreConfig
from bertray.training.config import AuditConfig, TrainConfig, TuneConfig
from tests.conftest import ROOT, run_job_process, write_shard

JOBS = {name: command(name) for name in COMMANDS}
CONTRACT: list[tuple[type[JobConfig], str]] = [
    (
        PrepareConfig,
        "input output text_column=text label_column=label validation=None test=None validation_fraction=0.1 "
        "test_fraction=0.1 group_column=None seed=0",
    ),
    (
        TrainConfig,
        "data output encoder=bert-base-uncased epochs=3 learning_rate=5e-05 batch_size=32 max_length=128 "
        "num_workers=1 precision=auto seed=0",
    ),
    (TuneConfig, "data output num_trials=16 learning_rates=2e-5:5e-4 batch_sizes=16,32,64 max_epochs=5 seed=0"),
    (AuditConfig, "data output encoder=bert-base-uncased epochs=3 folds=5 num_workers=None max_failures=3 seed=0"),
    (EvaluateConfig, "bundle data split=test output"),
    (PredictConfig, "bundle texts"),
    (ScoreConfig, "bundle input output text_column=text keep_columns num_actors=None precision=auto"),
]


@pytest.mark.parametrize(("config", "options"), CONTRACT)
def test_options_and_defaults_are_a_contract(config: type[JobConfig], options: str) -> None:
    for option in options.split():
        name, _, default = option.partition("=")
        field = config.model_fields[name]
        if default:
            assert str(field.default) == default
        assert field.description


@pytest.mark.parametrize("name", JOBS)
def test_help_shows_commands_and_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        JOBS[name](["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: bertray {name}" in text
    assert f"\n    bertray {name}" in text
    assert "exit codes: 0 done" in text
    assert "(required)" in text or name in ("demo", "report")
    assert ("--num-workers" in text) == (name in ("train", "audit"))
    assert ("--mlflow-uri" in text) == (name == "train")


def test_predict_arguments(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert JOBS["predict"](["--bundle", str(tiny_bundle), "Python, SQL", "", "--precision", "fp32"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["Python, SQL", ""]
    assert lines[0]["label"] in ("a", "b", "c")
    assert 0 < lines[0]["score"] <= 1
    assert lines[1]["error"] == "text is empty"


@pytest.mark.services
def test_predict_standard_input(tiny_bundle: Path) -> None:
    """Also bytes that are no text, which are an error of their line."""
    command = [sys.executable, "-m", "jobs.predict", "--bundle", str(tiny_bundle)]
    given = "Zürich\r\nB.Sc. Physics\n".encode() + b"\xff\xfe\n"
    finished = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, check=True)
    lines = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [line["text"] for line in lines[:2]] == ["Zürich", "B.Sc. Physics"]
    assert [line["error"] for line in lines] == [None, None, "text is not UTF-8"]


@pytest.mark.services
def test_predict_ends_quietly_when_its_reader_does(tiny_bundle: Path) -> None:
    command = f"yes text | head -2000 | {sys.executable} -m bertray predict --bundle {tiny_bundle} | head -1"
    finished = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(finished.stdout)["text"] == "text"
    assert finished.stderr == ""


def test_predict_on_a_terminal_says_what_it_waits_for(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    typed = SimpleNamespace(isatty=lambda: True, buffer=io.BytesIO(b"a text\n"))
    monkeypatch.setattr(sys, "stdin", typed)
    assert JOBS["predict"](["--bundle", str(tiny_bundle), "--precision", "fp32"]) == 0
    shown = capfd.readouterr()
    assert "type a text and Enter; Ctrl-D ends\n" in shown.err
    assert json.loads(shown.out)["text"] == "a text"


def test_a_missing_bundle(tmp_path: Path) -> None:
    (tmp_path / "such-bundle").mkdir()
    finished = run_job_process("predict", "--bundle", tmp_path / "suhc-bundle", "x")
    assert finished.returncode == 2
    assert finished.stdout == ""
    expected = (
        r"error: .*suhc-bundle is no model bundle: it does not exist\. Did you mean 'such-bundle'\? .*bertray train.*\n"
    )
    assert re.fullmatch(expected, finished.stderr)


@pytest.mark.services
def test_score_from_the_command_line(tiny_bundle: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "archive" / "good.parquet", ["one", "two", None])
    (tmp_path / "archive" / "bad.parquet").write_bytes(b"")
    options = ("--bundle", tiny_bundle, "--input", tmp_path / "archive", "--output", tmp_path / "scored")
    finished = run_job_process("score", *options, "--num-actors", 0)
    assert finished.returncode == 3, finished.stderr
    summary = json.loads(finished.stdout.splitlines()[-1])
    assert summary["num_shards_committed"] == summary["num_shards_failed"] == 1
    assert summary["num_rows_error"] == 1
    assert "bad.parquet" in finished.stderr
    (tmp_path / "archive" / "bad.parquet").unlink()
    finished = run_job_process("score", *options)
    assert finished.returncode == 0
    assert json.loads(finished.stdout)["num_shards_skipped"] == 1
    assert "nothing to do" in finished.stderr


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("prepare", ["--input", "/nowhere.csv", "--output", "/tmp/unused"], "no labelled files at /nowhere.csv"),
        ("train", ["--data", "/nowhere", "--output", "/tmp/unused"], "bertray prepare"),
        ("audit", ["--data", "/nowhere", "--output", "/tmp/unused"], "no finished data set"),
        ("audit", ["--data", "/nowhere", "--output", "/tmp/unused", "--folds", "1"], "--folds: '1' is not allowed"),
        (
            "tune",
            ["--data", "d", "--output", "/tmp/unused", "--batch-size", "16,32"],
            "or a range: --batch-sizes",
        ),
        ("evaluate", ["--bundle", "/nowhere", "--data", "/nowhere", "--output", "/tmp/unused"], "no finished data set"),
        ("score", ["--bundle", "/nowhere", "--input", "/nowhere", "--output", "/tmp/unused"], "no model bundle"),
        ("score", ["--bundle", "b", "--input", "i"], "--output is required"),
    ],
)
def test_likely_mistakes(job: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert JOBS[job](arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not Path("/tmp/unused").exists()


@pytest.mark.parametrize(
    ("job", "options", "inside"),
    [
        ("prepare", ["--input", "/nowhere"], ["", "/data"]),
        ("train", ["--data", "/nowhere"], ["/better"]),
        ("tune", ["--data", "/nowhere"], ["/better"]),
        ("audit", ["--data", "/nowhere"], ["", "/label_check"]),
        ("evaluate", ["--bundle", "/nowhere", "--data", "/nowhere"], ["", "/of/today"]),
        ("score", ["--bundle", "/nowhere", "--input", "/nowhere"], ["", "/scored"]),
    ],
)
def test_no_job_writes_into_a_bundle(
    job: str, options: list[str], inside: list[str], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in inside:
        assert JOBS[job]([*options, "--output", f"{tiny_bundle}{place}"]) == 2
        assert f"lies in the bundle {tiny_bundle}, which no other file may enter" in capsys.readouterr().err


def test_a_checkout_has_a_line_for_every_command() -> None:
    """`ray job submit --working-dir .` carries these; an installed package has `bertray`."""
    assert {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")} == set(COMMANDS)
    for name in COMMANDS:
        body = ast.parse((ROOT / "jobs" / f"{name}.py").read_text()).body[1:]
        assert [ast.unparse(line) for line in body] == [
            "from bertray.__main__ import command",
            f"main = command('{name}', __name__)",
        ]


def test_the_command_lists_jobs_and_refuses_what_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in COMMANDS)
    assert max(map(len, listed.splitlines())) <= 120
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bertray {bertray.__version__}\n"
    assert main(["scroe", "--bundle", "b"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err[:56]) == ("", "error: no command 'scroe'. Did you mean 'score'? Command")


def test_the_installed_command_is_the_job(tmp_path: Path) -> None:
    """Same help, same answers, same exit codes; from any folder."""
    installed = Path(sys.executable).with_name("bertray")

    def both(name: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
        words = list(map(str, arguments))
        return [
            subprocess.run([*command, *words], cwd=folder, capture_output=True, text=True, check=False)
            for command, folder in (([installed, name], tmp_path), ([sys.executable, "-m", f"jobs.{name}"], ROOT))
        ]

    for arguments in (["--help"], ["--bundle", "/nowhere", "x"], ["--bundel"]):
        one, other = both("predict", *arguments)
        assert (one.returncode, one.stdout, one.stderr) == (other.returncode, other.stdout, other.stderr)
        assert one.stdout or one.returncode == 2
