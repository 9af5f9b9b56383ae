"""Options from defaults, YAML, environment and flags; errors that say what to change; the summary line."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bertray.cli import JobResult, load_config, run_job
from bertray.data.config import PrepareConfig
from bertray.errors import RequestError
from bertray.scoring.config import ScoreConfig
from bertray.training.config import TrainConfig, TuneConfig

REQUIRED = ["--data", "d", "--output", "o"]


def test_each_source_overrides_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("epochs: 4\nbatch_size: 8\nlearning_rate: 1.0e-5\n")
    monkeypatch.setenv("BERTRAY_TRAIN_BATCH_SIZE", "16")
    monkeypatch.setenv("BERTRAY_TRAIN_LEARNING_RATE", "2e-5")
    config = load_config("train", TrainConfig, [*REQUIRED, "--config", str(file), "--learning-rate", "3e-5"])
    assert config.max_length == 128  # default
    assert config.epochs == 4  # YAML over default
    assert config.batch_size == 16  # environment over YAML
    assert config.learning_rate == 3e-5  # flag over environment


def test_yaml_is_read_as_flags_are(tmp_path: Path) -> None:
    file = tmp_path / "tune.yaml"
    file.write_text("num_workers: 1:8\nencoder: 007\noverwrite: yes\npatience:\nlearning_rate: 3e-5\n")
    config = load_config("train", TrainConfig, [*REQUIRED, "--config", str(file)])
    assert (config.worker_range, config.encoder, config.overwrite, config.patience) == ((1, 8), "007", True, None)
    assert config.learning_rate == 3e-5
    file.write_text("warmup_fractions: 0:0.2\nbatch_sizes: 16,32\nlayer_decays: 0.8:1\n")
    search = load_config("tune", TuneConfig, [*REQUIRED, "--config", str(file)])
    assert (search.warmup_fractions, search.batch_sizes, search.layer_decays) == ("0:0.2", "16,32", "0.8:1")


def test_lists_from_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--bundle", "b", "--input", "i", "--output", "o"]
    assert load_config("score", ScoreConfig, [*flags, "--keep-columns", "a, b"]).keep_columns == ["a", "b"]
    file = tmp_path / "score.yaml"
    file.write_text("keep_columns: [c, d]\n")
    assert load_config("score", ScoreConfig, [*flags, "--config", str(file)]).keep_columns == ["c", "d"]
    monkeypatch.setenv("BERTRAY_SCORE_KEEP_COLUMNS", "e,f")
    assert load_config("score", ScoreConfig, flags).keep_columns == ["e", "f"]
    assert load_config("prepare", PrepareConfig, ["--input", "x.csv", "y.csv", "--output", "o"]).input == [
        "x.csv",
        "y.csv",
    ]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ([*REQUIRED, "--epochs", "0"], ["--epochs", "'0'", "greater than or equal to 1"]),
        ([*REQUIRED, "--precision", "fp8"], ["--precision", "'fp8'", "'auto', 'fp32' or 'bf16'"]),
        ([*REQUIRED, "--batch-size", "many"], ["--batch-size", "'many'", "integer"]),
        (["--data", "d"], ["--output is required", "BERTRAY_TRAIN_OUTPUT", "'output:'"]),
        ([*REQUIRED, "--config", "/nowhere.yaml"], ["/nowhere.yaml", "No such file"]),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(arguments: list[str], messages: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        load_config("train", TrainConfig, arguments)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("epoch: 3\n", ["unknown option", "bad.yaml: epoch.", "Did you mean 'epochs'?", "batch_size"]),
        ("- a\n- b\n", ["holds a list", "option: value"]),
        ("epochs: [3\n", ["is not YAML"]),
    ],
)
def test_a_bad_yaml_file_is_named(tmp_path: Path, content: str, messages: list[str]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(RequestError) as caught:
        load_config("train", TrainConfig, [*REQUIRED, "--config", str(file)])
    for message in [str(file), *messages]:
        assert message in str(caught.value)


def test_an_unknown_environment_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTRAY_TRAIN_EPOCH", "3")
    with pytest.raises(RequestError, match=r"unknown option BERTRAY_TRAIN_EPOCH\. Did you mean 'epochs'"):
        load_config("train", TrainConfig, REQUIRED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch. Did you mean '--epochs'? bertray train --help shows every option"),
        (["--epoch=3"], "unknown option --epoch. Did you mean '--epochs'? bertray train --help shows every option"),
        (["words"], "unknown option words. bertray train --help shows every option"),
        (["--epochs"], "argument --epochs: expected one argument. bertray train --help shows every option"),
    ],
)
def test_flags_that_cannot_be_read_end_with_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job("train", TrainConfig, lambda config: JobResult({}), [*REQUIRED, *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_messages_name_where_a_value_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("epochs: 0\n")
    monkeypatch.setenv("BERTRAY_TRAIN_BATCH_SIZE", "-1")
    with pytest.raises(RequestError) as caught:
        load_config("train", TrainConfig, [*REQUIRED, "--config", str(file), "--precision", "fp8"])
    for words in (f"{file}: epochs: '0' is", "BERTRAY_TRAIN_BATCH_SIZE: '-1' is", "--precision: 'fp8' is"):
        assert words in str(caught.value)


def test_an_unset_shell_variable_is_no_place() -> None:
    with pytest.raises(RequestError, match=r"--output: '' is not allowed.*at least 1 character"):
        load_config("train", TrainConfig, ["--data", "d", "--output", ""])


def test_checks_over_several_fields() -> None:
    with pytest.raises(RequestError, match=r"validation_fraction \+ test_fraction is 1.2.*below 1"):
        load_config(
            "prepare",
            PrepareConfig,
            ["--input", "x", "--output", "o", "--validation-fraction", "0.6", "--test-fraction", "0.6"],
        )


def test_a_password_in_a_uri_is_refused_and_not_repeated() -> None:
    assert (
        load_config("train", TrainConfig, [*REQUIRED, "--mlflow-uri", "http://host:5000"]).mlflow_experiment
        == "bertray"
    )
    with pytest.raises(
        RequestError, match=r"mlflow_uri holds a user or a password.*MLFLOW_TRACKING_PASSWORD"
    ) as caught:
        load_config("train", TrainConfig, [*REQUIRED, "--mlflow-uri", "http://me:secret@host:5000"])
    assert "secret" not in str(caught.value)


def test_a_relative_output_is_refused_in_a_submitted_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert run_job("train", TrainConfig, lambda config: JobResult({}), REQUIRED) == 2
    assert "--output o is relative" in capsys.readouterr().err
    for place in ("/absolute", "s3://bucket/o"):
        assert run_job("train", TrainConfig, lambda config: JobResult({}), ["--data", "d", "--output", place]) == 0


def test_the_summary_is_the_last_line_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: TrainConfig) -> JobResult:
        print("chatter of a library")
        return JobResult({"epochs": config.epochs}, 3)

    assert run_job("train", TrainConfig, run, REQUIRED) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"epochs": 3}
    assert "chatter" in captured.err


def test_a_request_error_ends_with_code_2_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: TrainConfig) -> JobResult:
        raise RequestError("the path /x is wrong")

    assert run_job("train", TrainConfig, run, REQUIRED) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: the path /x is wrong\n"


@pytest.mark.parametrize(("code", "ended_by_python"), [(0, True), (3, True), (130, False), (143, False)])
def test_a_stopped_job_ends_without_the_interpreters_end(code: int, ended_by_python: bool) -> None:
    told = "import atexit; from bertray.cli import leave; atexit.register(print, 'by Python')"
    finished = subprocess.run([sys.executable, "-c", f"{told}; print('said'); leave({code})"], stdout=subprocess.PIPE)
    assert finished.returncode == code
    assert finished.stdout == (b"said\nby Python\n" if ended_by_python else b"said\n")


SIGNALLED = """
import os, signal, sys, time
from bertray.cli import run_job
from bertray.training.config import TrainConfig

class Field:
    def __set_name__(self, owner, name):
        wait()

def wait():
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(30)

def run(_):
    try:
        if sys.argv[2] == "while a class is made":
            type("Made", (), {"field": Field()})
        wait()
    finally:
        print("closed", file=sys.stderr)

before = signal.getsignal(signal.SIGTERM)
code = run_job("train", TrainConfig, run, ["--data", "d", "--output", "o"])
assert signal.getsignal(signal.SIGTERM) == before
sys.exit(code)
"""


@pytest.mark.parametrize("when", ["at work", "while a class is made"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_job_in_order(number: int, code: int, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(int(number)), when], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("closed\nstopped; what was finished is kept")


ODD = """
import logging, sys
from pathlib import Path
from bertray.cli import JobResult, leave, make_streams_last, run_job
from bertray.reports.terminal import print_scoring
from bertray.training.config import TrainConfig

def run(_):
    logging.getLogger("bertray").info("log of Zürich → caf\\udce9")
    for number in range(2000):  # more than a pipe holds
        print("chatter of Zürich →", number)
    print_scoring({"output": "Zürich → 東京"}, [{"path": "ö", "reason": "→"}])
    Path(sys.argv[1]).write_text("done")
    return JobResult({"output": "Zürich → caf\\udce9"}, 3)

make_streams_last()
leave(run_job("train", TrainConfig, run, ["--data", "d", "--output", "o"]))
"""


def odd_job(folder: Path) -> list[str]:
    (folder / "odd.py").write_text(ODD, encoding="utf-8")
    return [sys.executable, str(folder / "odd.py"), str(folder / "file")]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8", ""])
def test_any_encoding_of_stdout_will_do(encoding: str, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # as a cron job has it
    environment = os.environ | ({"PYTHONIOENCODING": encoding} if encoding else plain)
    done = subprocess.run(odd_job(tmp_path), capture_output=True, env=environment)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.decode(encoding or "ascii")) == {"output": "Zürich → caf\udce9"}
    assert b"log of Z" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [["stderr"], ["stdout", "stderr"]])
def test_a_reader_that_leaves_changes_no_exit_code(closed: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    streams = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE) | dict.fromkeys(closed, writer)
    done = subprocess.run(odd_job(tmp_path), **streams)  # type: ignore[call-overload]
    os.close(writer)
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "file").read_text() == "done"
    assert b"Traceback" not in (done.stderr or b"") and b"BrokenPipe" not in (done.stderr or b"")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label-separator", "|"], r"label_separator '\|' has no meaning .*add --multi-label"),
        (["--multi-label", "--oos-label", "oos"], r"oos_label 'oos' has no meaning with multi_label"),
        (["--multi-label", "--label-separator", ""], r"--label-separator: '' is not allowed"),
        (["--oos-label", "  "], r"--oos-label: '  ' is not allowed"),
    ],
)
def test_options_of_labels_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_config("prepare", PrepareConfig, ["--input", "x.csv", "--output", "o", *arguments])


def test_the_separator_belongs_to_several_labels() -> None:
    given = ["--input", "x.csv", "--output", "o"]
    assert load_config("prepare", PrepareConfig, given).separator is None
    assert load_config("prepare", PrepareConfig, [*given, "--multi-label"]).separator == ";"
    assert load_config("prepare", PrepareConfig, [*given, "--multi-label", "--label-separator", ", "]).separator == ", "


@pytest.mark.parametrize(
    ("given", "meant"), [("--lr", "--learning-rate"), ("--bs", "--batch-size"), ("--epoch", "--epochs")]
)
def test_options_are_suggested_by_their_initials_too(given: str, meant: str) -> None:
    with pytest.raises(RequestError, match=f"unknown option {given}. Did you mean '{meant}'"):
        load_config("train", TrainConfig, [*REQUIRED, given, "1"])


@pytest.mark.parametrize(
    "text", ["data: !!python/object/apply:os.system [touch ran]", "data: !!python/name:os.system", "data: [1"]
)
def test_a_configuration_file_runs_nothing(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("options.yaml").write_text(text)
    with pytest.raises(RequestError, match=r'options\.yaml is not YAML: (?s:.)*"options\.yaml", line 1'):
        load_config("train", TrainConfig, ["--config", "options.yaml"])
    assert not Path("ran").exists()


def test_nothing_that_is_logged_or_refused_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: TrainConfig) -> JobResult:
        logging.getLogger("bertray.x").warning("shard \x1b]0;a title\x07 failed")
        raise RequestError("the path \x1b[2J\u202e is wrong")

    assert run_job("train", TrainConfig, run, REQUIRED) == 2
    shown = capsys.readouterr().err
    assert "shard \\x1b]0;a title\\x07 failed\n" in shown
    assert "the path \\x1b[2J\\u202e is wrong\n" in shown


def test_a_list_that_is_given_twice_adds_up() -> None:
    given = ["--input", "a.csv", "b.csv", "--output", "o", "--input", "c.csv"]
    assert load_config("prepare", PrepareConfig, given).input == ["a.csv", "b.csv", "c.csv"]
