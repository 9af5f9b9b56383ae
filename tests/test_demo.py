"""`make demo` at a smaller size, on a Ray of its own, and the notebooks on what it wrote: what a new user sees."""

import ast
import json
import os
from pathlib import Path

import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from transformers import pipeline

import bertray
from bertray import Bundle
from bertray.schema import SPLITS
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_NAME = {path.stem: path for path in NOTEBOOKS}


def execute(path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """Run a notebook from its own folder, as Jupyter and `make notebooks` do; its kernel is gone afterwards."""
    monkeypatch.setenv("BERTRAY_DEMO", str(demo))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own backend makes the pictures
    notebook = nbformat.read(path, as_version=4)
    kernels: list[tuple[str, int]] = []
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}})
    client.on_notebook_start = lambda notebook: kernels.append((client.km.ip, client.km.provisioner.pid))
    try:
        client.execute()
    finally:
        [(address, process_id)] = kernels
        assert address == "127.0.0.1"
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)
    return notebook


def test_every_step_is_shown_and_the_end_says_where_things_lie(small_demo: Path) -> None:
    text = (small_demo / "stderr.txt").read_text()
    for job in ("prepare", "train", "evaluate", "score"):
        assert f"$ bertray {job} " in text
    assert "a look at" in text
    assert "where everything lies" in text
    places = json.loads((small_demo / "stdout.txt").read_text())  # one line: the summary
    folders = {"labelled", "archive", "dataset", "bundle", "evaluation", "scored"}
    assert set(places) == folders | {"bundle page", "evaluation page", "scored page"}
    assert all(Path(place).exists() for place in places.values())
    for noise in ("Traceback", "WARNING", "Deprecat", "LOAD REPORT", "it/s]"):
        assert noise not in text


def test_nothing_is_lost_on_the_way(small_demo: Path) -> None:
    report = json.loads((small_demo / "dataset" / "report.json").read_text())
    assert report["num_rows_in"] == 180 == report["num_rows_kept"] + sum(report["num_rows_out"].values())
    assert {"duplicate", "text_empty", "label_missing", "text_missing"} <= set(report["num_rows_out"])
    assert sum(report["splits"][split] for split in SPLITS) == report["num_rows_kept"]
    shards = sorted((small_demo / "archive").rglob("*.parquet"))
    assert len(shards) == 8
    assert sum(pq.ParquetFile(shard).metadata.num_rows for shard in shards) == 160
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


@pytest.mark.parametrize(("name", "num_pictures"), [("01-model", 5), ("02-archive", 2)])
def test_the_notebooks_run_on_the_demo(
    name: str, num_pictures: int, small_demo: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BERTRAY_ENCODER", str(tiny_encoder))
    notebook = execute(BY_NAME[name], small_demo, monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_pictures
    warnings = [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert [text for text in warnings if not text.startswith("warning: the models' accuracy on rows")] == []
    for output in outputs:
        assert "training" not in output.get("data", {}).get("text/plain", "") or "3 of 3 folds done" in str(output)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_without_outputs_a_notebook_says_what_is_missing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CellExecutionError, match=f"{tmp_path}/nowhere/bundle"):
        execute(path, tmp_path / "nowhere", monkeypatch)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_starts_in_ten_lines_of_the_public_interface(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert len([line for line in first.splitlines() if line.strip()]) <= 10
    code = [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    imports = [node for tree in code for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    from_bertray = [node for node in imports if "bertray" in ast.unparse(node)]
    assert from_bertray
    for node in from_bertray:
        assert isinstance(node, ast.ImportFrom) and node.module == "bertray"
        assert {alias.name for alias in node.names} <= set(bertray.__all__)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], f"cell {cell.id}: clear the outputs before committing"
            assert cell.execution_count is None, f"cell {cell.id}: clear the outputs before committing"
