"""Invents résumé chunks, labelled by section, and an archive of them: the usual example of tutorials.

    python -m benchmarks.resumes resumes    writes resumes/labelled.parquet and resumes/archive/part-0000.parquet

    1. sentence  a template of the section, or one that several sections share, whose slots Faker fills
                 "{{done}} {{artefact}} for {{company}}" -> "Rewrote a chat bot for Diaz Ltd"
    2. chunk     sentences up to a drawn length; every fifth chunk also holds a piece of the next section
    3. table     labelled chunks with the dirt of a hand-made table; unlabelled résumés, cut into chunks

The sections share wording on purpose: TF-IDF with logistic regression classifies about nine of ten held-out chunks
correctly, and wrong labels keep every model below 1.0. Addresses are under example.com, .org and .net, and phone
numbers under 555-01xx: they belong to nobody.
"""

import sys
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
from faker import Faker
from faker.providers import DynamicProvider

NUM_LABELLED, NUM_ARCHIVE = 1839, 4000
# The sections in their usual order on paper, with their shares of the labelled corpus.
LABELS = ("Contact Information", "Summary", "Work Experience", "Projects", "Education", "Skills")
_SHARES = (0.07, 0.07, 0.36, 0.13, 0.19, 0.18)

_LABEL_NOISE = 0.015
_SHARED_RATE = 0.65  # with this and the next rate the baseline scores between 0.85 and 0.93
_MIXED_RATE = 0.2
_ARCHIVE_SCHEMA = pa.schema([("document_id", pa.string()), ("section_number", pa.int32()), ("text", pa.string())])
_Row = tuple[str | None, str | None]  # text, label


def _choices(text: str) -> list[str]:
    """Alternatives written as running text: "a | b" -> ["a", "b"]."""
    return [" ".join(choice.split()) for choice in text.split("|")]


# What fills the slots of the templates, beside Faker's own names, companies and cities.
_WORDS = {name: _choices(text) for name, text in {
    "num": "2 | 3 | 4 | 5 | 6 | 7 | 8 | 9",
    "title": """Data Analyst | Statistician | Web Developer | DevOps Engineer | Mechanical Engineer | Product Manager
        | Quality Engineer | Marketing Manager | Recruiter | Account Executive""",
    "skill": """Python | SQL | R | PyTorch | Spark | Tableau | Excel | statistics | A/B testing | JavaScript | React
        | PostgreSQL | Linux | Docker | AWS | C++ | MATLAB | AutoCAD | FPGA | six sigma | Salesforce | SEO | SAP""",
    "done": "Built | Designed | Developed | Rewrote | Maintained | Automated | Launched | Tested | Improved | Planned",
    "artefact": """a reporting dashboard | an inventory system | a booking app | a recommendation engine | a chat bot
        | a data pipeline | a fraud detector | a test bench | a search index""",
    "result": "saved $50k a year | cut costs by 8 % | halved waiting times | now in production | won second prize",
    "topic": """machine learning | supply chains | renewable energy | customer analytics | process control
        | digital marketing | computer vision | financial planning | information security | public transport""",
    "soft": "teamwork | clear writing | problem solving | mentoring | attention to detail | leadership",
    "department": "sales | engineering | operations | marketing | finance | support",
    "adjective": "motivated | experienced | curious | reliable | versatile | hands-on | ambitious | pragmatic",
    "degree": "B.Sc. | M.Sc. | Bachelor of Arts | Master of Science | MBA | Ph.D. | Diploma",
    "subject": "Computer Science | Economics | Physics | Statistics | Mechanical Engineering | Biology | Psychology",
    "phone": "(212) 555-0134 | (415) 555-0172 | 303-555-0118 | 617-555-0156 | 702-555-0190",
    "link": "https://www.example.com/cv | https://www.example.org/code | https://www.example.net/portfolio",
}.items()}  # fmt: skip

# Sentences of one section, and sentences that several sections share: a bag of words cannot tell these apart.
_TEMPLATES = {labels: _choices(text) for labels, text in {
    "Contact Information": """{{name}} | {{street_address}}, {{city}} | Phone: {{phone}} | E-mail: {{safe_email}}
        | {{name}}, {{title}} | Mobile {{phone}}, {{safe_email}} | Reach me at {{safe_email}} or {{link}}""",
    "Education": """{{degree}} in {{subject}}, University of {{state}}, {{year}} | GPA 3.{{num}} | Minor in {{subject}}
        | Graduated with honours, {{year}} | Thesis on {{topic}} using {{skill}} | Dean's list in {{year}}""",
    "Work Experience": """{{title}}, {{company}}, {{city}} (since {{year}}) | Worked with {{department}} to {{bs}}
        | Supervised {{num}} employees; promoted to {{title}} in {{year}} | Reported to the head of {{department}}
        | Responsible for {{topic}} in the {{department}} department of {{company}}""",
    "Skills": """{{skill}}, {{skill}}, {{skill}} | Proficient in {{skill}} and {{skill}} | Tools: {{skill}}, {{skill}}
        | {{language_name}} (fluent), English (native) | {{skill}} ({{num}} years) | Soft skills: {{soft}}, {{soft}}""",
    "Projects": """{{catch_phrase}}: {{artefact}} in {{skill}} | Side project: {{artefact}} to {{bs}} | Code at {{link}}
        | Hackathon in {{city}}, {{year}}: {{artefact}} in {{num}} days | Wrote {{artefact}} for fun""",
    "Summary": """{{adjective}} {{title}} with {{num}} years of experience in {{topic}} | Known for {{soft}}
        | Looking for a role in {{topic}} where I can {{bs}} | My goal is to {{bs}} as a {{title}}""",
    "Work Experience, Projects": """{{done}} {{artefact}} with {{skill}} and {{skill}} | {{done}} {{artefact}}
        | {{done}} {{artefact}} for {{company}} | {{result}} by moving {{artefact}} to {{skill}}""",
    "Work Experience, Projects, Skills": "Technologies: {{skill}}, {{skill}} | Stack: {{skill}}, {{skill}}, {{skill}}",
    "Work Experience, Skills, Summary": "Hands-on experience with {{skill}} | Led a team of {{num}} to {{bs}}",
    "Education, Skills, Summary": "{{num}}-week course in {{skill}} and {{topic}}, {{year}} | Strong in {{topic}}",
    "Education, Work Experience": "Teaching assistant for {{subject}}, University of {{state}}",
    "Contact Information, Projects": "{{link}}",
    "Contact Information, Summary": "{{title}} based in {{city}}, open to relocation | Available from {{year}}",
}.items()}  # fmt: skip


class _Writer:
    """Writes chunks and owns the random state: two writers with one seed write the same."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self._fake = Faker("en_US")
        self._fake.seed_instance(seed)
        for name, words in _WORDS.items():
            self._fake.add_provider(DynamicProvider(name, words, self._fake))

    def section(self, label: str, num_words: int) -> list[str]:
        """Sentences of one section, `num_words` words in all; the last one may be cut short."""
        shared = [text for labels, texts in _TEMPLATES.items() if "," in labels and label in labels for text in texts]
        lines: list[str] = []
        while num_words > 0:
            pool = shared if self.rng.random() < _SHARED_RATE else _TEMPLATES[label]
            words = self._fake.parse(self.rng.choice(pool)).split()[:num_words]
            lines.append(" ".join(words))
            num_words -= len(words)
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
            lines.insert(0, rng.choice((f"{label}:", label.upper())))
        following = LABELS[(LABELS.index(label) + 1) % len(LABELS)]
        return rng.choice(("\n", ". ", "; ", " ")).join(lines + self.section(following, num_foreign))

    def long_text(self) -> str:
        """A whole résumé that nobody cut into chunks: more than 512 word pieces, so that a scorer has to cut it."""
        return "\n".join(line for label in LABELS for line in self.section(label, 75))


def labelled_chunks(num_rows: int = NUM_LABELLED, seed: int = 0) -> pa.Table:
    """A labelled corpus as a person would collect it, not cleaned: columns `text` and `label` (string, nullable).

    There must be 200 rows or more. About 1 % of them are exact duplicates, 0.5 % (at least three) have a null, empty or
    blank text, 1.5 % a wrong label; three labels are missing, and three texts occur twice with different labels. The
    first 60 rows have some of each, for a small demo.
    """
    writer = _Writer(seed)
    rng = writer.rng
    num_duplicates, num_blank, num_contradictions = num_rows // 100, 3 + num_rows // 300, 3
    num_written = num_rows - num_duplicates - num_blank - num_contradictions
    rows: list[_Row] = [(writer.chunk(label), label) for label in rng.choices(LABELS, _SHARES, k=num_written)]

    def mislabelled(row: _Row) -> _Row:
        return row[0], rng.choice([label for label in LABELS if label != row[1]])

    # Each row is spoilt in one way only; the rows are in no order, so that any will do.
    num_wrong = round(num_written * _LABEL_NOISE)
    wrong, unlabelled, sound = rows[:num_wrong], rows[num_wrong : num_wrong + 3], rows[num_wrong + 3 :]
    wrong, unlabelled = list(map(mislabelled, wrong)), [(text, None) for text, _ in unlabelled]
    contradicted = sound[num_duplicates : num_duplicates + num_contradictions]
    spoilt = (wrong, unlabelled, sound[:num_duplicates], list(map(mislabelled, contradicted)))
    blank: list[_Row] = [((None, "", " \n\t ")[number % 3], rng.choice(LABELS)) for number in range(num_blank)]
    first = [*(of_kind[0] for of_kind in spoilt), *blank[:3], sound[0], contradicted[0], *sound[-50:]]
    rest = [*(row for of_kind in spoilt for row in of_kind[1:]), *blank[3:]]
    rest += [*sound[1:num_duplicates], *sound[num_duplicates + 1 : -50]]
    rng.shuffle(first)
    rng.shuffle(rest)
    rows = first + rest
    return pa.table(dict(zip(("text", "label"), map(list, zip(*rows, strict=True)), strict=True)))


def archive_chunks(num_rows: int = NUM_ARCHIVE, seed: int = 1) -> pa.Table:
    """An archive of résumés cut into chunks, without labels. Of the first 60 rows three have no text, and two have
    more than 400 words.
    """
    writer = _Writer(seed)
    rng = writer.rng
    odd_texts: tuple[str | None, ...] = (None, "", "  \n", writer.long_text(), writer.long_text())
    odd_rows = dict(zip(rng.sample(range(60), len(odd_texts)), odd_texts, strict=True))
    rows: list[dict[str, str | int | None]] = []
    num_documents = 0
    while len(rows) < num_rows:
        body = rng.choices(LABELS[1:], weights=_SHARES[1:], k=rng.randint(3, 9))
        for number, label in enumerate([LABELS[0], *sorted(body, key=LABELS.index)]):
            text = odd_rows.get(len(rows), writer.chunk(label))
            rows.append({"document_id": f"resume-{num_documents:06d}", "section_number": number, "text": text})
        num_documents += 1
    return pa.Table.from_pylist(rows[:num_rows], schema=_ARCHIVE_SCHEMA)


def write(folder: Path) -> None:
    """Write both tables as files that bertray prepare and bertray score read."""
    (folder / "archive").mkdir(parents=True, exist_ok=True)
    pq.write_table(labelled_chunks(), folder / "labelled.parquet")
    pq.write_table(archive_chunks(), folder / "archive" / "part-0000.parquet")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
