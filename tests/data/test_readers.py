"""Files of every format and what people do to them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from bertray.data.config import PrepareConfig
from bertray.data.readers import read_labelled
from bertray.errors import RequestError
from bertray.formats.files import find_files

ROWS = [("Skills: Python, SQL", "Skills"), ('Said "yes",\nthen left', "Experience"), ("Zürich – 東京", "Contact")]


def read(
    *patterns: object,
    text: str = "text",
    label: str = "label",
    group: str | None = None,
    separator: str | None = None,
    encoding: str | None = None,
) -> pa.Table:
    files = [file for pattern in patterns for file in find_files(str(pattern), [text, label])]
    options: dict[str, Any] = {"text_column": text, "label_column": label, "group_column": group, "encoding": encoding}
    options |= {"multi_label": separator is not None, "label_separator": separator}
    return read_labelled(files, PrepareConfig(input=["files"], output="output", **options))


def pairs(table: pa.Table) -> list[tuple[str | None, str | None]]:
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def write(path: Path, rows: list[tuple[object, object]] = ROWS) -> Path:
    """Write rows in the format that the name asks for."""
    table = pa.table({"text": [row[0] for row in rows], "label": [row[1] for row in rows]})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    if "json" in path.name:
        data = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows).encode()
    else:
        delimiter = "\t" if ".tsv" in path.name else ","
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(table, sink, pa.csv.WriteOptions(delimiter=delimiter))
        data = sink.getvalue().to_pybytes()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.csv.gz", "a.csv.zst", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.zst", "a.parquet"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    table = read(write(tmp_path / name))
    assert pairs(table) == ROWS
    assert table["source"].to_pylist() == [str(tmp_path / name)] * 3
    assert table["source_row"].to_pylist() == [0, 1, 2]


def test_folders_globs_and_lists_of_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "a.csv", ROWS[:1])
    write(tmp_path / "b.jsonl", ROWS[1:2])
    (tmp_path / "README.md").write_text("not data")
    assert sorted(pairs(read(tmp_path))) == sorted(ROWS[:2])
    assert pairs(read(f"{tmp_path}/*.jsonl")) == ROWS[1:2]
    assert pairs(read(tmp_path / "b.jsonl", tmp_path / "sub")) == [ROWS[1], ROWS[0]]
    # Where patterns meet nobody votes twice.
    assert pairs(read(f"{tmp_path}/s*", f"{tmp_path}/**/*.csv", tmp_path / "b.jsonl", tmp_path)) == ROWS[:2]


def test_s3(s3_folder: str, tmp_path: Path) -> None:
    import s3fs

    s3fs.S3FileSystem().put_file(str(write(tmp_path / "a.csv.gz")), f"{s3_folder}/in/a.csv.gz")
    assert pairs(read(f"{s3_folder}/in")) == ROWS
    assert pairs(read(f"{s3_folder}/*/a.csv*")) == ROWS
    # S3's console makes an object for a folder.
    s3fs.S3FileSystem().pipe_file(f"{s3_folder}/in/", b"")
    assert pairs(read(f"{s3_folder}/in")) == pairs(read(f"{s3_folder}/**")) == ROWS
    with pytest.raises(RequestError, match=r"^not found: s3://no-such-bucket/x\*\.csv\. Check the path, the bucket"):
        read("s3://no-such-bucket/x*.csv")


def test_labels_may_be_numbers_and_booleans_but_not_fractions(tmp_path: Path) -> None:
    assert pairs(read(write(tmp_path / "a.parquet", [("x", 2), ("y", 10)]))) == [("x", "2"), ("y", "10")]
    assert pairs(read(write(tmp_path / "a.csv", [("7", 2), ("y", 10)]))) == [("7", "2"), ("y", "10")]
    # pandas turns integers with a gap into floats
    assert pairs(read(write(tmp_path / "b.parquet", [("x", 2.0), ("y", None)]))) == [("x", "2"), ("y", None)]
    assert pairs(read(write(tmp_path / "c.jsonl", [("x", True), ("y", False)]))) == [("x", "true"), ("y", "false")]
    with pytest.raises(RequestError, match=r"'label' of .*d\.parquet holds fractions, not classes"):
        read(write(tmp_path / "d.parquet", [("x", 0.5)]))


def test_labels_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,when\nx,007,2026-01-05\ny,7,2026-01-06\nz,True,2026-01-07\n")
    table = read(tmp_path / "a.csv", group="when")
    assert table["label"].to_pylist() == ["007", "7", "True"]
    assert table["group"].to_pylist() == ["2026-01-05", "2026-01-06", "2026-01-07"]
    (tmp_path / "b.jsonl").write_text(
        '{"text": "x", "label": "2026-01-05", "meta": 1}\n\n{"meta": "z", "text": "line\\u2028end", "label": "007"}\n'
    )
    assert pairs(read(tmp_path / "b.jsonl")) == [("x", "2026-01-05"), ("line\u2028end", "007")]


def test_inch_marks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\na 5" pipe,x\n"two\nlines",y\n')
    assert pairs(read(tmp_path / "a.csv")) == [('a 5" pipe', "x"), ("two\nlines", "y")]
    (tmp_path / "c.csv").write_text('label,text\nb,"x" \nb,"two\nlines"\n')
    assert pairs(read(tmp_path / "c.csv")) == [("x", "b"), ("two\nlines", "b")]


def test_rows_between_two_quotation_marks_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\nx\ta\n"y\tb\nz\ta\nv"\tb\n')
    assert len(read(tmp_path / "a.tsv")) == 2
    assert "1 rows have a cell" in caplog.text and "the first is row 3 of" in caplog.text


@pytest.mark.parametrize("label", ["18446744073709551616", "[36893488147419103232, 1]", '{"id": 36893488147419103232}'])
def test_large_integers_are_refused(tmp_path: Path, label: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x", "label": {label}}}\n')
    with pytest.raises(RequestError, match=r"'label' of .*a\.jsonl holds integers beyond 64 bits: write them as"):
        read(tmp_path / "a.jsonl", separator=";")
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": 9223372036854775807}\n')
    assert pairs(read(tmp_path / "b.jsonl")) == [("x", "9223372036854775807")]


def test_a_file_without_a_line_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert pairs(read(tmp_path / "empty.jsonl", write(tmp_path / "a.csv"))) == ROWS


def test_members_that_a_line_lacks_are_null(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"label": "a"}\n')
    assert pairs(read(tmp_path / "a.jsonl")) == [("x", None), (None, "a")]


def test_dictionary_and_large_strings(tmp_path: Path) -> None:
    table = pa.table(
        {"text": pa.array(["x", None], pa.large_string()), "label": pa.array(["a", "a"]).dictionary_encode()}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert pairs(read(tmp_path / "a.parquet")) == [("x", "a"), (None, "a")]


def test_null_empty_and_words_that_look_like_null(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,label\n,NA\n"",None\n\nNA,null\n')
    assert pairs(read(tmp_path / "a.csv")) == [(None, "NA"), (None, "None"), ("NA", "null")]


def test_a_row_longer_than_a_default_block(tmp_path: Path) -> None:
    text = "word " * 500_000
    assert pairs(read(write(tmp_path / "a.csv", [(text, "x")]))) == [(text, "x")]
    assert pairs(read(write(tmp_path / "a.jsonl", [(text, "x")]))) == [(text, "x")]


def test_group_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x"], "label": ["a"], "author": [7]}), tmp_path / "a.parquet")
    assert read(tmp_path, group="author")["group"].to_pylist() == ["7"]


def lists(table: pa.Table) -> list[list[str | None] | None]:
    assert table.column_names[:2] == ["text", "labels"]
    assert table["labels"].type == pa.list_(pa.string())
    return table["labels"].to_pylist()


def test_strings_of_several_labels_are_split(tmp_path: Path) -> None:
    rows = [("x", "joy;love"), ("y", " joy ; "), ("z", None), ("w", "")]
    expected = [["joy", "love"], [" joy ", " "], None]
    (tmp_path / "a.csv").write_text('text,label\nx,joy;love\ny, joy ; \nz,\nw,""\n')
    for file in (tmp_path / "a.csv", write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.parquet", rows)):
        assert lists(read(file, separator=";")) == [*expected, None if file.suffix == ".csv" else [""]]
    assert lists(read(write(tmp_path / "b.parquet", [("x", "a; b::c")]), separator="::")) == [["a; b", "c"]]
    assert lists(read(write(tmp_path / "c.parquet", [("x", 7), ("y", 8.0)]), separator=";")) == [["7"], ["8"]]


def test_lists_of_labels_stay_lists(tmp_path: Path) -> None:
    given = [["joy", "a;b"], [], None, ["", None]]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "x", "label": one}) + "\n" for one in given))
    assert lists(read(tmp_path / "a.jsonl", separator=";")) == given
    for number, kind in enumerate(
        (
            pa.list_(pa.string()),
            pa.large_list(pa.large_string()),
            pa.list_(pa.dictionary(pa.int32(), pa.string())),
        )
    ):
        file = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"text": ["x"] * 4, "label": pa.array(given, kind)}), file)
        assert lists(read(file, separator=";")) == given
    pairs_of_numbers = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    pq.write_table(pa.table({"text": ["x"] * 3, "label": pairs_of_numbers}), tmp_path / "n.parquet")
    assert lists(read(tmp_path / "n.parquet", separator=";")) == [["1", "2"], None, ["3", "4"]]
    # One data set may come from files of both kinds, and one of them may hold nothing.
    write(tmp_path / "a.parquet", [("y", "a;b")])
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": []}\n')
    both = read(tmp_path / "a.parquet", tmp_path / "b.jsonl", tmp_path / "n.parquet", separator=";")
    assert lists(both) == [["a", "b"], [], ["1", "2"], None, ["3", "4"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"body,label\nx,a\n", r"no column 'text'; it has body, label. Choose with --text-column"),
        ("a.csv", b"", r"a\.csv has no column 'text'; it has none"),
        ("a.csv", b"text,label\n\xff\xfe,a\n", r"cannot read .*a\.csv, which is not UTF-8"),
        (
            "a.csv",
            b"text,label\nx,a\ny,b,c\n",
            r"row 3 of .*a\.csv, .* has 3 cells, .* If one has a delimiter in it, put such",
        ),
        ("a.parquet", b"PAR1 but not", r"cannot read .*a\.parquet"),
        ("a.csv", b"text,label,text\nx,a,y\n", r"2 columns 'text'; it has text, label, text"),
        ("a.jsonl", b'{"text": 1, "label": "a"}', r"'text' of .*a\.jsonl is of type int64; it must hold strings"),
        ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": 1, "label": "a"}', r"'text' of .* several types"),
        ("a.jsonl", b'{"text": "x", "label": "a"}\n{"text": ', r"line 2 of .*a\.jsonl is not JSON"),
        ("a.json", b"{}\n[]", r"line 2 of .*a\.json is not .* is a list, not an object\. Write"),
        ("a.csv.gz", b"not gzip", r"cannot read .*a\.csv\.gz"),
        ("a.xlsx", b"PK", r"a\.xlsx is a spreadsheet: save the sheet as CSV"),
        (
            "a.csv",
            b'text,label\nx,a\n"y,b\nz,a\n',
            r"row 3 of .*a\.csv, .* has a cell .* does not end",
        ),
        ("a.csv", b"text,label\n" + b'"' + b"long,a\n" * 50_000, r"row 2 of .* does not end"),
        ("a.tsv", b'text\tlabel\nx\ta\n"y\tb\nz\ta\n', r"row 3 of .*a\.tsv, .* does not end"),
        # Arrow would read each of these three, and give fewer rows than there are.
        (
            "a.csv",
            b'label,text\na,x\na,"Yes" she said\na,y\nb,"No way\nb,z\n',
            r"row 3 of .*a\.csv, .* has text behind the closing one\. To mend it, put such a cell",
        ),
        (
            "a.csv",
            b'label,text\na,x\na,"Yes\nb,y\nb,"No way\nb,z\n',
            r"row 3 of .*a\.csv, .* swallowed the rows",
        ),
        ("a.tsv", b'text\tlabel\nx\ta\n"y\tb\nz\ta\n"v\tb\n', r"row 3 of .*a\.tsv, .* or save the table as Parquet"),
        ("a.jsonl", b'{"text": "hi \\ud83d", "label": "a"}', r"'text' of .*a\.jsonl holds text that is not Unicode"),
        (
            "a.csv",
            "text,label,catégorie\nx,a,y\n".encode("latin-1"),
            r"cannot read .*a\.csv, which is not UTF-8: .*Save it as UTF-8",
        ),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read(tmp_path / name)


def test_columns_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1], "label": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(RequestError, match=r"'text' of .*a\.parquet is of type int64; it must hold strings"):
        read(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x"], "label": [["a", "b"]]}), tmp_path / "b.parquet")
    with pytest.raises(RequestError, match=r"row 0 of column 'label' .* the labels 'a', 'b': .*add --multi-label"):
        read(tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": [["x"]], "label": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(RequestError, match=r"'text' .* is of type list<.*>; it must hold strings$"):
        read(tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": ["x"], "label": [[{"name": "a"}]]}), tmp_path / "d.parquet")
    with pytest.raises(RequestError, match=r"'label' .* is of type struct<.*>; it must hold strings, whole numbers"):
        read(tmp_path / "d.parquet", separator=";")


def test_invalid_utf8_in_parquet_is_named(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.binary()):
        text = pa.array([b"fine", None, b"\xff\xfe"], pa.binary()).view(kind)
        pq.write_table(pa.table({"text": text, "label": ["a"] * 3}), tmp_path / "a.parquet")
        with pytest.raises(RequestError, match=r"row 2 of column 'text' of .*a\.parquet, .* is not valid UTF-8"):
            read(tmp_path / "a.parquet")


def test_bytes_are_text(tmp_path: Path) -> None:
    for kind in (pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())):
        columns = {
            name: pa.array([f"{name} \u00e9".encode(), None], pa.binary()).cast(kind) for name in ("text", "label")
        }
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", store_schema=False)
        assert pairs(read(tmp_path / "a.parquet")) == [("text \u00e9", "label \u00e9"), (None, None)]


def test_more_text_than_fits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / f"{name}.csv") for name in "ab"]
    num_bytes = 2 * sum(len(text.encode()) for text, _ in ROWS)
    monkeypatch.setattr("bertray.data.readers._MAX_COLUMN_BYTES", num_bytes - 1)
    message = rf"the 6 rows of .*a\.csv, .*b\.csv have {num_bytes} bytes of text; at most {num_bytes - 1} fit"
    with pytest.raises(RequestError, match=message):
        read(*files)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    for pattern in (tmp_path, tmp_path / "*.csv", tmp_path / "missing"):
        with pytest.raises(RequestError, match=r"no labelled files at .*CSV"):
            read(pattern)
