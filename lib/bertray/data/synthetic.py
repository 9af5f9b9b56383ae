"""The demo's corpus: invented résumé chunks, labelled by section, and an archive of them to score.

    1. person    an invented applicant, whose words fill a whole résumé
                 {"title": ["Data Analyst", ...], "company": ["Diaz Ltd", ...], "skill": ["SQL", ...], ...}
    2. sentence  a template of the section, or one that several sections share, filled with these words
                 "{done} {artefact} for {company}, {result}" -> "Rewrote a chat bot for Diaz Ltd, won second prize"
    3. chunk     sentences up to a drawn length; every fifth chunk also holds a piece of the next section
    4. noise     headings, bullets, odd casing
    5. table     labelled chunks with the dirt of a hand-made table; unlabelled résumés in shards of uneven size

The sections share wording on purpose: TF-IDF with logistic regression classifies about nine of ten held-out chunks
correctly, and wrong labels keep every model below 1.0. Addresses are under example.com, .org and .net, and phone
numbers under 555-01xx: they belong to nobody.
"""

import re
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from bertray.errors import missing_extra

# The sections in their usual order on paper, with their shares of the labelled corpus.
LABELS = ("Contact Information", "Summary", "Work Experience", "Projects", "Education", "Skills")
_SHARES = (0.07, 0.07, 0.36, 0.13, 0.19, 0.18)

_LABEL_NOISE = 0.015
_SHARED_RATE = 0.6  # with this and the next rate the baseline scores between 0.85 and 0.93
_MIXED_RATE = 0.2
_ARCHIVE_SCHEMA = pa.schema([("document_id", pa.string()), ("section_number", pa.int32()), ("text", pa.string())])
_Row = tuple[str | None, str | None]  # text, label


def _choices(text: str) -> list[str]:
    """Alternatives written as running text: "a | b" -> ["a", "b"]."""
    return [" ".join(choice.split()) for choice in text.split("|")]


# An applicant has one field: its job titles and its skills.
_FIELDS = [(_choices(titles), _choices(skills)) for titles, skills in {
    "Data Analyst | Data Scientist | Machine Learning Engineer | Statistician": """Python | SQL | R | pandas | NumPy
        | PyTorch | Spark | Airflow | dbt | Tableau | Excel | statistics | A/B testing | forecasting""",
    "Web Developer | Full-Stack Developer | App Developer | DevOps Engineer": """JavaScript | React | Vue | CSS
        | GraphQL | Django | PostgreSQL | accessibility | Linux | Docker | Kubernetes | AWS | Bash | monitoring""",
    "Mechanical Engineer | Embedded Developer | Quality Engineer | Electronics Technician": """C | C++ | MATLAB
        | SolidWorks | AutoCAD | CAN bus | soldering | FPGA | PCB design | six sigma | 3D printing | ISO 9001""",
    "Marketing Manager | Product Manager | Account Executive | Recruiter": """Salesforce | SEO | copywriting | SAP
        | budgeting | negotiation | market research | Jira | HubSpot | bookkeeping | PowerPoint | pricing""",
}.items()]  # fmt: skip

# Words for any applicant. A name in braces is replaced by one of these, or by one of the person's own words.
_WORDS = {name: _choices(text) for name, text in {
    "n": "2 | 3 | 4 | 5 | 6 | 7 | 8 | 9",
    "done": "built | designed | developed | rewrote | maintained | automated | launched | tested | improved | planned",
    "artefact": """a reporting dashboard | an inventory system | a booking app | a recommendation engine | a chat bot
        | a data pipeline | a fraud detector | a test bench | a search index | a tool to {bs}""",
    "result": "saved ${n}0k a year | cut costs by {n} % | halved waiting times | now in production | won second prize",
    "topic": """machine learning | supply chains | renewable energy | customer analytics | process control
        | digital marketing | computer vision | financial planning | information security | public transport""",
    "soft": "teamwork | clear writing | problem solving | mentoring | attention to detail | leadership | communication",
    "department": "sales | engineering | operations | marketing | finance | support",
    "adjective": "motivated | experienced | curious | reliable | versatile | hands-on | ambitious | pragmatic",
    "degree": "B.Sc. | M.Sc. | Bachelor of Arts | Master of Science | MBA | Ph.D. | Diploma",
    "subject": "Computer Science | Economics | Physics | Statistics | Mechanical Engineering | Biology | Psychology",
    "course": "linear algebra | databases | macroeconomics | thermodynamics | algorithms | accounting",
    "language": "Spanish | German | French | Mandarin | Hindi | Portuguese | Arabic | Polish",
    "level": "basic | intermediate | advanced | expert | fluent",
}.items()}  # fmt: skip

# Sentences of one section, and sentences that several sections share: a bag of words cannot tell these apart.
_TEMPLATES = {tuple(labels.split(", ")): _choices(text) for labels, text in {
    "Contact Information": """{name} | {street}, {city} | Phone: {phone} | E-mail: {email} | {name}, {title}
        | Mobile {phone}, {email} | Reach me at {email} or {link}""",
    "Education": """{degree} in {subject}, {university}, {span} | {university} - {degree} {subject} ({year})
        | GPA 3.{n} | Graduated with honours, {year} | Minor in {subject} | Thesis on {topic} using {skill}
        | Courses included {course}, {course} and {course} | Dean's list in {year}; scholarship from {company}""",
    "Work Experience": """{title}, {company}, {city} ({span}) | {span}: {title} at {company}
        | Supervised {n} employees; promoted to {title} in {year} | Reported to the head of {department}
        | Responsible for {topic} in the {department} department of {company} | Worked with {department} to {bs}
        | Managed client accounts in {city}, {result} | Handled daily operations and on-call duty for {artefact}""",
    "Skills": """{skills} | {skills}, {soft} | Proficient in {skills} | Tools: {skills} | {level}: {skills}
        | {skill} ({level}), {skill} ({n} years) | {language} ({level}), English (native)
        | Soft skills: {soft}, {soft}, {soft} | Methods: {topic}, {skill}, {skill}""",
    "Projects": """{phrase}: {artefact} in {skill} | Side project: {artefact} to {bs} | Code at {link}
        | Personal project on {topic} with {skills} | Hackathon in {city}, {year}: {artefact} in {n} days
        | Wrote {artefact} for fun to learn {skill} | Volunteer work: {artefact} for a charity in {city}""",
    "Summary": """{adjective} {title} with {n} years of experience in {topic} | Known for {soft} and {soft}
        | Looking for a role in {topic} where I can {bs} | {adjective} professional with a {degree} and {soft}
        | My goal is to {bs} as a {title} | Brings {soft}, {soft} and {n} years in {department}""",
    "Work Experience, Projects": """{done} {artefact} with {skill} and {skill} | {done} {artefact}, {result}
        | {done} {artefact} for {company}, {result} | {result} by moving {artefact} to {skill} | {phrase}, {year}""",
    "Work Experience, Projects, Skills": "Technologies: {skills} | Stack: {skills}",
    "Work Experience, Summary": "{n} years at {company} in {topic}, {skill} | Led a team of {n} to {bs}",
    "Work Experience, Summary, Skills": "Hands-on experience with {skills}",
    "Skills, Summary": "Strong in {topic}, {skill} and {soft} | {soft}, {soft}, {language} ({level})",
    "Education, Projects": "Final-year project at {university}: {artefact} with {skill}",
    "Education, Work Experience": "Teaching assistant for {course}, {university} | {university}, {city}, {span}",
    "Education, Skills, Summary": "{n}-week course in {skill} and {topic}, {year}",
    "Contact Information, Projects": "{link}",
    "Contact Information, Summary": "{title} based in {city}, open to relocation | Available from {year}",
}.items()}  # fmt: skip


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

    def new_person(self) -> None:
        fake, rng = self.fake, self.rng
        titles, skills = rng.choice(_FIELDS)
        skills = rng.sample(skills, 10)
        years = sorted(rng.sample(range(1998, 2026), 4))
        self.words = _WORDS | {
            "name": [fake.name()],
            "title": rng.sample(titles, 2),
            "skill": skills,
            "skills": [", ".join(rng.sample(skills, size)) for size in (2, 3, 4, 5, 6)],
            "year": [str(year) for year in years],
            "span": [f"{first} - {last}" for first, last in pairwise(years)],
            "company": [fake.company() for _ in range(3)],
            "city": [fake.city() for _ in range(2)],
            "university": [f"{fake.city()} University", f"University of {fake.state()}"],
            "street": [fake.street_address()],
            "phrase": [fake.catch_phrase() for _ in range(3)],
            "bs": [fake.bs() for _ in range(3)],
            "email": [fake.safe_email()],
            "phone": [fake.numerify("(%##) 555-01##"), fake.numerify("%##-555-01##")],
            "link": [f"https://www.example.{rng.choice(('com', 'org', 'net'))}/{fake.user_name()}"],
        }

    def fill(self, template: str) -> str:
        """The template with a word in each slot, no word twice."""
        used: set[str] = set()

        def word(slot: re.Match[str]) -> str:
            choices = self.words[slot[1]]
            choice = self.rng.choice([text for text in choices if text not in used] or choices)
            used.add(choice)
            return self.fill(choice)

        return re.sub(r"\{(\w+)\}", word, template)

    def section(self, label: str, num_words: int) -> list[str]:
        """Sentences of one section, `num_words` words in all; the last one may be cut short."""
        shared = [text for of, texts in _TEMPLATES.items() if len(of) > 1 and label in of for text in texts]
        lines: list[str] = []
        while num_words > 0:
            pool = shared if self.rng.random() < _SHARED_RATE else _TEMPLATES[label,]
            first, *others = self.fill(self.rng.choice(pool)).split()[:num_words]
            is_address = "@" in first or "/" in first
            lines.append(" ".join([first if is_address else first[0].upper() + first[1:], *others]))
            num_words -= 1 + len(others)
        return lines

    def chunk(self, label: str) -> str:
        """One noisy chunk, the larger part of which belongs to `label`."""
        rng = self.rng
        # The median is about 25 words, of contact details half that: the demo trains on two CPU cores.
        num_words = int(min(max(rng.lognormvariate(3.2, 0.5), 5), 70))
        if label == "Contact Information":
            num_words = max(4, num_words // 2)
        num_foreign = int(num_words * rng.uniform(0.2, 0.45)) if rng.random() < _MIXED_RATE else 0
        lines = self.section(label, num_words - num_foreign)
        if rng.random() < 0.2:
            lines.insert(0, rng.choice((label, f"{label}:", label.upper())))
        following = LABELS[(LABELS.index(label) + 1) % len(LABELS)]
        return self.noise(lines + self.section(following, num_foreign))

    def noise(self, lines: list[str]) -> str:
        """The lines as one text, as a converter from paper or PDF would leave it."""
        rng = self.rng
        bullet = rng.choice(("• ", "- ", "* ", "> ")) if rng.random() < 0.3 else ""
        text = rng.choice(("\n", "\n", ". ", "; ", " ", "  ")).join(bullet + line for line in lines)
        return rng.choice((str.upper, str.lower))(text) if rng.random() < 0.08 else text

    def long_text(self) -> str:
        """A whole résumé that nobody cut into chunks: more than 512 word pieces, so that a scorer has to cut it."""
        self.new_person()
        return self.noise([line for label in LABELS for line in self.section(label, 75)])


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Split `total` in proportion to `weights`, exactly: rounding the running sum loses nothing."""
    marks = [round(total * sum(weights[:end]) / sum(weights)) for end in range(len(weights) + 1)]
    return [after - before for before, after in pairwise(marks)]


def labelled_chunks(num_rows: int = 1839, seed: int = 0) -> pa.Table:
    """A labelled corpus as a person would collect it, not cleaned: columns `text` and `label` (string, nullable).

    There must be 50 rows or more. About 1 % of them are exact duplicates, 0.5 % (at least three) have a null, empty or
    blank text, 1.5 % a wrong label; three labels are missing, and three texts occur twice with different labels.
    """
    writer = _Writer(seed)
    rng = writer.rng
    num_duplicates, num_blank, num_contradictions = num_rows // 100, 3 + num_rows // 300, 3
    num_written = num_rows - num_duplicates - num_blank - num_contradictions

    rows: list[_Row] = []
    for label, count in zip(LABELS, _apportion(num_written, _SHARES), strict=True):
        for _ in range(count):
            writer.new_person()
            rows.append((writer.chunk(label), label))
    rng.shuffle(rows)

    def mislabelled(row: _Row) -> _Row:
        return row[0], rng.choice([label for label in LABELS if label != row[1]])

    # Each row is spoilt in one way only; the rows are shuffled, so that any will do.
    num_wrong = round(num_written * _LABEL_NOISE)
    wrong, unlabelled, sound = rows[:num_wrong], rows[num_wrong : num_wrong + 3], rows[num_wrong + 3 :]
    rows = [*map(mislabelled, wrong), *((text, None) for text, _ in unlabelled), *sound]
    rows += [*sound[:num_duplicates], *map(mislabelled, sound[num_duplicates : num_duplicates + num_contradictions])]
    rows += [((None, "", " \n\t ")[number % 3], rng.choice(LABELS)) for number in range(num_blank)]
    rng.shuffle(rows)
    return pa.table(dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True)))


def archive_shards(num_rows: int = 4000, num_shards: int = 8, seed: int = 1) -> list[tuple[str, pa.Table]]:
    """An archive of résumés cut into chunks, without labels: relative paths (two a date) and tables.

    There must be 10 rows or more a shard. Shards differ in size by up to six times; a document stays in one shard.
    Three rows have no text, two have more than 400 words.
    """
    writer = _Writer(seed)
    rng = writer.rng
    odd_texts: tuple[str | None, ...] = (None, "", "  \n", writer.long_text(), writer.long_text())
    odd_rows = dict(zip(rng.sample(range(num_rows), len(odd_texts)), odd_texts, strict=True))
    shards: list[tuple[str, pa.Table]] = []
    num_written = num_documents = 0
    for shard, size in enumerate(_apportion(num_rows, [rng.uniform(0.3, 1.8) for _ in range(num_shards)])):
        rows: list[dict[str, str | int | None]] = []
        while len(rows) < size:
            writer.new_person()
            body = rng.choices(LABELS[1:], weights=_SHARES[1:], k=rng.randint(3, 9))
            labels = [LABELS[0], *sorted(body, key=LABELS.index)]
            for number, label in enumerate(labels[: size - len(rows)]):
                text = odd_rows.get(num_written + len(rows), writer.chunk(label))
                rows.append({"document_id": f"resume-{num_documents:06d}", "section_number": number, "text": text})
            num_documents += 1
        num_written += size
        day = date(2026, 1, 5) + timedelta(days=shard // 2)
        table = pa.Table.from_pylist(rows, schema=_ARCHIVE_SCHEMA)
        shards.append((f"date={day}/part-{shard % 2:04d}.parquet", table))
    return shards


def write_corpus(folder: Path, num_labelled: int, num_archive: int) -> Path:
    """Write `folder`/labelled.csv and the shards below `folder`/archive; return the path of the former."""
    for path, rows in archive_shards(num_archive):
        shard = folder / "archive" / path
        shard.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, shard)
    pa.csv.write_csv(labelled_chunks(num_labelled), folder / "labelled.csv")
    return folder / "labelled.csv"
