"""The public interface: exactly what is announced, typed, and as README shows it."""

import ast
import csv
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest

import bertray
from bertray import Bundle, TrainConfig, errors
from tests.conftest import ROOT, write_shard


def test_what_is_public_is_announced() -> None:
    raised = {name for name, one in vars(errors).items() if inspect.isclass(one) and issubclass(one, Exception)}
    jobs = {"prepare", "train", "evaluate", "audit", "score"}
    configs = {f"{name.capitalize()}{kind}" for name in jobs for kind in ("Config", "Result")}
    assert set(bertray.__all__) == raised | jobs | configs | {"Bundle", "Prediction"}
    assert bertray.__all__ == sorted(bertray.__all__)
    for name in bertray.__all__:
        assert getattr(bertray, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'predict'"):
        bertray.predict  # noqa: B018


@pytest.mark.parametrize("name", ["prepare", "train", "evaluate", "audit", "score"])
def test_a_job_is_a_typed_function(name: str) -> None:
    config, result = (getattr(bertray, f"{name.capitalize()}{kind}") for kind in ("Config", "Result"))
    hints = get_type_hints(getattr(bertray, name))
    assert (hints["config"], hints["return"]) == (config, result)


def test_a_type_checker_sees_it(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from bertray import Bundle, ScoreConfig, score\n"
        "reveal_type(Bundle.load('b').predict(['x']))\n"
        "reveal_type(score(ScoreConfig(bundle='b', input='i', output='o')).is_held)\n"
        "score(ScoreConfig(bundle='b', input='i', output='o', num_actors='many'))\n"
    )
    command = [sys.executable, "-m", "mypy", tmp_path / "user.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    *notes, _ = (line.partition("user.py:")[2] for line in done.stdout.splitlines())
    seen = [note.partition("Revealed type is ")[2] for note in notes if "note:" in note]
    assert [one[:6] for one in seen] == ['"list[', '"bool"']
    (refused,) = (note for note in notes if "error:" in note)
    assert refused.startswith('4: error: Argument "num_actors" to "ScoreConfig" has incompatible type "str"')


def test_the_environment_changes_no_configuration_that_a_program_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BERTRAY_TRAIN_EPOCHS", "7")
    assert TrainConfig(data="d", output="o").epochs == 3


def test_a_plan_is_for_the_command_line() -> None:
    with pytest.raises(bertray.RequestError, match="plan is an option of the command line"):
        bertray.score(bertray.ScoreConfig(bundle="b", input="i", output="o", plan=True))


def test_probabilities_are_those_of_the_predictions(tiny_bundle: Path) -> None:
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    texts = ["one", None, "two words", ""]
    probabilities_NC = bundle.predict_proba(texts)
    assert (probabilities_NC.shape, probabilities_NC.dtype) == ((4, 3), np.float32)
    assert np.isnan(probabilities_NC[[1, 3]]).all()
    assert probabilities_NC[[0, 2]].sum(axis=1) == pytest.approx(1)
    for row, prediction in enumerate(bundle.predict(texts)):
        if prediction.error is None:
            assert bundle.labels[probabilities_NC[row].argmax()] == prediction.label
            assert probabilities_NC[row].max() == pytest.approx(prediction.score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "'fp8'"),
        ({"precision": "FP16"}, "'FP16'"),
        ({"precision": "int8"}, "'int8'"),
        ({"precision": None}, "None"),
        ({"device": "gpu"}, "'gpu'"),
        ({"device": "cuda:0"}, "'cuda:0'"),
    ],
)
def test_a_bundle_is_loaded_as_asked_or_not_at_all(options: Any, message: str, tiny_bundle: Path) -> None:
    with pytest.raises(bertray.RequestError, match=f"{message} is not allowed: use one of auto, "):
        Bundle.load(str(tiny_bundle), **options)


@pytest.mark.services
def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "labelled.csv").open("w", newline="") as file:
        rows = [(f"the {word} of day {day}", label) for day in range(40) for word, label in WORDS]
        csv.writer(file).writerows([("text", "label"), *rows])
    write_shard(tmp_path / "archive" / "0.parquet", ["the apple", "the wave"])
    of_a_bundle, of_jobs = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    num_rows, f1_macro, accuracy, num_scored = values_of(of_jobs)
    assert num_rows == {"train": 96, "validation": 12, "test": 12}
    assert 0 <= f1_macro <= 1 and 0 <= accuracy <= 1
    assert num_scored == 2
    labels, predictions, probabilities_NC = values_of(of_a_bundle)
    assert labels == ("car", "fruit", "sea")
    assert {one.label for one in predictions} <= set(labels)
    assert probabilities_NC.shape == (1, 3)


WORDS = (("apple", "fruit"), ("wheel", "car"), ("wave", "sea"))


def values_of(code: str) -> list[Any]:
    """Run statements; the values of those that are expressions."""
    names: dict[str, Any] = {}
    values = []
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr):
            values.append(eval(compile(ast.Expression(statement.value), "README.md", "eval"), names))
        else:
            exec(compile(ast.Module([statement], []), "README.md", "exec"), names)
    return values
