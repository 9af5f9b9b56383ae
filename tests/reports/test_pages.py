"""Pages: what people decide by is on them, texts cannot change them, and they are bounded and self-contained."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bertray.errors import RequestError
from bertray.metrics.classification import Counts, full_metrics, intervals
from bertray.metrics.profile import Profile
from bertray.metrics.regression import ValueErrors
from bertray.reports.layout import axis, number, percent, text
from bertray.reports.pages import KINDS, MAX_PAGE_BYTES, add_page, make_page
from bertray.schema import SHARD_REPORT_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.gate import judge
from bertray.scoring.runs import NOW
from bertray.storage.location import Location
from bertray.versions import versions
from tests.conftest import ROOT

RIGHT_TO_LEFT = "\u202eevil\u202c"
UGLY = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    f"{RIGHT_TO_LEFT} before \u2067 after",
    "x" * 10_000_000,
    "</td></table><style>*{display:none}</style>",
    "\x00\x07 \n\n\t tabs and &lt; signs",
    "مرحبا بالعالم",
]
LABELS = (
    "<b>bold</b>",
    f"label {RIGHT_TO_LEFT}",
    "never seen",
    *(f"a long name of label number {n}" for n in range(74)),
)


class Page(HTMLParser):
    """What is in a page, as a browser reads it; AssertionError where tags do not close."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self._words: list[str] = []
        self.feed(self.source)
        assert self._open == []
        self.words = " ".join(" ".join(self._words).split()).replace("\u00a0", " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "wbr"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title"):
            self._words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(folder: Path, num_texts: int = 20) -> Page:
    """The page of an output, after what holds of every page was checked."""
    path = Path(make_page(Location.of(str(folder)), num_texts).path)
    page = Page(path)
    assert path.stat().st_size <= MAX_PAGE_BYTES
    assert {"script", "img", "iframe", "object", "form"} & {tag for tag, _ in page.tags} == set()
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        link = attributes.get("href") or attributes.get("src") or "data:,"
        assert link == "data:," or re.fullmatch(r"(\.\./)*[\w./-]+\.html", link), link
    assert "url(" not in page.source and "@import" not in page.source
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00]", page.source)
    assert not re.search(r"\b(nan|None|inf)\b", page.words.replace("none", ""))
    for chart in page.all("svg"):
        assert chart.get("aria-hidden") == "true" or (chart["role"] == "img" and len(chart["aria-label"] or "") > 10)
    assert [attributes.get("lang") for attributes in page.all("html")] == ["en"]
    assert page.words.count("?") >= 1 and len(page.all("h1")) == 1
    return page


def write_evaluation(folder: Path, metrics: dict[str, Any], rows: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    facts = {
        "split": "test",
        "precision": "fp32",
        "bundle_fingerprint": "ab" * 32,
        "data": "/data/<i>x</i>",
        "same_data_as_training": True,
        "versions": versions(),
    }
    (folder / "metrics.json").write_text(json.dumps(facts | metrics))
    num_rows = len(rows["text"])
    places = {"source": ["/in/a.csv"] * num_rows, "source_row": list(range(num_rows))}
    pq.write_table(pa.table({**places, "num_tokens": np.arange(num_rows) + 3, **rows}), folder / "predictions.parquet")
    return folder


def labelled(folder: Path, num_rows: int = 400, gain: float = 0.3, **changes: Any) -> Path:
    """An evaluation of 77 labels, with ugly names and texts; the model is better than the baseline by `gain`."""
    rng = np.random.default_rng(0)
    true = np.where(np.arange(num_rows) % 77 == 2, 0, np.arange(num_rows) % 77)
    others = (true + 1 + rng.integers(0, 70, num_rows)) % 77
    given, base = (np.where(rng.random(num_rows) < share, true, others) for share in (0.8, 0.8 - gain))
    given[:6], score = (true[:6] + 5) % 77, rng.random(num_rows) * 0.9
    score[:6] = np.linspace(0.99, 0.95, 6)
    measured, simple = (Counts(true, one, 77).metrics for one in (given, base))
    metrics = {
        **full_metrics(true, given, LABELS),
        "problem_type": "single_label_classification",
        "nll": float("nan"),
        "intervals": intervals(measured, None, num_rows),
        "baseline": {
            **full_metrics(true, base, LABELS),
            "name": "the simple one",
            "num_training_rows": 9000,
            "difference_intervals": intervals(measured, simple, num_rows),
        },
        "review": None,
        "out_of_scope": None,
    }
    texts = [*UGLY, *(f"text number {row} of the data" for row in range(num_rows))][:num_rows]
    rows = {"text": texts, "label": [LABELS[one] for one in true], "predicted": [LABELS[one] for one in given]}
    rows |= {"score": score, "is_right": true == given, "source": [f"/in/{row % 3}.csv" for row in range(num_rows)]}
    return write_evaluation(folder, metrics | changes, rows)


def test_texts_cannot_change_the_page(tmp_path: Path) -> None:
    page = page_of(labelled(tmp_path / "evaluation"))
    assert "<script" not in page.source and "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source
    assert r"\u202eevil\u202c before \u2067 after" in page.words
    assert "x" * 400 + "…" in page.words and "x" * 401 not in page.words
    assert "مرحبا بالعالم" in page.words
    assert "<b>bold</b>" in page.words  # as text
    assert page.all("bdi")


def test_seventy_seven_classes_stay_readable(tmp_path: Path) -> None:
    page = page_of(labelled(tmp_path / "evaluation"))
    assert "Of 77 classes, the 20 with most mistakes" in page.words
    assert len([one for one in page.all("abbr") if one.get("title")]) == 20
    assert sum(f"a long name of label number {n} " in page.words for n in range(74)) == 74
    assert "never seen 0 0.0 % – –" in page.words


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [(0.3, "better than the simple one"), (0.0, "not shown to be better"), (-0.15, "worse than the simple one")],
)
def test_the_question_is_answered_with_an_interval(gain: float, verdict: str, tmp_path: Path) -> None:
    folder = labelled(tmp_path / "evaluation", gain=gain)
    page = page_of(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    low, high = metrics["intervals"]["accuracy"]
    assert low < metrics["accuracy"] < high
    ends = f"(95 % interval: {percent(low)} to {percent(high)})".replace("\u00a0", " ")
    assert (
        f"It is right on {percent(metrics['accuracy'])} of 400 test rows {ends};".replace("\u00a0", " ") in page.words
    )
    assert verdict in page.words
    assert f"{100 * (metrics['accuracy'] - metrics['baseline']['accuracy']):+.1f}".replace("-", "−") in page.words


def test_what_was_not_measured_is_not_said(tmp_path: Path) -> None:
    few = page_of(labelled(tmp_path / "few", num_rows=12))
    assert "too few rows to tell it from the simple one" in few.words
    alone = page_of(labelled(tmp_path / "alone", baseline=None, same_data_as_training=False))
    assert "nobody knows whether a simple model would do" in alone.words
    assert "trained on another data set, which may hold these rows" in alone.words
    review = {"review_below": 0.5, "target_precision": 0.95, "coverage": 0.4, "precision": None, "num_rows_review": 9}
    assert "9 of these. Of the others, – are right" in page_of(labelled(tmp_path / "none", review=review)).words


def test_page_texts_bounds_the_texts(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "evaluation")
    for num_texts in (0, 3, 20):
        page = page_of(folder, num_texts)
        assert page.source.count('class="quote"') == num_texts
    none = page_of(folder, 0)
    assert "alert(1)" not in none.source and "text number" not in none.source
    assert "No texts are shown" in none.words
    many = page_of(labelled(tmp_path / "many", num_rows=20_000), 10**6)  # half of them go until it fits
    assert 100 < many.source.count('class="quote"') < 4000


def test_several_labels_a_row(tmp_path: Path) -> None:
    true_NC, given_NC = np.eye(3, dtype=int)[np.arange(90) % 3], np.eye(3, dtype=int)[np.arange(90) % 3]
    given_NC[:9] = 0
    names = ("joy", "love", "fear")
    metrics = full_metrics(true_NC, given_NC, names)
    metrics |= {"problem_type": "multi_label_classification", "review": None, "out_of_scope": None, "baseline": None}
    metrics["intervals"] = intervals(Counts(true_NC, given_NC, 3).metrics, None, 90)
    answers = [[[names[index] for index in np.flatnonzero(row)] for row in side] for side in (true_NC, given_NC)]
    rows = {"text": [f"text {row}" for row in range(90)], "labels": answers[0], "predicted": answers[1]}
    rows |= {"score": np.full(90, 0.8), "is_right": np.arange(90) > 2}
    page = page_of(write_evaluation(tmp_path / "new", metrics, rows))
    assert "Its micro-F1 is 94.7 % on 90 test rows" in page.words
    assert "text 2 fear none 80.0 %" in page.words and "text 3 " not in page.words
    rows.pop("is_right")  # as before pages
    metrics.pop("intervals")
    old = page_of(write_evaluation(tmp_path / "old", metrics, rows))
    assert "evaluate again to see what scores are worth" in old.words


def test_numbers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(3, 1, 300)
    given, base = true + rng.normal(0, 0.4, 300), true + rng.normal(0, 1, 300)
    given[7] += 5
    sides = [ValueErrors(true, one) for one in (given, base)]
    metrics: dict[str, Any] = {**sides[0].metrics(), "num_rows": 300, "problem_type": "regression", "review": None}
    metrics |= {"interval": {"wanted": 0.9, "coverage": 0.88, "mean_width": 1.5}, "out_of_scope": None}
    metrics["intervals"] = intervals(sides[0].metrics, None, 300)
    metrics["baseline"] = {
        **sides[1].metrics(),
        "name": "ridge",
        "num_training_rows": 900,
        "difference_intervals": intervals(*(side.metrics for side in sides), 300),
    }
    rows = {"text": [f"text {row}" for row in range(300)], "value": true, "predicted": [*given[:-1], None]}
    rows |= {"low": given - 0.7, "high": given + 0.7}
    page = page_of(write_evaluation(tmp_path / "numbers", metrics, rows))
    assert f"It is off by {number(metrics['mae'])} on average" in page.words
    assert "better than ridge" in page.words
    assert "88.0 % of the true values lie in their interval, wanted were 90.0 %" in page.words
    assert page.words.index("text 7 ") < page.words.index("text ", page.words.index("text 7 ") + 5)
    assert "Confusions" not in page.words


def test_a_page_that_fails_is_a_warning_and_leaves_no_old_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = labelled(tmp_path / "evaluation")
    page_of(folder)
    (folder / "predictions.parquet").write_bytes(b"no parquet")
    with pytest.raises(RequestError, match=r"predictions\.parquet is damaged.*Evaluate again"):
        make_page(Location.of(str(folder)), 20)
    add_page(Location.of(str(folder)), 20)
    assert "has no page: RequestError:" in caplog.text
    assert not (folder / "report.html").exists()
    add_page(Location.of(str(tmp_path / "nowhere")), 20)
    with pytest.raises(RequestError, match=r"has no page: it holds none of bundle\.json, metrics\.json"):
        make_page(Location.of(str(tmp_path)), 20)


def test_an_audit(tmp_path: Path) -> None:
    folder = tmp_path / "label_check"
    folder.mkdir()
    of_label = {"num_rows": 10, "num_suspects": 6, "noise": 0.2, "most_often": LABELS[1], "num_most_often": 6}
    report = {
        "num_rows": 40,
        "num_rows_without_tokens": 2,
        "num_suspects": 6,
        "noise": 0.12,
        "out_of_fold": {"accuracy": 0.81},
        "warnings": ["look"],
        "labels": {LABELS[0]: of_label, LABELS[1]: {"num_rows": 30, "num_suspects": 0, "noise": 0.0}},
        "problem_type": "single_label_classification",
        "data_fingerprint": "cd" * 32,
        "config": {"folds": 2},
        "versions": versions(),
    }
    (folder / "label_quality.json").write_text(json.dumps(report))
    rows = {"text": UGLY, "label": [LABELS[0]] * 6, "suggested_label": [LABELS[1]] * 6, "quality": [0.1] * 6}
    rows |= {"given_probability": [0.05] * 6, "suggested_probability": [0.9] * 6, "source": ["/a.csv"] * 6}
    pq.write_table(pa.table({**rows, "source_row": list(range(6))}), folder / "suspects.parquet")
    page = page_of(folder)
    assert "6 of 40 training rows (15.0 %) are suspect; the estimated share of wrong labels is 12.0 %." in page.words
    assert r"<b>bold</b> → label \u202eevil\u202c (6)" in page.words
    assert "probability as labelled as suggested from" in page.words and "5.0 % 90.0 %" in page.words
    assert "They are right on 81.0 % of all rows, so some suspects are their own mistakes." in page.words
    assert page.source.count('class="quote"') == 5  # of one pair
    assert "alert(1)" not in page_of(folder, 0).source


def test_an_audit_of_several_labels_a_row_shows_all_of_them(tmp_path: Path) -> None:
    of_label = {"num_rows": 9, "num_suspects": 0, "num_missing": 1, "noise": 0.1}
    facts = {"num_rows": 9, "num_rows_without_tokens": 0, "num_suspects": 1, "noise": 0.1, "warnings": []}
    facts |= {"out_of_fold": {}, "labels": {"art": of_label, "war": of_label}, "config": {}, "versions": versions()}
    facts |= {"problem_type": "multi_label_classification", "data_fingerprint": "cd" * 32}
    (tmp_path / "label_quality.json").write_text(json.dumps(facts))
    rows = {"text": ["a text"], "labels": [["art"]], "suggested_labels": [["art", "war"]], "quality": [0.1]}
    rows |= {"given_probability": [0.05], "suggested_probability": [0.9], "source": ["/a.csv"], "source_row": [7]}
    pq.write_table(pa.table(rows), tmp_path / "suspects.parquet")
    page = page_of(tmp_path)
    assert "nothing → war (1)" in page.words
    assert "text label probably probability as labelled as suggested from" in page.words
    assert "a text art art, war 5.0 % 90.0 % a.csv, row 7" in page.words


def profile_of(labels: dict[str, int], num_rows_error: int = 0, tokens: int = 8) -> Profile:
    num_rows = sum(labels.values())
    scores = [0] * 15 + [num_rows] + [0] * 4
    lengths = [num_rows * (index == int(np.log2(tokens))) for index in range(20)]
    return Profile(
        num_rows=num_rows + num_rows_error,
        num_rows_error=num_rows_error,
        num_rows_review=num_rows_error,
        num_tokens=tokens * num_rows,
        labels=labels,
        scores=tuple(scores),
        lengths=tuple(lengths),
        score_sum=0.77 * num_rows,
        score_square_sum=0.77**2 * num_rows,
        length_square_sum=float(tokens**2 * num_rows),
    )


def write_run(output: Path, day: int, now: Profile | None, before: Profile | None = None, **changes: Any) -> Path:
    folder = output / "runs" / f"202601{day:02}T031500.000000Z"
    folder.mkdir(parents=True)
    options: dict[str, Any] = {"bundle": "my bundle", "input": "in", "output": "out", "price_per_hour": 2.0}
    options["keep_columns"] = ["id", "a, b"]
    (folder / "config.json").write_text(json.dumps({"config": options, "bundle_fingerprint": "ef" * 32}))
    (folder / "plan.json").write_text("{}")
    if now is None:  # it has scored nothing, and says so in its shard report alone
        row = {**Profile().model_dump(), "labels": [], "path": f"<{day}>", "failure": f"no Parquet {RIGHT_TO_LEFT}"}
        pq.write_table(pa.Table.from_pylist([row], schema=SHARD_REPORT_SCHEMA), folder / "shards-00000.parquet")
        return folder
    references = {"what was announced last": before} if before else {}
    verdict = judge(now, references, 1, 0, ScoreConfig(bundle="b", input="i", output="o"))
    summary = {
        **verdict.summary(),
        "num_shards_committed": 3,
        "num_rows": now.num_rows,
        "num_rows_error": now.num_rows_error,
        "num_rows_model": now.num_rows_scored - 10,
        "num_rows_repeated": 10,
        "num_shards_failed": 1,
        "wall_s": 1800.0,
        "tokens_per_s": 900.0,
        "num_actors": 4,
        "movements": verdict.table(),
        "failures": [{"path": "a/<b>.parquet", "reason": "x" * 5000}],
        "errors": {"text is not UTF-8": now.num_rows_error},
        "sick_nodes": [{"node": "10.0.0.1", "num_failures": 3, "last": "disk full"}],
        "profiles": {name: one.model_dump() for name, one in {NOW: now, **references}.items()},
    }
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def test_a_run_that_passed(tmp_path: Path) -> None:
    first = profile_of({"a": 900, "b": 100})
    now = profile_of({"a": 880, "b": 120}, num_rows_error=8)
    page_of(write_run(tmp_path, 1, first))
    page = page_of(write_run(tmp_path, 2, now, first))
    assert "Yes, they are published." in page.words
    assert "What to do" not in page.words and "--accept" not in page.source
    assert "rows 1,008 to be reviewed 0.8 %" in page.words
    assert "cost 4 " in page.words  # four actors, half an hour, at 2
    assert "text is not UTF-8 8" in page.words
    assert "10.0.0.1 3 disk full" in page.words
    assert "Of 1,008 rows the model gave 990 a label; 10 have the label of an earlier row " in page.words
    assert "The last runs" in page.words
    labels = [one.get("aria-label") or "" for one in page.all("svg")]
    assert any("a 88.0\u00a0% (what was announced last 90.0\u00a0%)" in one for one in labels)
    assert any("a: 90.0\u00a0% at 2026-01-01, 88.0\u00a0% at 2026-01-02" in one for one in labels)


def test_a_held_run_says_what_to_do(tmp_path: Path) -> None:
    before = profile_of({"a": 900, "b": 100})
    page = page_of(write_run(tmp_path, 2, profile_of({"b": 1000}, tokens=64), before))
    assert (
        "No: the run is held, and nothing of it is published. What is beyond its limit: label mix moved by"
        in page.words
    )
    command = "bertray score --bundle 'my bundle' --input in --output out --keep-columns 'id,\"a, b\"'"
    assert f"{command} --price-per-hour 2.0 --accept" in page.words
    assert len([one for _, one in page.tags if one.get("class") == "beyond"]) >= 2
    labels = [one.get("aria-label") or "" for one in page.all("svg")]
    assert any(
        "this run: 100.0\u00a0% from 64 to 128. what was announced last: 100.0\u00a0% from 8 to 16" in one
        for one in labels
    )


def test_a_run_with_failures_alone(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, 1, None))
    assert "There is nothing to publish" in page.words
    assert "No row was read." in page.words
    assert r"<1> no Parquet \u202eevil\u202c" in page.words


def test_a_run_held_for_its_failures_says_to_mend_them(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, 1, Profile(), profile_of({"a": 900}), gate="held", held_because=["all failed"]))
    assert "No row was read: there is nothing to accept. Mend what failed, below" in page.words
    assert "run the command again" in page.words and "bertray score --bundle" in page.words
    assert "--accept" not in page.words and "What changed" not in page.words


def test_the_index_lists_the_last_runs(tmp_path: Path) -> None:
    profile = profile_of({"a": 90, "b": 10})
    for day in range(1, 32):
        folder = write_run(tmp_path, day, None if day == 5 else profile, profile)
        if day > 29:
            page_of(folder)
    (tmp_path / "runs" / "latest.json").write_text(json.dumps({"run_id": "20260131T031500.000000Z"}))
    page = page_of(tmp_path)
    assert page.words.count("UTC passed") == 29  # the first day is not among the last 30
    assert page.words.count("UTC unfinished") == 1
    assert [one["href"] for one in page.all("a")].count("runs/20260131T031500.000000Z/report.html") == 2
    assert "runs/20260129T031500.000000Z/report.html" not in page.source  # it has no page


@pytest.mark.parametrize("name", ["bundle", "multi_bundle", "scored"])
def test_old_outputs_get_a_page(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "tests" / "old" / name, tmp_path / name))
    page = page_of(folder)
    if name == "scored":
        (run,) = [one for one in (folder / "runs").iterdir() if one.is_dir()][:1]
        assert "Share of labels" in page_of(run).source
    else:
        assert "cannot be read any more, or is another one now" in page.words


def test_every_kind_has_its_template() -> None:
    folder = ROOT / "lib" / "bertray" / "reports" / "templates"
    assert {f"{kind.module}.html" for kind in KINDS} <= {path.name for path in folder.iterdir()}


def test_numbers_and_texts_are_written_for_people() -> None:
    assert [number(one) for one in (12345, 12345.6, 0.88693, 5e-05, -0.5, 3.0, float("nan"), None)] == [
        *("12,345", "12,346", "0.887", "5e−05", "−0.5", "3", "–", "–")
    ]
    assert text("a\nb\x00" + "c" * 100, 5) == r"a b\x…"
    assert text("\ud800") == r"\ud800"
    found = axis([0.12, None, float("nan"), 0.91])
    assert (found["low"], found["high"]) == (0.0, 1.0) and len(found["ticks"]) == 6
    assert axis([3.0])["low"] == 3.0 < axis([3.0])["high"]
