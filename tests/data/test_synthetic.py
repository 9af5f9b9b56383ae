"""The demo's corpus: passages of real docstrings, as dirty as promised, whose text does not name the section."""

import csv
import re
from collections import Counter
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.model_selection import GroupShuffleSplit

from benchmarks.docstrings import LABELS, corpus, passages
from bertray.data import synthetic
from bertray.data.synthetic import NUM_ARCHIVE, NUM_LABELLED, write_corpus
from bertray.metrics.baseline import classifier
from tests.corpora import Row, is_blank, labels_by_text


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, pa.Table]]:
    folder = tmp_path_factory.mktemp("corpus")
    assert write_corpus(folder, NUM_LABELLED, NUM_ARCHIVE) == folder / "labelled.csv"
    root = folder / "archive"
    return [(str(path.relative_to(root)), pq.ParquetFile(path).read()) for path in sorted(root.rglob("*.parquet"))]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    table = pq.read_table(Path(synthetic.__file__).with_name("demo_labelled.parquet"))
    assert table.schema == pa.schema([(name, pa.string()) for name in ("text", "label", "document_id")])
    return table.to_pylist()


@pytest.fixture(scope="module")
def archive_texts(archive: list[tuple[str, pa.Table]]) -> list[str | None]:
    return [text for _, table in archive for text in table["text"].to_pylist()]


# ---- labelled passages


def test_every_section_has_rows_and_one_is_rare(rows: list[Row]) -> None:
    assert len(rows) == NUM_LABELLED
    counts = Counter(row["label"] for row in rows)
    assert set(counts) == {*LABELS, None}
    assert min(counts[label] for label in LABELS) == counts["Raises"] >= 100
    assert max(counts.values()) <= 600


@pytest.mark.parametrize("num_rows", [60, NUM_LABELLED])
def test_labelled_rows_are_dirty(rows: list[Row], num_rows: int) -> None:
    rows = rows[:num_rows]
    texts = labels_by_text(rows)
    assert 1 <= sum(row["label"] is None for row in rows) <= 3
    assert 1 <= sum(len(set(labels)) > 1 for labels in texts.values()) <= 3
    assert 1 <= sum(len(labels) - len(set(labels)) for labels in texts.values()) <= 28
    blanks = [row["text"] for row in rows if is_blank(row["text"])]
    assert 3 <= len(blanks) <= 12
    assert None in blanks
    assert "" in blanks
    assert any(text and text.isspace() for text in blanks)


def test_no_passage_names_a_section_or_shows_code(rows: list[Row]) -> None:
    texts = [row["text"] for row in rows if not is_blank(row["text"])]
    names = re.compile(r"\b(parameter|return|rais|note|see also|example)", re.IGNORECASE)
    assert [text for text in texts if names.search(text) or ">>>" in text] == []
    assert all(8 <= len(text.split()) <= 40 for text in texts)


def test_no_document_is_labelled_and_archived(rows: list[Row], archive: list[tuple[str, pa.Table]]) -> None:
    archived = {name for _, table in archive for name in table["document_id"].to_pylist()}
    labelled = {row["document_id"] for row in rows}
    assert min(len(archived), len(labelled)) > 500
    assert not archived & labelled
    assert {name.split(".")[0] for name in archived | labelled} == {"numpy", "scipy", "sklearn", "pandas"}


def test_baseline_is_neither_perfect_nor_lost(rows: list[Row]) -> None:
    agreed = {text for text, labels in labels_by_text(rows).items() if set(labels) <= set(LABELS) and len(labels) == 1}
    clean = [row for row in rows if row["text"] in agreed]
    groups = [row["document_id"] for row in clean]
    [(train, test)] = GroupShuffleSplit(1, test_size=0.4, random_state=0).split(clean, groups=groups)
    texts, labels = ([row[name] for row in clean] for name in ("text", "label"))
    model = classifier(texts).fit([texts[row] for row in train], [labels[row] for row in train])
    accuracy = model.score([texts[row] for row in test], [labels[row] for row in test])
    assert len(test) >= 1000
    assert 0.5 <= accuracy <= 0.75


# ---- archive


def test_archive_paths_columns_and_totals(archive: list[tuple[str, pa.Table]]) -> None:
    assert [path for path, _ in archive] == [
        f"date=2026-01-{day:02d}/part-{part:04d}.parquet" for day in (5, 6, 7, 8) for part in (0, 1)
    ]
    assert all(len(PurePosixPath(path).parts) == 2 for path, _ in archive)
    columns = {"document_id": pa.string(), "passage_number": pa.int64(), "text": pa.string()}
    assert all(table.schema == pa.schema(columns) for _, table in archive)
    sizes = [table.num_rows for _, table in archive]
    assert sum(sizes) == NUM_ARCHIVE
    assert max(sizes) >= 2 * min(sizes) > 0


def test_the_passages_of_a_document_are_numbered(archive: list[tuple[str, pa.Table]]) -> None:
    passages_of: dict[str, list[int]] = {}
    for _, table in archive:
        for row in table.to_pylist():
            passages_of.setdefault(row["document_id"], []).append(row["passage_number"])
    assert all(numbers == list(range(len(numbers))) for numbers in passages_of.values())


def test_archive_texts_are_dirty(archive_texts: list[str | None]) -> None:
    assert sum(is_blank(text) for text in archive_texts) == 3
    assert None in archive_texts
    assert sum(len(text.split()) >= 400 for text in archive_texts if text) == 2


@pytest.mark.parametrize("num_rows", [80, 101, 3999])
def test_archive_of_any_size_has_all_rows_and_no_empty_shard(num_rows: int, tmp_path: Path) -> None:
    labelled = write_corpus(tmp_path, 60, num_rows)
    sizes = [pq.ParquetFile(path).metadata.num_rows for path in (tmp_path / "archive").rglob("*.parquet")]
    assert (len(sizes), sum(sizes)) == (8, num_rows)
    assert min(sizes) >= 1
    with labelled.open(newline="") as file:
        assert {row["label"] for row in csv.DictReader(file)} >= set(LABELS)


# ---- both


def test_passages_are_what_a_section_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kit" / "tests").mkdir(parents=True)
    source = '''def f(x):
    """Do.

    Parameters
    ----------
    x : array
        The rows that are counted; those without a text are left out.
    y : int
        Too short.

    Returns
    -------
    z : array
        The ``count`` of the rows, one number a label. It is new. A third sentence.

    See Also
    --------
    g : Counts the rows of many tables one after another.

    Examples
    --------
    Now the rows of a whole table are counted at once:

    >>> f([1, 2, 3, 4, 5, 6, 7, 8, 9])
    9

    Notes
    -----
    See the examples of other functions to learn what may be done.
    """
'''
    (tmp_path / "kit" / "__init__.py").touch()
    (tmp_path / "kit" / "rows.py").write_text(source)
    (tmp_path / "kit" / "tests" / "test_rows.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("benchmarks.docstrings._PACKAGES", ("kit",))
    assert list(passages()) == [
        ("kit.rows:0", "Parameters", "The rows that are counted; those without a text are left out."),
        ("kit.rows:0", "Returns", "The count of the rows, one number a label. It is new."),
        ("kit.rows:0", "See Also", "Counts the rows of many tables one after another."),
        ("kit.rows:0", "Examples", "Now the rows of a whole table are counted at once:"),
    ]


def test_a_seed_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.docstrings._PACKAGES", ("numpy",))
    first, second, other = corpus(), corpus(), corpus(seed=1)
    assert first == second
    assert first[0] != other[0]


def test_the_package_says_whose_passages_these_are(rows: list[Row]) -> None:
    notice = Path(synthetic.__file__).with_name("demo_NOTICE.txt").read_text()
    for package in {row["document_id"].split(".")[0] for row in rows}:
        assert {"sklearn": "scikit-learn"}.get(package, package) in notice
    assert "Redistributions of source code must retain the above copyright notice" in notice
