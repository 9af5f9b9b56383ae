"""Parquet and Arrow IPC files; class ids become the names that Hugging Face's `datasets` keeps in their metadata.

    label [0, 2, -1], {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}}}
      -> label ["a", "c", null]

A folder of `save_to_disk` has such Arrow files, named in order in state.json, and the metadata in dataset_info.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.storage.location import Location

LIST_TYPES = (pa.ListType, pa.LargeListType, pa.FixedSizeListType, pa.ListViewType, pa.LargeListViewType)
_INFO_FILE = "dataset_info.json"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream since 2019
_SPLITS_FILE, _STATE_FILE = MARKS = "dataset_dict.json", "state.json"


def parse_columnar(
    source: Any, is_parquet: bool, file: Location, columns: list[str], check: Callable[[list[str]], None]
) -> pa.Table:
    """The wanted columns that the file has; `check` is called with its names first.

    Raises:
        RequestError: a class id has no name, or the rows of a saved data set are chosen by another file.
    """
    if is_parquet:
        parquet = pq.ParquetFile(source)
        check(parquet.schema_arrow.names)
        table = parquet.read([name for name in columns if name in parquet.schema_arrow.names], use_threads=False)
        features = _features(parquet.schema_arrow)
    else:
        is_stream = source.read(6) != b"ARROW1"
        source.seek(max(0, source.seek(0, 2) - len(_END)))
        if is_stream and not source.read().endswith(_END):
            raise ValueError("it has no end mark")
        source.seek(0)
        with (pa.ipc.open_stream if is_stream else pa.ipc.open_file)(source) as reader:
            check(reader.schema.names)
            table = reader.read_all().select([name for name in columns if name in reader.schema.names])
        if _content(file.parent() / _STATE_FILE).get("_indices_files"):
            raise RequestError(
                f"{file.parent()} was saved after its rows were filtered, sorted or shuffled, and its index of them is "
                "not read: call flatten_indices() of the data set before save_to_disk()"
            )
        features = _features(reader.schema) or _content(file.parent() / _INFO_FILE).get("features") or {}
    for position, name in enumerate(table.column_names):
        if names := _class_names(features.get(name)):
            named = _named(table[name], names, f"column {name!r} of {file}")
            table = table.set_column(position, name, named)
    return table


def saved_files(mark: Location) -> list[Location]:
    """The files of a saved data set, in order, from its state.json; none if that is something else.

    Raises:
        RequestError: `mark` stands for several splits, which would be mixed.
    """
    folder, content = mark.parent(), _content(mark)
    if mark.name == _SPLITS_FILE:
        places = {"train": "--input", "validation": "--validation", "test": "--test"}
        names = content.get("splits") or []
        given = " ".join(f"{places.get(name, '--input')} {folder / name}" for name in names)
        raise RequestError(f"{folder} holds several splits of a DatasetDict. Name each: {given}")
    files = content.get("_data_files") or []
    if not all(isinstance(one, dict) and isinstance(one.get("filename"), str) for one in files):
        raise RequestError(f"{mark} does not name the files of the data set: save it again with save_to_disk()")
    return [folder / one["filename"] for one in files]


def _content(file: Location) -> dict[str, Any]:
    """The object that a JSON file holds; an empty one if there is no such file, or something else of its name."""
    try:
        found = json.loads(file.read_bytes()) if file.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict) and file.name == _INFO_FILE:  # it may have told the names of classes
        raise RequestError(f"{file} is no JSON object, and tells what the rows beside it mean: copy it again")
    return found if isinstance(found, dict) else {}


def _features(schema: pa.Schema) -> dict[str, Any]:
    found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    info = found.get("info") if isinstance(found, dict) else None
    return (info or {}).get("features") or {}


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them: [F], or {"feature": F, "_type": "List"}; else None."""
    while isinstance(feature, list) or (isinstance(feature, dict) and "feature" in feature):
        feature = feature[0] if isinstance(feature, list) else feature["feature"]
    return feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None


def _named(column: pa.ChunkedArray, names: list[str], what: str) -> pa.ChunkedArray:
    """The name of each id; null of -1, which is no class."""
    if isinstance(column.type, LIST_TYPES):
        return list_map(column, lambda values: _named(values, names, what))
    is_whole = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not is_whole:
        return column
    ids = pc.if_else(pc.is_nan(column), None, column) if pa.types.is_floating(column.type) else column
    ids = ids.cast(pa.int64())
    bounds = pc.min_max(ids).as_py()
    for found in (bounds["min"], bounds["max"]):
        if found is not None and not -1 <= found < len(names):
            raise RequestError(
                f"{what} holds the class id {found}, and its ClassLabel has {len(names)} names: correct the ids, or "
                "add names"
            )
    return pc.take(pa.array(names, pa.string()), pc.if_else(pc.equal(ids, -1), None, ids))


def list_map(column: pa.ChunkedArray, convert: Callable[[pa.ChunkedArray], pa.ChunkedArray]) -> pa.ChunkedArray:
    """The same lists of other values, one a value."""
    lists = column.combine_chunks()
    offsets = np.append(0, np.cumsum(pc.list_value_length(lists).fill_null(0))).astype(np.int32)
    values = convert(pa.chunked_array([pc.list_flatten(lists)])).combine_chunks()
    return pa.chunked_array([pa.ListArray.from_arrays(offsets, values, mask=lists.is_null())])
