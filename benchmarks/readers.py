"""Which reader takes labelled files as people bring them? Each case by each library: right, altered or refused.

    python -m benchmarks.readers

DuckDB and polars are no dependencies: install them beside bertray, in an environment of your own. A reader is given the
path alone, with its settings for detection, and must return the texts and labels, or an error. "altered" is the worst:
rows that nobody wrote, without a word. For cases that mean nothing certain a refusal is right.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.json

from benchmarks.results import write_result

Pairs = list[tuple[str | None, str | None]]
PLAIN: Pairs = [("a, b", "x"), ("c", "y")]
QUOTED: Pairs = [('He said "yes", then left', "x"), ("c", "y")]
LINES = '{"text": "a, b", "label": "x"}\n{"text": "c", "label": "y"}\n'
ARRAY = '[{"text": "a, b", "label": "x"},\n {"text": "c", "label": "y"}]'
COMMAS = 'text,label\n"a, b",x\nc,y\n'

# By name: the file's ending, its content, and the rows; None: only a refusal is right.
CASES: dict[str, tuple[str, bytes, Pairs | None]] = {
    "commas": ("csv", COMMAS.encode(), PLAIN),
    "semicolons": ("csv", b"text;label\na, b;x\nc;y\n", PLAIN),
    "tabs in .csv": ("csv", b"text\tlabel\na, b\tx\nc\ty\n", PLAIN),
    "pipes": ("csv", b"text|label\na, b|x\nc|y\n", PLAIN),
    "a line sep=;": ("csv", b"sep=;\r\ntext;label\r\na, b;x\r\nc;y\r\n", PLAIN),
    "blanks behind commas": ("csv", b'label, text\nx, "a, b"\ny, c\n', PLAIN),
    "blank that is text": ("csv", b"label,text\nx, a\ny,c\n", [(" a", "x"), ("c", "y")]),
    "BOM, quoted header": ("csv", '\ufeff"text","label"\n"a, b",x\nc,y\n'.encode(), PLAIN),
    "two BOMs": ("csv", ("\ufeff\ufeff" + COMMAS).encode(), PLAIN),
    "UTF-16 with BOM": ("csv", COMMAS.encode("utf-16"), PLAIN),
    "UTF-16 without BOM": ("csv", COMMAS.encode("utf-16-le"), None),
    "cp1252": ("csv", "text,label\ncafé,x\nc,y\n".encode("cp1252"), None),
    "doubled quotes": ("csv", b'text,label\n"He said ""yes"", then left",x\nc,y\n', QUOTED),
    "backslashed quotes": ("csv", b'text,label\n"He said \\"yes\\", then left",x\nc,y\n', QUOTED),
    "the same, no comma": ("csv", b'text,label\n"He said \\"yes\\"",x\nc,y\n', [('He said "yes"', "x"), ("c", "y")]),
    "backslash at the end": ("csv", b'text,label\n"C:\\dir, D:\\",x\nc,y\n', [("C:\\dir, D:\\", "x"), ("c", "y")]),
    "text behind a quote": ("csv", b'text,label\n"Yes" she said,x\nc,y\n', [('"Yes" she said', "x"), ("c", "y")]),
    "inch marks": ("csv", b'text,label\na 5" pipe,x\nc,y\n', [('a 5" pipe', "x"), ("c", "y")]),
    "quote never closed": ("csv", b'text,label\na,x\n"c,y\nd,x\ne,y\n', None),
    "line breaks in a cell": ("csv", b'text,label\n"a\n\nb",x\nc,y\n', [("a\n\nb", "x"), ("c", "y")]),
    "a row too long": ("csv", b"text,label\na,x\nc,y,z\n", None),
    "a row too short": ("csv", b"text,label\na,x\nc\n", None),
    "NA, None, 007": ("csv", b"text,label\nNA,007\nNone,7\n", [("NA", "007"), ("None", "7")]),
    "dates, booleans": ("csv", b"text,label\n2026-01-05,True\na,1e3\n", [("2026-01-05", "True"), ("a", "1e3")]),
    "JSON Lines": ("json", LINES.encode(), PLAIN),
    "JSON Lines, BOM, CRLF": ("json", ("\ufeff" + LINES).replace("\n", "\r\n").encode(), PLAIN),
    "JSON array": ("json", ARRAY.encode(), PLAIN),
    "JSON, pretty-printed": ("json", "\n".join(json.dumps(one, indent=1) for one in json.loads(ARRAY)).encode(), PLAIN),
    "JSON with NaN": ("json", b'{"text": "a", "label": "x"}\n{"text": "c", "label": NaN}\n', [("a", "x"), ("c", None)]),
    "JSON text like a date": ("json", b'{"text": "2026-01-05", "label": "007"}\n', [("2026-01-05", "007")]),
    "JSON by column": ("json", b'{"text": {"0": "a", "1": "c"}, "label": {"0": "x", "1": "y"}}', None),
    "JSON, commas behind": ("json", LINES.replace("}\n", "},\n").encode(), None),
}


def by_bertray(path: Path) -> Pairs:
    from bertray.formats.files import read_table
    from bertray.storage.location import Location

    return _pairs(read_table(Location.of(str(path)), {"text": "text", "label": "label"}))


def by_csv_module(path: Path) -> Pairs:
    if path.suffix == ".json":
        rows = [json.loads(line) for line in path.read_text("utf-8-sig").splitlines()]
        return [(row["text"], row["label"]) for row in rows]
    text = path.read_text("utf-8-sig")
    dialect = csv.Sniffer().sniff(text)
    return [
        (row["text"] or None, row["label"] or None) for row in csv.DictReader(text.splitlines(True), dialect=dialect)
    ]


def by_pyarrow(path: Path) -> Pairs:
    if path.suffix == ".json":
        return _pairs(pa.json.read_json(path))
    strings = pa.csv.ConvertOptions(column_types={"text": pa.string(), "label": pa.string()}, strings_can_be_null=False)
    return _pairs(
        pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True), convert_options=strings)
    )


def by_duckdb(path: Path) -> Pairs:
    import duckdb

    read = "read_json(?)" if path.suffix == ".json" else "read_csv(?, all_varchar = true, header = true)"
    return _pairs(duckdb.execute(f"SELECT text, label FROM {read}", [str(path)]).to_arrow_table())  # noqa: S608


def by_polars(path: Path) -> Pairs:
    import polars as pl

    if path.suffix == ".json":
        is_array = path.read_bytes().lstrip()[:1] == b"["
        return _pairs((pl.read_json if is_array else pl.read_ndjson)(path).to_arrow())
    return _pairs(pl.read_csv(path, infer_schema=False).to_arrow())


READERS: dict[str, Callable[[Path], Pairs]] = {
    "bertray": by_bertray,
    "csv, json": by_csv_module,
    "pyarrow": by_pyarrow,
    "duckdb": by_duckdb,
    "polars": by_polars,
}


def _pairs(table: pa.Table) -> Pairs:
    columns = ([None if one is None else str(one) for one in table[name].to_pylist()] for name in ("text", "label"))
    return list(zip(*columns, strict=True))


def verdict(read: Callable[[Path], Pairs], path: Path, expected: Pairs | None) -> str:
    """right, refused, or what was returned instead of the rows."""
    try:
        with contextlib.redirect_stderr(None):
            found = read(path)
    except ImportError:
        raise
    except Exception:  # each library has errors of its own
        return "right" if expected is None else "refused"
    return "right" if found == expected else "**altered**"


def main() -> None:
    """Try every case with every reader that is installed, and write the table."""
    logging.disable()
    table: dict[str, dict[str, str]] = {name: {} for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (suffix, content, expected)) in enumerate(CASES.items()):
            path = Path(folder) / f"{number}.{suffix}"
            path.write_bytes(content)
            for reader, read in READERS.items():
                with contextlib.suppress(ImportError):
                    table[name][reader] = verdict(read, path, expected)
    readers = [reader for reader in READERS if reader in table["commas"]]
    lines = [f"| case | {' | '.join(readers)} |", "|---" * (len(readers) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(found[reader] for reader in readers)} |" for name, found in table.items()]
    for word in ("right", "refused", "**altered**"):
        lines.append(f"| {word} of {len(CASES)} | {' | '.join(str(_count(table, one, word)) for one in readers)} |")
    write_result("readers", "labelled-files", "\n".join(lines), {"versions_of_readers": _versions()})


def _count(table: dict[str, dict[str, str]], reader: str, word: str) -> int:
    return sum(found[reader] == word for found in table.values())


def _versions() -> dict[str, str]:
    found = {}
    for package in ("pyarrow", "duckdb", "polars"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


if __name__ == "__main__":
    main()
