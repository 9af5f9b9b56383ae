"""Token ids of texts, without special tokens: the reference tokenizer's ids, from a faster tokenizer where it is exact.

The reference is the encoder's own tokenizer (Hugging Face's `tokenizers`). nanotoken gives the same ids for WordPiece
many times as fast. It is compared with the reference at load, on texts that a shortcut could get wrong, and in each
call, on one text. After one difference only the reference is used.

Legend: N texts, T tokens.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from bertray.tokenization.windows import offsets

try:
    import nanotoken
except ImportError:  # no wheel for this platform
    nanotoken = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

# Texts per call of the reference tokenizer: bounds the encodings that are in memory at once.
_CALL_ROWS = 1024
# The text that is compared in each call has at most this size.
_CHECKED_BYTES = 10_000
# Every pair of these is compared at load: pieces of text that a shortcut could get wrong.
_PIECES = (
    "the cat's café",
    "unbelievable ANTIDISESTABLISHMENTARIANISM",
    "e.g. $9.99, https://a.b/c?d=e",
    "[SEP]a[MASK] [sep]",
    "\x00\x07a\x0bb\x0cc\x7f",
    "a\xa0b\u3000c\u2028d\x85e",
    "e\u0301 !\u0301 \u0338= \xad\u200b\u200d\ufeff",
    "ﬁ İ ß ǅ ς Σ ﷺ",
    "각 \u1100\u1161 नमस्ते สวัสดี ሰላม",
    "中文字 㐀\u4dff\u9fff 豈 𠀀 日本語カタカナ x中y",
    "👩\u200d👩\u200d👧 🇩🇪 ☝🏽\ufe0f",
    "– ’ “ … « ¿ ։ །་ \u037e \u1fef \u212a ≠",
    "Привет שלום مرحبا résumé naïve",
    "x" * 100 + " " + "x" * 101 + " " + "é" * 101,
    "\ue000\u0378\ufffd\ufffe\U000e0001",
)


class Ids(NamedTuple):
    """Token ids of N texts end to end."""

    ids_T: np.ndarray  # int32
    offsets_N1: np.ndarray  # int64


class TextTokenizer:
    """Turns texts into ids; one thread at a time.

    Args:
        tokenizer: the reference; it is copied, so that its own padding and truncation do not change.
        limit: a longer text yields its first `limit` + 1 ids; None: all.

    Attributes:
        is_fast: nanotoken is in use; False for good after the first difference.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int | None) -> None:
        self._reference = plain_copy(tokenizer)
        self._num_kept = None if limit is None else limit + 1
        if self._num_kept:
            self._reference.enable_truncation(self._num_kept)
        self._fast = self._faster()
        self.is_fast = self._fast is not None

    def encode(self, strings: pa.LargeStringArray) -> Ids:
        """The ids of each text; none for a null."""
        if self.is_fast:
            found = self._by_nanotoken(self._fast, strings)
            row = self._differing_row(strings, found)
            if row is None:
                return found
            _log.warning("warning: nanotoken gives row %d of a step other ids than the reference tokenizer", row)
            self.is_fast = False
        return self._by_reference(strings)

    def _by_reference(self, strings: pa.LargeStringArray) -> Ids:
        pieces = [np.zeros(0, dtype=np.int32)]
        for start in range(0, len(strings), _CALL_ROWS):
            texts = strings[start : start + _CALL_ROWS].fill_null("").to_pylist()
            encodings = self._reference.encode_batch_fast(texts, add_special_tokens=False)
            pieces += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        return Ids(np.concatenate(pieces), offsets([len(piece) for piece in pieces[1:]]))

    def _by_nanotoken(self, fast: Any, strings: pa.LargeStringArray) -> Ids:
        texts = strings.fill_null("").cast(pa.large_binary()).to_pylist()
        # On this thread: the model uses the other cores.
        ids_T, offsets_N1 = fast.encode_batch(
            texts, add_special_tokens=False, max_length=self._num_kept, parallel=False
        )
        return Ids(ids_T.view(np.int32), offsets_N1)

    def _faster(self) -> Any:
        """nanotoken's tokenizer; None if it is not installed, does not support this one, or gives other ids."""
        if nanotoken is None:
            return None
        try:
            fast = nanotoken.WordPieceTokenizer.from_json(self._reference.to_str())
        except nanotoken.UnsupportedTokenizerError:
            return None
        texts = pa.array([one + other for one in _PIECES for other in _PIECES], pa.large_string())
        if all(map(np.array_equal, self._by_reference(texts), self._by_nanotoken(fast, texts))):
            return fast
        _log.warning("warning: nanotoken gives other ids than the reference tokenizer, which is used instead")
        return None

    def _differing_row(self, strings: pa.LargeStringArray, found: Ids) -> int | None:
        """The row of the first short text, if its ids differ from the reference's."""
        for row, text in enumerate(strings[:16].to_pylist()):
            if text and len(text) * 4 <= _CHECKED_BYTES:
                expected = self._reference.encode(text, add_special_tokens=False).ids
                ids = found.ids_T[found.offsets_N1[row] : found.offsets_N1[row + 1]]
                return None if np.array_equal(ids, expected) else row
        return None


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy of the tokenizer without padding and truncation."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
