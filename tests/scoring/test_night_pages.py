"""The pages of a night: written last, from files; nothing is added to a night with nothing to do."""

import json
from pathlib import Path
from typing import Any

import pytest

from bertray.drivers.score import run
from bertray.scoring.config import ScoreConfig
from tests.conftest import write_shard
from tests.stub_pool import stub_pool


@pytest.fixture
def config(tiny_bundle: Path, tmp_path: Path) -> ScoreConfig:
    write_shard(tmp_path / "archive" / "a.parquet", ["a text", "", "", "<script>"])
    places = {"bundle": str(tiny_bundle), "input": str(tmp_path / "archive"), "output": str(tmp_path / "scored")}
    return ScoreConfig(**places, price_per_hour=3.0, max_error_fraction=0.6)


def content(config: ScoreConfig) -> dict[str, tuple[bytes, int]]:
    files = [path for path in Path(config.output).rglob("*") if path.is_file() and "lock" not in path.parts]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_night_and_one_with_nothing_to_do(config: ScoreConfig) -> None:
    first = run(config, open_pool=stub_pool())
    folder = Path(config.output) / "runs" / first.summary["run_id"]  # type: ignore[index]
    page = (folder / "report.html").read_text()
    assert "Yes, they are published." in page and "text is empty" in page
    assert f"runs/{folder.name}/report.html" in (Path(config.output) / "index.html").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["errors"] == {"text is empty": 2}
    assert summary["profiles"]["this run"]["num_rows"] == 4
    assert [summary[f"num_rows{of}"] for of in ("", "_error", "_repeated", "_model")] == [4, 2, 0, 2]
    assert "Of 4 rows the model gave 2 a label; 0 have the label of an earlier row" in page
    before = content(config)
    assert run(config, open_pool=stub_pool()).summary["run_id"] is None  # type: ignore[index]
    assert content(config) == before


def test_a_held_night(config: ScoreConfig) -> None:
    held = run(config.model_copy(update={"max_error_fraction": 0.1}), open_pool=stub_pool())
    assert held.exit_code == 5
    (page,) = Path(config.output).glob("runs/*/report.html")
    assert "--max-error-fraction 0.1 --accept" in page.read_text()


def test_a_page_that_fails_changes_nothing_else(
    config: ScoreConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of a page")

    monkeypatch.setattr("bertray.reports.run.facts", fail)
    assert run(config, open_pool=stub_pool()).exit_code == 0
    assert "has no page: ZeroDivisionError: of a page" in caplog.text
    assert "What is published" in (Path(config.output) / "index.html").read_text()
    assert list(Path(config.output).rglob("report.html")) == []
