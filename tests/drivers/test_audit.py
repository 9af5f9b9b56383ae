"""jobs.audit on a two-node cluster: planted label errors are found, whatever happens to workers."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from bertray.data.config import PrepareConfig
from bertray.data.prepare import prepare
from bertray.drivers import cluster
from bertray.drivers.audit import AuditResult, _warnings, audit
from bertray.drivers.cross_validation import _result
from bertray.errors import BertrayError, LockedError, RequestError
from bertray.schema import suspect_schema
from bertray.storage.location import Location
from bertray.storage.lock import RunLock
from bertray.training.config import AuditConfig
from tests.conftest import WHAT_A_DIVERGING_WORKER_LOGS, run_job_process
from tests.drivers.conftest import WORDS
from tests.kills import killing, titled

NUM_ROWS = 180
# Rows of training whose label is another than their word says.
WRONG_ROWS = {7: "sea", 40: "car", 71: "fruit", 110: "car", 150: "sea"}
OPTIONS: dict[str, Any] = {
    "folds": 3,
    "epochs": 8,
    "learning_rate": 3e-3,
    "batch_size": 16,
    "max_length": 32,
    "precision": "fp32",
}


def true_label(row: int) -> str:
    return sorted(WORDS)[row % 3]


def write_labelled(path: Path, num_rows: int, wrong: dict[int, str]) -> str:
    rows = []
    for row in range(num_rows):
        word = WORDS[true_label(row)].split()[row // 3 % 4]
        text = f"the {word} of {path.stem} {row} " + "and so on " * (row % 6)
        rows.append({"text": text, "label": wrong.get(row, true_label(row))})
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three labels that a word tells apart, but in five training rows."""
    assert all(label != true_label(row) for row, label in WRONG_ROWS.items())
    folder = tmp_path_factory.mktemp("dataset")
    splits = {name: write_labelled(folder / f"{name}.jsonl", 12, {}) for name in ("validation", "test")}
    rows = write_labelled(folder / "train.jsonl", NUM_ROWS, WRONG_ROWS)
    prepare(PrepareConfig(input=[rows], output=str(folder / "data"), **splits))
    return str(folder / "data")


def run(dataset: str, output: Path | str, encoder: Path, **options: Any) -> AuditResult:
    return audit(AuditConfig(data=dataset, output=str(output), encoder=str(encoder), **{**OPTIONS, **options}))


@pytest.fixture(scope="module")
def audited(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AuditResult, Path]:
    output = tmp_path_factory.mktemp("audited") / "label_check"
    return run(dataset, output, tiny_encoder), output


def test_planted_errors_are_the_worst_rows(audited: tuple[AuditResult, Path]) -> None:
    worst = audited[0].suspects.slice(0, len(WRONG_ROWS)).to_pylist()
    assert {row["source_row"]: row["label"] for row in worst} == WRONG_ROWS
    for row in worst:
        assert row["suggested_label"] == true_label(row["source_row"])
        assert row["given_probability"] < 0.5 < row["suggested_probability"]
        assert f"of train {row['source_row']} " in row["text"]
        assert Path(row["source"]).name == "train.jsonl"


def test_what_is_written(audited: tuple[AuditResult, Path], dataset: str) -> None:
    found, output = audited
    written = pq.ParquetFile(output / "suspects.parquet").read()
    assert written.schema.equals(suspect_schema("single_label_classification"))
    assert written.equals(found.suspects)
    training = pq.ParquetFile(Path(dataset) / "train.parquet").read()
    assert training.take(written["row"])["text"].to_pylist() == written["text"].to_pylist()
    report = json.loads((output / "label_quality.json").read_text())
    assert report == found.report
    assert report["num_rows"] == sum(report["num_rows_by_fold"]) == NUM_ROWS
    assert report["num_suspects"] == written.num_rows == sum(one["num_suspects"] for one in report["labels"].values())
    assert 0 < report["noise"] < 0.1
    assert report["out_of_fold"]["accuracy"] > 0.9
    assert report["config"]["folds"] == 3
    assert report["versions"]["cleanlab"]
    assert len(found.quality_N) == NUM_ROWS


def test_models_that_have_learnt_too_little_are_told_of(audited: tuple[AuditResult, Path]) -> None:
    assert audited[0].report["warnings"] == []
    (warning,) = _warnings({"accuracy": 0.24, "f1_macro": 0.2})
    assert "accuracy on rows that they have not seen is 0.24" in warning and "--epochs" in warning
    assert len(_warnings({"f1_micro": 0.3, "f1_macro": 0.9})) == 1


@pytest.mark.chaos
def test_the_same_seed_gives_the_same_after_a_worker_was_killed(
    audited: tuple[AuditResult, Path], dataset: str, tiny_encoder: Path, tmp_path: Path
) -> None:
    # Half a second after a fold has begun it is in the middle of something.
    began_s: list[float] = []

    def is_at_work() -> bool:
        if titled("ray::_judge") and not began_s:
            began_s.append(time.monotonic())
        return bool(began_s) and time.monotonic() > began_s[0] + 0.5

    with killing("ray::_judge", is_at_work, limit=1) as killed:
        found = run(dataset, tmp_path / "label_check", tiny_encoder)
    assert len(killed) == 1
    assert found.quality_N.tolist() == audited[0].quality_N.tolist()
    assert found.suspects.equals(audited[0].suspects)


@pytest.mark.chaos
def test_windows_from_the_command_line_to_s3(
    ray_cluster: str, dataset: str, tiny_encoder: Path, s3_folder: str
) -> None:
    output = f"{s3_folder}/label_check"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in (OPTIONS | {"max_length": 16}).items()]
    finished = run_job_process(
        "audit", "--data", dataset, "--output", output, "--encoder", tiny_encoder, "--long-documents=mean", *options
    )
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout.splitlines()[-1])
    with (Location.of(output) / "suspects.parquet").open() as file:
        suspects = pq.ParquetFile(file).read()
    assert summary["num_suspects"] == suspects.num_rows
    assert len(set(WRONG_ROWS) & set(suspects["source_row"].to_pylist())) >= 3  # windows see less of a text
    assert "the most suspect rows" in finished.stderr
    assert f"{summary['num_suspects']} of {NUM_ROWS} rows are suspect" in finished.stderr
    assert json.loads((Location.of(output) / "label_quality.json").read_bytes())["noise"] == summary["noise"]


def test_labels_of_too_few_texts_are_refused(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"--folds 90 needs 90 different texts .* 'car' \(\d+\).*Lower --folds to"):
        run(dataset, tmp_path / "label_check", tiny_encoder, folds=90)
    assert not (tmp_path / "label_check").exists()


def test_the_output_is_not_the_data_set(dataset: str, tiny_encoder: Path) -> None:
    with pytest.raises(RequestError, match="choose a folder of its own"):
        run(dataset, Path(dataset).parent, tiny_encoder)


def test_a_data_set_that_is_written_anew_meanwhile_is_not_reported_on(
    ray_cluster: str, dataset: str, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))

    def while_folds_are_trained(*_: Any) -> np.ndarray:
        shutil.copy(data / "test.parquet", data / "train.parquet")
        return np.zeros((NUM_ROWS, 3), dtype=np.float32)

    monkeypatch.setattr("bertray.drivers.cross_validation.out_of_fold_logits", while_folds_are_trained)
    with pytest.raises(RequestError, match="was changed while its labels were judged"):
        run(str(data), tmp_path / "label_check", tiny_encoder)
    assert not (tmp_path / "label_check" / "suspects.parquet").exists()


def test_two_audits_do_not_share_an_output(dataset: str, tiny_encoder: Path, tmp_path: Path) -> None:
    with RunLock(Location.of(str(tmp_path)), "another").held(), pytest.raises(LockedError, match="run another holds"):
        run(dataset, tmp_path, tiny_encoder)


@pytest.mark.chaos  # the loop's own message: test_train_here
def test_a_diverging_fold_says_which_rows(
    ray_cluster: str, dataset: str, diverging_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "bertray")
    with pytest.raises(BertrayError, match=r"the loss is nan at epoch 1, step 1: .*row \d+ of .*train\.jsonl, "):
        run(dataset, tmp_path / "label_check", Path(diverging_encoder))
    assert not (tmp_path / "label_check" / "label_quality.json").exists()
    assert WHAT_A_DIVERGING_WORKER_LOGS in caplog.text


@pytest.mark.parametrize("error", cluster.LOST_ERRORS)
def test_a_fold_that_is_lost_too_often(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def get(_: object) -> None:
        raise error("its process died")

    monkeypatch.setattr(
        "bertray.drivers.cross_validation.ray.get", get
    )  # Ray kills for want of memory, and loses nodes
    with pytest.raises(BertrayError, match=r"fold 2 was lost 4 times, .* Is there enough memory\?"):
        _result(None, 1, 3)


@pytest.mark.chaos  # half a minute; how several labels are judged: metrics/test_label_issues
def test_rows_with_several_labels(ray_cluster: str, calm_encoder: str, tmp_path: Path) -> None:
    wrong = {10: [], 61: ["car", "fruit", "sea"], 100: ["car"]}
    rows = []
    for row in range(NUM_ROWS):
        labels = [label for number, label in enumerate(sorted(WORDS)) if row // 2**number % 2]
        words = [WORDS[label].split()[row // 8 % 4] for label in labels]
        rows.append({"text": f"the {' and the '.join(words)} of day {row}", "label": wrong.get(row, labels)})
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare(PrepareConfig(input=[str(tmp_path / "in.jsonl")], output=str(tmp_path / "data"), multi_label=True))
    found = run(str(tmp_path / "data"), tmp_path / "label_check", Path(calm_encoder), epochs=20)
    assert found.report["out_of_fold"]["f1_macro"] > 0.8
    assert found.suspects.schema.equals(suspect_schema("multi_label_classification"))
    training = pq.ParquetFile(tmp_path / "data" / "train.parquet").read()["source_row"].to_pylist()
    assert set(wrong) & set(training) <= set(found.suspects["source_row"].to_pylist())
    for row in found.suspects.to_pylist():
        assert row["labels"] != row["suggested_labels"]
        assert row["given_probability"] < row["suggested_probability"]
    counted = sum(facts["num_suspects"] + facts["num_missing"] for facts in found.report["labels"].values())
    differing = sum(len({*row["labels"]} ^ {*row["suggested_labels"]}) for row in found.suspects.to_pylist())
    assert counted == differing
