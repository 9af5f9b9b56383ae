"""Metrics of a bundle on a split, written and returned."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from bertray import Bundle
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare
from bertray.drivers.config import EvaluateConfig
from bertray.drivers.evaluate import evaluate, run
from bertray.errors import RequestError
from bertray.storage.outputs import sha256_of


def make_dataset(folder: Path, labels: str) -> str:
    folder.mkdir()
    rows = [
        {"text": f"{labels[row % len(labels)]}{row} words", "label": labels[row % len(labels)]} for row in range(120)
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(PrepareConfig(input=[str(folder / "in.jsonl")], output=str(folder / "data")))
    return str(folder / "data")


def test_what_is_written(tiny_bundle: Path, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "abc", "abc")
    output = tmp_path / "evaluation"
    config = EvaluateConfig(bundle=str(tiny_bundle), data=data, output=str(output), precision="fp32")
    metrics = evaluate(config).metrics
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert set(metrics) >= {
        "accuracy",
        "precision_weighted",
        "recall_weighted",
        "f1_weighted",
        "f1_macro",
        "per_class",
        "confusion_matrix",
        "labels",
        "num_rows",
        "baseline",
    }
    rows = Dataset.open(data).split("test")
    table = pq.read_table(output / "predictions.parquet")
    predicted = [
        prediction.label for prediction in Bundle.load(str(tiny_bundle), "fp32").predict(rows["text"].to_pylist())
    ]
    assert table["predicted"].to_pylist() == predicted
    assert table.select(rows.column_names).equals(rows)
    for name, column in (("accuracy", "predicted"), ("baseline", "baseline_predicted")):
        hits = [a == b for a, b in zip(table[column].to_pylist(), rows["label"].to_pylist(), strict=True)]
        expected = metrics["baseline"]["accuracy"] if name == "baseline" else metrics[name]
        assert sum(hits) / len(hits) == pytest.approx(expected)
    assert table["is_right"].to_pylist() == [a == b for a, b in zip(predicted, rows["label"].to_pylist(), strict=True)]
    low, high = metrics["intervals"]["accuracy"]
    assert low <= metrics["accuracy"] <= high
    assert "Is this model good enough" in (output / "report.html").read_text()
    assert metrics["same_data_as_training"] is False  # the tiny bundle was trained on nothing
    for name, (low, high) in metrics["baseline"]["difference_intervals"].items():
        assert low <= metrics[name] - metrics["baseline"][name] <= high
    with pytest.raises(RequestError, match=r"--output .* has a metrics\.json: choose .* with --overwrite"):
        evaluate(config)
    assert evaluate(config.model_copy(update={"overwrite": True})).metrics["accuracy"] == metrics["accuracy"]


@pytest.mark.parametrize("is_multi_label", [False, True])
def test_the_baseline_is_left_out_or_fitted_on_a_sample(
    is_multi_label: bool,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        {"text": f"{'abc'[row % 3]}{row} words", "label": ["abc"[row % 3]] if is_multi_label else "abc"[row % 3]}
        for row in range(120)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"input": [str(tmp_path / "in.jsonl")], "output": str(tmp_path / "data")}
    prepare(PrepareConfig(**files, multi_label=is_multi_label))
    bundle = make_bundle(problem_type="multi_label_classification") if is_multi_label else make_bundle()
    places = {"bundle": str(bundle), "data": str(tmp_path / "data"), "output": str(tmp_path / "out")}
    run(EvaluateConfig(**places, baseline=False))
    assert read(tmp_path / "out")[0]["baseline"] is None
    assert set(read(tmp_path / "out")[1]["baseline_predicted"]) == {None}
    assert "this bundle" in (shown := capsys.readouterr().err) and "TF-IDF" not in shown
    monkeypatch.setattr("bertray.drivers.measure.MAX_BASELINE_ROWS", 20)
    run(EvaluateConfig(**places, overwrite=True))
    assert read(tmp_path / "out")[0]["baseline"]["num_training_rows"] == 20
    assert "regression, 20" in " ".join(capsys.readouterr().err.split())


def write(file: Path, rows: Iterable[tuple[str, str | list[str]]]) -> str:
    file.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return str(file)


def read(output: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    return json.loads((output / "metrics.json").read_text()), pq.read_table(output / "predictions.parquet").to_pydict()


def words(number: int) -> str:
    return " ".join(["physics", "sql", "Zürich", "cook", "sales", "north", "wave"][n * number % 7] for n in range(1, 9))


@pytest.fixture
def scope_data(tmp_path: Path) -> Callable[..., str]:
    """Texts of classes a, b and c; in the test split every third text is of `oos_label`."""

    def build(oos_label: str) -> str:
        train = [(f"{words(row)} training {row}", "abc"[row % 3]) for row in range(60)]
        test = [(f"{words(row)} {row}", oos_label if row % 3 == 0 else "abb"[row % 3]) for row in range(90)]
        files = {"input": [write(tmp_path / "in.jsonl", train)], "test": write(tmp_path / "test.jsonl", test)}
        prepare(PrepareConfig(**files, output=str(tmp_path / "data"), oos_label=oos_label))
        return str(tmp_path / "data")

    return build


def test_texts_out_of_scope_are_found_by_their_score(
    make_bundle: Callable[..., Path], scope_data: Callable[..., str], tmp_path: Path
) -> None:
    data, output = scope_data("none of these"), tmp_path / "evaluation"
    scores = [one.score for one in Bundle.load(str(make_bundle()), "fp32").predict([words(row) for row in range(50)])]
    median = float(np.median([score for score in scores if score is not None]))
    bundle = str(make_bundle(review_below=median, target_precision=0.9))
    config = EvaluateConfig(bundle=bundle, data=data, output=str(output), precision="fp32")
    metrics = evaluate(config).metrics
    found, rows = read(output)
    assert found == metrics
    true, predicted, reviewed = rows["label"], rows["predicted"], rows["review"]
    assert reviewed == [score < median for score in rows["score"]]
    assert 0 < sum(reviewed) < 90

    in_scope = [label != "none of these" for label in true]
    right = [a == b for a, b in zip(true, predicted, strict=True)]
    assert (metrics["num_rows"], sum(map(sum, metrics["confusion_matrix"]))) == (60, 60)
    assert metrics["accuracy"] == pytest.approx(np.mean([r for r, i in zip(right, in_scope, strict=True) if i]))
    covered = [r for r, review in zip(right, reviewed, strict=True) if not review]  # those out of scope too, as wrong
    assert metrics["review"] == {
        "review_below": median,
        "target_precision": 0.9,
        "coverage": pytest.approx(len(covered) / 90),
        "precision": pytest.approx(np.mean(covered)),
        "num_rows_review": sum(reviewed),
    }
    scope = metrics["out_of_scope"]
    kept = [r and not review for r, review, i in zip(right, reviewed, in_scope, strict=True) if i]
    assert (scope["label"], scope["is_class"], scope["threshold"]) == ("none of these", False, median)
    assert scope["in_scope_accuracy"] == pytest.approx(np.mean(kept))
    assert scope["oos_recall"] == pytest.approx(
        np.mean([review for review, i in zip(reviewed, in_scope, strict=True) if not i])
    )
    assert (scope["num_rows_in_scope"], scope["num_rows_out_of_scope"]) == (60, 30)

    higher = evaluate(config.model_copy(update={"oos_threshold": 1.0, "overwrite": True})).metrics["out_of_scope"]
    assert (higher["threshold"], higher["oos_recall"], higher["in_scope_coverage"]) == (1.0, 1.0, 0.0)
    assert (higher["oos_precision"], higher["auroc"]) == (pytest.approx(1 / 3), scope["auroc"])
    none = evaluate(config.model_copy(update={"bundle": str(make_bundle()), "overwrite": True})).metrics
    assert none["review"] is None
    assert none["out_of_scope"]["threshold"] is None
    assert (none["out_of_scope"]["oos_recall"], none["out_of_scope"]["in_scope_coverage"]) == (0.0, 1.0)


def test_texts_out_of_scope_are_found_by_their_class(
    tiny_bundle: Path, scope_data: Callable[..., str], tmp_path: Path
) -> None:
    data, output = scope_data("c"), tmp_path / "evaluation"
    config = EvaluateConfig(bundle=str(tiny_bundle), data=data, output=str(output), precision="fp32")
    metrics = evaluate(config).metrics
    _, rows = read(output)
    pairs = list(zip(rows["label"], rows["predicted"], strict=True))
    scope = metrics["out_of_scope"]
    assert (metrics["num_rows"], scope["is_class"], scope["threshold"]) == (90, True, None)
    assert scope["oos_recall"] == pytest.approx(np.mean([b == "c" for a, b in pairs if a == "c"]))
    assert scope["oos_precision"] == pytest.approx(np.mean([a == "c" for a, b in pairs if b == "c"]))
    assert scope["oos_recall"] == pytest.approx(metrics["per_class"]["c"]["recall"])
    assert scope["in_scope_accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs if a != "c"]))
    with pytest.raises(RequestError, match=r"--oos-threshold 0\.5 has no meaning: 'c' is a class of .*data"):
        evaluate(config.model_copy(update={"oos_threshold": 0.5}))


def test_a_threshold_for_a_data_set_without_texts_out_of_scope(tiny_bundle: Path, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "abc", "abc")
    config = EvaluateConfig(bundle=str(tiny_bundle), data=data, output=str(tmp_path / "evaluation"), oos_threshold=0.5)
    with pytest.raises(RequestError, match=r"--oos-threshold 0\.5 has no meaning: .* prepare .* with --oos-label"):
        evaluate(config)


@pytest.mark.parametrize("thresholds", [None, (0.9, 0.2, 0.6)])
def test_several_labels_a_row(
    make_bundle: Callable[..., Path], tmp_path: Path, thresholds: tuple[float, ...] | None
) -> None:
    rows = [(f"{words(row)} {row}", [["a"], ["b", "c"], ["c"], []][row % 4]) for row in range(200)]
    files = {"input": [write(tmp_path / "in.jsonl", rows)], "output": str(tmp_path / "data")}
    prepare(PrepareConfig(**files, multi_label=True))
    several = {"problem_type": "multi_label_classification", "thresholds": thresholds, "review_below": 0.75}
    bundle, output = str(make_bundle(**several)), tmp_path / "evaluation"
    config = EvaluateConfig(bundle=bundle, data=str(tmp_path / "data"), output=str(output), precision="fp32")
    metrics = evaluate(config).metrics
    found, table = read(output)
    assert found == metrics
    expected = Bundle.load(bundle, "fp32").predict(table["text"])
    assert table["predicted"] == [one.labels for one in expected]
    true = list(map(set, table["labels"]))
    for name, column in (("", "predicted"), ("baseline", "baseline_predicted")):
        given = list(map(set, table[column]))
        num_right = sum(len(a & b) for a, b in zip(true, given, strict=True))
        f1_micro = 2 * num_right / (sum(map(len, true)) + sum(map(len, given)))
        measured = metrics["baseline"] if name else metrics
        assert measured["f1_micro"] == pytest.approx(f1_micro)
        assert measured["subset_accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(true, given, strict=True)]))
    reached = {label: scores.get("threshold") for label, scores in metrics["per_class"].items()}
    assert reached == dict(zip("abc", thresholds or (None,) * 3, strict=True))
    best = [one.label in labels for one, labels in zip(expected, true, strict=True) if not one.review]
    assert 0 < len(best) < len(true)
    assert metrics["review"]["precision"] == pytest.approx(np.mean(best))
    assert metrics["review"]["coverage"] == pytest.approx(len(best) / len(true))
    assert metrics["out_of_scope"] is None
    assert 0 < metrics["ece"] < 1

    with pytest.raises(RequestError, match=r"the bundle is for multi_label_classification, .* for single_label"):
        evaluate(config.model_copy(update={"data": make_dataset(tmp_path / "abc", "abc")}))


def test_a_text_without_a_prediction_counts_as_wrong(tiny_bundle: Path, tmp_path: Path) -> None:
    data, broken = make_dataset(tmp_path / "abc", "abc"), shutil.copytree(tiny_bundle, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    info = json.loads((broken / "bundle.json").read_text())
    info["files"]["model.safetensors"] = sha256_of(broken / "model.safetensors")
    (broken / "bundle.json").write_text(json.dumps(info))
    settings = {"output": str(tmp_path / "out"), "precision": "fp32"}
    metrics = evaluate(EvaluateConfig(bundle=str(broken), data=data, **settings)).metrics
    assert (metrics["accuracy"], metrics["f1_macro"], metrics["ece"], metrics["nll"]) == (0, 0, None, None)


def test_other_labels_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "abd", "abd")
    with pytest.raises(RequestError, match=r"different labels \(only one of them has c, d\).*a, b, c"):
        evaluate(EvaluateConfig(bundle=str(tiny_bundle), data=data, output=str(tmp_path / "evaluation")))
    assert not (tmp_path / "evaluation").exists()
