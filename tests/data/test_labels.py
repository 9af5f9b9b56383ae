"""Which spellings are one label, and which are told of."""

import pyarrow as pa
import pytest
from pydantic import ValidationError

from bertray.data.config import PrepareConfig
from bertray.data.labels import one_spelling, warn_of_alike


def spelt(*labels: str | None, oos_label: str | None = None) -> tuple[list[str | None], str | None]:
    column = pa.chunked_array([pa.array(labels, pa.string())])
    tables, found = one_spelling({"input": pa.table({"label": column})}, oos_label)
    return tables["input"]["label"].to_pylist(), found


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["1", "1.0", "1.00", "+1", " 1 ", "-0", "-2.0"], ["1", "1", "1", "1", "1", "0", "-2"]),
        ([f"{10**30}", f"{10**30}.0"], [f"{10**30}"] * 2),
        (["1", "1.0", "007"], None),
        (["1", "1.0", "1e3"], None),
        (["1", "1.0", "1.5"], None),
        (["1", "1.0", "N/A"], None),
        (["1", "1.0", None, "", "\u200b"], ["1", "1", None, "", ""]),
        (["e\u0301 \u00a0x", "\u00e9\u2003x\ufeff", "\u00e9 x"], ["\u00e9 x"] * 3),
        # Joiners and variation selectors: the most frequent spelling.
        (["می\u200cخواهم", "می\u200cخواهم", "میخواهم"], ["می\u200cخواهم"] * 3),
        (["❤", "❤", "❤\ufe0f"], ["❤"] * 3),
        (["\u200d", "\ufe0f", "\u3164", "\x00"], [""] * 4),
        # The flags of England and Scotland differ in invisible tags alone.
        (["🏴\U000e0067\U000e007f", "🏴\U000e0073\U000e007f", "🏴"], None),
    ],
)
def test_spellings(given: list[str | None], expected: list[str | None] | None) -> None:
    assert spelt(*given) == (given if expected is None else expected, None)


def test_the_label_out_of_scope_need_not_be_a_number() -> None:
    assert spelt("1", "1.0", "oos", oos_label="oos\u200b") == (["1", "1", "oos"], "oos")
    assert spelt("1", "1.0", "2.00", oos_label="2") == (["1", "1", "2"], "2")


def test_labels_that_differ_in_case_or_punctuation_are_told_of() -> None:
    [warning] = warn_of_alike(
        {"Top up.": 1, "top_up": 2, "TOP-UP": 3, ":)": 1, ":(": 1, "C": 1, "C++": 1, "-1": 1, "1": 1}
    )
    assert "'TOP-UP' (3 rows) and 'Top up.' (1 rows) and 'top_up' (2 rows). If" in warning
    assert not any(other in warning for other in (":)", "'C'", "'1'"))
    many = {f"{name}{number}": 1 for number in range(9) for name in "aA"}
    assert " and 4 more. If" in warn_of_alike(many)[0]
    assert warn_of_alike({"a": 1, "b": 2}) == []


@pytest.mark.parametrize("name", ["no-such", "base64"])
def test_an_encoding_that_nobody_has_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"{name}.*as cp1252"):
        PrepareConfig(input=["a.csv"], output="dataset", encoding=name)
