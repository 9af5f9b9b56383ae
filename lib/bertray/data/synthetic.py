"""The demo's corpus: invented résumé chunks, labelled by section, and an archive of them to score.

    1. person    one invented applicant, whose words fill a whole résumé
                 {"title": ["Data Analyst", ...], "company": ["Diaz Ltd", ...], "skill": ["SQL", ...], ...}
    2. sentence  a template of the section, or one that several sections share, filled with these words
                 "{done} {artefact} for {company}, {result}"
                 -> "Rewrote a billing service for Diaz Ltd, saved $40k a year"
    3. chunk     sentences up to a drawn length; every fifth chunk also holds a piece of a neighbouring section
    4. noise     headings, bullets, broken lines, odd casing
    5. table     `labelled_chunks` adds the dirt of a hand-made table: duplicates, blanks, missing and wrong labels;
                 `archive_shards` cuts unlabelled résumés into Hive-style shards of uneven size

The sections share wording on purpose: TF-IDF with logistic regression classifies about nine of ten held-out chunks
correctly, and wrong labels keep every model below 1.0. Addresses are under example.com, .org and .net, and phone
numbers under 555-01xx: they belong to nobody.
"""

import re
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from bertray.errors import missing_extra

# The sections in their usual order on paper, with their shares of the labelled corpus.
_SHARES = {
    "Contact Information": 0.07, "Summary": 0.07, "Work Experience": 0.36,
    "Projects": 0.13, "Education": 0.19, "Skills": 0.18,
}  # fmt: skip
LABELS = tuple(_SHARES)

_MAX_CHUNK_WORDS = 70  # before bullets and headings
_LONG_WORDS = 450  # more than 512 word pieces: a scorer has to cut such a text
_LABEL_NOISE = 0.015
_SHARED_RATE = 0.55  # with this and the next rate the baseline scores between 0.85 and 0.93
_MIXED_RATE = 0.2
_ARCHIVE_SCHEMA = pa.schema([("document_id", pa.string()), ("section_number", pa.int32()), ("text", pa.string())])


def _choices(text: str) -> list[str]:
    """Alternatives written as running text: "a | b" -> ["a", "b"]."""
    return [" ".join(choice.split()) for choice in text.split("|")]


# An applicant has one field: its job titles and its skills.
_FIELDS = [(_choices(titles), _choices(skills)) for titles, skills in {
    "Data Analyst | Data Scientist | Machine Learning Engineer | Statistician": """Python | SQL | R | pandas | NumPy
        | PyTorch | Spark | Airflow | dbt | Tableau | Excel | statistics | A/B testing | forecasting""",
    "Web Developer | Frontend Engineer | Full-Stack Developer | App Developer": """JavaScript | TypeScript | React
        | Vue | Node.js | HTML | CSS | GraphQL | REST APIs | Django | Redis | PostgreSQL | accessibility | Figma""",
    "DevOps Engineer | Site Reliability Engineer | Cloud Architect | System Administrator": """Linux | Docker | AWS
        | Kubernetes | Terraform | Ansible | Azure | Bash | Go | Kafka | Jenkins | networking | monitoring""",
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
        | a data pipeline | a fraud detector | a test bench | a search index | a sensor network | an API for {topic}
        | a tool to {bs}""",
    "result": """saved ${n}0k a year | cut costs by {n} % | halved waiting times | used by {n}00 people
        | now in production | finished {n} weeks early | won second prize""",
    "topic": """machine learning | supply chains | renewable energy | customer analytics | process control
        | digital marketing | computer vision | financial planning | information security | public transport""",
    "soft": "teamwork | clear writing | problem solving | mentoring | attention to detail | leadership | communication",
    "department": "sales | engineering | operations | marketing | finance | support",
    "adjective": "motivated | experienced | curious | reliable | versatile | hands-on | ambitious | pragmatic",
    "degree": "B.Sc. | M.Sc. | Bachelor of Arts | Master of Science | MBA | Ph.D. | Diploma",
    "subject": "Computer Science | Economics | Physics | Statistics | Mechanical Engineering | Biology | Psychology",
    "course": "linear algebra | databases | macroeconomics | thermodynamics | algorithms | accounting",
    "certificate": "Certified Scrum Master | ITIL Foundation | Six Sigma Green Belt | CompTIA Security+",
    "language": "Spanish | German | French | Mandarin | Hindi | Portuguese | Arabic | Polish",
    "level": "basic | intermediate | advanced | expert | fluent",
    "team": "a team of {n} | two colleagues | {department} and {department} | volunteers",
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
        | {done} {artefact} for {company}, {result} | {done} and {done} {artefact} together with {team}
        | {result} by moving {artefact} to {skill} | {phrase}, {year}""",
    "Work Experience, Projects, Skills": "Technologies: {skills} | Stack: {skills}",
    "Work Experience, Summary": "{n} years at {company} in {topic}, {skill} | Led {team} to {bs}",
    "Work Experience, Summary, Skills": "Hands-on experience with {skills}",
    "Skills, Summary": "Strong in {topic}, {skill} and {soft} | {soft}, {soft}, {language} ({level})",
    "Education, Projects": "Final-year project at {university}: {artefact} with {skill}",
    "Education, Work Experience": "Teaching assistant for {course}, {university} | {university}, {city}, {span}",
    "Education, Skills": "{certificate}, {year} | {n}-week course in {skill} and {topic}",
    "Education, Summary": "{degree} {subject} graduate of {university} with a focus on {topic}",
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
        """Start another résumé."""
        fake, rng = self.fake, self.rng
        titles, skills = rng.choice(_FIELDS)
        _, stray_skills = rng.choice(_FIELDS)
        skills = list(dict.fromkeys(rng.sample(skills, 10) + rng.sample(stray_skills, 3)))
        years = sorted(rng.sample(range(1998, 2026), 4))
        self.words = _WORDS | {
            "name": [fake.name()],
            "title": [*rng.sample(titles, 2), fake.job().split(",")[0]],
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
        num_words = int(min(max(rng.lognormvariate(3.2, 0.5), 5), _MAX_CHUNK_WORDS))
        if label == "Contact Information":
            num_words = max(4, num_words // 2)
        num_foreign = int(num_words * rng.uniform(0.2, 0.45)) if rng.random() < _MIXED_RATE else 0
        lines = self.section(label, num_words - num_foreign)
        if rng.random() < 0.2:
            lines.insert(0, rng.choice((label, f"{label}:", label.upper())))
        step = rng.choice((-1, 1))
        neighbour = self.section(LABELS[(LABELS.index(label) + step) % len(LABELS)], num_foreign)
        return self.noise(neighbour + lines if step < 0 else lines + neighbour)

    def noise(self, lines: list[str]) -> str:
        """The lines as one text, as a converter from paper or PDF would leave it."""
        rng = self.rng
        bullet = rng.choice(("• ", "- ", "* ", "> ")) if rng.random() < 0.3 else ""
        text = rng.choice(("\n", "\n", ". ", "; ", " ", "  ")).join(bullet + line for line in lines)
        style = rng.random()
        if style < 0.08:
            text = text.upper() if style < 0.03 else text.lower()
        if rng.random() < 0.1:
            text = re.sub(" ", lambda _: "\n" if rng.random() < 0.15 else " ", text)
        return text

    def long_text(self) -> str:
        """A whole résumé that nobody cut into chunks."""
        self.new_person()
        return self.noise([line for label in LABELS for line in self.section(label, _LONG_WORDS // len(LABELS))])


def _apportion(total: int, weights: list[float]) -> list[int]:
    """Split `total` in proportion to `weights`, exactly: rounding the running sum loses nothing."""
    marks = [round(total * sum(weights[:end]) / sum(weights)) for end in range(len(weights) + 1)]
    return [after - before for before, after in pairwise(marks)]


def labelled_chunks(num_rows: int = 1839, seed: int = 0) -> pa.Table:
    """A labelled corpus as a person would collect it, not cleaned.

    Returns `num_rows` rows (50 or more) in random order, columns `text` and `label` (both string, nullable). "Work
    Experience" is five times as frequent as "Summary". About 1 % of the rows are exact duplicates, 0.5 % (at least
    three rows) have a null, empty or blank text, 1.5 % a wrong label; three labels are missing, and three texts occur
    twice with different labels.

    Raises `RequestError` if Faker is not installed.
    """
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
        position = next(untouched)
        rows[position] = (rows[position][0], None)
    rows += [((None, "", " \n\t ")[number % 3], rng.choice(LABELS)) for number in range(num_blank)]
    rng.shuffle(rows)
    return pa.table(dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True)))


def archive_shards(num_rows: int = 4000, num_shards: int = 8, seed: int = 1) -> list[tuple[str, pa.Table]]:
    """An archive of résumés cut into chunks, without labels.

    Returns `num_shards` pairs: a relative path such as "date=2026-01-05/part-0000.parquet", two shards a date, and a
    table with the columns `document_id` (string), `section_number` (int32, from 0 in each document) and `text` (string,
    nullable). Shards differ in size by up to six times and hold `num_rows` rows (10 or more a shard) in all, three of
    them without text and two with more than 400 words. A document stays in one shard.

    Raises `RequestError` if Faker is not installed.
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
            body = rng.choices(LABELS[1:], weights=list(_SHARES.values())[1:], k=rng.randint(3, 9))
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
    labelled = folder / "labelled.csv"
    labelled.parent.mkdir(parents=True, exist_ok=True)
    pa.csv.write_csv(labelled_chunks(num_labelled), labelled)
    for path, rows in archive_shards(num_archive):
        shard = folder / "archive" / path
        shard.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, shard)
    return labelled
