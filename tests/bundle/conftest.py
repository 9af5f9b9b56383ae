"""What tests of several engines share: bundles with a data set that says what they lose."""

import json
import shutil
from pathlib import Path

import pytest

from bertray import Bundle
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare

TEXTS = [f"{word} text {'with more words ' * (row % 7)}number {row}" for row in range(60) for word in ("a", "some")]


def copied(bundle: Path, folder: Path, data: str) -> str:
    """The bundle, as if it had been trained on another data set."""
    shutil.copytree(bundle, folder)
    file = folder / "bundle.json"
    info = json.loads(file.read_text())
    info["training"]["data"] = data
    info["data_fingerprint"] = Dataset.open(data).fingerprint()
    file.write_text(json.dumps(info))
    return str(folder)


def dataset(folder: Path, bundle: Path, *, right: bool) -> str:
    """A data set whose validation labels are the bundle's answers in fp32, so that int8 can only lose, or never are."""
    answers = [one.label or "" for one in Bundle.load(str(bundle), "fp32", "cpu").predict(TEXTS)]
    labels = answers if right else [{"a": "b", "b": "c", "c": "a"}[answer] for answer in answers]
    folder.mkdir()
    validation = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    train = [{"text": f"training {text}", "label": "abc"[row % 3]} for row, text in enumerate(TEXTS)]
    for name, rows in (("train", train), ("validation", validation)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PrepareConfig(
        input=[str(folder / "train.jsonl")], validation=str(folder / "validation.jsonl"), output=str(folder / "data")
    )
    prepare(config)
    return str(folder / "data")


@pytest.fixture(scope="module")
def never_right_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny bundle with a data set on which it is never right in fp32, so that no other precision loses anything."""
    folder = tmp_path_factory.mktemp("never-right")
    return copied(tiny_bundle, folder / "bundle", dataset(folder / "labelled", tiny_bundle, right=False))
