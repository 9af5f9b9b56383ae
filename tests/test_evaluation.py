"""Metrics of a bundle on a split, written and returned."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bertray import Bundle
from bertray.config import EvaluateConfig, PrepareConfig
from bertray.dataset import Dataset, prepare
from bertray.errors import RequestError
from bertray.evaluation import evaluate


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
    metrics = evaluate(config)
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
    assert metrics["same_data_as_training"] is False  # the tiny bundle was trained on nothing


def test_other_labels_are_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "abd", "abd")
    with pytest.raises(RequestError, match=r"different labels \(c, d stand in one alone\).*a, b, c"):
        evaluate(EvaluateConfig(bundle=str(tiny_bundle), data=data, output=str(tmp_path / "evaluation")))
    assert not (tmp_path / "evaluation").exists()
