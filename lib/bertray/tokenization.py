"""An Arrow text column becomes flat token ids, offsets, and a reason for every row that has no text to score.

    ["B.Sc. Physics", null, "Python"]
      -> ids_T      [101, 1038, …, 102, 101, 18750, 102]      int32, all documents end to end
         offsets_N1 [0, 7, 7, 10]                             int64, document n is ids_T[offsets_N1[n]:offsets_N1[n+1]]
         truncated_N [False, False, False]
         errors      [null, "text is null", null]             a row with an error has no tokens

Legend: N documents, N1 = N + 1, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from bertray.errors import ShardError

# Texts handed to the tokenizer at a time: bounds the Python strings and encodings that live at once.
_CALL_ROWS = 1024


@dataclass(frozen=True)
class TokenColumn:
    """Token ids of N documents; see the module's example."""

    ids_T: np.ndarray
    offsets_N1: np.ndarray
    truncated_N: np.ndarray
    errors: pa.StringArray

    @property
    def lengths_N(self) -> np.ndarray:
        return np.diff(self.offsets_N1)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets_N1[-1])


class ColumnTokenizer:
    """A bundle's tokenizer applied to whole columns.

    Args:
        tokenizer: the reference tokenizer; it is copied, so that its own padding and truncation stay as they are.
        max_length: tokens a document is cut to, special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> TokenColumn:
        """Tokenise a column.

        Args:
            texts: string, large_string, string_view, binary (UTF-8), or a dictionary of one of these.

        Raises:
            ShardError: the column is of another type.
        """
        strings, errors = as_text(texts)
        pieces: list[np.ndarray] = []
        lengths_N = np.zeros(len(strings), dtype=np.int64)
        truncated_N = np.zeros(len(strings), dtype=bool)
        rows = np.flatnonzero(errors.is_null().to_numpy(zero_copy_only=False))
        for start in range(0, len(rows), _CALL_ROWS):
            part = rows[start : start + _CALL_ROWS]
            encodings = self._tokenizer.encode_batch_fast(strings.take(pa.array(part)).to_pylist())
            for row, encoding in zip(part, encodings, strict=True):
                pieces.append(np.array(encoding.ids, dtype=np.int32))
                lengths_N[row] = len(pieces[-1])
                truncated_N[row] = bool(encoding.overflowing)
        ids_T = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
        return TokenColumn(ids_T, np.concatenate([[0], np.cumsum(lengths_N)]), truncated_N, errors)


def as_text(column: pa.Array | pa.ChunkedArray) -> tuple[pa.LargeStringArray, pa.StringArray]:
    """The column as valid strings, and for every row null or the reason why it cannot be scored.

    Raises:
        ShardError: the column's type holds no text.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    check_text_type(column.type)
    if pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())
    # Large: a column of two billion bytes must not overflow 32-bit offsets in a kernel.
    column = column.cast(pa.large_binary())
    not_utf8_N = _not_utf8(column)
    strings = pc.if_else(pa.array(not_utf8_N), pa.scalar(b"", pa.large_binary()), column).cast(pa.large_string())
    errors = pc.case_when(
        pc.make_struct(
            pa.array(not_utf8_N),
            pc.is_null(strings),
            pc.fill_null(pc.equal(pc.utf8_trim_whitespace(strings), ""), False),
        ),
        pa.scalar("text is not UTF-8"),
        pa.scalar("text is null"),
        pa.scalar("text is empty"),
        pa.scalar(None, pa.string()),
    )
    return strings, errors


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
