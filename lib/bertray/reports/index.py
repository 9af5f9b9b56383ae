"""index.html of an output of bertray score: what is published, and what came of the last runs.

runs/latest.json says the first, the files of the runs the rest: see `reports.run`.
"""

from __future__ import annotations

from typing import Any

from bertray.reports.layout import rendered
from bertray.reports.run import NOW, NUM_RUNS, history, read_runs
from bertray.scoring.runs import RUNS, Runs
from bertray.storage.location import Location


def render(facts: dict[str, Any]) -> str:
    """The page."""
    return rendered("index.html", facts)


def facts(folder: Location, num_texts: int = 0) -> dict[str, Any]:
    """What the page shows of an output."""
    runs, latest = read_runs(folder / RUNS), Runs(folder).latest()
    published = latest.published if latest else None
    labels = published.profile.labels if published else {}
    whole = max(1, published.profile.num_rows_scored) if published else 1
    return {
        "place": folder,
        "runs": [
            {**run, "now": run["profiles"][NOW], "has_page": (folder / RUNS / run["run_id"] / "report.html").exists()}
            for run in reversed(runs)
        ],
        "last": runs[-1] if runs else None,
        "num_runs": NUM_RUNS,
        "latest": latest,
        "published": published,
        "labels": sorted(([label, count, count / whole] for label, count in labels.items()), key=lambda row: -row[1]),
        "history": history(runs),
        "versions": runs[-1]["asked"].get("versions", {"bertray": ""}) if runs else {"bertray": ""},
    }
