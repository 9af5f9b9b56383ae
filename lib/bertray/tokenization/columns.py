"""Columns of text: as they stand in Parquet files, as valid strings, and each text once.

Legend: N texts.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import ShardError


def as_text(column: pa.Array | pa.ChunkedArray) -> tuple[pa.LargeStringArray, pa.StringArray]:
    """The column as valid strings, and for every row null or the reason why it cannot be scored.

    Raises:
        ShardError: the column's type holds no text.
    """
    column = _as_bytes(column)
    not_utf8_N = _not_utf8(column)
    strings = pc.if_else(pa.array(not_utf8_N), pa.scalar(b"", pa.large_binary()), column).cast(pa.large_string())
    errors = pc.case_when(
        pc.make_struct(pa.array(not_utf8_N), pc.is_null(strings), pc.fill_null(_is_empty(strings), False)),
        pa.scalar("text is not UTF-8"),
        pa.scalar("text is null"),
        pa.scalar("text is empty"),
        pa.scalar(None, pa.string()),
    )
    return strings, errors


def distinct(column: pa.Array | pa.ChunkedArray) -> tuple[pa.LargeBinaryArray, pa.Int32Array]:
    """The column's distinct texts, null among them, and for every row the place of its text there.

    Raises:
        ShardError: the column's type holds no text.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    texts, places, num_before = [pa.array([], pa.large_binary())], [np.zeros(0, dtype=np.int64)], 0
    for chunk in chunks:
        texts_of_chunk, places_of_chunk = _distinct(chunk)
        places.append(places_of_chunk.to_numpy() + num_before)
        texts.append(texts_of_chunk)
        num_before += len(texts_of_chunk)
    encoded = pa.concat_arrays(texts).dictionary_encode(null_encoding="encode")
    return encoded.dictionary, encoded.indices.take(pa.array(np.concatenate(places)))


def _distinct(column: pa.Array) -> tuple[pa.LargeBinaryArray, pa.Int32Array]:
    """Its texts, hardly any of them twice, and for every row the place of its text."""
    if not pa.types.is_dictionary(column.type):
        encoded = _as_bytes(column).dictionary_encode(null_encoding="encode")
        return encoded.dictionary, encoded.indices
    # Not decoded: a few long texts may stand in very many rows. Its entries may be unused, null, or there twice.
    used = column.indices.dictionary_encode(null_encoding="encode")
    return _as_bytes(column.dictionary).take(used.dictionary), used.indices


def num_text_bytes(column: pa.Array) -> int:
    """Bytes of all rows' texts, repeated ones counted each time."""
    if pa.types.is_dictionary(column.type):
        lengths_N = pc.binary_length(_as_bytes(column.dictionary)).take(column.indices)
    else:
        lengths_N = pc.binary_length(_as_bytes(column))
    return pc.sum(lengths_N).as_py() or 0


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> pa.LargeBinaryArray:
    if isinstance(column, pa.ChunkedArray):
        check_text_type(column.type)
        return pa.concat_arrays([pa.array([], pa.large_binary()), *map(_as_bytes, column.chunks)])
    if pa.types.is_dictionary(column.type):
        return _as_bytes(column.dictionary).take(column.indices)
    check_text_type(column.type)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    # Large: a column of two billion bytes must not overflow 32-bit offsets in a kernel.
    return column.cast(pa.large_binary())


def check_text_type(kind: pa.DataType) -> None:
    """Refuse a column that cannot hold text.

    Raises:
        ShardError: it holds neither strings nor bytes nor nulls alone.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (
        pa.types.is_null(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
    ):
        raise ShardError(f"the text column is of type {kind}; it must hold strings")


def _is_empty(strings: pa.LargeStringArray) -> pa.BooleanArray:
    return pc.or_(pc.utf8_is_space(strings), pc.equal(pc.binary_length(strings), 0))


def _not_utf8(column: pa.LargeBinaryArray) -> np.ndarray:
    """Which rows are not valid UTF-8; rows are looked at one by one only where the whole column is not."""
    invalid_N = np.zeros(len(column), dtype=bool)
    try:
        column.cast(pa.large_string())
    except pa.ArrowInvalid:
        for row, value in enumerate(column):
            try:
                (value.as_py() or b"").decode("utf-8")
            except UnicodeDecodeError:
                invalid_N[row] = True
    return invalid_N
