"""Columns of text as files hold them: turned into valid strings, and reduced to distinct texts.

Legend: N texts.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bertray.errors import RequestError, ShardError

# Characters that show nothing, for classes of regular expressions: Unicode's Default_Ignorable_Code_Point, interlinear
# annotation, and the blank of Braille. Joiners, variation selectors and the tags of flags change how others look.
JOINERS = "\u180b-\u180d\u180f\u200c\u200d\ufe00-\ufe0f\U000e0100-\U000e01ef"
ZERO_WIDTH = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufeff"
    "\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e001f\U000e0080-\U000e00ff"
    "\U000e01f0-\U000e0fff"
)
_VISIBLE = rf"[^\s\p{{Z}}\p{{Cc}}\x{{e0020}}-\x{{e007f}}{JOINERS}{ZERO_WIDTH}]"

_MAX_EXACT_FLOAT = 2**53
_REMOVED = re.compile(rf"[\0-\x1f\x7f-\x9f{ZERO_WIDTH}]")

TEXT_TYPES = {pa.null(), pa.string(), pa.large_string(), pa.string_view()}
TEXT_TYPES |= {pa.binary(), pa.large_binary(), pa.binary_view()}


def as_text(column: pa.Array | pa.ChunkedArray) -> tuple[pa.LargeStringArray, pa.StringArray]:
    """The column as valid strings, and for each row null or the reason why it cannot be scored.

    Raises:
        ShardError: the column's type holds no text.
    """
    strings, is_invalid_N = as_utf8(column)
    conditions = pc.make_struct(is_invalid_N, pc.is_null(strings), is_blank(strings))
    return strings, pc.case_when(conditions, "text is not UTF-8", "text is null", "text is empty")


def as_utf8(column: pa.Array | pa.ChunkedArray) -> tuple[pa.LargeStringArray, pa.BooleanArray]:
    """The column as strings, and whether each is not valid UTF-8, and therefore empty.

    Raises:
        ShardError: the column's type holds no text.
    """
    column = _as_bytes(column)
    is_invalid_N = pa.array(_is_not_utf8(column))
    return pc.if_else(is_invalid_N, pa.scalar(b"", pa.large_binary()), column).cast(pa.large_string()), is_invalid_N


def as_strings(column: pa.ChunkedArray, what: str, *, is_text: bool = False) -> pa.ChunkedArray:
    """Strings, or bytes of UTF-8; without `is_text` also whole numbers, dates and booleans.

    Raises:
        RequestError: they are of another type, or not valid UTF-8; it names `what`.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):  # a gap among numbers; a data frame's column without a value is one of floats too
        column = column.cast(pa.float64())
        column = pc.if_else(pc.is_nan(column), None, column)
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column), pa.string())])
    if kind in TEXT_TYPES:
        strings, is_invalid_N = as_utf8(column)
        if row := pc.index(is_invalid_N, True).as_py() + 1:
            raise RequestError(f"row {row - 1} of {what}, counted from 0, is not valid UTF-8: write it as UTF-8")
        return pa.chunked_array([strings.cast(pa.string())])
    if is_text:
        raise RequestError(f"{what} is of type {kind}; it must hold strings")
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        column = _as_whole_numbers(column, what)
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_temporal(kind)):
        raise RequestError(f"{what} is of type {kind}; it must hold strings, whole numbers, dates or booleans")
    return column.cast(pa.string())


def _as_whole_numbers(column: pa.ChunkedArray, what: str) -> pa.ChunkedArray:
    is_float = pa.types.is_floating(column.type)
    if is_float and pc.max(pc.abs(column)).as_py() > _MAX_EXACT_FLOAT:
        raise RequestError(
            f"{what} holds numbers above 2**53 as floats, which are no longer exact: write them as integers or strings"
        )
    try:
        return column.cast(pa.int64() if is_float else pa.decimal256(76, 0))
    except pa.ArrowInvalid as error:
        raise RequestError(
            f"{what} holds fractions, not classes (to predict numbers, say --regression): {error}"
        ) from error


def one_line(text: str) -> str:
    """Its visible characters, composed (NFC), with one blank for any white space: what two names are compared by."""
    visible = _REMOVED.sub("", " ".join(text.split()))
    return " ".join(unicodedata.normalize("NFC", visible).split()).strip("\u200c\u200d")


def is_blank(strings: pa.Array | pa.ChunkedArray) -> pa.BooleanArray | pa.ChunkedArray:
    """Whether each string shows nothing: it is empty, or of white space, controls and zero-width characters alone."""
    return pc.invert(pc.match_substring_regex(strings, _VISIBLE))


def distinct(column: pa.ChunkedArray) -> tuple[pa.LargeBinaryArray, pa.Int32Array]:
    """The column's distinct texts, null among them, and for each row the position of its text there."""
    texts, positions, num_before = [pa.array([], pa.large_binary())], [np.zeros(0, dtype=np.int64)], 0
    for chunk in column.chunks:
        # A dictionary is not decoded, because a few long texts may stand in many rows. Its entries may be unused, null
        # or repeated.
        is_dictionary = pa.types.is_dictionary(chunk.type)
        encoded = (chunk.indices if is_dictionary else _as_bytes(chunk)).dictionary_encode(null_encoding="encode")
        texts.append(_as_bytes(chunk.dictionary).take(encoded.dictionary) if is_dictionary else encoded.dictionary)
        positions.append(encoded.indices.to_numpy() + num_before)
        num_before += len(texts[-1])
    encoded = pa.concat_arrays(texts).dictionary_encode(null_encoding="encode")
    return encoded.dictionary, encoded.indices.take(pa.array(np.concatenate(positions)))


def num_text_bytes(column: pa.Array) -> int:
    """Bytes of the texts of all rows; repeated texts count each time."""
    is_dictionary = pa.types.is_dictionary(column.type)
    lengths = pc.binary_length(_as_bytes(column.dictionary if is_dictionary else column))
    return pc.sum(lengths.take(column.indices) if is_dictionary else lengths).as_py() or 0


def check_text_type(kind: pa.DataType) -> None:
    """Refuse a column that cannot hold text.

    Raises:
        ShardError: the type is neither string, binary nor null, nor a dictionary of these.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in TEXT_TYPES:
        raise ShardError(f"the text column is of type {kind}; it must hold strings")


def _as_bytes(column: pa.Array | pa.ChunkedArray) -> pa.LargeBinaryArray:
    check_text_type(column.type)
    if isinstance(column, pa.ChunkedArray):
        return pa.concat_arrays([pa.array([], pa.large_binary()), *map(_as_bytes, column.chunks)])
    if pa.types.is_dictionary(column.type):
        return _as_bytes(column.dictionary).take(column.indices)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    return column.cast(pa.large_binary())  # large: 32-bit offsets overflow at two billion bytes


def _is_not_utf8(column: pa.LargeBinaryArray) -> np.ndarray:
    try:
        column.cast(pa.large_string())
        return np.zeros(len(column), dtype=bool)
    except pa.ArrowInvalid:  # only then look at each row
        texts = (text or b"" for text in column.to_pylist())
        return np.array([text.decode(errors="ignore").encode() != text for text in texts])
