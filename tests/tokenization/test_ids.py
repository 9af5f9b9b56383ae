"""The fast tokenizer gives the ids of the reference, whatever the text; where it does not, the reference does all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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
from bertray.tokenization import ids as ids_module
from bertray.tokenization.ids import TextTokenizer, plain_copy
from bertray.tokenization.tokenizer import ColumnTokenizer
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
LIMITED = {limit: TextTokenizer(TOKENIZERS["uncased"], limit) for limit in range(1, 13)}
FAST = {name: TextTokenizer(tokenizer, None) for name, tokenizer in TOKENIZERS.items()}


def reference_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    encodings = plain_copy(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def ids_of(tokenizer: TextTokenizer, texts: list[str]) -> list[list[int]]:
    found = tokenizer.encode(pa.array(texts, pa.large_string()))
    assert found.ids_T.dtype == np.int32
    return [part.tolist() for part in np.split(found.ids_T, found.offsets_N1[1:-1])] if texts else []


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(texts_strategy)
def test_any_text(name: str, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    assert ids_of(FAST[name], texts) == reference_ids(TOKENIZERS[name], texts)
    assert FAST[name].is_fast


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_pair_of_tricky_pieces(name: str) -> None:
    texts = [one + other for one in TRICKY for other in TRICKY]
    assert ids_of(FAST[name], texts) == reference_ids(TOKENIZERS[name], texts)
    assert FAST[name].is_fast


@settings(max_examples=150, deadline=None)
@given(texts_strategy, st.integers(1, 12))
def test_any_limit(texts: list[str], limit: int) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    tokenizer = LIMITED[limit]
    tokenizer.is_fast = True
    expected = [ids[: limit + 1] for ids in reference_ids(TOKENIZERS["uncased"], texts)]
    assert ids_of(tokenizer, texts) == expected
    tokenizer.is_fast = False
    assert ids_of(tokenizer, texts) == expected


@pytest.mark.parametrize(
    "path", sorted(SHARED_DATA.glob("*/*.parquet")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
@pytest.mark.parametrize("name", ["uncased", "cased"])
@needs_shared_data
def test_real_texts(name: str, path: Path) -> None:
    texts = pq.read_table(path, columns=["text"])["text"].slice(0, 800).combine_chunks().cast(pa.large_string())
    found = TextTokenizer(TOKENIZERS[name], None).encode(texts)
    expected = reference_ids(TOKENIZERS[name], texts.to_pylist())
    assert np.diff(found.offsets_N1).tolist() == [len(ids) for ids in expected]
    assert found.ids_T.tolist() == [one for ids in expected for one in ids]


def test_a_text_of_10_mb() -> None:
    texts = ["a short one", "word, " * 1_700_000, "中文" * 20_000 + "x" * 300_000, "last"]
    assert ids_of(FAST["uncased"], texts[1:2])[0] == reference_ids(TOKENIZERS["uncased"], ["word, "])[0] * 1_700_000
    found = ids_of(TextTokenizer(TOKENIZERS["uncased"], 510), texts)
    expected = reference_ids(TOKENIZERS["uncased"], [texts[0], texts[1][:6000], texts[2], texts[3]])
    assert found == [ids[:511] for ids in expected]


def test_nulls_have_no_ids() -> None:
    found = FAST["uncased"].encode(pa.array(["one", None, "two"], pa.large_string()))
    assert np.diff(found.offsets_N1).tolist() == [1, 0, 1]


def test_added_tokens_with_flags() -> None:
    tokenizer = cased()
    tokenizer.add_special_tokens([AddedToken("<url>", normalized=False, lstrip=True, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("alone", normalized=False, single_word=True)])
    tokenizer.add_tokens([AddedToken("Two Words", normalized=True)])
    texts = ["a <url> b", "a<url>b", "a < url>", "alone", "notalone", "not alone.", "x" * 5000 + " <url> alone"]
    texts += ["two words", "Two  Words Two Words", "TWO WORDS"]
    assert ids_of(TextTokenizer(tokenizer, None), texts) == reference_ids(tokenizer, texts)


def test_what_is_refused_goes_through_the_reference() -> None:
    unknown = cased()
    unknown.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    for tokenizer in (unknown, Tokenizer(BPE())):
        assert not TextTokenizer(tokenizer, None).is_fast
    texts = ["One text", "", "[SEP] and Ünïcode", "long " * 50]
    tokens = ColumnTokenizer(unknown, 16).encode(pa.array(texts))
    unknown.enable_truncation(16)
    expected = [unknown.encode(text).ids for text in texts if text]
    assert [part.tolist() for part in np.split(tokens.ids_T, tokens.offsets_S1[1:-1])] == expected
    assert tokens.documents_S.tolist() == [0, 2, 3]
    assert tokens.truncated_N.tolist() == [False, False, False, True]


def test_where_nanotoken_is_not_installed_the_reference_does_all() -> None:
    code = """
import sys
sys.modules["nanotoken"] = None
import pyarrow as pa
from bertray.model.pretrained import load_tokenizer
from bertray.tokenization.tokenizer import ColumnTokenizer
tokenizer = ColumnTokenizer(load_tokenizer("minilm", 64)[0].backend_tokenizer, 64)
assert not tokenizer.is_fast
print(tokenizer.encode(pa.array(["the café", None])).ids_T.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    tokenizer = ColumnTokenizer(TOKENIZERS["uncased"], 64)
    assert tokenizer.is_fast
    assert json.loads(done.stdout) == tokenizer.encode(pa.array(["the café", None])).ids_T.tolist()


class Wrong:
    """A fast tokenizer that gives another id for every text with a word in it."""

    def __init__(self, fast: Any, word: bytes) -> None:
        self._fast, self._word = fast, word

    def encode_batch(self, texts: list[bytes], **options: Any) -> tuple[np.ndarray, np.ndarray]:
        ids_T, offsets_N1 = self._fast.encode_batch(texts, **options)
        ids_T = ids_T.copy()
        for row, text in enumerate(texts):
            if self._word in text:
                ids_T[offsets_N1[row]] += 1
        return ids_T, offsets_N1


def test_other_ids_at_load_are_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    make = ids_module.nanotoken.WordPieceTokenizer.from_json

    class Broken:
        from_json = staticmethod(lambda text: Wrong(make(text), "ﬁ".encode()))

    monkeypatch.setattr("nanotoken.WordPieceTokenizer", Broken)
    assert not TextTokenizer(TOKENIZERS["uncased"], None).is_fast
    assert "nanotoken gives other ids than the reference tokenizer" in caplog.text


def test_other_ids_later_are_noticed_and_never_used_again(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = TextTokenizer(TOKENIZERS["uncased"], None)
    tokenizer._fast = Wrong(tokenizer._fast, b"odd")
    assert ids_of(tokenizer, ["fine", "odd"]) != reference_ids(TOKENIZERS["uncased"], ["fine", "odd"])  # not looked at
    texts = ["x" * 20_000, "odd", "another odd one"]  # the first is too long to be tokenised twice
    assert ids_of(tokenizer, texts) == reference_ids(TOKENIZERS["uncased"], texts)
    assert not tokenizer.is_fast
    assert "nanotoken gives row 1 of a step other ids than the reference tokenizer" in caplog.text
    assert ids_of(tokenizer, ["fine", "odd"]) == reference_ids(TOKENIZERS["uncased"], ["fine", "odd"])
