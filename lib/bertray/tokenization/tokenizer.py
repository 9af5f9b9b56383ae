"""Turn an Arrow text column into flat token ids, offsets, and a reason for each row that cannot be scored.

    ["B.Sc. Physics", null, "Python"]
      -> ids_T       [101, 1038, …, 102, 101, 18750, 102]     int32, all sequences end to end
         offsets_S1  [0, 7, 10]                               int64, sequence s is ids_T[offsets_S1[s]:offsets_S1[s+1]]
         documents_S [0, 2]                                   the document of each sequence
         truncated_N [False, False, False]
         errors      [null, "text is null", null]             a row with an error has no sequence

A sequence is what the model reads at once, special tokens included: the beginning of a document, or one of the
overlapping windows that cover it. A document with several windows stands in documents_S once for each.

Legend: N documents, S sequences, S1 = S + 1, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tokenizers import Tokenizer

from bertray.tokenization.columns import as_text
from bertray.tokenization.ids import TextTokenizer, plain_copy
from bertray.tokenization.windows import cut, offsets, positions


@dataclass(frozen=True)
class Sequences:
    """What a model reads: token ids end to end, and the document of each sequence."""

    ids_T: np.ndarray
    offsets_S1: np.ndarray
    documents_S: np.ndarray

    @property
    def lengths_S(self) -> np.ndarray:
        return np.diff(self.offsets_S1)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets_S1[-1])


@dataclass(frozen=True)
class TokenColumn(Sequences):
    """Token ids of N documents; see the module's example."""

    truncated_N: np.ndarray
    errors: pa.StringArray

    @property
    def num_tokens_N(self) -> np.ndarray:
        """Tokens of each document that the model reads, in all its windows (int64)."""
        return np.bincount(self.documents_S, self.lengths_S, minlength=len(self.errors)).astype(np.int64)


class ColumnTokenizer:
    """A bundle's tokenizer for whole columns.

    Args:
        tokenizer: the reference tokenizer; a copy of it is used.
        max_length: tokens of a sequence, special tokens included.
        stride: tokens by which the windows of a longer document overlap at least; None: truncate it.
        vocabulary_size: embeddings of the model. A document with a token beyond them gets an error. None: it has all.
    """

    def __init__(
        self, tokenizer: Tokenizer, max_length: int, stride: int | None = None, vocabulary_size: int | None = None
    ) -> None:
        encoding = plain_copy(tokenizer).encode("a")
        content = np.flatnonzero(np.array(encoding.special_tokens_mask) == 0)
        self._prefix, self._suffix = encoding.ids[: content[0]], encoding.ids[content[-1] + 1 :]
        self._window = max_length - len(self._prefix) - len(self._suffix)
        self._stride = stride
        added = [] if vocabulary_size is None else [n for n in tokenizer.get_vocab().values() if n >= vocabulary_size]
        self._missing = np.array(added, dtype=np.int32)
        assert stride is None or 0 <= stride < self._window, f"{self._window} tokens fit, the overlap is {stride}"
        self._texts = TextTokenizer(tokenizer, limit=self._window if stride is None else None)

    @property
    def is_fast(self) -> bool:
        """See `TextTokenizer`."""
        return self._texts.is_fast

    def encode(self, texts: pa.Array | pa.ChunkedArray) -> TokenColumn:
        """Tokenize a column of strings, of UTF-8 in bytes, or of a dictionary of these.

        Raises:
            ShardError: the column is of another type.
        """
        strings, errors = as_text(texts)
        contents = self._texts.encode(strings)
        num_tokens_N = np.diff(contents.offsets_N1)
        # Without tokens of its own, every text would get the same label.
        errors = pc.if_else(pc.and_(pa.array(num_tokens_N == 0), errors.is_null()), "text has no tokens", errors)
        if len(self._missing):  # a bundle from before training refused such tokenizers
            places_M = np.flatnonzero(np.isin(contents.ids_T, self._missing))
            rows_M = np.searchsorted(contents.offsets_N1, places_M, side="right") - 1
            if self._stride is None:  # what is cut off is not read
                rows_M = rows_M[places_M - contents.offsets_N1[rows_M] < self._window]
            is_missing_N = pa.array(np.isin(np.arange(len(errors)), rows_M))
            what = "text has a token that the model has no embedding for"
            errors = pc.if_else(pc.and_(is_missing_N, errors.is_null()), what, errors)
        documents_S = np.flatnonzero(errors.is_null().to_numpy(zero_copy_only=False))
        starts_S = contents.offsets_N1[:-1][documents_S]
        lengths_S = num_tokens_N[documents_S]
        if self._stride is None:
            lengths_S = np.minimum(lengths_S, self._window)
            truncated_N = num_tokens_N > self._window
        else:
            cut_S, within_S, lengths_S = cut(lengths_S, self._window, self._stride)
            documents_S, starts_S = documents_S[cut_S], starts_S[cut_S] + within_S
            truncated_N = np.zeros(len(errors), dtype=bool)
        # Lay the sequences end to end, each between the special tokens.
        num_before, num_after = len(self._prefix), len(self._suffix)
        offsets_S1 = offsets(lengths_S + num_before + num_after)
        ids_T = np.empty(offsets_S1[-1], dtype=np.int32)
        ids_T[offsets_S1[:-1, None] + np.arange(num_before)] = self._prefix
        ids_T[offsets_S1[1:, None] - num_after + np.arange(num_after)] = self._suffix
        places_T = positions(offsets_S1[:-1] + num_before, lengths_S)
        ids_T[places_T] = contents.ids_T[positions(starts_S, lengths_S)]
        return TokenColumn(ids_T, offsets_S1, documents_S, truncated_N, errors)
