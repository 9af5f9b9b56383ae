"""Which files of a place are shards: by their names, by a list of paths, and never the dead files of a table.

    archive/day=5/part-0.parquet, part-1.parq   shards
    archive/day=5/part-2                        a shard if it begins as Parquet does: names without an ending are opened
    archive/_SUCCESS, _temporary/part-0         hidden, left out; _day=5/part-0.parquet is a shard
    archive/notes.csv                           another ending, left out
    archive/_delta_log/0.json                   a table: refused, unless --shards lists its files

What is left out is counted. Names that would be one name in the output are refused before anything is scored.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from itertools import pairwise

from bertray.errors import RequestError
from bertray.storage.local import MAX_NAME_BYTES, shortened
from bertray.storage.location import FileInfo, Location, is_hidden
from bertray.storage.outputs import in_parallel

_SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
PREDICTIONS = "predictions"  # the folder of the output
_MAX_KEY_BYTES = 1024  # of S3, without the bucket
_CONVERT = "Shards are Parquet files: write them, for instance with pandas.read_csv(FILE).to_parquet(SHARD)"
# A table's folder holds files that are no longer, or not yet, part of it. Its sign is a folder in it.
_TABLES = {"_delta_log": "Delta", ".hoodie": "Hudi", "_spark_metadata": "Spark streaming", "metadata": "Iceberg"}
_ICEBERG_NAME = re.compile(r"(v\d+|\d{5,}-.*)\.metadata\.json(\.gz)?")  # of a file in Iceberg's `metadata`


@dataclass(frozen=True)
class Listing:
    """The shards of a place, sorted by path, and the paths that were left out."""

    shards: list[FileInfo]
    hidden: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)  # files that are not Parquet, or do not look like it

    def counts(self) -> dict[str, int]:
        """For plans and summaries."""
        return {"num_files_hidden": len(self.hidden), "num_files_other": len(self.other)}

    def left_out(self) -> str:
        """What was left out, with an example of each kind; empty if nothing was."""
        kinds = {"with a name that begins with . or _": self.hidden, f"other than {', '.join(_SUFFIXES)}": self.other}
        return ", ".join(f"{len(paths)} {kind}, such as {min(paths)!r}" for kind, paths in kinds.items() if paths)


def shards_of(source: Location) -> Listing:
    """The shards in a folder, or the one shard that is named.

    Raises:
        RequestError: there are none, or the place is a table, lies in one or holds one.
    """
    _refuse_in_table(source)
    if source.is_file():
        file = source.info()
        if not file.path.lower().endswith(_SUFFIXES) and source.first_bytes(len(_MAGIC)) != _MAGIC:
            raise RequestError(f"--input {source} is no Parquet file. {_CONVERT}")
        return Listing([file])
    files = source.all_files()
    _refuse_tables(source, [file.path for file in files])
    hidden = [file.path for file in files if is_hidden(file.path)]
    seen = [file for file in files if not is_hidden(file.path)]
    unknown = [file for file in seen if _has_no_ending(file.path)]
    starts = in_parallel(lambda file: (source / file.path).first_bytes(len(_MAGIC)), unknown)
    found = [file for file, start in zip(unknown, starts, strict=True) if start == _MAGIC]
    shards = [file for file in seen if file.path.lower().endswith(_SUFFIXES)] + found
    other = {file.path for file in seen} - {shard.path for shard in shards}
    listing = Listing(source.in_order(shards), hidden, sorted(other))
    if not shards and files:
        raise RequestError(f"--input {source} holds no Parquet file, but {listing.left_out()}. {_CONVERT}")
    if not shards:
        wrong = "is an empty folder" if source.exists() else "does not exist"
        raise RequestError(f"--input {source} {wrong}: check the path")
    return listing


def listed_shards(source: Location, file: Location) -> Listing:
    """The shards of a folder that a text file lists: a path or URI a line, relative ones below the folder.

    Raises:
        RequestError: the list names no file, or one that is not there, lies outside of the folder or is named twice.
    """
    try:
        lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"--shards {file} is no UTF-8 text: {error}. It holds a path a line") from error
    there = {one.path: one for one in source.all_files() if not is_hidden(one.path)}
    taken: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        line = re.sub("^file:/(?!/)", "/", line)  # as Hadoop writes them
        place = Location.of(line if "://" in line or line.startswith("/") else f"{source}/{line}")
        path = place.path.removeprefix(f"{source.path}/")
        wrong = (
            f"lies outside of --input {source}"
            if not source.contains(place) or path == place.path
            else f"is not in --input {source}, or is hidden"
            if path not in there
            else f"stands in line {taken[path]}, too"
            if path in taken
            else ""
        )
        if wrong:
            raise RequestError(f"--shards {file}, line {number}: {line!r} {wrong}. A line is a plain path")
        taken[path] = number
    if not taken:
        raise RequestError(f"--shards {file} lists no path: write one a line")
    return Listing(source.in_order(there[path] for path in taken))


def predictions_name(path: str) -> str:
    """Where the predictions of the shard at a path are, relative to the folder of predictions."""
    if path.lower().endswith(_SUFFIXES[0]):
        return path
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{shortened(name, MAX_NAME_BYTES - len(_SUFFIXES[0]))}{_SUFFIXES[0]}"


def squeezed(name: str) -> str:
    """A key of S3 as a path of a file system."""
    return re.sub("/{2,}", "/", name).lstrip("/") if "//" in f"/{name}" else name


def check_names(shards: list[FileInfo], output: Location, *, is_caseless: bool = False) -> None:
    """Raise a RequestError if a shard's name cannot be one of the output, or two shards would be one file there."""
    folder = (output / PREDICTIONS).path
    max_key_bytes = _MAX_KEY_BYTES - len(folder.partition("/")[2].encode()) - 1
    names: dict[str, str] = {}
    for shard in shards:
        path, name = shard.path, predictions_name(shard.path)
        if "/../" in f"/{path}/" or "/./" in f"/{path}/":
            raise RequestError(f"the shard {path!r} has . or .. in its name, which leads elsewhere: rename it")
        # On a disk every part of a path has a limit, on S3 the whole.
        parts, limit = (name.split("/"), MAX_NAME_BYTES) if output.is_local else ([name], max_key_bytes)
        if too_long := [part for part in parts if len(part.encode()) > limit]:
            raise RequestError(
                f"{too_long[0]!r} has {len(too_long[0].encode())} bytes, and a name in {output}/predictions may have "
                f"{limit}: rename the shard, or choose another --output"
            )
        key = unicodedata.normalize("NFC", name).casefold() if is_caseless else squeezed(name)
        if (other := names.setdefault(key, path)) != path:
            raise RequestError(f"the predictions of {other!r} and {path!r} would have one name: rename one of them")
    for name, path in names.items() if output.is_local else ():
        folder = name.rpartition("/")[0]
        while folder and folder not in names:
            folder = folder.rpartition("/")[0]
        if folder:
            raise RequestError(
                f"the predictions of {names[folder]!r} would be a file where those of {path!r} need a folder: rename "
                "one of them"
            )


def _has_no_ending(path: str) -> bool:
    """Whether a name says nothing of its format: `part-0`, and `export.2026` too."""
    _, dot, ending = path.rpartition("/")[2].rpartition(".")
    return not dot or ending.isdigit()


def _refuse_tables(source: Location, paths: list[str]) -> None:
    """Refuse a table at or below a place, by the paths of its files."""
    for path in paths:
        for sign, kind in _TABLES.items():
            folder, is_there, name = f"/{path}".rpartition(f"/{sign}/")
            if is_there and (kind != "Iceberg" or _ICEBERG_NAME.fullmatch(name)):
                raise _table(kind, f"{source}{folder}")


def _refuse_in_table(source: Location) -> None:
    """Refuse a place that lies in a table."""
    above = source.ancestors()
    signs = [place / sign for place in above for sign, kind in _TABLES.items() if kind != "Iceberg"]
    signs += [table / "metadata" for place, table in pairwise([source, *above]) if place.name == "data"]
    for sign, is_there in zip(signs, in_parallel(Location.is_folder, signs), strict=True):
        kind = _TABLES[sign.name]
        if is_there and (kind != "Iceberg" or any(_ICEBERG_NAME.fullmatch(file.path) for file in sign.files())):
            raise _table(kind, str(sign.parent()))


def _table(kind: str, folder: str) -> RequestError:
    return RequestError(
        f"{folder} is {'an' if kind == 'Iceberg' else 'a'} {kind} table: some of its files may be dead. "
        "Write the live ones into a list, and give that with --shards; docs/scoring.md has the lines that write it"
    )
