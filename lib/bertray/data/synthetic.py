"""The demo's corpus: invented résumé chunks, labelled by section, and an archive of them to score.

    1. person    one invented applicant, on whose words a whole résumé draws
                 {"title": ["Data Analyst", ...], "company": ["Diaz Ltd", ...], "skill": ["SQL", ...], ...}
    2. sentence  a template of the section, or one that several sections share, filled with those words
                 "{done} {artefact} for {company}, {result}"
                 -> "Rewrote a billing service for Diaz Ltd, saved $40k a year"
    3. chunk     sentences up to a drawn length; every fifth also holds a piece of a neighbouring section
    4. noise     headings, page headers, bullets, broken lines, odd casing, slips of an OCR
    5. table     `labelled_chunks` adds the dirt of a hand-made table: duplicates, blanks, missing and wrong
                 labels; `archive_shards` cuts résumés without labels into uneven Hive-style shards
                 {"text": "* Rewrote a bi1ling service for Diaz Ltd, saved", "label": "Work Experience"}

Sections share wording on purpose: TF-IDF with a logistic regression gets about nine of ten held-out chunks
right, and wrong labels keep any model from 1.0. Mail and web addresses are under example.com, .org and .net,
phone numbers under 555-01xx: they belong to nobody.
"""

import re
from collections.abc import Iterator
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random
from string import capwords

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from bertray.data.resume_words import FIELDS, HEADINGS, OWN, PAGE_HEADERS, SHARED, WORDS
from bertray.errors import RequestError, missing_extra

# Shares of a labelled corpus: the longest sections of a résumé are cut into the most chunks.
_SHARES = {
    "Contact Information": 0.07, "Education": 0.19, "Work Experience": 0.36,
    "Skills": 0.18, "Projects": 0.13, "Summary": 0.07,
}  # fmt: skip
LABELS = tuple(_SHARES)
# The usual order on paper: a chunk cut at a boundary holds words of a neighbour in this order.
_ORDER = ("Contact Information", "Summary", "Work Experience", "Projects", "Education", "Skills")

_MIN_LABELLED_ROWS = 50  # with fewer, the dirt outweighs the text
_MIN_SHARD_ROWS = 10  # on average; then even the smallest shard, a sixth of the largest, has a row
_MAX_CHUNK_WORDS = 70  # before bullets and headings, which add up to 20
_LONG_WORDS = 450  # more than 512 word pieces: a scorer has to cut such a text
_LABEL_NOISE = 0.015
_SHARED_RATE = 0.55  # this and the next are set so that the baseline scores between 0.85 and 0.93
_MIXED_RATE = 0.2

Shard = tuple[str, pa.Table]  # relative path, rows
_TEXT = ("text", pa.string())
_LABELLED_SCHEMA = pa.schema([_TEXT, ("label", pa.string())])
_ARCHIVE_SCHEMA = pa.schema([("document_id", pa.string()), ("section_number", pa.int32()), _TEXT])
_BULLETS = ("• ", "- ", "* ", "· ", "> ")
_ADDRESS_SIGNS = set("@/")  # words left as they are: a slip in an address may make it a real one
_OCR_SLIPS = (("l", "1"), ("O", "0"), ("rn", "m"), ("m", "rn"), ("S", "5"), ("e", "c"), ("i", "l"))


class _Writer:
    """Writes chunks and owns the random state: two writers with one seed write the same."""

    def __init__(self, seed: int) -> None:
        try:
            from faker import Faker
        except ImportError as error:
            raise missing_extra("the synthetic corpus", "demo") from error
        self.rng = Random(seed)
        self.fake = Faker("en_US")
        self.fake.seed_instance(seed)
        self.new_person()

    def new_person(self) -> None:
        """Start another résumé."""
        fake, rng = self.fake, self.rng
        titles, skills = rng.choice(FIELDS)
        _, stray_skills = rng.choice(FIELDS)
        job = capwords(" ".join(reversed(fake.job().split(", "))))  # "Engineer, civil" -> "Civil Engineer"
        self.person: dict[str, list[str]] = {
            "name": [fake.name()],
            "title": [*rng.sample(titles, 2), job],
            "skill": list(dict.fromkeys(rng.sample(skills, 10) + rng.sample(stray_skills, 3))),
            "company": [fake.company() for _ in range(3)],
            "city": [fake.city() for _ in range(2)],
            "university": ["{city} University", f"University of {fake.state()}", "{city} College"],
            "street": [fake.street_address()],
            "phrase": [fake.catch_phrase() for _ in range(3)],
            "bs": [fake.bs() for _ in range(3)],
            "email": [fake.safe_email()],
            "phone": [fake.numerify("(%##) 555-01##"), fake.numerify("%##-555-01##")],
            "link": [f"https://www.example.{rng.choice(('com', 'org', 'net'))}/{fake.user_name()}"],
        }

    def fill(self, template: str) -> str:
        """The template with a value in each slot; no word list gives the same value twice."""
        rng = self.rng
        used: set[str] = set()

        def value(slot: re.Match[str]) -> str:
            if slot[1] == "skills":
                return ", ".join(rng.sample(self.person["skill"], rng.randint(2, 6)))
            if slot[1] in ("span", "months"):
                first, separator = rng.randint(1998, 2023), rng.choice((" - ", "-", " to "))
                last = first + rng.randint(1, 2)
                months = f"{{month}} {first}{separator}{{month}} {last}"
                return self.fill(months) if slot[1] == "months" else f"{first}{separator}{last}"
            choices = self.person.get(slot[1]) or WORDS[slot[1]]
            choice = rng.choice([text for text in choices if text not in used] or choices)
            used.add(choice)
            return self.fill(choice)

        return re.sub(r"\{(\w+)\}", value, template)

    def section(self, label: str, num_words: int) -> list[str]:
        """Sentences of one section, `num_words` words in all; the last one may be cut short."""
        shared = [text for labels, texts in SHARED.items() if label in labels for text in texts]
        lines: list[str] = []
        used: set[str] = set()
        while num_words > 0:
            pool = shared if self.rng.random() < _SHARED_RATE else OWN[label]
            template = self.rng.choice([text for text in pool if text not in used] or pool)
            used.add(template)
            words = self.fill(template).split()[:num_words]
            if not _ADDRESS_SIGNS & set(words[0]):
                words[0] = words[0][0].upper() + words[0][1:]
            lines.append(" ".join(words))
            num_words -= len(words)
        return lines

    def chunk(self, label: str) -> str:
        """One noisy chunk, the larger part of which belongs to `label`."""
        rng = self.rng
        # About 25 words in the median, and contact details half that: the demo trains on two CPU cores.
        num_words = int(min(max(rng.lognormvariate(3.2, 0.5), 5), _MAX_CHUNK_WORDS))
        if label == "Contact Information":
            num_words = max(4, num_words // 2)
        num_foreign = int(num_words * rng.uniform(0.2, 0.45)) if rng.random() < _MIXED_RATE else 0
        lines = self.section(label, num_words - num_foreign)
        if rng.random() < 0.2:
            heading = rng.choice(HEADINGS[label])
            lines.insert(0, rng.choice((heading, f"{heading}:", heading.upper())))
        if num_foreign:
            step = rng.choice((-1, 1))
            neighbour = self.section(_ORDER[(_ORDER.index(label) + step) % len(_ORDER)], num_foreign)
            lines = neighbour + lines if step < 0 else lines + neighbour
        if rng.random() < 0.05:
            lines.insert(0, self.fill(rng.choice(PAGE_HEADERS)))
        return self.noise(lines)

    def noise(self, lines: list[str]) -> str:
        """The lines as one text, as a converter from paper or PDF would leave it."""
        rng = self.rng
        bullet = rng.choice(_BULLETS) if rng.random() < 0.3 else ""
        text = rng.choice(("\n", "\n", ". ", "; ", " ", "  ")).join(bullet + line for line in lines)
        style = rng.random()
        if style < 0.08:
            text = text.upper() if style < 0.03 else text.lower()
        if rng.random() < 0.2:
            text = re.sub(r"\S{3,}", lambda found: self.slip(found[0]), text)
        if rng.random() < 0.1:
            text = re.sub(" ", lambda _: "\n" if rng.random() < 0.15 else " ", text)
        return text

    def slip(self, word: str) -> str:
        """The word, three times in ten with letters misread where it has them."""
        if _ADDRESS_SIGNS & set(word) or self.rng.random() > 0.3:
            return word
        return word.replace(*self.rng.choice(_OCR_SLIPS), 1)

    def long_text(self) -> str:
        """A résumé that nobody cut."""
        num_words = _LONG_WORDS // len(_ORDER)
        return self.noise([line for label in _ORDER for line in self.section(label, num_words)])


def _apportion(total: int, weights: list[float]) -> list[int]:
    """Split `total` in proportion to `weights`, exactly: rounding the running sum loses nothing."""
    marks = [round(total * sum(weights[:end]) / sum(weights)) for end in range(len(weights) + 1)]
    return [after - before for before, after in pairwise(marks)]


def labelled_chunks(num_rows: int = 1839, seed: int = 0) -> pa.Table:
    """A labelled corpus as a person would collect it, not cleaned.

    Returns `num_rows` rows in random order, columns `text` and `label` (both string, nullable). "Work
    Experience" is five times as frequent as "Summary". About 1 % of the rows are exact duplicates, 0.5 % (at
    least three rows) have a null, empty or blank text, 1.5 % a wrong label; three labels are missing, and
    three texts stand twice with different labels.

    Raises `RequestError` if `num_rows` is below 50 or Faker is not installed.
    """
    if num_rows < _MIN_LABELLED_ROWS:
        raise RequestError(f"num_rows is {num_rows}: ask for at least {_MIN_LABELLED_ROWS} labelled chunks")
    writer = _Writer(seed)
    rng = writer.rng
    num_duplicates, num_blank, num_contradictions, num_unlabelled = num_rows // 100, 3 + num_rows // 300, 3, 3
    num_written = num_rows - num_duplicates - num_blank - num_contradictions

    rows: list[tuple[str | None, str | None]] = []
    for label, count in zip(LABELS, _apportion(num_written, list(_SHARES.values())), strict=True):
        for _ in range(count):
            writer.new_person()
            rows.append((writer.chunk(label), label))
    rng.shuffle(rows)

    def mislabelled(row: tuple[str | None, str | None]) -> tuple[str | None, str]:
        return row[0], rng.choice([label for label in LABELS if label != row[1]])

    # The rows are shuffled, so the first ones are as good as any; each is spoilt in one way only.
    num_wrong = round(num_written * _LABEL_NOISE)
    rows[:num_wrong] = [mislabelled(row) for row in rows[:num_wrong]]
    untouched = iter(range(num_wrong, num_written))
    rows += [rows[next(untouched)] for _ in range(num_duplicates)]
    rows += [mislabelled(rows[next(untouched)]) for _ in range(num_contradictions)]
    for _ in range(num_unlabelled):
        place = next(untouched)
        rows[place] = (rows[place][0], None)
    rows += [((None, "", " \n\t ")[number % 3], rng.choice(LABELS)) for number in range(num_blank)]
    rng.shuffle(rows)
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=_LABELLED_SCHEMA)


def archive_shards(num_rows: int = 4000, num_shards: int = 8, seed: int = 1) -> Iterator[Shard]:
    """An archive of résumés cut into chunks, without labels, one shard at a time.

    Yields `num_shards` pairs: a relative path such as "date=2026-01-05/part-0000.parquet", two shards a date,
    and a table with the columns `document_id` (string), `section_number` (int32, from 0 in each document) and
    `text` (string, nullable). Shards differ in size by up to six times and hold `num_rows` rows in all, three
    of them without text and two with more than 400 words. A document stays in one shard.

    Raises `RequestError`, before the first shard, if there are fewer than 10 rows a shard or Faker is not
    installed.
    """
    if num_shards < 1 or num_rows < _MIN_SHARD_ROWS * num_shards:
        raise RequestError(
            f"{num_rows} rows in {num_shards} shards: "
            f"ask for one shard or more, and for {_MIN_SHARD_ROWS} rows or more a shard"
        )
    return _shards(_Writer(seed), num_rows, num_shards)


def _shards(writer: _Writer, num_rows: int, num_shards: int) -> Iterator[Shard]:
    # A generator of its own, so that `archive_shards` raises when called and not at the first shard.
    rng = writer.rng
    *blank_rows, long_a, long_b = rng.sample(range(num_rows), 5)
    blanks: dict[int, str | None] = dict(zip(blank_rows, (None, "", "  \n"), strict=True))
    num_written = num_documents = 0
    for shard, size in enumerate(_apportion(num_rows, [rng.uniform(0.3, 1.8) for _ in range(num_shards)])):
        rows: list[dict[str, str | int | None]] = []
        while len(rows) < size:
            writer.new_person()
            document_id = f"resume-{num_documents:06d}"
            body = rng.choices(LABELS[1:], weights=list(_SHARES.values())[1:], k=rng.randint(3, 9))
            labels = [LABELS[0], *sorted(body, key=_ORDER.index)]
            for number, label in enumerate(labels[: size - len(rows)]):
                row = num_written + len(rows)
                text = writer.long_text() if row in (long_a, long_b) else blanks.get(row, writer.chunk(label))
                rows.append({"document_id": document_id, "section_number": number, "text": text})
            num_documents += 1
        num_written += size
        day = date(2026, 1, 5) + timedelta(days=shard // 2)
        yield f"date={day}/part-{shard % 2:04d}.parquet", pa.Table.from_pylist(rows, schema=_ARCHIVE_SCHEMA)


def write_corpus(folder: Path, num_labelled: int, num_archive: int) -> Path:
    """Write `folder`/labelled.csv and the shards below `folder`/archive; returns the path of the former."""
    labelled = folder / "labelled.csv"
    labelled.parent.mkdir(parents=True, exist_ok=True)
    pa.csv.write_csv(labelled_chunks(num_labelled), labelled)
    for path, rows in archive_shards(num_archive):
        shard = folder / "archive" / path
        shard.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, shard)
    return labelled
