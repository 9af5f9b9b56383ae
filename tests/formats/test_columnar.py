"""Parquet and Arrow as people and libraries write them."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from bertray.errors import RequestError
from bertray.formats.files import find_files, read_table
from bertray.storage.location import Location

COLUMNS = {"text": "text", "label": "label"}
ROWS = pa.table({"text": ["x", "y"], "label": ["a", None]})


def read(place: Path) -> list[dict[str, Any]]:
    tables = [read_table(file, COLUMNS) for file in find_files(str(place), ["text", "label"])]
    return pa.concat_tables(tables).select(["text", "label"]).to_pylist()


def with_features(table: pa.Table, **features: Any) -> pa.Table:
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_to_disk(folder: Path, tables: dict[str, pa.Table], **state: Any) -> Path:
    folder.mkdir(parents=True)
    for name, table in tables.items():
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    files = {"_data_files": [{"filename": name} for name in tables], "_indices_files": None}
    (folder / "state.json").write_text(json.dumps({**files, **state}))
    features = {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder


@pytest.mark.parametrize("name", ["a.parquet", "a.parq", "a.PARQUET", "part-00000", "a.csv"])
def test_parquet_whatever_its_name(tmp_path: Path, name: str) -> None:
    pq.write_table(ROWS, tmp_path / name)
    assert read(tmp_path) == read(tmp_path / name) == ROWS.to_pylist()


@pytest.mark.parametrize("compression", ["uncompressed", "lz4", "zstd"])
def test_arrow_files(tmp_path: Path, compression: str) -> None:
    pa.feather.write_feather(ROWS, tmp_path / "a.feather", compression)
    assert read(tmp_path) == ROWS.to_pylist()


def test_a_stream_of_arrow(tmp_path: Path) -> None:
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, ROWS.schema) as out:
        out.write_table(ROWS)
    assert read(tmp_path) == ROWS.to_pylist()


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8()])
def test_names_of_classes_are_the_labels(tmp_path: Path, kind: pa.DataType) -> None:
    ids = [1, 0, None] if kind == pa.uint8() else [1, 0, -1]
    table = pa.table({"text": ["x", "y", "z"], "label": pa.array(ids, kind)})
    pq.write_table(with_features(table, label={"names": ["no", "yes"], "_type": "ClassLabel"}), tmp_path / "a.parquet")
    assert [row["label"] for row in read(tmp_path)] == ["yes", "no", None]


@pytest.mark.parametrize("wrap", [lambda one: {"feature": one, "_type": "Sequence"}, lambda one: [one]])
def test_names_of_lists_of_classes(tmp_path: Path, wrap: Any) -> None:
    table = pa.table({"text": ["x", "y", "z"], "label": [[0, 1], [], None]})
    feature = wrap({"names": ["no", "yes"], "_type": "ClassLabel"})
    pq.write_table(with_features(table, label=feature), tmp_path / "a.parquet")
    assert [row["label"] for row in read(tmp_path)] == [["no", "yes"], [], None]


@pytest.mark.parametrize("wrong", [2, -2])
def test_an_id_without_a_name_is_refused(tmp_path: Path, wrong: int) -> None:
    table = pa.table({"text": ["x", "y"], "label": [1, wrong]})
    pq.write_table(with_features(table, label={"names": ["no", "yes"], "_type": "ClassLabel"}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=rf"'label' of .* holds the class id {wrong}, .* ClassLabel has 2 names"):
        read(tmp_path)


def test_other_features_change_nothing(tmp_path: Path) -> None:
    strings = with_features(ROWS, label={"names": ["no"], "_type": "ClassLabel"}, text={"dtype": "string"})
    pq.write_table(strings, tmp_path / "a.parquet")
    assert read(tmp_path) == ROWS.to_pylist()


def test_a_saved_data_set_in_its_order(tmp_path: Path) -> None:
    first, second = (pa.table({"text": [text], "label": [number]}) for text, number in (("x", 1), ("y", 0)))
    folder = save_to_disk(tmp_path / "saved", {"data-2.arrow": first, "data-1.arrow": second})
    (folder / "cache-1.arrow").write_bytes(b"not of the data set")
    expected = [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}]
    assert read(folder) == read(tmp_path) == expected
    assert read(folder / "data-2.arrow") == expected[:1]


def test_a_saved_data_set_with_indices_is_refused(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "saved", {"d.arrow": ROWS}, _indices_files=[{"filename": "indices.arrow"}])
    for place in (folder, folder / "d.arrow"):
        with pytest.raises(RequestError, match=r"saved was saved after its rows were filtered, .*flatten_indices\(\)"):
            read(place)


@pytest.mark.parametrize("above", [".", ".."])
def test_several_splits_are_refused_with_the_options(tmp_path: Path, above: str) -> None:
    folder = tmp_path / "in" / "d"
    for name in ("train", "test"):
        save_to_disk(folder / name, {"d.arrow": ROWS})
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(RequestError, match=rf"Name each: --input {folder}/train --test {folder}/test$"):
        read(folder / above)
    assert read(folder / "test") == ROWS.to_pylist()


def test_only_wanted_columns_are_read(tmp_path: Path) -> None:
    table = ROWS.append_column("other", [["z", "z"]])
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_table(Location.of(str(tmp_path / "a.parquet")), COLUMNS).column_names == ["text", "label"]


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    sink = io.BytesIO()
    pq.write_table(ROWS, sink)
    for name, content in (("a.parquet", sink.getvalue()[:-9]), ("a.arrow", b"ARROW1\0\0"), ("b.arrow", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError, match=rf"cannot read .*{name}"):
            read(tmp_path / name)


def test_an_arrow_stream_that_ends_between_batches_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"] * 50, "label": ["x", "y"] * 50})
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=10)
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(whole[:-8])
    columns = {"text": "text", "label": "label"}
    assert read_table(Location.of(str(tmp_path / "a.arrow")), columns).num_rows == 100
    with pytest.raises(RequestError, match=r"cannot read .*b\.arrow: it has no end mark"):
        read_table(Location.of(str(tmp_path / "b.arrow")), columns)
