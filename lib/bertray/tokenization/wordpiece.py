"""WordPiece over whole columns: every distinct word is tokenised once, by the reference tokenizer.

    ["The cat.", "the cat"]
      1. classes  every byte is white space, punctuation or part of a word       one table look-up a byte
      2. words    The cat . the cat                                              where the class changes, and every
                                                                                 punctuation mark and ideograph
      3. distinct [The, cat, .] and [0, 1, 2, 3, 1]                              Arrow's dictionary encoding
      4. ids      The -> 1996, cat -> 4937, . -> 1012                            remembered, or from the reference
      5. gather   ids_T [1996, 4937, 1012, 1996, 4937], offsets_N1 [0, 3, 5]

Why the ids are those of the reference: BERT's normalizer works character by character (cleaning, spaces around
ideographs, canonical decomposition, dropped accents, lower case), its pre-tokenizer splits at white space and around
every punctuation mark, and its model tokenises word by word. ASCII white space, ASCII punctuation and ideographs are
starters in canonical decomposition, so that text can be cut around them before all of that. What is cut off is not
interpreted here: the reference normalises and tokenises it, or, where it is ASCII letters and digits, to which all
steps but lower case do nothing, its model alone. Texts that contain an added token such as [SEP] are
not cut at all, for the reference looks for those first.

Legend: N documents, T tokens, W words, U distinct words, X bytes.
"""

from __future__ import annotations

import json
from itertools import chain, repeat
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from bertray.tokenization.columns import WHITE_SPACE, chunks, find_bytes, heads, text_bytes
from bertray.tokenization.ragged import offsets, positions

_SPACE, _PART, _ALONE, _REST = 0, 1, 2, 3  # classes of bytes; _REST: of a character that stands alone, but its first
_PUNCTUATION = bytes([*range(33, 48), *range(58, 65), *range(91, 97), *range(123, 127)])

_CHUNK_BYTES = 1 << 22  # text worked on at a time: the arrays of a chunk stay near the processor
_MAX_KNOWN_WORDS, _MAX_KNOWN_BYTES = 1 << 19, 1 << 25  # remembered across calls, about 100 MB; then all are forgotten
_JOINED_WORDS = 128  # words handed to the reference as one text
# Where no more than `limit` tokens of a text are wanted, so many bytes a token are looked at first.
_BYTES_PER_TOKEN = 8


class Tokens(NamedTuple):
    """Token ids of N texts end to end, without special tokens."""

    ids_T: np.ndarray  # int32
    offsets_N1: np.ndarray  # int64


class ColumnWordPiece:
    """A WordPiece tokenizer applied to whole columns; see the module's text. Not for use by two threads at once.

    Args:
        tokenizer: one that `supports` accepts; used without padding and truncation.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._reference = plain_copy(tokenizer)
        self._added = [token.content.encode() for token in self._reference.get_added_tokens_decoder().values()]
        self._classes = np.full(256, _PART, dtype=np.uint8)
        self._classes[list(WHITE_SPACE)] = _SPACE
        self._classes[list(_PUNCTUATION)] = _ALONE
        self._class_table = self._classes.tobytes()
        normalizer = json.loads(tokenizer.to_str())["normalizer"]
        self._splits_ideographs = bool(normalizer["handle_chinese_chars"])
        self._lowercases = bool(normalizer["lowercase"])
        self._model = self._reference.model
        self._vocabulary = self._reference.get_vocab(with_added_tokens=False)
        self._max_characters = self._model.max_input_chars_per_word
        self._separator = self._find_separator()
        self._known = _KnownWords()

    @staticmethod
    def supports(tokenizer: Tokenizer) -> bool:
        """Whether ids can be promised to be those of this tokenizer: BERT's normalizer, splits and model."""
        parts = json.loads(tokenizer.to_str())
        kinds = [(parts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
        added = parts["added_tokens"]
        return (
            kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"]
            # An added token that is sought after normalization can be met in many spellings; one with white space
            # could lie across a cut.
            and not any(token["normalized"] or len(token["content"].split()) != 1 for token in added)
            and len(added) <= 64
        )

    def encode(self, strings: pa.LargeStringArray, limit: int | None = None) -> Tokens:
        """Ids of every text, as the reference gives them without special tokens; of a null, none.

        Args:
            strings: valid UTF-8.
            limit: where given, texts of more tokens may come back with any number of them above the limit, the first
                ones, which spares the reading of the rest.
        """
        if limit is None:
            return self._encode(strings)
        beginnings, is_cut_N = heads(strings, (limit + 1) * _BYTES_PER_TOKEN)
        tokens = self._encode(beginnings)
        # A head can hold too few tokens to say that the limit is passed: long words, or characters that are dropped.
        again_N = is_cut_N & (np.diff(tokens.offsets_N1) <= limit)
        if not again_N.any():
            return tokens
        return _replace(tokens, np.flatnonzero(again_N), self._encode(strings.filter(pa.array(again_N))))

    def _encode(self, strings: pa.LargeStringArray) -> Tokens:
        parts = [self._encode_chunk(strings[start:stop]) for start, stop in chunks(strings, _CHUNK_BYTES)]
        if not parts:
            return Tokens(np.zeros(0, dtype=np.int32), offsets([]))
        lengths_N = np.concatenate([np.diff(part.offsets_N1) for part in parts])
        return Tokens(np.concatenate([part.ids_T for part in parts]), offsets(lengths_N))

    def _encode_chunk(self, strings: pa.LargeStringArray) -> Tokens:
        text_X, offsets_N1 = text_bytes(strings)
        tokens = self._encode_words(text_X, offsets_N1)
        rows = self._rows_with_added_tokens(text_X, offsets_N1)
        if len(rows) == 0:
            return tokens
        ids = [encoding.ids for encoding in self._ask(strings.take(pa.array(rows)).to_pylist())]
        exact = Tokens(np.array([one for text in ids for one in text], dtype=np.int32), offsets(list(map(len, ids))))
        return _replace(tokens, rows, exact)

    def _encode_words(self, text_X: np.ndarray, offsets_N1: np.ndarray) -> Tokens:
        starts_W, words = self._split(text_X, offsets_N1)
        encoded = words.dictionary_encode()
        entries_U = self._look_up(encoded.dictionary.to_pylist())
        entries_W = entries_U[encoded.indices.to_numpy()]
        lengths_W = self._known.lengths[entries_W]
        ids_T = self._known.ids[positions(self._known.starts[entries_W], lengths_W)]
        first_word_N1 = np.searchsorted(starts_W, offsets_N1)
        return Tokens(ids_T, offsets(lengths_W)[first_word_N1])

    def _split(self, text_X: np.ndarray, offsets_N1: np.ndarray) -> tuple[np.ndarray, pa.LargeBinaryArray]:
        """Where the words start, and the words."""
        classes_X = np.frombuffer(text_X.tobytes().translate(self._class_table), dtype=np.uint8)
        if self._splits_ideographs:
            classes_X = _with_ideographs(text_X, classes_X)
        is_part_X = classes_X == _PART
        is_text_X = classes_X != _SPACE
        begins_X = classes_X == _ALONE
        begins_X[:1] |= is_part_X[:1]
        begins_X[1:] |= is_part_X[1:] & ~is_part_X[:-1]
        begins = offsets_N1[:-1][np.diff(offsets_N1) > 0]  # a document ends a word without white space
        begins_X[begins] = is_text_X[begins]
        starts_W = np.flatnonzero(begins_X)
        # Words laid end to end: the text without its white space, cut where words start.
        words = text_X[is_text_X]
        cuts_W1 = np.append(np.cumsum(is_text_X, dtype=np.int64)[starts_W] - 1, len(words))
        return starts_W, pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(starts_W), [None, pa.py_buffer(cuts_W1), pa.py_buffer(words)]
        )

    def _rows_with_added_tokens(self, text_X: np.ndarray, offsets_N1: np.ndarray) -> np.ndarray:
        places = [find_bytes(text_X, token) for token in self._added]
        found = np.unique(np.searchsorted(offsets_N1, np.concatenate([[], *places]), side="right") - 1)
        return found.astype(np.int64)

    def _look_up(self, words: list[bytes]) -> np.ndarray:
        """The entries of distinct words (int64); unknown ones are tokenised and remembered."""
        if len(self._known.entries) > _MAX_KNOWN_WORDS or self._known.num_bytes > _MAX_KNOWN_BYTES:
            self._known = _KnownWords()
        entries_U = np.fromiter(map(self._known.entries.get, words, repeat(-1)), dtype=np.int64, count=len(words))
        unknown = np.flatnonzero(entries_U < 0)
        if len(unknown):
            new = [words[index] for index in unknown]
            entries_U[unknown] = self._known.add(new, self._tokenize_words(new))
        return entries_U

    def _tokenize_words(self, words: list[bytes]) -> Tokens:
        """Ids of words by the reference, or by its model where the other steps leave a word as it is."""
        ids = [self._pieces(word) if word.isalnum() else [] for word in words]  # of bytes: ASCII letters and digits
        others = [index for index, word in enumerate(words) if not word.isalnum()]
        for index, found in zip(
            others, self._tokenize_others([words[index].decode() for index in others]), strict=True
        ):
            ids[index] = found
        return Tokens(np.fromiter(chain.from_iterable(ids), dtype=np.int32), offsets(list(map(len, ids))))

    def _pieces(self, word: bytes) -> list[int]:
        """Ids of ASCII letters and digits: no cleaning, accent or split concerns them."""
        text = (word.lower() if self._lowercases else word).decode()
        whole = self._vocabulary.get(text)
        if whole is not None and len(text) <= self._max_characters:  # the longest match first: the word itself
            return [whole]
        return [token.id for token in self._model.tokenize(text)]

    def _tokenize_others(self, words: list[str]) -> list[list[int]]:
        """Ids of words by the reference; joined to texts by a mark, for a call costs more than a word."""
        if self._separator is None:
            return [encoding.ids for encoding in self._ask(words)]
        mark, mark_id = self._separator
        rest = [word for word in words if word != mark]
        joined = [
            f" {mark} ".join(rest[at : at + _JOINED_WORDS]) + f" {mark}" for at in range(0, len(rest), _JOINED_WORDS)
        ]
        ids_T = np.array([one for encoding in self._ask(joined) for one in encoding.ids], dtype=np.int32)
        ends = np.flatnonzero(ids_T == mark_id)
        if len(ends) != len(rest):  # a word became the mark, or holds it
            return [encoding.ids for encoding in self._ask(words)]
        found = iter(np.split(ids_T, ends + 1)[:-1])
        return [[mark_id] if word == mark else next(found)[:-1].tolist() for word in words]

    def _find_separator(self) -> tuple[str, int] | None:
        """A punctuation mark that the vocabulary knows: its id ends a word and stands in no other.

        Not the semicolon: the Greek question mark is decomposed to it. No character becomes one of these four.
        """
        unknown_id = self._reference.token_to_id(self._model.unk_token)
        for mark in "|~,.":
            ids = self._reference.encode(mark, add_special_tokens=False).ids
            if len(ids) == 1 and ids[0] != unknown_id:
                return mark, ids[0]
        return None

    def _ask(self, texts: list[str]) -> list[Any]:
        return list(self._reference.encode_batch_fast(texts, add_special_tokens=False))


class _KnownWords:
    """Words that were tokenised before: entry e has the tokens ids[starts[e] : starts[e] + lengths[e]]."""

    def __init__(self) -> None:
        self.entries: dict[bytes, int] = {}
        self.num_bytes = 0
        self.ids = np.zeros(0, dtype=np.int32)
        self.starts = np.zeros(0, dtype=np.int64)
        self.lengths = np.zeros(0, dtype=np.int64)

    def add(self, words: list[bytes], tokens: Tokens) -> np.ndarray:
        """Remember words; returns their entries."""
        entries = np.arange(len(self.entries), len(self.entries) + len(words))
        self.entries.update(zip(words, entries.tolist(), strict=True))
        self.num_bytes += sum(map(len, words))
        self.starts = np.concatenate([self.starts, tokens.offsets_N1[:-1] + len(self.ids)])
        self.lengths = np.concatenate([self.lengths, np.diff(tokens.offsets_N1)])
        self.ids = np.concatenate([self.ids, tokens.ids_T])
        return entries


def plain_copy(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without padding and truncation; the original stays as it is."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _replace(tokens: Tokens, rows: np.ndarray, others: Tokens) -> Tokens:
    """The same, but `rows` are taken from `others`."""
    lengths_N = np.diff(tokens.offsets_N1)
    starts_N = tokens.offsets_N1[:-1].copy()
    lengths_N[rows] = np.diff(others.offsets_N1)
    starts_N[rows] = len(tokens.ids_T) + others.offsets_N1[:-1]
    ids_T = np.concatenate([tokens.ids_T, others.ids_T])[positions(starts_N, lengths_N)]
    return Tokens(ids_T, offsets(lengths_N))


def _with_ideographs(text_X: np.ndarray, classes_X: np.ndarray) -> np.ndarray:
    """Classes in which U+4E00 to U+9FFF stand alone: E4 B8 80 to E9 BF BF in UTF-8.

    The reference sets spaces around more ideographs than these. Others stay in their word: that is exact as well.
    """
    if len(text_X) == 0 or text_X.max() < 0xE4:
        return classes_X
    leads = np.flatnonzero((text_X >= 0xE4) & (text_X <= 0xE9))
    leads = leads[(text_X[leads] > 0xE4) | (text_X[leads + 1] >= 0xB8)]
    classes_X = classes_X.copy()
    classes_X[leads] = _ALONE
    classes_X[leads + 1] = classes_X[leads + 2] = _REST
    return classes_X
