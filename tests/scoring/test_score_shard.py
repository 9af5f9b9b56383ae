"""One shard in, one file of the same rows out, whatever the shard holds."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray import Bundle
from bertray.errors import ShardChangedError, ShardError
from bertray.schema import MULTI_LABEL_PREDICTION_SCHEMA, predictions_schema
from bertray.scoring import shard_reader
from bertray.scoring.score_shard import merge_parts, score_shard
from bertray.scoring.units import Counts
from bertray.storage.location import Location
from bertray.tokenization.columns import distinct, num_text_bytes
from tests.conftest import write_shard


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.load(str(tiny_bundle), "fp32")


def score(
    bundle: Bundle, shard: Path, *, keep: tuple[str, ...] = (), text: str = "text", step_bytes: int = 1 << 20
) -> tuple[Counts, pa.Table]:
    output = shard.parent / "out" / shard.name
    counts = score_shard(bundle, Location.of(str(shard)), Location.of(str(output)), text, list(keep), step_bytes)
    return counts, pq.read_table(output)


def numbers(counts: Counts) -> tuple[int, ...]:
    profile = counts.profile
    repeated = counts.num_rows_repeated, counts.num_tokens_repeated
    return profile.num_rows, profile.num_rows_error, repeated[0], profile.num_tokens, repeated[1]


def test_rows_stay_in_order_over_many_steps(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_READ_ROWS", 3)
    texts: list[str | None] = [f"text number {row} " * (row % 5 + 1) for row in range(50)]
    texts[3], texts[20] = None, " "
    counts, table = score(bundle, write_shard(tmp_path / "a.parquet", texts), keep=("document_id",), step_bytes=300)
    assert table["row"].to_pylist() == list(range(50))
    assert table["document_id"].to_pylist() == [f"a-{row}" for row in range(50)]
    for row, prediction in enumerate(bundle.predict(texts)):
        assert table["label"][row].as_py() == prediction.label
        assert table["score"][row].as_py() == pytest.approx(prediction.score, abs=1e-5)
        assert table["error"][row].as_py() == prediction.error
    assert numbers(counts) == (50, 2, 0, sum(table["num_tokens"].to_pylist()), 0)


def test_the_schema_of_a_predictions_file(bundle: Bundle, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.parquet", ["x"], page=[3])
    _, table = score(bundle, shard, keep=("page", "text"))
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("row", "int64"),
        ("page", "int64"),
        ("text", "string"),
        ("label", "string"),
        ("score", "float"),
        ("review", "bool"),
        ("num_tokens", "int32"),
        ("truncated", "bool"),
        ("error", "string"),
    ]


def test_no_rows_give_a_file_of_no_rows(bundle: Bundle, tmp_path: Path) -> None:
    counts, table = score(bundle, write_shard(tmp_path / "a.parquet", []), keep=("document_id",))
    assert numbers(counts) == (0, 0, 0, 0, 0)
    assert table.num_rows == 0
    assert "label" in table.column_names


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int32(), pa.string())]
)
def test_text_of_other_types(bundle: Bundle, tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["Python, SQL", None, "Physics"]).cast(kind)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    _, table = score(bundle, tmp_path / "a.parquet")
    assert table["label"].to_pylist() == [one.label for one in bundle.predict(["Python, SQL", None, "Physics"])]


def test_invalid_utf8_is_a_row_error(bundle: Bundle, tmp_path: Path) -> None:
    texts = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    _, table = score(bundle, tmp_path / "a.parquet")
    assert table["error"].to_pylist() == [None, "text is not UTF-8"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a readable Parquet file"), (b"PAR1 nonsense PAR1", "not a readable Parquet file")],
)
def test_a_file_that_is_not_parquet(bundle: Bundle, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ShardError, match=message):
        score(bundle, tmp_path / "a.parquet")


def test_a_damaged_page_leaves_no_file(bundle: Bundle, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.parquet", [f"text {row}" for row in range(1000)])
    data = bytearray(shard.read_bytes())
    data[60 : len(data) // 2] = b"\xff" * (len(data) // 2 - 60)
    shard.write_bytes(data)
    with pytest.raises(ShardError, match="cannot be read"):
        score(bundle, shard)
    assert list((tmp_path / "out").iterdir()) == []


def test_missing_columns_and_wrong_types(bundle: Bundle, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.parquet", ["x"], page=[3])
    with pytest.raises(ShardError, match="no column 'body'; the shard has document_id, text, page"):
        score(bundle, shard, text="body")
    with pytest.raises(ShardError, match="no column 'url'"):
        score(bundle, shard, keep=("url",))
    with pytest.raises(ShardError, match="the text column is of type int64"):
        score(bundle, shard, text="page")
    with pytest.raises(ShardError, match="not found"):
        score(bundle, tmp_path / "gone.parquet")


def test_what_a_last_check_refuses_is_not_put(bundle: Bundle, tmp_path: Path) -> None:
    shard, output = Location.of(str(write_shard(tmp_path / "a.parquet", ["one"]))), tmp_path / "out" / "a.parquet"

    def refuse() -> None:
        raise ShardChangedError("rewritten")

    with pytest.raises(ShardChangedError):
        score_shard(bundle, shard, Location.of(str(output)), "text", [], before_put=refuse)
    assert list(output.parent.iterdir()) == []
    score_shard(bundle, shard, Location.of(str(output)), "text", [], origin={"bertray.shard": "a.parquet"})
    assert pq.read_schema(output).metadata[b"bertray.shard"] == b"a.parquet"


def test_identical_texts_are_scored_once(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str | None] = ["one text", "another one", "one text", None, "", None, "one text"]
    asked: list[list[object]] = []
    begin = bundle.begin_column
    monkeypatch.setattr(
        bundle, "begin_column", lambda texts, order=0.0: asked.append(texts.to_pylist()) or begin(texts, order)
    )
    counts, table = score(bundle, write_shard(tmp_path / "a.parquet", texts), keep=("document_id",))
    assert asked == [[b"one text", b"another one", None, b""]]
    assert table["document_id"].to_pylist() == [f"a-{row}" for row in range(7)]
    for row, prediction in enumerate(bundle.predict(texts)):
        found = table.slice(row, 1).to_pylist()[0]
        assert (found["label"], found["error"], found["num_tokens"]) == (
            prediction.label,
            prediction.error,
            prediction.num_tokens,
        )
    num_tokens = table["num_tokens"].to_pylist()
    assert numbers(counts) == (7, 3, 2, sum(num_tokens), 2 * num_tokens[0])


@pytest.mark.parametrize("use_dictionary", [True, False])
@pytest.mark.parametrize("row_group_size", [10, 4000, 100_000])
def test_a_step_holds_so_many_bytes(tmp_path: Path, use_dictionary: bool, row_group_size: int) -> None:
    path = tmp_path / "a.parquet"
    texts = [f"{row % 7} word " * 10 for row in range(9000)]  # 70 bytes; encoded by a dictionary, a fraction of one
    table = pa.table({"id": range(9000), "text": texts})
    pq.write_table(table, path, use_dictionary=use_dictionary, row_group_size=row_group_size)
    with shard_reader.opened(Location.of(str(path))) as file:
        steps = list(shard_reader.steps(file, "text", ["id"], 2000 * 70))
    assert pa.concat_tables(steps)["id"].to_pylist() == list(range(9000))
    read_rows = shard_reader._READ_ROWS
    assert all(2000 <= len(step) < 2000 + read_rows for step in steps[:-1])


def test_rows_with_little_text_fill_no_memory(tmp_path: Path) -> None:
    rows = {"text": pa.nulls(40_000, pa.string()), "html": [f"{row:05d}" * 100 for row in range(40_000)]}
    pq.write_table(pa.table(rows), tmp_path / "shard.parquet")
    with shard_reader.opened(Location.of(str(tmp_path / "shard.parquet"))) as file:
        found = list(shard_reader.steps(file, "text", ["html"], 100_000))
    assert sum(map(len, found)) == 40_000
    assert max(step.nbytes for step in found) < 2 * 8 * 100_000


def test_long_texts_are_read_few_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{row}" * 100_000 for row in range(30)]}), path, compression="none")
    with shard_reader.opened(Location.of(str(path))) as file:
        steps = list(shard_reader.steps(file, "text", [], 1000))
    assert [len(step) for step in steps] == [1] * 30


def write_repeated(path: Path, text: str, num_rows: int, name: str = "text", **options: Any) -> Path:
    """One text in all rows, on one page; the file does not say that it came from a dictionary."""
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(num_rows, np.int32)), pa.array([text]))
    table = pa.table({name: column if options.get("use_dictionary", True) else column.cast(pa.string())})
    options |= {"data_page_size": 1 << 30, "dictionary_pagesize_limit": 1 << 30, "store_schema": False}
    pq.write_table(table, path, compression="zstd", write_statistics=False, **options)
    return path


@pytest.mark.parametrize(
    ("num_rows", "text_bytes", "options"),
    [
        (10**6, 1 << 10, {}),  # many rows
        (3000, 1 << 20, {"name": "text.of.a.page"}),  # long ones: with 1,024 rows, a read would hold a GiB
        (300, 1 << 20, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}),
        (1, 300 << 20, {"use_dictionary": False}),
    ],
)
def test_a_few_bytes_that_grow_beyond_memory(
    tmp_path: Path, num_rows: int, text_bytes: int, options: dict[str, Any]
) -> None:
    path = write_repeated(tmp_path / "bomb.parquet", "x" * text_bytes, num_rows, **options)
    assert path.stat().st_size < 300_000
    num_read = 0
    with (
        shard_reader.opened(Location.of(str(path))) as file,
        pytest.raises(ShardError, match=r"a row group of [\d,]+ bytes grows to [\d,]+ or more .* smaller row groups"),
    ):
        for step in shard_reader.steps(file, options.get("name", "text"), [], 1 << 20):
            num_read += len(step)
    # A read is of fewer rows where they may be long: else the first one would be too large already.
    assert num_read * text_bytes <= 256 << 20
    assert (num_read > 0) == (num_rows > 1)


def test_long_texts_that_repeat_are_read_to_the_end(tmp_path: Path) -> None:
    path = write_repeated(tmp_path / "a.parquet", "x" * (1 << 20), 600, row_group_size=200)
    with shard_reader.opened(Location.of(str(path))) as file:
        assert sum(len(step) for step in shard_reader.steps(file, "text", [], 1 << 20)) == 600


def test_texts_of_a_dictionary_are_not_decoded(bundle: Bundle, tmp_path: Path) -> None:
    values = pa.array(["one text", None, "another", "one text", "not used"])
    indices = pa.array([0, 3, None, 1, 2] * 200, pa.int32())
    column = pa.DictionaryArray.from_arrays(indices, values)
    texts, places = distinct(pa.chunked_array([column.slice(0, 500), column.slice(500)]))
    assert texts.to_pylist() == [b"one text", None, b"another"]
    assert texts.take(places).to_pylist() == [b"one text", b"one text", None, None, b"another"] * 200
    assert num_text_bytes(column) == 200 * (8 + 8 + 7)
    assert distinct(pa.chunked_array([], column.type))[0].to_pylist() == []


def with_groups(path: Path, num_rows: int, row_group_size: int) -> Location:
    texts = [None if row % 17 == 3 else f"text {row} " * (row % 5 + 1) for row in range(num_rows)]
    pq.write_table(pa.table({"id": range(num_rows), "text": texts}), path, row_group_size=row_group_size)
    return Location.of(str(path))


@pytest.mark.parametrize("row_group_size", [7, 30, 1000])
def test_any_range_of_rows(tmp_path: Path, row_group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_READ_ROWS", 5)
    shard = with_groups(tmp_path / "a.parquet", 90, row_group_size)
    for rows in (range(90), range(90, 90), range(1), range(29, 31), range(30, 60), range(13, 89)):
        with shard_reader.opened(shard) as file:
            found = [
                row for step in shard_reader.steps(file, "text", ["id"], 60, rows) for row in step["id"].to_pylist()
            ]
        assert found == list(rows)


@pytest.mark.parametrize("row_group_size", [7, 30, 1000])
@pytest.mark.parametrize("num_rows", [0, 2, 90])
def test_parts_make_the_whole(bundle: Bundle, tmp_path: Path, num_rows: int, row_group_size: int) -> None:
    shard = with_groups(tmp_path / "a.parquet", num_rows, row_group_size)
    whole, merged = (Location.of(str(tmp_path / name)) for name in ("whole.parquet", "merged.parquet"))
    counts = score_shard(bundle, shard, whole, "text", ["id"])
    parts = [Location.of(str(tmp_path / f"part-{part}.parquet")) for part in range(4)]
    for part in (2, 0, 3, 1):
        score_shard(bundle, shard, parts[part], "text", ["id"], part=(part, 4), origin={"bertray.shard": "not this"})
    found, precision = merge_parts(parts, merged, num_rows, origin={"bertray.shard": "a.parquet"})
    assert precision == bundle.precision
    assert numbers(found)[:2] == numbers(counts)[:2]
    assert found.profile.labels == counts.profile.labels
    one, other = pq.read_table(whole.path), pq.read_table(merged.path)
    assert one.drop(["score"]).equals(other.drop(["score"]))
    assert other["score"].to_pylist() == pytest.approx(one["score"].to_pylist(), abs=1e-5)
    assert other.schema.metadata == {b"bertray.shard": b"a.parquet"}


def test_several_labels_a_row(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    several = {"problem_type": "multi_label_classification", "thresholds": (0.5, 0.9, 0.5), "review_below": 0.99}
    bundle = Bundle.load(str(make_bundle(**several)), "fp32")
    shard, merged = with_groups(tmp_path / "a.parquet", 90, 30), Location.of(str(tmp_path / "merged.parquet"))
    parts = [Location.of(str(tmp_path / f"part-{part}.parquet")) for part in range(3)]
    for part in range(3):
        score_shard(bundle, shard, parts[part], "text", ["id"], 300, part=(part, 3))
    counts, _ = merge_parts(parts, merged, 90)
    found, expected = pq.read_table(merged.path), bundle.predict(pq.read_table(shard.path)["text"].to_pylist())
    assert found.column_names == ["row", "id", *MULTI_LABEL_PREDICTION_SCHEMA.names]
    assert found["labels"].to_pylist() == [one.labels for one in expected]
    assert found["review"].to_pylist() == [one.review for one in expected]
    given = Counter(label for one in expected for label in one.labels or [])
    assert counts.profile.labels == given
    assert counts.profile.num_rows_unlabelled == sum(one.labels == [] for one in expected)
    assert counts.profile.num_rows_review == sum(one.review for one in expected)
    assert 0 < counts.profile.num_rows_error < counts.profile.num_rows_review < 90

    counts, empty = score(bundle, write_shard(tmp_path / "empty.parquet", []))
    assert numbers(counts) == (0, 0, 0, 0, 0)
    assert empty.schema.equals(predictions_schema([], MULTI_LABEL_PREDICTION_SCHEMA))


def test_parts_that_do_not_fit_are_not_merged(bundle: Bundle, tmp_path: Path) -> None:
    shard, merged = with_groups(tmp_path / "a.parquet", 40, 10), Location.of(str(tmp_path / "merged.parquet"))
    parts = [Location.of(str(tmp_path / f"part-{part}.parquet")) for part in range(4)]
    for part in range(4):
        score_shard(bundle, shard, parts[part], "text", [], part=(part, 4))
    with pytest.raises(ShardError, match=r"part-2\.parquet does not go on at row 10"):
        merge_parts([parts[0], parts[2]], merged, 20)
    with pytest.raises(ShardError, match="its parts have 30 rows, the file's footer says 40"):
        merge_parts(parts[:3], merged, 40)
    with pytest.raises(ShardError, match=r"not found: .*part-9"):
        merge_parts([parts[0], Location.of(str(tmp_path / "part-9"))], merged, 40)
    assert not merged.exists()


def test_a_shard_is_scored_again_where_other_ids_are_met_in_its_midst(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"{word} {'and so on ' * (row % 4)}{row}" for row, word in enumerate(["one", "odd"] * 10)]
    shard = write_shard(tmp_path / "a.parquet", texts)
    monkeypatch.setattr(shard_reader, "_READ_ROWS", 4)
    expected_counts, expected = score(Bundle.load(str(tiny_bundle), "fp32"), shard, step_bytes=100)
    bundle = Bundle.load(str(tiny_bundle), "fp32")
    exact, is_checked = bundle.tokenizer._texts._by_nanotoken, iter([False, False, True])

    def wrong(fast: object, strings: pa.LargeStringArray) -> object:
        found = exact(fast, strings)
        found.ids_T.setflags(write=True)
        found.ids_T[found.offsets_N1[1] - 1] += 7  # of the first text's last token
        return found

    monkeypatch.setattr(bundle.tokenizer._texts, "_by_nanotoken", wrong)
    differing = bundle.tokenizer._texts._differing_row
    monkeypatch.setattr(
        bundle.tokenizer._texts, "_differing_row", lambda *both: differing(*both) if next(is_checked) else None
    )
    counts, table = score(bundle, shard, step_bytes=100)
    assert table.equals(expected) and counts == expected_counts
    assert not bundle.tokenizer.is_fast
    assert "a.parquet is scored again, by the reference tokenizer alone" in caplog.text


def test_folders_are_columns_to_keep(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "day=2026%2F01" / "site=__HIVE_DEFAULT_PARTITION__" / "id=of_the_folder"
    folder.mkdir(parents=True)
    write_shard(folder / "a.parquet", ["one", "two"], id=[0, 1])
    counts = score_shard(
        bundle,
        Location.of(str(folder / "a.parquet")),
        Location.of(str(tmp_path / "out.parquet")),
        "text",
        ["site", "id", "day"],
    )
    table = pq.ParquetFile(tmp_path / "out.parquet").read()
    assert counts.profile.num_rows == 2
    assert table.column_names[:4] == ["row", "site", "id", "day"]
    assert table["site"].to_pylist() == [None, None]
    assert table["id"].to_pylist() == [0, 1]  # a column of the shard comes first
    assert table["day"].to_pylist() == ["2026/01"] * 2
    shard_reader.read_in_isolation(Location.of(str(folder / "a.parquet")), "text", ["day"], 1 << 20)
    with pytest.raises(ShardError, match="no column 'month'; the shard has"):
        score_shard(bundle, Location.of(str(folder / "a.parquet")), Location.of(str(tmp_path / "b")), "text", ["month"])
