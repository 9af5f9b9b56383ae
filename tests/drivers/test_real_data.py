"""Real, openly licensed data beside the project; a clone without it skips these."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import pipeline

from bertray import Bundle
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare
from bertray.scoring.score_shard import score_shard
from bertray.storage.location import Location
from tests.conftest import SHARED_DATA, needs_shared_data

pytestmark = needs_shared_data


def test_banking77_with_its_own_test_split(tmp_path: Path) -> None:
    folder = SHARED_DATA / "banking77"
    report = prepare(
        PrepareConfig(
            input=[str(folder / "train.parquet")], test=str(folder / "test.parquet"), output=str(tmp_path / "data")
        )
    ).report
    assert report["num_rows_in"] == 10003 + 3080 == report["num_rows_kept"] + sum(report["num_rows_out"].values())
    assert len(Dataset.open(str(tmp_path / "data")).labels) == 77
    assert all(min(counts.values()) >= 1 for counts in report["labels"].values())


def test_pages_of_documentation_score_as_the_pipeline_scores_them(tiny_bundle: Path, tmp_path: Path) -> None:
    pages = pq.read_table(SHARED_DATA / "bulk_cpp_docs" / "part-00000.parquet").slice(0, 60)
    pq.write_table(pages, tmp_path / "pages.parquet")
    shard, output = (Location.of(str(tmp_path / name)) for name in ("pages.parquet", "scored.parquet"))
    counts = score_shard(Bundle.load(str(tiny_bundle), "fp32"), shard, output, "text", ["doc_id"])
    assert (counts.profile.num_rows, counts.profile.num_rows_error) == (60, 0)
    table = pq.read_table(output.path)
    assert table["doc_id"].equals(pages["doc_id"])
    expected = pipeline("text-classification", model=str(tiny_bundle), truncation=True)(pages["text"].to_pylist())
    assert table["label"].to_pylist() == [one["label"] for one in expected]
    assert table["score"].to_pylist() == pytest.approx([one["score"] for one in expected], abs=1e-4)
