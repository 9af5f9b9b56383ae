"""runs/<run-id>/report.html: may tonight's labels be published, and what changed?

config.json, plan.json    what was asked, what there was to do
summary.json              the gate's verdict with the profiles that it compared; errors, speed, failures
shards-*.parquet          profiles and failures, where there is no summary or an old one
the runs before           shares of labels, of errors and of rows to be reviewed, by night
"""

from __future__ import annotations

import shlex
from datetime import datetime
from typing import Any

from bertray.config import as_csv
from bertray.metrics.profile import Profile
from bertray.reports.layout import rendered
from bertray.schema import NUM_LENGTH_BINS, NUM_SCORE_BINS, SHARD_REPORT_SCHEMA
from bertray.scoring.config import ScoreConfig
from bertray.scoring.runs import NOW, profile_of
from bertray.storage.location import Location
from bertray.storage.outputs import in_parallel, read_json, read_records

NUM_RUNS = 30
_NUM_LABEL_LINES, _NUM_LABEL_BARS, _MAX_FAILURES = 6, 12, 100
_DAMAGED = "Remove it, and make the page again"


def render(facts: dict[str, Any]) -> str:
    """The page."""
    return rendered("run.html", facts)


def facts(folder: Location, num_texts: int = 0) -> dict[str, Any]:
    """What the page shows of a run."""
    run = read_run(folder)
    summary, profiles = run["summary"], run["profiles"]
    scored = profiles[NOW].num_rows_scored
    before = {name: one for name, one in profiles.items() if name != NOW and scored and one.num_rows_scored}
    edges = run["summary"].get("answers", {}).get("score_edges") or [bin / NUM_SCORE_BINS for bin in range(21)]
    failures = summary.get("failures", run["failures"])
    config, num_actors = run["config"], summary.get("num_actors", 0)
    price, hours = config.get("price_per_hour"), summary.get("wall_s", 0) / 3600
    return {
        **run,
        "place": folder,
        "now": profiles[NOW],
        "against": [
            _comparison(profiles[NOW], one, name, edges, summary.get("movements", [])) for name, one in before.items()
        ],
        "alone": _comparison(profiles[NOW], None, NOW, edges, []) if not before else None,
        "errors": sorted(summary.get("errors", {}).items(), key=lambda item: -item[1]),
        "failures": [[one["path"], one["reason"]] for one in failures[:_MAX_FAILURES]],
        "num_failures": len(failures),
        "sick": [[one["node"], one["num_failures"], one["last"]] for one in summary.get("sick_nodes", [])],
        "cost": None if price is None else price * max(1, num_actors) * hours,
        "command": _command(config),
        "history": history(read_runs(folder.parent(), until=folder.name)),
        "bundle_fingerprint": run["asked"].get("bundle_fingerprint", ""),
        "versions": run["asked"].get("versions", {"bertray": "an earlier version"}),
    }


def read_runs(runs: Location, until: str = "~") -> list[dict[str, Any]]:
    """The last runs of an output up to one of them, the oldest first."""
    run_ids = [
        run_id for run_id in sorted(runs.folders()) if run_id <= until and (runs / run_id / "plan.json").exists()
    ]
    return in_parallel(lambda run_id: read_run(runs / run_id), run_ids[-NUM_RUNS:])


def read_run(folder: Location) -> dict[str, Any]:
    """What the files of a run say; a run that was stopped, or has published nothing, may lack some."""

    def content(name: str) -> dict[str, Any]:
        file = folder / name
        return read_json(file, _DAMAGED) if file.exists() else {}

    summary, asked, failures = content("summary.json"), content("config.json"), list[dict[str, str]]()
    profiles = {name: Profile(**one) for name, one in summary.get("profiles", {}).items()}
    if NOW not in profiles:
        files = [folder / info.path for info in folder.files((".parquet",))]
        report = read_records(files, SHARD_REPORT_SCHEMA, _DAMAGED)
        failed = report.filter(report["failure"].is_valid())
        failures = [{"path": row["path"], "reason": row["failure"]} for row in failed.to_pylist()]
        profiles[NOW] = profile_of(report)
    began = datetime.strptime(folder.name[:15], "%Y%m%dT%H%M%S")
    return {
        "run_id": folder.name,
        "day": f"{began:%Y-%m-%d}",
        "began": f"{began:%Y-%m-%d %H:%M} UTC",
        "summary": summary,
        "asked": asked,
        "config": asked.get("config", {}),
        "profiles": profiles,
        "failures": failures,
        # unfinished: the run was stopped, or all that it scored had failed before
        "gate": summary.get("gate") or "unfinished",
    }


def history(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Lines by run: shares of the labels that most rows have, of rows with an error and of those to be reviewed."""
    profiles = [run["profiles"][NOW] for run in runs]

    def line(name: str, values: list[float | None]) -> dict[str, Any]:
        return {"name": name, "points": [list(point) for point in enumerate(values)], "dots": True}

    def share(counts: list[int], wholes: list[int]) -> list[float | None]:
        return [count / whole if whole else None for count, whole in zip(counts, wholes, strict=True)]

    num_scored = [one.num_rows_scored for one in profiles]
    totals = sum(profiles, Profile()).labels
    names = sorted(totals, key=lambda label: -totals[label])[:_NUM_LABEL_LINES]
    num_rows = [one.num_rows for one in profiles]
    means = [one.score_moments()[0] if one.num_rows_scored else None for one in profiles]
    return {
        "days": [run["day"] for run in runs],
        "labels": [line(name, share([one.labels.get(name, 0) for one in profiles], num_scored)) for name in names],
        "num_labels": len(totals),
        "means": [line("mean", means)],
        "shares": [
            line("to be reviewed", share([one.num_rows_review for one in profiles], num_rows)),
            line("with an error", share([one.num_rows_error for one in profiles], num_rows)),
        ],
        "speeds": [line("tokens a second", [run["summary"].get("tokens_per_s") or None for run in runs])],
    }


def _comparison(
    now: Profile, before: Profile | None, name: str, edges: list[float], movements: list[dict[str, Any]]
) -> dict[str, Any]:
    """A profile beside another one: movements, labels, and the bins of scores and lengths that are not empty."""
    whole, whole_before = max(1, now.num_rows_scored), max(1, before.num_rows_scored if before else 0)
    both = {**(before.labels if before else {}), **now.labels}
    labels: list[list[Any]] = [
        [label, now.labels.get(label, 0) / whole, before.labels.get(label, 0) / whole_before if before else None]
        for label in both
    ]
    changes = [abs(one - (other or 0)) for _, one, other in labels]
    order = sorted(range(len(labels)), key=lambda index: (-changes[index], labels[index][0]))
    lengths = [now.lengths, before.lengths if before else now.lengths]
    used = [index for index in range(NUM_LENGTH_BINS) if any(counts[index] for counts in lengths)] or [0]
    cut = slice(used[0], used[-1] + 1)
    return {
        "name": name,
        "movements": [one for one in movements if one["against"] == name],
        "labels": [labels[index] for index in order[:_NUM_LABEL_BARS]],
        "num_labels": len(labels),
        "scores": [list(now.scores), list(before.scores) if before else None, list(edges)],
        "lengths": [
            list(now.lengths[cut]),
            list(before.lengths[cut]) if before else None,
            [2**power for power in range(used[0], used[-1] + 2)],
        ],
    }


def _command(config: dict[str, Any]) -> str:
    """The command that asked for a run, without options that have their default."""
    words = ["bertray", "score"]
    for name, field in ScoreConfig.model_fields.items():
        value, flag = config.get(name, field.get_default(call_default_factory=True)), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value != field.get_default(call_default_factory=True) and name != "accept":
            words += [flag, as_csv(value) if isinstance(value, list) else str(value)]
    return shlex.join(words)
