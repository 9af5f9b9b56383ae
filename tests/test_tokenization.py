"""Columns in, flat ids out, the same ids as the reference tokenizer's."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bertray.errors import ShardError
from bertray.pretrained import encoder_folder
from bertray.text import as_text
from bertray.tokenization import ColumnTokenizer, TokenColumn

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
            assert text is None or not text.strip()


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
