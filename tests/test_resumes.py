"""The invented résumés: as dirty as promised, neither trivial nor hopeless; their generator follows a seed."""

import random
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from benchmarks.resumes import LABELS, archive_chunks, labelled_chunks, write
from bertray import PrepareConfig, prepare
from tests.corpora import Row, is_blank, labels_by_text


@pytest.fixture(scope="module")
def labelled() -> pa.Table:
    return labelled_chunks()


@pytest.fixture(scope="module")
def rows(labelled: pa.Table) -> list[Row]:
    return labelled.to_pylist()


@pytest.fixture(scope="module")
def archive() -> pa.Table:
    return archive_chunks()


@pytest.fixture(scope="module")
def archive_texts(archive: pa.Table) -> list[str | None]:
    return archive["text"].to_pylist()


# ---- labelled chunks


def test_labelled_rows_columns_and_labels(labelled):
    assert labelled.num_rows == 1839
    assert labelled.schema == pa.schema([("text", pa.string()), ("label", pa.string())])
    assert set(labelled["label"].to_pylist()) == {*LABELS, None}
    assert set(LABELS) == {
        "Contact Information",
        "Education",
        "Work Experience",
        "Skills",
        "Projects",
        "Summary",
    }


def test_labels_are_imbalanced(rows):
    counts = Counter(row["label"] for row in rows if row["label"])
    ranked = [label for label, _ in counts.most_common()]
    assert ranked[0] == "Work Experience"
    assert set(ranked[-2:]) == {"Contact Information", "Summary"}
    assert counts[ranked[0]] >= 4 * counts[ranked[-1]]


def test_labelled_rows_are_dirty(rows):
    texts = labels_by_text(rows)
    assert 2 <= sum(row["label"] is None for row in rows) <= 3
    assert 2 <= sum(len(set(labels)) > 1 for labels in texts.values()) <= 3
    num_duplicates = sum(len(labels) - len(set(labels)) for labels in texts.values())
    assert 0.007 <= num_duplicates / len(rows) <= 0.015

    blanks = [row["text"] for row in rows if is_blank(row["text"])]
    assert 0.003 <= len(blanks) / len(rows) <= 0.008
    assert None in blanks
    assert "" in blanks
    assert any(text and text.isspace() for text in blanks)


def test_chunks_are_short_and_mostly_without_heading(rows):
    texts = [row["text"] for row in rows if not is_blank(row["text"])]
    lengths = sorted(len(text.split()) for text in texts)
    assert 20 <= lengths[len(lengths) // 2] <= 30
    assert sum(lengths) / len(lengths) <= 40
    assert lengths[-1] <= 95

    headings = {label.lower() for label in LABELS}
    num_headed = sum(re.split(r"[\n.;:]|  ", text.lower().lstrip("•-*·> "))[0] in headings for text in texts)
    assert 0.05 <= num_headed / len(texts) <= 0.3


def test_baseline_is_neither_perfect_nor_lost(rows):
    agreed = {text: labels for text, labels in labels_by_text(rows).items() if len(set(labels)) == 1}
    texts, labels = zip(*((text, label) for text, (label, *_) in agreed.items() if label), strict=True)
    texts_train, texts_test, labels_train, labels_test = train_test_split(
        texts, labels, test_size=0.2, stratify=labels, random_state=0
    )
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10.0, tol=1e-3, max_iter=1000))
    accuracy = model.fit(texts_train, labels_train).score(texts_test, labels_test)
    assert 0.75 <= accuracy <= 0.97


# ---- archive


def test_the_files_are_what_the_commands_read(tmp_path, labelled, archive):
    write(tmp_path / "resumes")
    config = PrepareConfig(input=[str(tmp_path / "resumes" / "labelled.parquet")], output=str(tmp_path / "dataset"))
    prepared = prepare(config)
    assert set(prepared.labels) == set(LABELS)
    report = prepared.report
    assert report["num_rows_in"] == 1839 == report["num_rows_kept"] + sum(report["num_rows_out"].values())
    assert pq.read_table(tmp_path / "resumes" / "archive") == archive
    columns = {"document_id": pa.string(), "section_number": pa.int32(), "text": pa.string()}
    assert archive.schema == pa.schema(columns)
    assert archive.num_rows == 4000


def test_documents_are_numbered(archive):
    rows = archive.to_pylist()
    assert [row["document_id"] for row in rows] == sorted(row["document_id"] for row in rows)
    sections: dict[str, list[int]] = {}
    for row in rows:
        assert re.fullmatch(r"resume-\d{6}", row["document_id"])
        sections.setdefault(row["document_id"], []).append(row["section_number"])
    assert all(numbers == list(range(len(numbers))) for numbers in sections.values())


def test_archive_texts_are_dirty(archive_texts):
    assert 3 <= sum(is_blank(text) for text in archive_texts) <= 4
    assert None in archive_texts
    assert 1 <= sum(len(text.split()) >= 400 for text in archive_texts if text) <= 2


# ---- both


def test_addresses_and_phone_numbers_belong_to_nobody(rows, archive_texts):
    texts = "\n".join(text for text in [*(row["text"] for row in rows), *archive_texts] if text).lower()
    domains = Counter(re.findall(r"@(\S*\w)", texts))
    hosts = Counter(re.findall(r"://([^/\s]+)", texts))
    assert min(domains.total(), hosts.total()) > 100
    assert set(domains) <= {"example.com", "example.org", "example.net"}
    assert set(hosts) <= {"www.example.com", "www.example.org", "www.example.net"}
    # Every "@" and "://" was looked at, and each full phone number is of the range kept for fiction.
    assert (texts.count("@"), texts.count("://")) == (domains.total(), hosts.total())
    assert all(number.startswith("555-01") for number in re.findall(r"\b\d{3}-\d{4}\b", texts))


def test_a_seed_gives_the_same_rows_and_leaves_the_global_generator_alone():
    state = random.getstate()
    assert labelled_chunks(200, seed=5).equals(labelled_chunks(200, seed=5))
    assert not labelled_chunks(200, seed=5).equals(labelled_chunks(200, seed=6))
    assert archive_chunks(200, seed=5) == archive_chunks(200, seed=5)
    assert archive_chunks(200, seed=5) != archive_chunks(200, seed=6)
    assert random.getstate() == state
