"""jobs.prepare from files to a data set: splits, leaks, labels, counts, refusals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare, sort_labels
from bertray.errors import RequestError
from bertray.schema import DATASET_SCHEMA, MULTI_LABEL_SCHEMA, NO_CLASS
from tests.conftest import SHARED_DATA, needs_shared_data

Rows = list[tuple[str | None, str | None]]


def many(num_rows: int, prefix: str = "text") -> Rows:
    return [(f"{prefix} {row}", "ab"[row % 2]) for row in range(num_rows)]


def write(path: Path, rows: Rows, **columns: list[Any]) -> str:
    pq.write_table(pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows], **columns}), path)
    return str(path)


def run(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], Dataset]:
    output = str(tmp_path / "dataset")
    report = prepare(PrepareConfig(output=output, **options)).report
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
    assert (dataset.problem_type, dataset.oos_label) == ("single_label_classification", None)
    everything = [texts(dataset, split) for split in ("train", "validation", "test")]
    assert len(set.union(*everything)) == 100
    for split in ("train", "validation", "test"):
        table = dataset.split(split)
        assert table.schema.equals(DATASET_SCHEMA)
        assert dataset.num_rows(split) == table.num_rows
        for row in table.to_pylist():
            assert row["label"] == dataset.labels[row["label_id"]]
            assert rows[row["source_row"]] == (row["text"], row["label"])
        targets_N = dataset.targets(table)
        assert targets_N.dtype == np.int64
        assert targets_N.tolist() == table["label_id"].to_pylist()
        assert dataset.in_scope(table).equals(table)
    assert json.loads((tmp_path / "dataset" / "report.json").read_text()) == report


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", many(200))
    fingerprints = []
    for seed in (0, 0, 1):
        _, dataset = run(tmp_path, input=source, seed=seed, overwrite=True)
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


@pytest.mark.parametrize("multi_label", [False, True])
def test_many_classes_of_three_texts_are_counted_in_one_warning(tmp_path: Path, multi_label: bool) -> None:
    rows: Rows = [(f"text {row}", f"c{row % 300:03}") for row in range(900)]
    report, _ = run(tmp_path, input=write(tmp_path / "in.parquet", rows), multi_label=multi_label)
    assert report["splits"] == {"train": 720, "validation": 90, "test": 90}
    assert all(counts["train"] for counts in report["labels"].values())
    [warning] = report["warnings"]
    assert warning.startswith("of the 300 classes validation lacks 210 and test lacks 210: ")
    assert warning.count("'c") == 5


def test_one_label_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"1 distinct labels \(\['a'\]\); a classifier needs two"):
        run(tmp_path, input=write(tmp_path / "in.parquet", [(str(row), "a") for row in range(50)]))


def test_a_data_set_is_replaced_only_if_asked(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", many(50))
    _, dataset = run(tmp_path, input=source)
    other = write(tmp_path / "other.parquet", many(80))
    for left in ("report.json", "train.parquet"):  # the second as if an earlier run had died while it wrote
        with pytest.raises(RequestError, match=rf"--output .*dataset has a {left}: choose .* with --overwrite"):
            run(tmp_path, input=other)
        assert dataset.num_rows("train") == 40
        (tmp_path / "dataset" / "report.json").unlink(missing_ok=True)
    report, _ = run(tmp_path, input=other, overwrite=True)
    assert report["splits"]["train"] == 64
    with pytest.raises(RequestError, match=r"--output .*in\.parquet is a file: give a folder"):
        prepare(PrepareConfig(input=[other], output=source))


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    source = write(tmp_path / "raw" / "train.parquet", many(50))
    with pytest.raises(RequestError, match=r"--output .*raw holds .*train\.parquet, which is read"):
        prepare(PrepareConfig(input=[source], output=str(tmp_path / "raw")))
    assert pq.ParquetFile(source).metadata.num_rows == 50


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text,label\n")
    with pytest.raises(RequestError, match=r"--input .*in\.csv has no rows"):
        run(tmp_path, input=str(tmp_path / "in.csv"))


def test_a_split_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none of the 1 rows of --test .* can be used: 1 text_empty\. Are"):
        run(
            tmp_path,
            input=write(tmp_path / "train.parquet", many(50)),
            test=write(tmp_path / "test.parquet", [(" ", "a")]),
        )


def test_labels_sort_as_people_expect() -> None:
    assert sort_labels(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert sort_labels(["10", "9", "-"]) == ["-", "10", "9"]
    assert sort_labels(["9" * 5000, "10"]) == ["10", "9" * 5000]
    assert sort_labels(["b", "B", "a"]) == ["B", "a", "b"]


def test_an_unfinished_folder_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no finished data set: it has no report\.json.*bertray prepare"):
        Dataset.open(str(tmp_path))


def test_a_labelled_file_is_no_data_set_yet(tmp_path: Path) -> None:
    (tmp_path / "labelled.csv").write_text("text,label\n")
    with pytest.raises(RequestError, match=r"is a file, .* bertray prepare --input .*labelled\.csv --output DATASET$"):
        Dataset.open(str(tmp_path / "labelled.csv"))


def write_lists(path: Path, rows: list[tuple[str, list[str] | None]], **columns: list[Any]) -> str:
    labels = pa.array([row[1] for row in rows], pa.list_(pa.string()))
    pq.write_table(pa.table({"text": [row[0] for row in rows], "label": labels, **columns}), path)
    return str(path)


def many_lists(num_rows: int, prefix: str = "text") -> list[tuple[str, list[str] | None]]:
    sets: list[list[str]] = [["10"], ["9"], ["10", "9"], ["x10", "9", "10"], []]
    return [(f"{prefix} {row}", sets[row % 5]) for row in range(num_rows)]


def test_rows_of_several_labels_become_three_splits(tmp_path: Path) -> None:
    rows = [*many_lists(100), ("text 2", ["9", " 10 ", "10"]), ("nothing", None), ("blank", [" "])]
    report, dataset = run(tmp_path, input=write_lists(tmp_path / "in.parquet", rows), multi_label=True)
    assert report["num_rows_out"] == {"duplicate": 1, "label_missing": 2}
    assert sum(report["splits"].values()) == report["num_rows_kept"] == 100
    wanted = {"10": 60, "9": 60, "x10": 20} | {"0": 20, "1": 40, "2": 20, "3+": 20}
    assert list(report["labels"] | report["num_rows_by_labels"]) == list(wanted)
    for name, counts in (report["labels"] | report["num_rows_by_labels"]).items():
        assert sum(counts.values()) == wanted[name]
        for split in ("validation", "test"):
            assert abs(counts[split] - wanted[name] / 10) <= 2
    assert (dataset.problem_type, dataset.oos_label) == ("multi_label_classification", None)
    assert dataset.labels == ("10", "9", "x10")
    seen = []
    for split in ("train", "validation", "test"):
        table = dataset.split(split)
        assert table.schema.equals(MULTI_LABEL_SCHEMA)
        targets_NC = dataset.targets(table)
        assert (targets_NC.dtype, targets_NC.shape) == (np.float32, (table.num_rows, 3))
        for row, targets_C in zip(table.to_pylist(), targets_NC, strict=True):
            assert row["label_ids"] == sorted(set(row["label_ids"])) == np.flatnonzero(targets_C).tolist()
            assert row["labels"] == [dataset.labels[label] for label in row["label_ids"]]
            assert set(row["labels"]) == set(rows[row["source_row"]][1] or [])
        assert set(targets_NC.ravel()) == {0.0, 1.0}
        assert dataset.in_scope(table).equals(table)
        seen += table["text"].to_pylist()
    assert sorted(seen) == sorted(f"text {row}" for row in range(100))
    assert json.loads((tmp_path / "dataset" / "report.json").read_text()) == report


def test_labels_that_sort_by_number_stand_in_the_order_of_their_ids(tmp_path: Path) -> None:
    rows = [(f"text {row}", ["10", "9"][: 1 + row % 2]) for row in range(40)]
    _, dataset = run(tmp_path, input=write_lists(tmp_path / "in.parquet", rows), multi_label=True)
    assert dataset.labels == ("9", "10")
    assert ["9", "10"] in dataset.split("train")["labels"].to_pylist()
    assert dataset.targets(dataset.split("train")[:0]).shape == (0, 2)


def test_strings_and_lists_of_the_same_labels_give_the_same_rows(tmp_path: Path) -> None:
    lists = [(f"text {row}", [["a"], ["b", "a"], ["b"]][row % 3]) for row in range(60)]
    strings: Rows = [(text, " | ".join(labels)) for text, labels in lists]
    write_lists(tmp_path / "in.parquet", lists)
    _, dataset = run(tmp_path, input=str(tmp_path / "in.parquet"), multi_label=True)
    fingerprint = dataset.fingerprint()
    write(tmp_path / "in.parquet", strings)  # in the same place, which the rows name
    _, dataset = run(
        tmp_path, input=str(tmp_path / "in.parquet"), multi_label=True, label_separator="|", overwrite=True
    )
    assert dataset.fingerprint() == fingerprint


def test_given_splits_and_groups_of_several_labels(tmp_path: Path) -> None:
    groups = [f"g{row // 5}" for row in range(200)]
    source = write_lists(tmp_path / "in.parquet", many_lists(200), author=groups)
    test = write_lists(tmp_path / "test.parquet", many_lists(20, "test"), author=["g0"] * 20)
    report, dataset = run(tmp_path, input=source, test=test, group_column="author", multi_label=True)
    assert report["num_rows_out"] == {"group_in_test": 5}
    group_of = {f"text {row}": group for row, group in enumerate(groups)}
    sides = [{group_of[text] for text in texts(dataset, split)} for split in ("train", "validation")]
    assert not sides[0] & sides[1]
    assert all(len(side) > 2 for side in sides)


def test_unseen_labels_among_several_are_listed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the test split has labels .*: 'z' \(2 rows\)\. Add") as caught:
        run(
            tmp_path,
            input=write_lists(tmp_path / "in.parquet", many_lists(50)),
            test=write_lists(tmp_path / "test.parquet", [("1", ["z", "10"]), ("2", ["z"]), ("3", ["9"])]),
            multi_label=True,
        )
    assert "--oos-label" not in str(caught.value)  # which is refused with --multi-label
    assert not (tmp_path / "dataset").exists()


def test_lists_of_one_label_each_are_that_label(tmp_path: Path) -> None:
    rows = [(f"text {row}", [["a"], ["b", " b"], ["a", ""]][row % 3]) for row in range(60)]
    report, dataset = run(tmp_path, input=write_lists(tmp_path / "in.parquet", [*rows, ("none", []), ("null", None)]))
    assert dataset.labels == ("a", "b")
    assert report["problem_type"] == "single_label_classification"
    assert report["num_rows_out"] == {"label_missing": 2}


def test_a_row_of_two_labels_is_named_with_the_option(tmp_path: Path) -> None:
    rows = [*(("x", ["a"]) for _ in range(20)), ("none", []), ("two", ["a", "b"])]
    with pytest.raises(RequestError, match=r"row 21 of column 'label' of .* has the labels 'a', 'b': .*--multi-label"):
        run(tmp_path, input=write_lists(tmp_path / "in.parquet", rows))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1.0, 2.0, None, float("nan")]),
        pa.array([1, 2, None, None], pa.int8()),
        pa.array([1, 2, None, None], pa.decimal128(38, 0)),
        pa.array([1, 2, None, None], pa.decimal128(10, 2)),
        pa.array([1.0, 2.0, None, float("nan")], pa.float32()),
        pa.array([[1.0], [2.0], [float("nan")], None]),
        pa.array(["1", "2.00", " ", None]),
        pa.array(["1.0", "+2", "\u200b", None]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_whole_number_is_one_label_however_it_is_written(tmp_path: Path, column: pa.Array) -> None:
    first: Rows = [(f"text {row}", str(row % 2 + 1)) for row in range(60)]
    second = pa.table({"text": ["v", "w", "x", "y"], "label": column})
    pq.write_table(second, tmp_path / "b.parquet")
    report, dataset = run(tmp_path, input=[write(tmp_path / "a.parquet", first), str(tmp_path / "b.parquet")])
    assert dataset.labels == ("1", "2")
    assert report["num_rows_out"] == {"label_missing": 2}
    assert report["num_rows_kept"] == 62
    assert not report["warnings"]


def test_numbers_of_given_splits_groups_and_the_label_out_of_scope_are_spelt_alike(tmp_path: Path) -> None:
    rows: Rows = [(f"text {row}", f"{row % 2}") for row in range(40)]
    others: Rows = [(f"test {row}", f"{row % 3}.0") for row in range(9)]
    report, dataset = run(
        tmp_path,
        input=write(tmp_path / "in.parquet", rows, author=[float(row) for row in range(40)]),
        test=write(tmp_path / "test.parquet", others, author=["0.0"] * 9),
        oos_label="2.00",
        group_column="author",
    )
    assert (dataset.labels, dataset.oos_label, report["num_rows_oos"]["test"]) == (("0", "1"), "2", 3)
    assert report["num_rows_out"] == {"group_in_test": 1}


def test_where_one_label_is_no_number_all_stay_and_are_told_of(tmp_path: Path) -> None:
    rows: Rows = [(f"text {row}", ["1", "1.0", "01", "N/A"][row % 4]) for row in range(80)]
    report, dataset = run(tmp_path, input=write(tmp_path / "in.parquet", rows))
    assert dataset.labels == ("01", "1", "1.0", "N/A")
    assert "'01' (20 rows) and '1' (20 rows) and '1.0' (20 rows). If" in report["warnings"][0]


def test_numbers_that_a_float_cannot_hold_are_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["x", "y"], "label": [2.0**53 + 2, None]})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(
        RequestError, match=r"'label' of .* holds numbers above 2\*\*53 as floats.*as integers or strings"
    ):
        run(tmp_path, input=str(tmp_path / "in.parquet"))


def test_a_column_without_a_value_is_counted_whatever_its_type(tmp_path: Path) -> None:
    empty = pa.table({"text": pa.array([None, float("nan")]), "label": ["a", "b"]})
    pq.write_table(empty, tmp_path / "empty.parquet")
    report, _ = run(tmp_path, input=[write(tmp_path / "in.parquet", many(40)), str(tmp_path / "empty.parquet")])
    assert report["num_rows_out"] == {"text_missing": 2}


def test_labels_that_look_alike_are_one_and_others_are_told_of(tmp_path: Path) -> None:
    forms = [
        "sante\u0301",
        "sant\u00e9\u200b",
        "sant\u00e9",
        "Sant\u00e9.",
        "soci\u00e9t\u00e9\u00a0 civile",
        "soci\u00e9t\u00e9 civile",
    ]
    rows: Rows = [(f"text {row}", forms[row % 6]) for row in range(120)]
    report, dataset = run(tmp_path, input=write(tmp_path / "in.parquet", rows))
    assert dataset.labels == ("Sant\u00e9.", "sant\u00e9", "soci\u00e9t\u00e9 civile")
    [warning] = report["warnings"]
    assert "'Sant\u00e9.' (20 rows) and 'sant\u00e9' (60 rows). If" in warning


def test_out_of_scope_rows_without_a_class_are_kept_in_held_out_splits(tmp_path: Path) -> None:
    outside: Rows = [("is it art", "oos"), ("or is it mud", " oos ")]
    report, dataset = run(
        tmp_path,
        input=write(tmp_path / "train.parquet", many(50)),
        validation=write(tmp_path / "dev.parquet", [*many(10, "dev"), outside[0]]),
        test=write(tmp_path / "test.parquet", [*outside, *many(10, "test")]),
        oos_label=" oos",
    )
    assert dataset.labels == ("a", "b")
    assert dataset.oos_label == "oos"
    assert report["splits"] == {"train": 50, "validation": 10, "test": 12}
    assert report["num_rows_oos"] == {"train": 0, "validation": 0, "test": 2}
    assert report["num_rows_out"] == {"text_in_test": 1}
    assert list(report["labels"]) == ["a", "b"]
    rows = dataset.split("test")
    assert rows.schema.equals(DATASET_SCHEMA)
    assert dataset.targets(rows).tolist() == [NO_CLASS, NO_CLASS, *[0, 1] * 5]
    assert rows["label"].to_pylist()[:2] == ["oos", "oos"]
    assert dataset.in_scope(rows).equals(rows[2:])


def test_an_out_of_scope_label_that_training_has_is_a_class(tmp_path: Path) -> None:
    rows: Rows = [(f"text {row}", ("a", "b", "oos")[row % 3]) for row in range(90)]
    report, dataset = run(tmp_path, input=write(tmp_path / "in.parquet", rows), oos_label="oos")
    assert dataset.labels == ("a", "b", "oos")
    assert dataset.oos_label == "oos"
    assert report["num_rows_oos"] == report["labels"]["oos"] == {"train": 24, "validation": 3, "test": 3}
    assert dataset.in_scope(dataset.split("test")).num_rows == 9


def test_an_out_of_scope_label_of_no_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no row has the label 'OOS' of --oos-label.*training has 'a', 'b'"):
        run(tmp_path, input=write(tmp_path / "in.parquet", many(50)), oos_label="OOS")


def test_other_unseen_labels_are_refused_beside_the_one_out_of_scope(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no training row has: 'z' \(1 rows\)\.") as caught:
        run(
            tmp_path,
            input=write(tmp_path / "train.parquet", many(50)),
            test=write(tmp_path / "test.parquet", [("1", "z"), ("2", "oos"), ("3", "a")]),
            oos_label="oos",
        )
    assert "'oos'" not in str(caught.value)


def test_a_split_of_nothing_but_rows_out_of_scope_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no row of a class is left for the test split"):
        run(
            tmp_path,
            input=write(tmp_path / "train.parquet", many(50)),
            test=write(tmp_path / "test.parquet", [("1", "oos")]),
            oos_label="oos",
        )


def test_a_data_set_made_before_there_was_a_choice_has_one_label_a_row(tmp_path: Path) -> None:
    run(tmp_path, input=write(tmp_path / "in.parquet", many(50)))
    file = tmp_path / "dataset" / "report.json"
    report = json.loads(file.read_text())
    del report["problem_type"], report["oos_label"]
    file.write_text(json.dumps(report))
    dataset = Dataset.open(str(tmp_path / "dataset"))
    assert (dataset.problem_type, dataset.oos_label) == ("single_label_classification", None)


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


@needs_shared_data
def test_emotions_several_of_them_a_row(tmp_path: Path) -> None:
    folder = SHARED_DATA / "goemotions_multilabel"
    report, dataset = run(
        tmp_path,
        input=str(folder / "train.parquet"),
        validation=str(folder / "dev.parquet"),
        test=str(folder / "test.parquet"),
        multi_label=True,
    )
    assert (
        report["num_rows_in"] == 43410 + 5426 + 5427 == report["num_rows_kept"] + sum(report["num_rows_out"].values())
    )
    assert len(dataset.labels) == 28
    for split in ("train", "validation", "test"):
        targets_NC = dataset.targets(dataset.split(split))
        num_rows_of = dict(zip(dataset.labels, targets_NC.sum(axis=0).astype(int).tolist(), strict=True))
        assert num_rows_of == {label: counts[split] for label, counts in report["labels"].items()}
        assert sum(counts[split] for counts in report["num_rows_by_labels"].values()) == len(targets_NC)
    # Texts that stand with two sets of labels: 59 by their exact text, some more when trimmed and in NFC.
    assert report["sources"]["input"]["num_label_conflicts"] >= 59


@needs_shared_data
@pytest.mark.parametrize(("train", "num_rows_oos"), [("train", 0), ("train_with_oos", 100)])
def test_intents_with_a_test_set_that_goes_beyond_them(tmp_path: Path, train: str, num_rows_oos: int) -> None:
    folder = SHARED_DATA / "clinc150"
    report, dataset = run(
        tmp_path,
        input=str(folder / f"{train}.parquet"),
        validation=str(folder / "dev.parquet"),
        test=str(folder / "test_with_oos.parquet"),
        oos_label="oos",
    )
    assert report["num_rows_oos"] == {"train": num_rows_oos, "validation": 0, "test": 1000}
    assert ("oos" in dataset.labels) == bool(num_rows_oos)
    assert len(dataset.labels) == 150 + bool(num_rows_oos)
    test = dataset.split("test")
    assert (dataset.targets(test) == NO_CLASS).sum() == (0 if num_rows_oos else 1000)
    assert dataset.in_scope(test).num_rows == (5500 if num_rows_oos else 4500)


def test_an_output_that_is_the_inputs_folder_by_way_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    source = write(tmp_path / "raw" / "train.parquet", many(50))
    (tmp_path / "link").symlink_to(tmp_path / "raw")
    with pytest.raises(RequestError, match=r"--output .*link holds .*train\.parquet, which is read"):
        prepare(PrepareConfig(input=[source], output=str(tmp_path / "link"), overwrite=True))


def test_texts_that_differ_only_in_what_nobody_sees_stay_together(tmp_path: Path) -> None:
    plain = many(60)
    rows = [
        *plain,
        *((f"{text}\u200b", label) for text, label in plain),
        *((f"\u00a0{text}", label) for text, label in plain),
    ]
    report, _ = run(tmp_path, input=write(tmp_path / "in.parquet", rows))
    assert report["num_rows_out"] == {"duplicate": 120}


def test_a_split_that_is_the_input_too(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", many(50))
    with pytest.raises(RequestError, match="all texts of --input are in --test too"):
        run(tmp_path, input=source, test=source)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1, 0], [1, 0, 0]] * 20, r"has a 0 or 1 for each class: write the names"),
        (["['a', 'b']", "['b']"] * 20, r"lists that were written as text, as .*'b'.*write ';' between"),
    ],
)
def test_lists_that_are_no_labels_are_refused(labels: list[Any], message: str, tmp_path: Path) -> None:
    table = pa.table({"text": [f"text {row}" for row in range(len(labels))], "label": labels})
    pq.write_table(table, tmp_path / "in.parquet")
    with pytest.raises(RequestError, match=message):
        run(tmp_path, input=str(tmp_path / "in.parquet"), multi_label=True)
