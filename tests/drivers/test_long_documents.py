"""Texts longer than the window, through the jobs: their beginnings are alike, only their ends tell the label."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bertray.bundle.info import read_info
from bertray.storage.location import Location
from jobs import evaluate, prepare, score, train
from tests.conftest import write_shard
from tests.drivers.conftest import WORDS

OPTIONS = [
    "--max-length=12",
    "--epochs=3",
    "--learning-rate=3e-3",
    "--batch-size=16",
    "--precision=fp32",
    "--device=cpu",
]


def text_of(label: str, number: int) -> str:
    """The last words tell the label; what truncation to 12 tokens leaves is the same for all labels."""
    return "and so it goes on and on " * (1 + number % 4) + f"{number} " + WORDS[label]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    rows = [{"text": text_of(label, number), "label": label} for number in range(45) for label in WORDS]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert prepare.main(["--input", str(folder / "in.jsonl"), "--output", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture(scope="module")
def arguments(dataset: Path, calm_encoder: str) -> list[str]:
    return ["--data", str(dataset), "--encoder", calm_encoder, "--num-workers", "0", *OPTIONS]


@pytest.fixture(scope="module")
def bundle(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on windows that overlap by the default: a quarter of 12."""
    output = tmp_path_factory.mktemp("trained") / "bundle"
    assert train.main([*arguments, "--output", str(output), "--long-documents", "max"]) == 0
    return output


def history(bundle: Path) -> list[dict[str, float]]:
    return read_info(Location.of(str(bundle))).history


def test_windows_reach_what_truncation_leaves_out(bundle: Path) -> None:
    assert max(epoch["accuracy"] for epoch in history(bundle)) > 0.9  # truncated: a third


def test_the_bundle_keeps_the_policy(bundle: Path) -> None:
    info = read_info(Location.of(str(bundle)))
    assert (info.long_documents, info.stride, info.max_length) == ("max", 3, 12)
    assert info.training["long_documents"] == "max"


@pytest.mark.services
def test_evaluate_and_score_obey_the_bundle(
    bundle: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--bundle", str(bundle), "--precision", "fp32"]
    output = str(tmp_path / "evaluation")
    assert evaluate.main([*common, "--data", str(dataset), "--split", "validation", "--output", output]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    best = max(history(bundle), key=lambda epoch: epoch["f1_macro"])
    assert summary["accuracy"] == pytest.approx(best["accuracy"])
    rows = pq.read_table(tmp_path / "evaluation" / "predictions.parquet")
    assert max(rows["num_tokens"].to_pylist()) > 40
    assert not any(rows["truncated"].to_pylist())

    texts = [text_of("car", 3), None, text_of("sea", 2), "wave shore tide fish", text_of("fruit", 0)]
    write_shard(tmp_path / "archive" / "a.parquet", texts)
    folders = ["--input", str(tmp_path / "archive"), "--output", str(tmp_path / "scored")]
    assert score.main([*common, *folders, "--num-actors", "0"]) == 0
    scored = pq.read_table(tmp_path / "scored" / "predictions" / "a.parquet")
    assert scored["label"].to_pylist() == ["car", None, "sea", "sea", "fruit"]
    assert scored["truncated"].to_pylist() == [False] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--long-documents mean --stride 10",
            r"--stride 10: a window of --max-length 12 holds 10 tokens .* --stride 3",
        ),
        ("--stride 4", r"stride 4 has no meaning with long_documents truncate: leave it out, or use mean or max"),
        ("--long-documents mean --stride -1", r"--stride: '-1' is not allowed\. .* greater than or equal to 0"),
        ("--long-documents middle", r"--long-documents: 'middle' is not allowed\. .*'truncate', 'mean' or 'max'"),
    ],
)
def test_a_wrong_policy_is_refused_before_training(
    dataset: Path, calm_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    arguments = ["--data", str(dataset), "--encoder", calm_encoder, *OPTIONS, "--output", str(tmp_path / "bundle")]
    assert train.main([*arguments, *options.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "fine-tuning" not in error
