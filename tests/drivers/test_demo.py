"""`make demo` at a smaller size, on a Ray of its own: what a new user sees."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from test_notebooks import execute
from transformers import pipeline

from bertray import Bundle
from bertray.schema import SPLITS


def test_every_step_is_shown_and_the_end_says_where_things_lie(small_demo: Path) -> None:
    text = (small_demo / "stderr.txt").read_text()
    for job in ("prepare", "train", "evaluate", "score"):
        assert f"$ python -m jobs.{job} " in text
    assert "a look at" in text
    assert "where everything lies" in text
    places = json.loads((small_demo / "stdout.txt").read_text())  # one line: the summary
    assert set(places) == {"labelled", "archive", "dataset", "bundle", "evaluation", "scored"}
    assert all(Path(place).exists() for place in places.values())
    for noise in ("Traceback", "WARNING", "Deprecat", "LOAD REPORT", "it/s]"):
        assert noise not in text


def test_nothing_is_lost_on_the_way(small_demo: Path) -> None:
    report = json.loads((small_demo / "dataset" / "report.json").read_text())
    assert report["num_rows_in"] == 360 == report["num_rows_kept"] + sum(report["num_rows_out"].values())
    assert {"duplicate", "text_empty", "label_missing", "text_missing"} <= set(report["num_rows_out"])
    assert sum(report["splits"][split] for split in SPLITS) == report["num_rows_kept"]
    shards = sorted((small_demo / "archive").rglob("*.parquet"))
    assert len(shards) == 8
    assert sum(pq.ParquetFile(shard).metadata.num_rows for shard in shards) == 240
    for shard in shards:
        scored = small_demo / "scored" / "predictions" / shard.relative_to(small_demo / "archive")
        assert pq.ParquetFile(scored).read(["document_id"]).equals(pq.ParquetFile(shard).read(["document_id"]))


def test_pipeline_predict_and_score_agree(small_demo: Path) -> None:
    shard = min((small_demo / "archive").rglob("*.parquet"))
    texts = [text for text in pq.ParquetFile(shard).read()["text"].to_pylist() if text and text.strip()][:40]
    reference = pipeline("text-classification", model=str(small_demo / "bundle"), truncation=True)(texts)
    predictions = Bundle.load(str(small_demo / "bundle"), "fp32").predict(texts)
    for prediction, other in zip(predictions, reference, strict=True):
        assert prediction.label == other["label"]
        assert abs(prediction.score - other["score"]) < 1e-4


def test_the_notebook_runs_on_the_demo(small_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = execute(small_demo, monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    warnings = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert warnings == []
