"""Writes the demo's corpus: passages of docstrings, labelled with their section, and an archive of other passages.

    python -m benchmarks.docstrings    labelled and archived passages, to lib/bertray/data/demo_*.parquet

    1. docstring  of numpy, scipy, scikit-learn and pandas, which write them in sections
    2. passage    what a section says of one thing, or a paragraph of it: two sentences, no code
                  under Returns "labels : ndarray\\n    Index of the cluster each sample belongs to."
                  -> "Index of the cluster each sample belongs to."
    3. table      labelled passages with the dirt of a hand-made table; an archive of other docstrings

People wrote the passages, and their sections are the labels. Those that name a section are left out, so a heading
cannot be looked up. A docstring is in one of the two tables. What the licence of the four packages asks for is in
lib/bertray/data/demo_NOTICE.txt.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from random import Random
from textwrap import dedent

import pyarrow as pa
import pyarrow.parquet as pq

from bertray.data import synthetic
from bertray.data.synthetic import NUM_ARCHIVE, NUM_LABELLED

LABELS = ("Examples", "Notes", "Parameters", "Raises", "Returns", "See Also")
_PACKAGES = ("numpy", "scipy", "sklearn", "pandas")
_MAX_ROWS_OF_LABEL = 580  # Parameters alone are four of ten passages
_MIN_WORDS, _MAX_WORDS = 8, 40

_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_HEADING = r"^ *([A-Z][A-Za-z ]+)\n *-{3,} *\n"
_SECTION = re.compile(rf"{_HEADING}(.*?)(?={_HEADING.replace('(', '(?:')}|\Z)", re.DOTALL | re.MULTILINE)
# Where the next passage of a section starts: after "name : type", after "name :", after a blank line.
_STARTS = dict.fromkeys(("Parameters", "Raises", "Returns"), r"(?m)^\S.*$") | {"See Also": r"(?m)^\S[^:\n]*(?::|$)"}
_NAMES_A_SECTION = re.compile(r"\b(?:parameter|return|rais|note|see also|example|referenc)", re.IGNORECASE)
_Row = dict[str, str | int | None]


def passages() -> Iterator[tuple[str, str, str]]:
    """Document id, label and text of all passages, in the order of the files and of their lines."""
    for package in _PACKAGES:
        [folder] = find_spec(package).submodule_search_locations
        for file in sorted(Path(folder).rglob("*.py")):
            name = ".".join(file.relative_to(folder).with_suffix("").parts)
            if "tests" in file.parts or "externals" in file.parts:
                continue
            for number, docstring in enumerate(_DOCSTRING.findall(file.read_text("utf-8"))):
                for heading, body in _SECTION.findall(docstring):
                    if heading in LABELS:
                        yield from ((f"{package}.{name}:{number}", heading, text) for text in _texts(heading, body))


def _texts(label: str, body: str) -> Iterator[str]:
    for part in re.split(_STARTS.get(label, r"\n\s*\n"), dedent(body)):
        if any(code in part for code in (">>>", "...", "::", ".. ", "\\")):
            continue
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"[`*]+", "", part).strip())
        words = " ".join(sentences[:2]).split()
        text = " ".join(words[:_MAX_WORDS])
        if len(words) >= _MIN_WORDS and not _NAMES_A_SECTION.search(text):
            yield text


def corpus(seed: int = 0) -> tuple[pa.Table, pa.Table]:
    """Labelled passages (`text`, `label`, `document_id`) and an archive (`document_id`, `passage_number`, `text`)."""
    rng = Random(seed)
    documents: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for document, label, text in passages():
        documents[document].append((label, text))
    ids = sorted(documents)
    rng.shuffle(ids)
    half = len(ids) // 2
    return _labelled({name: documents[name] for name in ids[:half]}, rng), _archive(
        {name: documents[name] for name in ids[half:]}, rng
    )


def _labelled(documents: dict[str, list[tuple[str, str]]], rng: Random) -> pa.Table:
    """About 1 % of the rows are exact duplicates, 0.4 % have a null, empty or blank text; three labels are missing, and
    three texts occur twice with different labels. The first 60 rows have some of each, for a small demo.
    """
    rows_of: dict[str, list[_Row]] = defaultdict(list)
    seen: set[str] = set()
    for document, passages_of_it in documents.items():
        for label, text in passages_of_it:
            if text not in seen and len(rows_of[label]) < _MAX_ROWS_OF_LABEL:
                seen.add(text)
                rows_of[label].append({"text": text, "label": label, "document_id": document})
    # The first rows have all labels, the rarest too.
    first = [row for rows in zip_longest(*(rows_of[label][:8] for label in LABELS)) for row in rows if row]
    rest = [row for label in LABELS for row in rows_of[label][8:]]
    rng.shuffle(rest)
    blank = [row | {"text": (None, "", " \n\t ")[number % 3]} for number, row in enumerate(rest[:12])]
    unlabelled = [row | {"label": None} for row in rest[12:15]]
    contradicted = [row | {"label": LABELS[LABELS.index(row["label"]) - 1]} for row in rest[15:18]]
    duplicated = rest[18:46]
    first += [*blank[:3], unlabelled[0], contradicted[0], rest[15], duplicated[0], duplicated[0]]
    rest = [*rest[16:18], *contradicted[1:], *unlabelled[1:], *blank[3:], *duplicated[1:], *rest[19:]]
    rng.shuffle(first)
    rng.shuffle(rest)
    return pa.Table.from_pylist((first + rest)[:NUM_LABELLED])


def _archive(documents: dict[str, list[tuple[str, str]]], rng: Random) -> pa.Table:
    """Of the first 60 rows three have no text, and two have more than 400 words."""
    texts = [text for passages_of_it in documents.values() for _, text in passages_of_it]
    odd_texts = (None, "", "  \n", " ".join(texts[:40]), " ".join(texts[40:80]))
    odd_rows = dict(zip(rng.sample(range(60), len(odd_texts)), odd_texts, strict=True))
    rows: list[_Row] = []
    for document, passages_of_it in documents.items():
        for number, (_, text) in enumerate(passages_of_it):
            rows.append({"document_id": document, "passage_number": number, "text": odd_rows.get(len(rows), text)})
    return pa.Table.from_pylist(rows[:NUM_ARCHIVE])


if __name__ == "__main__":
    for name, table in zip(("labelled", "archive"), corpus(), strict=True):
        file = Path(synthetic.__file__).with_name(f"demo_{name}.parquet")
        pq.write_table(table, file, compression="zstd", compression_level=19)
