"""--probabilities: a column with the probability of every label, or with the likeliest labels and theirs."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bertray import Bundle, RequestError, ScoreConfig, score
from bertray.bundle.info import read_info
from bertray.cli import load_config
from bertray.scoring.manifest import fingerprint
from bertray.scoring.refusals import bundle_for
from bertray.scoring.score_shard import merge_parts, score_shard
from bertray.storage.location import Location
from tests.conftest import write_shard

TEXTS = ["Python, SQL", None, "B.Sc. in Physics, 2014", "", "jane@example.org"]
REQUEST = {"bundle": "b", "input": "i", "output": "o"}


def scored(
    bundle_folder: Path, probabilities: str | None, folder: Path, num_parts: int = 1
) -> tuple[Bundle, pq.ParquetFile]:
    """The bundle, and a predictions file of `TEXTS`, maybe merged from parts."""
    bundle = Bundle.load(str(bundle_folder), "fp32", "cpu")
    bundle.probabilities = probabilities
    shard = write_shard(folder / "archive" / "0.parquet", TEXTS)
    place = Location.of(str(folder))
    parts = [place / f"{part}.parquet" for part in range(num_parts)]
    for number, part in enumerate(parts):
        of = (number, num_parts)
        score_shard(bundle, Location.of(str(shard)), part, "text", [], part=of, origin={"bertray.shard": "0.parquet"})
    if num_parts > 1:
        merge_parts(parts, place / "merged.parquet", len(TEXTS), origin={"bertray.shard": "0.parquet"})
    return bundle, pq.ParquetFile(folder / ("0.parquet" if num_parts == 1 else "merged.parquet"))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_all_are_in_the_order_that_the_file_names(num_parts: int, tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, file = scored(tiny_bundle, "all", tmp_path, num_parts)
    facts = file.metadata.metadata
    assert tuple(json.loads(facts[b"bertray.labels"])) == bundle.labels
    assert facts[b"bertray.shard"] == b"0.parquet" and b"bertray.counts" in facts
    table = file.read()
    assert table.column_names[-1] == "probabilities"
    assert [one.label for one in bundle.predict(TEXTS)] == table["label"].to_pylist()
    expected_NC = bundle.predict_proba(TEXTS)
    for row, expected_C in zip(table.to_pylist(), expected_NC, strict=True):
        if row["error"]:
            assert row["probabilities"] is None
        else:
            assert row["probabilities"] == pytest.approx(expected_C.tolist(), abs=1e-6)
            assert bundle.labels[int(np.argmax(row["probabilities"]))] == row["label"]
    assert sum(row is None for row in table["probabilities"].to_pylist()) == 2


@pytest.mark.parametrize(("how", "num_listed"), [("top:1", 1), ("top:2", 2), ("top:9", 3)])
def test_the_likeliest_labels_with_their_scores(how: str, num_listed: int, tiny_bundle: Path, tmp_path: Path) -> None:
    _, file = scored(tiny_bundle, how, tmp_path)
    for row in file.read().to_pylist():
        if row["error"]:
            assert row["top_labels"] is None
            continue
        listed = row["top_labels"]
        assert listed[0] == {"label": row["label"], "score": row["score"]}
        scores = [one["score"] for one in listed]
        assert len(listed) == num_listed and scores == sorted(scores, reverse=True)
        assert len({one["label"] for one in listed}) == num_listed


def test_without_the_option_nothing_is_other(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, file = scored(tiny_bundle, None, tmp_path)
    assert file.schema_arrow.names == ["row", *bundle.schema.names]
    assert b"bertray.labels" not in file.metadata.metadata
    info = read_info(Location.of(str(tiny_bundle)))
    plain, others = (
        ScoreConfig(**REQUEST),
        [ScoreConfig(**REQUEST, probabilities=how) for how in ("all", "top:2", "top:3")],
    )
    assert len({fingerprint(info, one) for one in (plain, *others)}) == 4


@pytest.mark.parametrize("how", ["top", "top:0", "top:-1", "top:1.5", "All", "3", "", "all "])
def test_another_wish_is_refused(how: str) -> None:
    words = [word for name, value in REQUEST.items() for word in (f"--{name}", value)]
    with pytest.raises(RequestError, match=r"--probabilities: .* is not allowed.*all\|top:"):
        load_config("score", ScoreConfig, [*words, "--probabilities", how])


def test_a_column_is_kept_once() -> None:
    with pytest.raises(RequestError, match="--keep-columns x,x names a column twice"):
        bundle_for(ScoreConfig(**REQUEST, keep_columns=["x", "x"]))


def test_a_kept_column_may_have_the_name_only_without_the_option(tiny_bundle: Path) -> None:
    config = ScoreConfig(**{**REQUEST, "bundle": str(tiny_bundle)}, keep_columns=["probabilities", "top_labels"])
    assert bundle_for(config)
    for kept, option in (("top_labels", "top:3"), ("probabilities", "all"), ("label", None), ("labels", None)):
        update = {"keep_columns": ["document_id", kept], "probabilities": option}
        with pytest.raises(RequestError, match=f"--keep-columns {kept}: predictions have a column of this name; res"):
            bundle_for(config.model_copy(update=update))


@pytest.mark.services
def test_a_run_and_the_next_one_without_the_option(tiny_bundle: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "archive" / "0.parquet", TEXTS)
    folders = {"bundle": str(tiny_bundle), "input": str(tmp_path / "archive"), "output": str(tmp_path / "scored")}
    config = ScoreConfig(**folders, num_actors=0, precision="fp32", probabilities="top:2", accept=True)
    assert score(config).summary["num_rows_error"] == 2
    file = pq.ParquetFile(tmp_path / "scored" / "predictions" / "0.parquet")
    assert json.loads(file.metadata.metadata[b"bertray.labels"]) == ["a", "b", "c"]
    assert [one and len(one) for one in file.read()["top_labels"].to_pylist()] == [2, None, 2, None, 2]
    with pytest.raises(RequestError, match=r"probabilities: 'top:2' -> None: .* or say --rescore"):
        score(config.model_copy(update={"probabilities": None}))
