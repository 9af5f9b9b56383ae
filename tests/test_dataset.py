"""jobs.prepare from files to a data set: splits, leaks, labels, counts, refusals."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.config import PrepareConfig
from bertray.dataset import Dataset, prepare, sort_labels
from bertray.errors import RequestError
from bertray.schema import DATASET_SCHEMA
from tests.conftest import SHARED_DATA, needs_shared_data

Rows = list[tuple[str | None, str | None]]


def many(num_rows: int, prefix: str = "text") -> Rows:
    return [(f"{prefix} {row}", "ab"[row % 2]) for row in range(num_rows)]


def write(path: Path, rows: Rows, **columns: list[Any]) -> str:
    pq.write_table(pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows], **columns}), path)
    return str(path)


def run(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Dataset]:
    output = str(tmp_path / "dataset")
    report = prepare(PrepareConfig(output=output, **options))
    return report, Dataset.open(output)


def texts(dataset: Dataset, split: str) -> set[str]:
    return set(dataset.split(split)["text"].to_pylist())


def test_one_file_becomes_three_splits(tmp_path: Path) -> None:
    rows = [*many(100), (None, "a"), ("text 0", "a")]
    report, dataset = run(tmp_path, input=write(tmp_path / "in.parquet", rows))
    assert report["splits"] == {"train": 80, "validation": 10, "test": 10}
    assert report["num_rows_out"] == {"duplicate": 1, "text_missing": 1}
    assert report["num_rows_in"] == 102 == report["num_rows_kept"] + sum(report["num_rows_out"].values())
    assert dataset.labels == ("a", "b")
    everything = [texts(dataset, split) for split in ("train", "validation", "test")]
    assert len(set.union(*everything)) == 100
    for split in ("train", "validation", "test"):
        table = dataset.split(split)
        assert table.schema.equals(DATASET_SCHEMA)
        assert dataset.num_rows(split) == table.num_rows
        for row in table.to_pylist():
            assert row["label"] == dataset.labels[row["label_id"]]
            assert rows[row["source_row"]] == (row["text"], row["label"])
    assert json.loads((tmp_path / "dataset" / "report.json").read_text()) == report


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", many(200))
    fingerprints = []
    for seed in (0, 0, 1):
        _, dataset = run(tmp_path, input=source, seed=seed)
        fingerprints.append(dataset.fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_leaks_leave_the_training_side(tmp_path: Path) -> None:
    report, dataset = run(
        tmp_path,
        input=write(tmp_path / "train.parquet", [*many(50), ("shared", "a"), (" both", "a")]),
        validation=write(tmp_path / "dev.parquet", [*many(10, "dev"), ("shared", "b"), ("both ", "b")]),
        test=write(tmp_path / "test.parquet", [*many(10, "test"), ("both", "a")]),
    )
    assert report["sources"]["input"]["num_rows_out"] == {"text_in_test": 1, "text_in_validation": 1}
    assert report["sources"]["validation"]["num_rows_out"] == {"text_in_test": 1}
    assert "both" in texts(dataset, "test")
    assert "shared" in texts(dataset, "validation")
    assert not {"shared", " both"} & texts(dataset, "train")
    for counts in report["sources"].values():
        assert counts["num_rows_in"] == counts["num_rows_kept"] + sum(counts["num_rows_out"].values())


def test_a_given_test_split_leaves_validation_to_be_held_out(tmp_path: Path) -> None:
    report, _ = run(
        tmp_path,
        input=write(tmp_path / "train.parquet", many(100)),
        test=write(tmp_path / "test.parquet", many(30, "test")),
        validation_fraction=0.2,
    )
    assert report["splits"] == {"train": 80, "validation": 20, "test": 30}


def test_groups_stay_on_one_side_of_given_and_made_splits(tmp_path: Path) -> None:
    groups = [f"g{row // 4}" for row in range(200)]
    source = write(tmp_path / "train.parquet", many(200), author=groups)
    test = write(tmp_path / "test.parquet", many(20, "test"), author=["g0"] * 20)
    report, dataset = run(tmp_path, input=source, test=test, group_column="author")
    assert report["sources"]["input"]["num_rows_out"] == {"group_in_test": 4}
    group_of = {f"text {row}": group for row, group in enumerate(groups)}
    sides = [{group_of[text] for text in texts(dataset, split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert "g0" not in sides[0] | sides[1]


def test_unseen_labels_are_listed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the test split has labels .*: 'B' \(2 rows\), 'z' \(1 rows\).*'a', 'b'"):
        run(
            tmp_path,
            input=write(tmp_path / "train.parquet", many(50)),
            test=write(tmp_path / "test.parquet", [("1", "z"), ("2", "B"), ("3", "B"), ("4", "a")]),
        )
    assert not (tmp_path / "dataset").exists()


def test_a_rare_class_is_reported_and_trained_on(tmp_path: Path) -> None:
    report, dataset = run(tmp_path, input=write(tmp_path / "in.parquet", [*many(100), ("alone", "rare")]))
    assert report["labels"]["rare"] == {"train": 1, "validation": 0, "test": 0}
    assert any("rare" in warning for warning in report["warnings"])
    assert dataset.labels == ("a", "b", "rare")


def test_one_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"1 distinct labels \(\['a'\]\); a classifier needs two"):
        run(tmp_path, input=write(tmp_path / "in.parquet", [(str(row), "a") for row in range(50)]))


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    source = write(tmp_path / "raw" / "train.parquet", many(50))
    with pytest.raises(RequestError, match=r"--output .*raw holds .*train\.parquet, which is read"):
        prepare(PrepareConfig(input=[source], output=str(tmp_path / "raw")))
    assert pq.ParquetFile(source).metadata.num_rows == 50


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no row is left for the test split"):
        run(
            tmp_path,
            input=write(tmp_path / "train.parquet", many(50)),
            test=write(tmp_path / "test.parquet", [(" ", "a")]),
        )


def test_labels_sort_as_people_expect() -> None:
    assert sort_labels(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sort_labels(["10", "9", "-"]) == ["-", "10", "9"]
    assert sort_labels(["b", "B", "a"]) == ["B", "a", "b"]


def test_an_unfinished_folder_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no finished data set: it has no report\.json.*jobs\.prepare"):
        Dataset.open(str(tmp_path))


@needs_shared_data
def test_the_leak_in_csabstruct_is_found(tmp_path: Path) -> None:
    folder = SHARED_DATA / "csabstruct"
    report, dataset = run(
        tmp_path,
        input=str(folder / "train.parquet"),
        validation=str(folder / "dev.parquet"),
        test=str(folder / "test.parquet"),
    )
    # 172 distinct test texts stand in train, some of them more than once and in validation too.
    assert report["sources"]["input"]["num_rows_out"]["text_in_test"] >= 160
    assert not texts(dataset, "train") & texts(dataset, "test")
    assert report["num_rows_in"] == 11333 + 2026 + 1349
