"""A node on which the model fails on any text, beside two that are well."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bertray import ScoreConfig, score
from tests.conftest import ROOT, write_shard


@pytest.fixture
def sick_node(ray_nodes: Any) -> Iterator[Any]:
    faults = os.pathsep.join([str(ROOT / "tests" / "faults"), os.environ.get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": faults, "BERTRAY_SICK": "breaking"}
    node = ray_nodes.add_node(num_cpus=4, object_store_memory=150_000_000, env_vars=variables)
    yield node
    ray_nodes.remove_node(node)


def test_what_fails_on_a_sick_node_is_scored_elsewhere(sick_node: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    for number in range(40):
        write_shard(tmp_path / "archive" / f"{number:02d}.parquet", [f"text {number} {row}" for row in range(200)])
    config = ScoreConfig(
        bundle=str(tiny_bundle),
        input=str(tmp_path / "archive"),
        output=str(tmp_path / "scored"),
        num_actors=3,
        precision="fp32",
    )
    scored = score(config)
    assert (scored.failures, scored.summary["num_shards_committed"]) == ([], 40)
    (at_fault,) = scored.summary["sick_nodes"]
    assert at_fault["last"] == "the model does not run here: ValueError: broken"
    assert at_fault["num_failures"] <= 9  # 3 a start of an actor, and 3 starts
    for shard in (tmp_path / "archive").iterdir():
        predictions = pq.read_table(tmp_path / "scored" / "predictions" / shard.name)
        assert predictions["error"].null_count == len(predictions) == 200
