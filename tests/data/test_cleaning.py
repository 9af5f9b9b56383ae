"""Which rows go, for which reason, and that none goes uncounted."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from bertray.data.cleaning import clean, comparison_keys, drop_shared


def table(*rows: tuple[str | None, str | None], groups: list[str | None] | None = None) -> pa.Table:
    columns = {
        "text": pa.chunked_array([pa.array([row[0] for row in rows], pa.string())]),
        "label": pa.chunked_array([pa.array([row[1] for row in rows], pa.string())]),
    }
    if groups is not None:
        columns["group"] = pa.chunked_array([pa.array(groups, pa.string())])
    return pa.table(columns)


def kept(rows: pa.Table) -> list[tuple[str, str]]:
    return list(zip(rows["text"].to_pylist(), rows["label"].to_pylist(), strict=True))


def test_every_reason() -> None:
    cleaned = clean(
        table(
            (None, "a"),
            ("", "a"),
            (" \n\u00a0", "a"),
            ("\u200b \ufeff\x00\u00ad", "a"),
            ("no label", None),
            ("blank label", "  "),
            ("twice", "a"),
            ("  twice\n", " a "),
            ("caf\u00e9", "a"),
            ("cafe\u0301", "a"),
            ("voted", "b"),
            ("voted", "a"),
            ("voted", "b"),
            ("tied", "a"),
            ("tied", "b"),
        )
    )
    assert kept(cleaned.rows) == [("twice", "a"), ("caf\u00e9", "a"), ("voted", "b")]
    assert cleaned.rows_out == {
        "text_missing": 1,
        "text_empty": 3,
        "label_missing": 2,
        "duplicate": 3,
        "label_outvoted": 1,
        "label_tied": 2,
    }
    assert cleaned.num_conflicts == 2
    assert cleaned.conflicts == [
        {"text": "voted", "labels": {"b": 2, "a": 1}, "kept": "b"},
        {"text": "tied", "labels": {"a": 1, "b": 1}, "kept": None},
    ]


def test_texts_stay_as_they_were_read() -> None:
    assert kept(clean(table(("  Cafe\u0301 \n", "a"))).rows) == [("  Cafe\u0301 \n", "a")]


def test_what_stands_in_a_held_out_split_leaves() -> None:
    held_out = table(("x ", "a"), ("other", "b"), groups=["g1", None])
    rows, rows_out = drop_shared(
        table((" x", "a"), ("y", "a"), ("z", "a"), groups=["g9", "g1", None]), held_out, "test"
    )
    assert kept(rows) == [("z", "a")]  # a null group is shared with nobody
    assert rows_out == {"text_in_test": 1, "group_in_test": 1}


def multi_label(*rows: tuple[str | None, list[str | None] | None]) -> pa.Table:
    labels = pa.chunked_array([pa.array([row[1] for row in rows], pa.list_(pa.string()))])
    return table(*((row[0], "") for row in rows)).drop_columns("label").append_column("labels", labels)


def test_every_reason_with_several_labels() -> None:
    cleaned = clean(
        multi_label(
            ("none on purpose", []),
            ("no labels", None),
            ("blanks alone", ["", " ", None]),
            ("blanks too", [" b ", "", "a", None, "b"]),
            (" blanks too", ["a", "b"]),
            ("voted", ["a"]),
            ("voted", ["a", "b"]),
            ("voted", ["b", "a"]),
            ("tied", []),
            ("tied", ["a"]),
            (None, ["a"]),
        )
    )
    assert list(zip(cleaned.rows["text"].to_pylist(), cleaned.rows["labels"].to_pylist(), strict=True)) == [
        ("none on purpose", []),
        ("blanks too", ["a", "b"]),
        ("voted", ["a", "b"]),
    ]
    assert cleaned.rows_out == {
        "label_missing": 2,
        "duplicate": 2,
        "label_outvoted": 1,
        "label_tied": 2,
        "text_missing": 1,
    }
    assert cleaned.conflicts == [
        {"text": "voted", "labels": {'["a", "b"]': 2, '["a"]': 1}, "kept": '["a", "b"]'},
        {"text": "tied", "labels": {"[]": 1, '["a"]': 1}, "kept": None},
    ]


rows_strategy = st.lists(
    st.tuples(
        st.one_of(st.none(), st.text(max_size=3), st.sampled_from(["x", " x", "y", "e\u0301", "\u00e9"])),
        st.one_of(st.none(), st.sampled_from(["a", " a", "b", ""])),
    ),
    max_size=20,
)


@given(rows_strategy)
def test_rows_in_are_rows_kept_and_rows_out(rows: list[tuple[str | None, str | None]]) -> None:
    cleaned = clean(table(*rows))
    assert len(rows) == cleaned.rows.num_rows + cleaned.rows_out.total()
    keys = comparison_keys(cleaned.rows).to_pylist()
    assert len(set(keys)) == len(keys)
    assert all(keys)
    assert all(label and label == label.strip() for label in cleaned.rows["label"].to_pylist())
    again = clean(cleaned.rows)
    assert again.rows.equals(cleaned.rows)
    assert not again.rows_out


multi_label_rows_strategy = st.lists(
    st.tuples(
        st.one_of(st.none(), st.sampled_from(["x", " x", "y", ""])),
        st.one_of(st.none(), st.lists(st.one_of(st.none(), st.sampled_from(["a", " a", "b", '"', ""])), max_size=3)),
    ),
    max_size=20,
)


@given(multi_label_rows_strategy)
def test_no_row_of_several_labels_is_lost(rows: list[tuple[str | None, list[str | None] | None]]) -> None:
    cleaned = clean(multi_label(*rows))
    assert len(rows) == cleaned.rows.num_rows + cleaned.rows_out.total()
    keys = comparison_keys(cleaned.rows).to_pylist()
    assert len(set(keys)) == len(keys)
    for labels in cleaned.rows["labels"].to_pylist():
        assert labels == sorted({label.strip() for label in labels} - {""})
    again = clean(cleaned.rows)
    assert again.rows.equals(cleaned.rows)
    assert not again.rows_out
