"""Bundles, data sets and outputs of version 0.1.0 before its modules moved into rooms are read as they were.

tests/old/ was made by the command line of that version: a data set of each problem type, a bundle trained on each, an
archive of two shards, and the output of scoring it with --keep-columns document_id --precision fp32.
"""

import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bertray import Bundle, EvaluateConfig, ScoreConfig, evaluate, score
from bertray.data.dataset import Dataset
from bertray.scoring.manifest import Manifest
from bertray.storage.location import Location
from tests.conftest import ROOT, write_shard

OLD = ROOT / "tests" / "old"


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A copy of the archive and its output; the shards are as old as the manifest says."""
    for name in ("archive", "scored"):
        shutil.copytree(OLD / name, tmp_path / name)
    for record in Manifest(Location.of(str(tmp_path / "scored"))).latest().to_pylist():
        modified_ns = int(record["version"])
        os.utime(tmp_path / "archive" / record["path"], ns=(modified_ns, modified_ns))
    return tmp_path


@pytest.mark.services
def test_an_old_output_is_gone_on_with(places: Path) -> None:
    folders = {"bundle": str(OLD / "bundle"), "input": str(places / "archive"), "output": str(places / "scored")}
    config = ScoreConfig(**folders, num_actors=0, keep_columns=["document_id"], precision="fp32", input_moved=True)
    before = {path: path.read_bytes() for path in (places / "scored" / "predictions").rglob("*.parquet")}
    summary = score(config).summary
    assert (summary["num_shards_skipped"], summary["num_shards_committed"]) == (2, 0)
    write_shard(places / "archive" / "2026-01-07" / "c.parquet", ["the apple of day 3 and so on"])
    scored = score(config.model_copy(update={"input_moved": False, "accept": True}))
    assert (scored.summary["num_shards_skipped"], scored.summary["num_shards_committed"]) == (2, 1)
    assert {path: path.read_bytes() for path in before} == before


def test_an_old_bundle_says_what_it_said(places: Path) -> None:
    bundle = Bundle.load(str(OLD / "bundle"), "fp32")
    for path in (places / "archive").rglob("*.parquet"):
        expected = pq.read_table(places / "scored" / "predictions" / path.relative_to(places / "archive"))
        found = bundle.predict_column(pq.read_table(path)["text"])
        for name in ("label", "review", "num_tokens", "truncated", "error"):
            assert found[name].to_pylist() == expected[name].to_pylist()
        assert found["score"].to_pylist() == [
            None if one is None else pytest.approx(one, abs=1e-5) for one in expected["score"].to_pylist()
        ]


@pytest.mark.parametrize(
    ("kind", "name", "value"), [("", "accuracy", 0.9166666666666666), ("multi_", "f1_micro", 0.5882352941176471)]
)
def test_an_old_bundle_is_as_good_on_an_old_data_set(kind: str, name: str, value: float, tmp_path: Path) -> None:
    data = OLD / f"{kind}dataset"
    config = EvaluateConfig(
        bundle=str(OLD / f"{kind}bundle"), data=str(data), output=str(tmp_path / "out"), precision="fp32"
    )
    found = evaluate(config).metrics
    assert found[name] == pytest.approx(value)
    assert found["same_data_as_training"]
    assert Dataset.open(str(data)).labels == ("car", "fruit", "sea")
