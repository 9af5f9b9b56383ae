"""Token ids of texts, without special tokens: those of the reference tokenizer, by a faster one where that is exact.

The reference is the encoder's own tokenizer (Hugging Face's `tokenizers`). nanotoken gives the same ids of WordPiece
tokenizers many times as fast, and refuses tokenizers that it cannot do exactly. It is checked at load, with texts
around which a shortcut could go wrong, and with one text of every call. After one difference the reference does all.

Legend: N texts, T tokens.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from bertray.tokenization.ragged import offsets

try:
    import nanotoken
except ImportError:  # no wheel for this platform
    nanotoken = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

# Texts handed to the reference tokenizer at a time: bounds the Python strings and encodings that live at once.
_CALL_ROWS = 1024
# The text of a call that both tokenise has at most so many bytes.
_CHECKED_BYTES = 10_000
# What texts are made of that a shortcut could take for something else.
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
    """Gives texts their ids; not for use by two threads at once.

    Args:
        tokenizer: the reference; it is copied, so that its own padding and truncation stay as they are.
        limit: texts of more tokens come back with `limit` + 1 of them, the first ones; None: with all.

    Attributes:
        is_fast: whether nanotoken is used, so far.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int | None) -> None:
        self._reference = plain_copy(tokenizer)
        self._num_kept = None if limit is None else limit + 1
        if self._num_kept:
            self._reference.enable_truncation(self._num_kept)
        self._fast = self._faster()
        self.is_fast = self._fast is not None

    def encode(self, strings: pa.LargeStringArray) -> Ids:
        """Ids of every text; of a null, none.

        Args:
            strings: valid UTF-8.
        """
        if not self.is_fast:
            return self._by_reference(strings)
        found = self._by_nanotoken(self._fast, strings)
        if row := self._differing_row(strings, found):
            _log.warning("warning: nanotoken gives row %d of a step other ids than the reference tokenizer", row[0])
            self.is_fast = False
            return self._by_reference(strings)
        return found

    def _by_reference(self, strings: pa.LargeStringArray) -> Ids:
        pieces, lengths = [np.zeros(0, dtype=np.int32)], []
        for start in range(0, len(strings), _CALL_ROWS):
            texts = [text or "" for text in strings[start : start + _CALL_ROWS].to_pylist()]
            for encoding in self._reference.encode_batch_fast(texts, add_special_tokens=False):
                pieces.append(np.array(encoding.ids, dtype=np.int32))
                lengths.append(len(pieces[-1]))
        return Ids(np.concatenate(pieces), offsets(lengths))

    def _by_nanotoken(self, fast: Any, strings: pa.LargeStringArray) -> Ids:
        texts = strings.fill_null("").cast(pa.large_binary()).to_pylist()
        # On this thread: the processor's others are the model's.
        ids_T, offsets_N1 = fast.encode_batch(
            texts, add_special_tokens=False, max_length=self._num_kept, parallel=False
        )
        return Ids(ids_T.view(np.int32), offsets_N1)

    def _faster(self) -> Any:
        """nanotoken's tokenizer; None: it is not installed, refuses this one, or gives other ids."""
        if nanotoken is None:
            return None
        try:
            fast = nanotoken.WordPieceTokenizer.from_json(self._reference.to_str())
        except nanotoken.UnsupportedTokenizerError:
            return None
        texts = pa.array(_checked_texts(), pa.large_string())
        expected, found = self._by_reference(texts), self._by_nanotoken(fast, texts)
        if all(map(np.array_equal, expected, found)):
            return fast
        _log.warning("warning: nanotoken gives other ids than the reference tokenizer, which is used instead")
        return None

    def _differing_row(self, strings: pa.LargeStringArray, found: Ids) -> list[int]:
        """The first row that is no long text, where its ids are not the reference's."""
        for row, text in enumerate(strings[:16].to_pylist()):
            if text and len(text) * 4 <= _CHECKED_BYTES:
                expected = self._reference.encode(text, add_special_tokens=False).ids
                ids = found.ids_T[found.offsets_N1[row] : found.offsets_N1[row + 1]]
                return [] if np.array_equal(ids, expected) else [row]
        return []


@cache
def _checked_texts() -> list[str]:
    """Some two hundred texts: each piece after each other one."""
    return [one + other for one in _PIECES for other in _PIECES]


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without padding and truncation; the original stays as it is."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy
