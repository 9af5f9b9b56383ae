"""The columnar tokenizer gives the ids of the reference, whatever the text."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import WordPieceTrainer

from bertray.model.pretrained import load_tokenizer
from bertray.tokenization import wordpiece
from bertray.tokenization.columns import heads
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.tokenization.wordpiece import ColumnWordPiece, plain_copy
from tests.conftest import ROOT, SHARED_DATA, needs_shared_data

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Pieces around which a shortcut could go wrong.
TRICKY = [
    *["[SEP]", "[MASK]", "[CLS", "]", "[sep]", "[SEP", "[[SEP]]", "##s", "#", "'", "-", "don't", "e.g.", "$9.99"],
    *["\x00", "\x07", "\x0b", "\x0c", "\x1c", "\x7f", "\x85", "\xa0", "\xad", "\t", "\n", "\r", " ", "  "],
    *["\u200b", "\u200d", "\u2028", "\u3000", "\ufeff", "\ufffd", "\ufffe", "\U000e0001", "\ue000", "\u0378"],
    *["é", "e\u0301", "\u0301", "\u0338=", "!\u0301", "Å", "ﬁ", "İ", "ß", "ǅ", "ς", "Σ", "ﷺ", "각", "\u1100\u1161"],
    *["中", "中文", "㐀", "\u4dff", "\u4e00", "\u9fff", "\ua000", "豈", "𠀀", "日本語カタカナ", "中\u0301", "x中y"],
    *["👩\u200d👩\u200d👧", "🇩🇪", "☝🏽", "\ufe0f", "–", "’", "“", "…", "«", "¿", "¡", "։", "।", "་", "𝔘", "़", "ำ"],
    *[
        "word",
        "Word",
        "WORD",
        "unbelievable",
        "antidisestablishmentarianism",
        "x" * 99,
        "x" * 100,
        "x" * 101,
        "é" * 101,
    ],
    *[
        "https://a.b/c?d=e",
        "résumé",
        "naïve",
        "Привет",
        "שלום",
        "مرحبا",
        "नमस्ते",
        "สวัสดี",
        "ሰላም",
        ";",
        "|",
        "~",
        "`",
        "^",
        "\u037e",  # becomes a semicolon
        "\u1fef",  # a grave accent
        "\u212a",  # a K
        "≠",
    ],
]
texts_strategy = st.lists(
    st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=3)), max_size=12).map("".join)),
    max_size=6,
)


def uncased() -> Tokenizer:
    return load_tokenizer("minilm", 512)[0].backend_tokenizer


def cased() -> Tokenizer:
    """A cased WordPiece, with accents, trained on the pieces above and this project's page."""
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    corpus = [(ROOT / "README.md").read_text(), " ".join(TRICKY)]
    tokenizer.train_from_iterator(
        corpus, WordPieceTrainer(vocab_size=1500, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def without_ideographs() -> Tokenizer:
    """No cleaning, ideographs left in their words, accents stripped though case is kept."""
    tokenizer = cased()
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=False, handle_chinese_chars=False, strip_accents=True, lowercase=False
    )
    return tokenizer


def without_punctuation() -> Tokenizer:
    """A vocabulary of letters and digits alone, words of at most 6 characters: all else is unknown."""
    pieces = list("abcdefghijklmnopqrstuvwxyz0123456789")
    vocabulary = {
        piece: index for index, piece in enumerate([*SPECIAL, *pieces, *(f"##{one}" for one in pieces), "unbreakable"])
    }
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=6))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = {
    "uncased": uncased(),
    "cased": cased(),
    "without_ideographs": without_ideographs(),
    "without_punctuation": without_punctuation(),
}
COLUMNAR = {name: ColumnWordPiece(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def reference_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    encodings = plain_copy(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def columnar_ids(columnar: ColumnWordPiece, texts: list[str], limit: int | None = None) -> list[list[int]]:
    tokens = columnar.encode(pa.array(texts, pa.large_string()), limit)
    assert tokens.ids_T.dtype == np.int32
    return [part.tolist() for part in np.split(tokens.ids_T, tokens.offsets_N1[1:-1])] if texts else []


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(texts_strategy)
def test_any_text(name: str, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    assert columnar_ids(COLUMNAR[name], texts) == reference_ids(TOKENIZERS[name], texts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_pair_of_tricky_pieces(name: str) -> None:
    texts = [one + other for one in TRICKY for other in TRICKY]
    assert columnar_ids(COLUMNAR[name], texts) == reference_ids(TOKENIZERS[name], texts)


@settings(max_examples=150, deadline=None)
@given(texts_strategy, st.integers(1, 12))
def test_any_limit(texts: list[str], limit: int) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    found = columnar_ids(COLUMNAR["uncased"], texts, limit)
    for ids, expected in zip(found, reference_ids(TOKENIZERS["uncased"], texts), strict=True):
        assert ids[: limit + 1] == expected[: limit + 1]


@pytest.mark.parametrize(
    "path", sorted(SHARED_DATA.glob("*/*.parquet")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
@pytest.mark.parametrize("name", ["uncased", "cased"])
@needs_shared_data
def test_real_texts(name: str, path: Path) -> None:
    texts = pq.read_table(path, columns=["text"])["text"].slice(0, 800).combine_chunks().cast(pa.large_string())
    tokens = ColumnWordPiece(TOKENIZERS[name]).encode(texts)
    expected = reference_ids(TOKENIZERS[name], texts.to_pylist())
    assert np.diff(tokens.offsets_N1).tolist() == [len(ids) for ids in expected]
    assert tokens.ids_T.tolist() == [one for ids in expected for one in ids]


def test_a_text_of_10_mb() -> None:
    texts = ["a short one", "word, " * 1_700_000, "中文" * 20_000 + "x" * 300_000, "last"]
    assert (
        columnar_ids(COLUMNAR["uncased"], texts[1:2])[0]
        == reference_ids(TOKENIZERS["uncased"], ["word, "])[0] * 1_700_000
    )
    found = columnar_ids(COLUMNAR["uncased"], texts, limit=510)
    expected = reference_ids(TOKENIZERS["uncased"], [texts[0], texts[1][:6000], texts[2], texts[3]])
    assert [ids[:511] for ids in found] == [ids[:511] for ids in expected]


def test_a_cut_inside_a_word_or_a_token_is_taken_back() -> None:
    for num_bytes in range(1, 20):
        cut, is_cut_N = heads(
            pa.array(["one [SEP] two 中文字 x", "ab", None, "unbroken" * 3], pa.large_string()), num_bytes
        )
        first, second, third, fourth = (text.rstrip() for text in cut.to_pylist())
        assert is_cut_N.tolist() == [num_bytes < 25, num_bytes < 2, False, num_bytes < 24]
        assert first in ("", "one", "one [SEP]", "one [SEP] two")
        assert (second, third, fourth) == ("ab" if num_bytes > 1 else "", "", "")


def test_memory_is_bounded_and_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordpiece, "_MAX_KNOWN_WORDS", 50)
    monkeypatch.setattr(wordpiece, "_CHUNK_BYTES", 200)
    columnar = ColumnWordPiece(TOKENIZERS["uncased"])
    texts = [f"{number} one two {number + 1}; {number}" for number in range(500)]
    for _ in range(2):
        assert columnar_ids(columnar, texts) == reference_ids(TOKENIZERS["uncased"], texts)
    assert len(columnar._known.entries) < 150


def test_memory_is_bounded_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordpiece, "_MAX_KNOWN_BYTES", 1000)
    monkeypatch.setattr(wordpiece, "_CHUNK_BYTES", 200)
    columnar = ColumnWordPiece(TOKENIZERS["uncased"])
    texts = [f"{number}" * 20 for number in range(500)]
    assert columnar_ids(columnar, texts) == reference_ids(TOKENIZERS["uncased"], texts)
    assert columnar._known.num_bytes < 1500


def test_a_word_that_turns_into_the_separator() -> None:
    columnar = ColumnWordPiece(TOKENIZERS["uncased"])
    columnar._separator = (";", TOKENIZERS["uncased"].token_to_id(";"))
    texts = ["τι\u037e και ; \u037e", "τι"]
    assert columnar_ids(columnar, texts) == reference_ids(TOKENIZERS["uncased"], texts)


def test_each_distinct_word_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    columnar = ColumnWordPiece(TOKENIZERS["uncased"])
    asked: list[bytes] = []
    ask = columnar._tokenize_words
    monkeypatch.setattr(columnar, "_tokenize_words", lambda words: asked.extend(words) or ask(words))
    for _ in range(3):
        columnar_ids(columnar, ["the cat, the dog; the cat", "cat"])
    assert sorted(asked) == [b",", b";", b"cat", b"dog", b"the"]


def test_what_is_not_supported() -> None:
    assert all(map(ColumnWordPiece.supports, TOKENIZERS.values()))
    sought_in_normalized_text = cased()
    sought_in_normalized_text.add_tokens([AddedToken("Two Words", normalized=True)])
    split_by_spaces = cased()
    split_by_spaces.add_special_tokens([AddedToken("<two words>", normalized=False)])
    other_splits = cased()
    other_splits.pre_tokenizer = pre_tokenizers.Whitespace()
    other_normalizer = cased()
    other_normalizer.normalizer = normalizers.NFKC()
    for tokenizer in (sought_in_normalized_text, split_by_spaces, other_splits, other_normalizer, Tokenizer(BPE())):
        assert not ColumnWordPiece.supports(tokenizer)


def test_added_tokens_with_flags() -> None:
    tokenizer = cased()
    tokenizer.add_special_tokens([AddedToken("<url>", normalized=False, lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("alone", normalized=False, single_word=True)])
    texts = ["a <url> b", "a<url>b", "a < url>", "alone", "notalone", "not alone.", "x" * 5000 + " <url> alone"]
    assert columnar_ids(ColumnWordPiece(tokenizer), texts) == reference_ids(tokenizer, texts)


def test_other_kinds_of_tokenizers_take_the_reference_path() -> None:
    parts = json.loads(cased().to_str())
    parts["normalizer"] = {"type": "NFC"}
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    texts = ["One text", "", "[SEP] and Ünïcode", "long " * 50]
    tokens = ColumnTokenizer(tokenizer, 16).encode(pa.array(texts))
    tokenizer.enable_truncation(16)
    expected = [tokenizer.encode(text).ids for text in texts if text]
    assert [part.tolist() for part in np.split(tokens.ids_T, tokens.offsets_S1[1:-1])] == expected
    assert tokens.documents_S.tolist() == [0, 2, 3]
    assert tokens.truncated_N.tolist() == [False, False, False, True]
