"""CSV and JSON as spreadsheets, databases and people write them; no text that is not as it was."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bertray.errors import RequestError
from bertray.formats.files import find_files, read_table
from bertray.storage.location import Location

COLUMNS = {"text": "text", "label": "label"}
Pairs = list[tuple[str | None, str | None]]
PLAIN: Pairs = [("a, b", "x"), ("c", "y")]
COMMAS = 'text,label\n"a, b",x\nc,y\n'
LINES = '{"text": "a, b", "label": "x"}\n{"text": "c", "label": "y"}\n'


def read(path: Path, content: str | bytes, encoding: str | None = None) -> Pairs:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = read_table(Location.of(str(path)), COLUMNS, encoding)
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize(
    "content",
    [
        COMMAS,
        "text;label\na, b;x\nc;y\n",
        "text\tlabel\na, b\tx\nc\ty\n",
        "text|label\na, b|x\nc|y\n",
        "sep=;\r\ntext;label\r\na, b;x\r\nc;y\r\n",
        '"sep=\t"\ntext\tlabel\na, b\tx\nc\ty\n',
        'label, text\nx, "a, b"\ny, c\n',
        'label,text\nx, "a, b"\ny,"c" \n',
        '\ufeff"text","label"\n"a, b",x\nc,y\n',
        "\ufeff\ufeff" + COMMAS,
        "\ufeffsep=,\n" + COMMAS,
        COMMAS.replace("\n", "\r"),
        'text, label, more, and more\n"a, b", x, 1, 2\nc, y, "3", 4\n',
        " text ;label\u00a0;\na, b;x;\nc;y;\n",
    ],
)
def test_delimiters_blanks_and_marks(tmp_path: Path, name: str, content: str) -> None:
    assert read(tmp_path / name, content) == PLAIN


def test_a_blank_that_the_header_does_not_have_is_text(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", 'label,text\nx, a\ny," ""b"" "\n') == [(" a", "x"), (' "b" ', "y")]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
@pytest.mark.parametrize(
    ("written", "given"),
    [
        ("utf-8-sig", None),
        ("utf-16", None),
        ("utf-32", None),
        ("utf-16", "cp1252"),
        ("cp1252", "cp1252"),
        ("utf-16-le", "utf-16-le"),
        ("gb18030", "gb18030"),
    ],
)
def test_encodings(tmp_path: Path, name: str, written: str, given: str | None) -> None:
    content = (COMMAS if name == "a.csv" else LINES).replace("c", "cafés")
    assert read(tmp_path / name, content.encode(written), given) == [("a, b", "x"), ("cafés", "y")]


@pytest.mark.parametrize(
    ("written", "given", "message"),
    [
        ("cp1252", None, r"line 3 of .*a\.csv, which is not UTF-8: .*caf.xe9.* --encoding, as cp1252"),
        ("cp1252", "ascii", r"line 3 of .*a\.csv, which is not ASCII"),
        ("utf-16-le", None, r"zero bytes.* say --encoding utf-16-le"),
        ("utf-16-be", None, r"zero bytes.* say --encoding utf-16-le or utf-16-be"),
    ],
)
def test_other_encodings_are_refused_by_row(tmp_path: Path, written: str, given: str | None, message: str) -> None:
    content = "text,label\na,x\ncafé,y\n" if written == "cp1252" else COMMAS
    with pytest.raises(RequestError, match=message):
        read(tmp_path / "a.csv", content.encode(written), given)


def test_an_encoding_for_a_file_of_utf_8_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read(tmp_path / "a.csv", "text,label\ncafé,x\n", "cp1252") == [("cafÃ©", "x")]
    assert "a.csv is read as cp1252, as --encoding says, but it is valid UTF-8" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        '"He said \\"yes\\", then left",x',
        '"He said \\"yes\\"",x',
        '"\\"yes\\" he said",x',
        'c,y\n"ends with \\"",x\nplain,y\n"and \\"",y',
        '"a \\", b",x',
    ],
)
@pytest.mark.parametrize("other", ["c,y", '"say ""no""",y', '"C:\\dir\\",y'])
def test_backslashed_quotation_marks_are_refused_with_their_row(tmp_path: Path, row: str, other: str) -> None:
    with pytest.raises(RequestError, match=r"row [34] of .*a\.csv, .* has a backslash before a quotation mark"):
        read(tmp_path / "a.csv", f"text,label\n{other}\n{row}\n")


@pytest.mark.parametrize("cell", ['"Yes" she said', ' "Yes" she said', ' "Yes, she said'])
def test_text_behind_a_quotation_mark_is_refused_with_its_row(tmp_path: Path, cell: str) -> None:
    with pytest.raises(RequestError, match=r"row 3 of .*a\.csv, counting the header, has "):
        read(tmp_path / "a.csv", f"label,text\ny,c\nx,{cell}\n")


def test_the_header_of_a_joined_file_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"row 4 of .*a\.csv is the header again"):
        read(tmp_path / "a.csv", f"\ufeff{COMMAS}\ufeff{COMMAS}")


def test_backslashes_are_text(tmp_path: Path) -> None:
    content = 'text,label\n"C:\\dir, D:\\",x\nC:\\dir\\,y\n"a ""b\\"" c",x\n"\\",y\n'
    assert read(tmp_path / "a.csv", content) == [
        ("C:\\dir, D:\\", "x"),
        ("C:\\dir\\", "y"),
        ('a "b\\" c', "x"),
        ("\\", "y"),
    ]


cells = st.text(st.sampled_from('a "\\,;\t|\n\r='), min_size=1, max_size=6)


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=4), st.sampled_from(",;\t|"), st.booleans())
def test_what_a_writer_of_csv_has_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], delimiter: str, quotes_all: bool
) -> None:
    import csv
    import io

    sink = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if quotes_all else csv.QUOTE_MINIMAL
    csv.writer(sink, delimiter=delimiter, quoting=quoting).writerows([("text", "label"), *rows])
    path = tmp_path_factory.getbasetemp() / f"{random.random()}.csv"
    assert read(path, sink.getvalue()) == rows


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        ("\ufeff" + LINES).replace("\n", "\r\n"),
        f"[{LINES.strip().replace(chr(10), ',')}]",
        "".join(json.dumps(json.loads(line), indent=1) for line in LINES.splitlines()),
        json.dumps([json.loads(line) for line in LINES.splitlines()], indent=4) + "\n",
        LINES.replace("}", ', "more": {"text": [1]}}'),
    ],
)
def test_json(tmp_path: Path, content: str) -> None:
    assert read(tmp_path / "a.json", content) == PLAIN


def test_nan_in_json_is_missing(tmp_path: Path) -> None:
    content = '{"text": NaN, "label": 1}\n{"text": "x", "label": NaN}\n{"text": "NaN", "label": 2}'
    assert read(tmp_path / "a.jsonl", content) == [(None, 1), ("x", None), ("NaN", 2)]


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", "[]") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": {"0": "a"}, "label": {"0": "x"}}', "one object with the rows by column: write JSON Lines"),
        ('{"text": ["a"], "label": ["x"]}', "one object with the rows by column: write JSON Lines"),
        ('{"columns": ["text", "label"], "data": [["a", "x"]]}', "it has columns, data.* lie deeper: write JSON Lines"),
        ('{"data": [{"text": "a", "label": "x"}]}', "it has data.* lie deeper: write JSON Lines"),
        ('[{"data": {"text": "a"}, "label": "x"}]', "no column 'text'; it has data, label.* lie deeper"),
        (json.dumps({str(n): {"text": "a"} for n in range(3000)}), "18, 19 and 2980 more.* lie deeper"),
        (LINES.replace("}\n", "},\n"), "line 1 of .* is not JSON of rows: .*no comma behind it"),
        ('{"text": "a"}\n\n{"text": \n', "line 3 of .* is not JSON"),
        ('{"text": "a"}\n"b"\n', "line 2 of .* value 0 from here is a str, not an object. Write"),
        ('[{"text": "a"}, ["b"]]', "line 1 of .* value 1 from here is a list, not an object. Write"),
        ("[" * 100_000, "line 1 of .* is not JSON"),
        ('{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}', r"several types, .*'int': 1, 'str': 0"),
    ],
)
def test_json_that_holds_no_rows_is_refused_briefly(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(tmp_path / "a.json", content)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"", "a spreadsheet: save the sheet as CSV"),
        ("a.csv", b"PK\x03\x04", "a spreadsheet or an archive: save the sheet"),
        ("a.csv.gz.zip", b"", "an archive: unpack it"),
        ("a.orc", b"ORC", r"an ORC file: pyarrow\.parquet\.write_table"),
        ("a.AVRO", b"", "an Avro file: COPY"),
        ("a.pkl", b"", "a data frame: load it"),
        ("a.db", b"", "a database: export"),
        ("a.txt", b"", "name it .csv or .tsv"),
        ("a.csv", b"\x1f\x8b\x08", "compressed: add .gz or .zst"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.md", b"", "no known format"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read(tmp_path / name, content)
    if not content:  # its name tells it: then also of a folder that has nothing else
        with pytest.raises(RequestError, match="no labelled files at .* it has" if name != "a.md" else "no labelled"):
            find_files(str(tmp_path), ["text", "label"])


def test_what_lies_beside_tables_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (
        ("a.csv", COMMAS),
        ("b.json", LINES),
        ("c.xlsx", "PK"),
        ("metadata.json", '{"version": 3}'),
        ("list.json", '["x"]'),
        ("state.json", "[1]"),
        ("NOTES", "{text}"),
    ):
        (tmp_path / name).write_text(content)
    for pattern in (f"{tmp_path}", f"{tmp_path}/*"):
        caplog.clear()
        assert [file.name for file in find_files(pattern, ["text", "label"])] == ["a.csv", "b.json"]
        assert "5 of 7 files at" in caplog.text and "c.xlsx (a spreadsheet: save" in caplog.text


def test_json_that_is_cut_is_no_stray(tmp_path: Path) -> None:
    for name, content in (("a.csv", COMMAS), ("state.json", "{"), ("b.json", LINES[:-4])):
        (tmp_path / name).write_text(content)
    assert len(find_files(str(tmp_path), ["text", "label"])) == 3  # and refused when it is read


def test_a_folder_of_json_alone_is_read(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text('{"body": "x"}')
    assert len(find_files(str(tmp_path), ["text", "label"])) == 2  # and refused by their columns


def test_folders_are_columns(tmp_path: Path) -> None:
    folder = tmp_path / "label=a%2Fb" / "year=__HIVE_DEFAULT_PARTITION__"
    folder.mkdir(parents=True)
    (folder / "a.csv").write_text("text\nx\n")
    (folder / "b.jsonl").write_text('{"text": "y", "label": "own"}')
    columns = {**COLUMNS, "group": "year"}
    tables = [read_table(file, columns) for file in find_files(str(tmp_path), ["text", "label"])]
    rows = pa.concat_tables(table.select(["text", "label", "year"]) for table in tables).to_pylist()
    assert rows == [{"text": "x", "label": "a/b", "year": None}, {"text": "y", "label": "own", "year": None}]
