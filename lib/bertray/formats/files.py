"""Which files are meant, their format and encoding, and the columns that their folders are.

1. A pattern becomes files:        "cv/"                            -> cv/a.csv, cv/b.jsonl.gz, cv/c.parquet
2. A file's format is told:        by its ending, or by its first bytes, which are right if both differ
3. A file becomes a table:         of the wanted columns
4. Folders become columns:         "label=billing/part-0.parquet"   -> label="billing" in every row
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import io
import logging
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from bertray.errors import RequestError, listed
from bertray.formats.columnar import MARKS, parse_columnar, saved_files
from bertray.formats.delimited import parse_delimited
from bertray.formats.json_rows import is_stray, parse_json
from bertray.storage.location import Location

_log = logging.getLogger(__name__)

FORMATS_HELP = "CSV (.csv, .tsv), JSON (.jsonl, .ndjson, .json), each also .gz or .zst, .parquet, and Arrow (.arrow)"
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_READ = ("parquet", "arrow", "json", ",", "\t")
# By ending or first bytes: what is read (text by its delimiter), and what else there is, with how to export it.
_FORMATS: dict[tuple[str | bytes, ...], str] = {
    (".parquet", ".parq", ".pq", b"PAR1"): "parquet",
    (".arrow", ".feather", b"ARROW1", b"\xff\xff\xff\xff"): "arrow",
    (".jsonl", ".ndjson", ".json"): "json",
    (".csv",): ",",
    (".tsv",): "\t",
    (".xlsx", ".xlsm", ".xls", ".ods", ".numbers", b"\xd0\xcf\x11\xe0"): "a spreadsheet: save the sheet as CSV (UTF-8)",
    (b"PK\x03\x04",): "a spreadsheet or an archive: save the sheet as CSV (UTF-8), or unpack it",
    (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", b"BZh", b"\xfd7zXZ"): "an archive: unpack it",
    (b"\x1f\x8b", b"(\xb5/\xfd"): "compressed: add .gz or .zst to its name",
    (".orc", b"ORC"): "an ORC file: pyarrow.parquet.write_table(pyarrow.orc.read_table(FILE), NEW) makes it Parquet",
    (".avro", b"Obj\x01"): "an Avro file: COPY (FROM read_avro(FILE)) TO NEW in DuckDB makes it Parquet",
    (".pkl", ".pickle", ".h5", ".dta", ".sav", ".rds", b"FEA1"): "a data frame: load it, and save it as Parquet or CSV",
    (".db", ".sqlite", ".sqlite3", ".duckdb", b"SQLite"): "a database: export the table as CSV",
    (".txt",): "text without an ending that tells its columns: if it is a table, name it .csv or .tsv",
    (b"version https://git-lfs",): "a pointer of Git LFS: fetch the content with git lfs pull",
}
_MARKS = [(mark, what) for marks, what in _FORMATS.items() for mark in marks]
_SAVED = (".arrow", ".json")  # what save_to_disk writes
_HEAD_BYTES = 32

# UTF-32 before UTF-16, whose mark begins it.
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_LE: "utf-16", codecs.BOM_BE: "utf-16"}
_MAX_NAME_CHARS = 60
_PROBED_BYTES = 1 << 20


def find_files(pattern: str, columns: list[str]) -> list[Location]:
    """The files at a path, folder or glob, sorted; those of a saved data set in its order.

    Of several files, those of no known format and JSON without a wanted column are left out, with a warning.

    Raises:
        RequestError: there are none, or they are several splits of a saved data set.
    """
    place = Location.of(pattern)
    if place.is_file():
        return [place]
    there = [
        file
        for found in (place.glob() if glob.has_magic(place.path) and not place.exists() else [place])
        for file in ([found] if found.is_file() else [found / info.path for info in found.files()])
    ]
    for mark in [file for file in there if file.name in MARKS]:
        if saved := saved_files(mark):
            folder = mark.parent()
            there = [file for file in there if file.parent() != folder or not file.name.endswith(_SAVED)] + saved
    formats = {file: _format(file.name, b"" if "." in file.name else _head(file, _HEAD_BYTES)) for file in there}
    files = [file for file, kind in formats.items() if kind in _READ]
    jsons = [file for file in files if file.name.endswith(".json")]
    strays = [file for file in jsons if is_stray(_head(file, _PROBED_BYTES), columns)]
    if len(strays) < len(files):  # else these are the files that are meant, and their columns the error
        formats |= dict.fromkeys(strays, "no rows with the columns")
        files = [file for file in files if formats[file] in _READ]
    others = [file for file in there if formats[file] not in _READ]
    named = "; ".join(f"{file.name} ({formats[file] or 'unknown'})" for file in others[:3])
    if not files:
        has = f": it has {named}" if others else ""
        raise RequestError(f"no labelled files at {pattern}{has}. Give a file, a folder or a glob of {FORMATS_HELP}")
    if others:
        _log.warning("warning: %d of %d files at %s are not read: %s", len(others), len(there), pattern, named)
    return files


def read_table(file: Location, columns: dict[str, str], encoding: str | None = None) -> pa.Table:
    """The wanted columns of a file, of the types that it has.

    Args:
        columns: the wanted ones, by the `NAME` of the option `--NAME-column` that chose them.
        encoding: of text without a BOM; None: UTF-8.

    Raises:
        RequestError: the file cannot be parsed, or has a wanted column not exactly once.
    """
    folders = folder_columns(file)

    def check(found: list[str]) -> None:
        for option, name in columns.items():
            num_found = found.count(name)
            if num_found == 1 or (not num_found and name in folders):
                continue
            named = listed((f"{one:.{_MAX_NAME_CHARS}}" for one in found), 20) or "none"
            raise RequestError(
                f"{file} has {num_found or 'no'} column{'s' * (num_found > 1)} {name!r}; it has {named}. Choose with "
                f"--{option}-column"
            )

    wanted = list(dict.fromkeys(columns.values()))
    try:
        with file.open() as stream:
            table = _parse(stream, file, wanted, encoding, check)
    except RequestError:
        raise
    except (pa.ArrowException, csv.Error, OSError, ValueError) as error:
        raise RequestError(f"cannot read {file}: {error}. Is it whole? Copy or write it again") from error
    for name in wanted:
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(folders[name], pa.string()), table.num_rows))
    return table


def folder_columns(file: Location) -> dict[str, str | None]:
    """The columns that the folders above a file are, as Hive and Spark write them: `label=billing/part-0.parquet`."""
    pairs = [part.partition("=") for part in file.path.split("/")[:-1]]
    return {
        unquote(name): None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
        for name, equals, value in pairs
        if name and equals
    }


def _parse(stream: Any, file: Location, wanted: list[str], encoding: str | None, check: Any) -> pa.Table:
    for suffix, codec in _COMPRESSIONS.items():
        if file.name.lower().endswith(suffix):
            stream = pa.BufferReader(pa.CompressedInputStream(pa.BufferReader(stream.read()), codec).read())
    kind = _format(file.name, stream.read(_HEAD_BYTES))
    stream.seek(0)
    if kind not in _READ:
        raise RequestError(f"{file} is {kind}" if kind else f"{file} has no known format. Accepted are {FORMATS_HELP}")
    if kind in ("parquet", "arrow"):
        return parse_columnar(stream, kind == "parquet", file, wanted, check)
    content = stream.read()
    encoding = _encoding(content, file, encoding)
    if kind == "json":
        return parse_json(content.decode(encoding).lstrip("\ufeff"), file, wanted, check)
    lines = list(io.TextIOWrapper(io.BytesIO(content), encoding, newline=""))
    lines[:1] = [line.lstrip("\ufeff") for line in lines[:1]]
    return parse_delimited(lines, kind, file, wanted, check)


def _format(name: str, head: bytes = b"") -> str | None:
    """One of `_FORMATS`: the first bytes are right if the ending differs. None: unknown."""
    stem = name.lower().removesuffix(".gz").removesuffix(".zst")
    told = [what for mark, what in _MARKS if isinstance(mark, bytes) and head.startswith(mark)]
    told += [what for mark, what in _MARKS if isinstance(mark, str) and stem.endswith(mark)]
    return told[0] if told else None


def _head(file: Location, num_bytes: int) -> bytes:
    with file.open() as stream:
        return bytes(stream.read(num_bytes))


def _encoding(content: bytes, file: Location, given: str | None) -> str:
    """The encoding of a text file, after a look at all of it."""
    found = next((name for bom, name in _BOMS.items() if content.startswith(bom)), None)
    encoding = found or given or "utf-8"
    try:
        text = content.decode(encoding)
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line, around = content[:start].count(b"\n") + 1, content[max(0, start - 20) : start + 20]
        raise RequestError(
            f"cannot read line {line} of {file}, which is not {encoding.upper()}: see {around!r}. Save it as UTF-8, or "
            "name its encoding with --encoding, as cp1252 (Western Windows), gb18030 or shift_jis"
        ) from error
    if "\0" in text[:4]:
        raise RequestError(
            f"cannot read {file}, which is not {encoding.upper()}: it has zero bytes. Save it as UTF-8, or if it is "
            "UTF-16 without a byte order mark, say --encoding utf-16-le or utf-16-be"
        )
    if given and not found and not content.isascii():
        with contextlib.suppress(UnicodeDecodeError):
            content.decode()
            _log.warning("warning: %s is read as %s, as --encoding says, but it is valid UTF-8", file, encoding)
    return encoding
