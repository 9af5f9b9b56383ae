"""Columns in, flat ids out, the same ids as the reference tokenizer's."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from bertray.errors import ShardError
from bertray.model.sources import encoder_folder
from bertray.tokenization.columns import as_text, is_blank
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn

REFERENCE = AutoTokenizer.from_pretrained(encoder_folder("minilm"))
MAX_LENGTH = 16
TOKENIZER = ColumnTokenizer(REFERENCE.backend_tokenizer, MAX_LENGTH)


def documents(tokens: TokenColumn) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(len(tokens.errors))]
    for document, a, b in zip(tokens.documents_S, tokens.offsets_S1, tokens.offsets_S1[1:], strict=False):
        found[document] += tokens.ids_T[a:b].tolist()
    return found


def test_ids_offsets_and_truncation() -> None:
    long_text = "word " * 100
    tokens = TOKENIZER.encode(pa.array(["B.Sc. Physics", None, long_text, "  ", "Python"]))
    expected = REFERENCE(["B.Sc. Physics", long_text, "Python"], truncation=True, max_length=MAX_LENGTH)["input_ids"]
    assert documents(tokens) == [expected[0], [], expected[1], [], expected[2]]
    assert tokens.truncated_N.tolist() == [False, False, True, False, False]
    assert tokens.errors.to_pylist() == [None, "text is null", None, "text is empty", None]
    assert tokens.num_tokens == sum(map(len, expected))
    assert tokens.num_tokens_N.tolist() == [len(expected[0]), 0, MAX_LENGTH, 0, len(expected[2])]


@given(st.lists(st.one_of(st.none(), st.text()), max_size=8))
def test_ids_are_the_reference_ids(texts: list[str | None]) -> None:
    tokens = TOKENIZER.encode(pa.array(texts, pa.string()))
    for text, ids, error in zip(texts, documents(tokens), tokens.errors.to_pylist(), strict=True):
        if error is None:
            assert ids == REFERENCE(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        else:
            assert ids == []
            num_tokens = len(REFERENCE(text or "", add_special_tokens=False)["input_ids"])
            assert text is None or all(unicodedata.category(one)[0] in "ZCLMS" for one in text)
            assert (error == "text has no tokens") <= (num_tokens == 0)


STRIDE = 4
WINDOWS = ColumnTokenizer(REFERENCE.backend_tokenizer, MAX_LENGTH, STRIDE)


def reference_windows(text: str) -> list[list[int]]:
    options = {"max_length": MAX_LENGTH, "stride": STRIDE, "return_overflowing_tokens": True}
    windows: list[list[int]] = REFERENCE(text, truncation=True, **options)["input_ids"]
    return windows


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.text(max_size=200)), max_size=8))
def test_windows_of_any_text(texts: list[str | None]) -> None:
    column = pa.array(texts, pa.string())
    tokens, beginnings = WINDOWS.encode(column), TOKENIZER.encode(column)
    assert tokens.errors.equals(beginnings.errors)
    assert not tokens.truncated_N.any()
    for document, text in enumerate(texts):
        mine = np.flatnonzero(tokens.documents_S == document)
        windows = [tokens.ids_T[tokens.offsets_S1[one] : tokens.offsets_S1[one + 1]].tolist() for one in mine]
        assert tokens.num_tokens_N[document] == sum(map(len, windows))
        if tokens.errors[document].is_valid:
            assert windows == []
            continue
        assert text is not None
        expected = reference_windows(text)
        assert len(windows) == len(expected)
        assert windows[0] == expected[0]
        ids = REFERENCE(text)["input_ids"]
        assert windows[-1][1:-1] == ids[1:-1][-(MAX_LENGTH - 2) :]
        if not beginnings.truncated_N[document]:
            assert windows == [ids]


@pytest.mark.parametrize("num_words", [14, 24, 34, 94])
def test_where_the_last_window_is_full_all_are_those_of_transformers(num_words: int) -> None:
    words = ["one", "two", "three", "cat", "dog", "sun", "red"]  # each of one token
    text = " ".join(words[number % 7] for number in range(num_words))
    tokens = WINDOWS.encode(pa.array([text]))
    assert [tokens.ids_T[a:b].tolist() for a, b in zip(tokens.offsets_S1, tokens.offsets_S1[1:], strict=False)] == (
        reference_windows(text)
    )


def test_windows_with_a_tokenizer_of_another_kind() -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w48 $A w49", special_tokens=[("w48", 48), ("w49", 49)]
    )
    text = " ".join(f"w{number}" for number in range(1, 11))
    column = pa.array([text, None, "w5"])
    windows = ColumnTokenizer(tokenizer, 8, 2).encode(column)
    assert windows.documents_S.tolist() == [0, 0, 2]
    assert windows.ids_T.tolist() == [48, 1, 2, 3, 4, 5, 6, 49, 48, 5, 6, 7, 8, 9, 10, 49, 48, 5, 49]
    truncated = ColumnTokenizer(tokenizer, 8).encode(column)
    assert truncated.ids_T.tolist() == [48, 1, 2, 3, 4, 5, 6, 49, 48, 5, 49]
    assert truncated.truncated_N.tolist() == [True, False, False]


def test_the_reference_tokenizer_is_left_as_it_was() -> None:
    before = REFERENCE.backend_tokenizer.to_str()
    ColumnTokenizer(REFERENCE.backend_tokenizer, 8).encode(pa.array(["a b c"]))
    assert REFERENCE.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_type_of_text(kind: pa.DataType) -> None:
    column = pa.chunked_array([pa.array(["one", None], pa.string()).cast(kind), pa.array(["two"]).cast(kind)])
    plain = TOKENIZER.encode(pa.array(["one", None, "two"]))
    tokens = TOKENIZER.encode(column)
    assert np.array_equal(tokens.ids_T, plain.ids_T)
    assert tokens.errors.to_pylist() == [None, "text is null", None]


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff", "\u00ad", "\u2060\u200d", "\x00", "\x1b", "\u3164", "\u2800", "\ufe0f"]
)
def test_a_text_that_shows_nothing_is_empty(text: str) -> None:
    tokens = TOKENIZER.encode(pa.array([text, f" {text}\n", f"a{text}"]))
    assert tokens.errors.to_pylist() == ["text is empty", "text is empty", None]
    assert tokens.documents_S.tolist() == [2]


def test_a_visible_text_without_tokens_of_its_own_is_an_error() -> None:
    assert TOKENIZER.encode(pa.array(["\ufffd", "a"])).errors.to_pylist() == ["text has no tokens", None]


@pytest.mark.parametrize("text", ["\u06dd", "\u0301", "\ue000", "\U0001f600", "]", "^", "-", "\\"])
def test_other_characters_are_visible(text: str) -> None:
    assert not is_blank(pa.array([text])).to_pylist()[0]


def test_invalid_utf8_is_a_row_error() -> None:
    column = pa.array([b"fine", b"\xff\xfe", None, b"\xed\xa0\x80"], pa.binary())
    for kind in (pa.binary(), pa.string()):  # a string column can hold it too: Parquet does not check
        strings, errors = as_text(column if kind == pa.binary() else column.view(pa.string()))
        assert errors.to_pylist() == [None, "text is not UTF-8", "text is null", "text is not UTF-8"]
        assert strings.to_pylist()[0] == "fine"


def test_a_column_of_nulls_and_no_rows() -> None:
    assert TOKENIZER.encode(pa.nulls(2)).errors.to_pylist() == ["text is null"] * 2
    empty = TOKENIZER.encode(pa.array([], pa.string()))
    assert empty.offsets_S1.tolist() == [0]
    assert empty.num_tokens == 0


def test_other_types_are_refused() -> None:
    with pytest.raises(ShardError, match="the text column is of type int64; it must hold strings"):
        TOKENIZER.encode(pa.array([1]))
