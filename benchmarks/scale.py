"""What a large archive costs beside the model: fixed seconds, seconds a shard, memory of the driver, many actors.

    python -m benchmarks.scale                          all of it: about 10 minutes on 2 cores
    python -m benchmarks.scale --only nothing planning
    python -m benchmarks.scale --share 0.01             a try with less of everything; nothing is written

    fixed        bertray score over 8 small shards, beside the bare engine on the same texts, and where the rest goes
    nothing      a run over shards that are all done
    planning     listing and plan of many real shards, and what is asked of the file system for it
    manifest     a manifest of a million records; planning and dividing as many shards; the profile of all
    s3           what a listing costs whoever lists, and how often S3 is asked (moto, on loopback)
    publishing   staged shards become predictions, on a disk and on a slow store
    reading      reading, comparing and writing in one process, without a model
    tiny         many tiny shards end to end
    far          the same on a slow store
    units        many units over eight fake GPUs, without a model: what a unit costs the driver
    handing      a million planned units: when the first one starts, and how many a second the driver hands over
    ramp         eight fake GPUs: from the first actor that is ready to the last one at work
    efficiency   1, 2, 4 and 8 fake GPUs with a stub that sleeps for every row

It needs no GPU and no network. What stands for a GPU is a process of its own on this machine's cores: where the stub
sleeps, reading, writing, committing and handing over units are real (benchmarks/stub). Shards are hard links of few
files, so that reading them costs no disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, write_result
from benchmarks.scale_actors import efficiency, handing, ramp, units
from benchmarks.scale_data import (
    NUM_LABELS,
    TINY_ROWS,
    commit_shards,
    tiny_archive,
    write_manifest,
)
from benchmarks.scale_figures import Line, Measured
from benchmarks.scale_runs import (
    NUM_GPUS,
    Bench,
    Ran,
    fingerprint_of,
    run_part,
    run_timed_part,
    s3_environment,
    score,
    score_command,
    serving,
    slow_store,
    traced,
)
from benchmarks.tiny import WORDS_A_TEXT, tiny_bundle, word_archive
from bertray.storage.lock import new_run_id

NUM_REPEATS = 3  # of what takes seconds: the median counts

# The archive of `fixed`.
FIXED_SHARDS, FIXED_ROWS = 8, 500

NUM_DONE, NUM_PLANNED, NUM_RECORDS, NUM_LISTED = 10_000, 100_000, 1_000_000, 20_000
NUM_TINY, READ_ROWS, NUM_ASKED = 10_000, 200_000, 20
NUM_PUBLISHED, NUM_FAR, S_A_REQUEST = 10_000, 1_000, 0.1


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME")
    parser.add_argument("--share", type=float, default=1.0, help="of shards, records and units; below 1: a try")
    options = parser.parse_args(argv)
    rows = ["| what | measured | target | |", "|---|---|---|---|"]
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as place:
        bundle = tiny_bundle(Path(place) / "bundle")
        for name in options.only:
            folder = Path(place) / name
            folder.mkdir()
            started_s = time.monotonic()
            found = MEASUREMENTS[name](Bench(folder, bundle, options.share))
            shutil.rmtree(folder)
            wall_s = time.monotonic() - started_s
            new = [line.row() for line in found.lines]
            print(f"{name}: {wall_s:.0f} s\n" + "\n".join(new), file=sys.stderr, flush=True)
            rows += new
            facts[name] = {**found.facts, "benchmark_wall_s": wall_s}
    if options.share < 1:
        print("\n".join(rows), json.dumps(facts, indent=2), sep="\n\n")
        return
    subject = "all" if len(options.only) == len(MEASUREMENTS) else "-".join(options.only)
    write_result("scale", subject, "\n".join(rows), facts)


def fixed(bench: Bench) -> Measured:
    """A small run, cut into what passes one after another."""
    archive = word_archive(bench.folder / "archive", [bench.some(FIXED_ROWS)] * FIXED_SHARDS)
    runs, engines = [], []
    for repeat in range(NUM_REPEATS):  # in turn, for machines drift
        runs.append(score(bench, archive, bench.folder / f"scored-{repeat}", "--device", "cpu", "--num-actors", 1))
        engines.append(run_timed_part("engine", bench.bundle, archive))
    more_s = [run.wall_s - engine["wall_s"] - _session_s(run) for run, engine in zip(runs, engines, strict=True)]
    middle = more_s.index(statistics.median_low(more_s))
    run, engine = runs[middle], engines[middle]
    assert run.summary["num_tokens"] == engine["num_tokens"]
    lines = [
        Line("fixed: bertray score over 8 small shards, its whole process", run.wall_s, "s"),
        Line("fixed: the bare engine on the same texts, its whole process", engine["wall_s"], "s"),
        Line("fixed: Ray's start and end, in bertray score", _session_s(run), "s"),
        Line("fixed: what bertray score takes more than both", more_s[middle], "s", at_most=4),
        *(Line(f"fixed, of bertray score: {what}", wall_s, "s") for what, wall_s in _phases(run).items()),
        *(Line(f"fixed, of the bare engine: {name.removesuffix('_s')}", engine[name], "s") for name in _ENGINE_PARTS),
        Line(
            "fixed, of the bare engine: the interpreter's start and end",
            engine["wall_s"] - sum(engine[name] for name in _ENGINE_PARTS),
            "s",
        ),
    ]
    facts = {
        "shards": FIXED_SHARDS,
        "rows_a_shard": bench.some(FIXED_ROWS),
        "words_a_text": WORDS_A_TEXT,
        "num_tokens": engine["num_tokens"],
        "more_s": more_s,
        "jobs_score": [{"wall_s": one.wall_s, "session_s": _session_s(one), **_phases(one)} for one in runs],
        "engine": engines,
    }
    return Measured(lines, facts)


_ENGINE_PARTS = ("import_s", "load_s", "predict_s")


def _session_s(run: Ran) -> float:
    return run.first("enter session").wall_s + run.first("leave session").wall_s


def _phases(run: Ran) -> dict[str, float]:
    """A run's time from its first moment to its last, by what it waited for."""
    driver = run.first("enter session").pid
    imported = next(span for span in run.spans["import bertray.drivers.cluster"] if span.pid == driver)
    loaded, in_actor = run.first("ScoringActor._begin"), run.first("ScoringActor.__init__")
    units = run.spans["UnitScorer.score"]
    edges = [
        ("interpreter, configuration, listing, plan", run.start_s),
        ("imports of Ray in the driver", imported.start_s),
        ("Ray's start", run.first("enter session").start_s),
        ("Ray Data's plan and the start of the actor's process", run.first("enter session").end_s),
        ("imports of torch and transformers in the actor", in_actor.start_s),
        ("load of the model", loaded.start_s),
        ("from the load to the first unit", loaded.end_s),
        ("units: read, score, write, commit", units[0].start_s),
        ("end of Ray Data, records, summary", units[-1].end_s),
        ("Ray's end", run.first("leave session").start_s),
        ("the gate, and the interpreter's end", run.first("leave session").end_s),
        ("", run.end_s),
    ]
    return {what: edges[place + 1][1] - start_s for place, (what, start_s) in enumerate(edges[:-1])}


def nothing(bench: Bench) -> Measured:
    """A night on which nothing is new."""
    num_shards = bench.some(NUM_DONE)
    archive, output = tiny_archive(bench.folder / "archive", num_shards), bench.folder / "scored"
    commit_shards(archive, output, fingerprint_of(bench, archive, output))
    runs = [score(bench, archive, output) for _ in range(NUM_REPEATS)]
    run = sorted(runs, key=lambda one: one.wall_s)[NUM_REPEATS // 2]
    assert run.summary["num_shards_skipped"] == num_shards and run.summary["run_id"] is None, run.summary
    imported = _imported(score_command(bench, archive, output))
    heavy = [name for name in ("ray", "torch", "transformers") if name in imported]
    lines = [
        Line(f"nothing: {num_shards:,} done shards, the whole process", run.wall_s, "s", at_most=1.2),
        Line("nothing: of Ray, torch and transformers, how many were imported", len(heavy), "", at_most=0),
        *(
            Line(f"nothing, of it: {what}", run.first(what).wall_s, "s")
            for what in ("list_shards", "Manifest.latest", "plan")
        ),
    ]
    return Measured(lines, {"walls_s": [one.wall_s for one in runs], "num_modules_imported": len(imported)})


def _imported(command: list[str]) -> set[str]:
    """The modules that a command imports."""
    command = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def planning(bench: Bench) -> Measured:
    """All done but the last tenth."""
    num_shards = bench.some(NUM_PLANNED)
    archive, output = tiny_archive(bench.folder / "archive", num_shards), bench.folder / "scored"
    request = fingerprint_of(bench, archive, output)
    commit_shards(archive, output, request, share=0.9)
    parts = [run_part("planning", archive, output, request) for _ in range(NUM_REPEATS)]
    part = sorted(parts, key=lambda one: one["list_s"])[NUM_REPEATS // 2]
    assert part["num_shards_new"] + part["num_shards_skipped"] == num_shards, part
    asked = part["calls_of_the_listing"]
    lines = [
        Line(
            f"planning: {num_shards:,} shards, listing to plan",
            part["list_s"] + part["manifest_s"] + part["plan_s"],
            "s",
            at_most=20,
        ),
        Line("planning, of it: the listing", part["list_s"], "s"),
        Line("planning, of it: the manifest", part["manifest_s"], "s"),
        Line("planning, of it: the plan", part["plan_s"], "s"),
        Line("planning: listings of the input", sum(asked.get(name, 0) for name in ("find", "ls", "walk")), "", 1),
        Line("planning: other calls of the file system until the plan stands, not of the manifest", _others(part), ""),
        Line("planning: peak memory", part["peak_mib"], "MiB"),
    ]
    return Measured(lines, {"runs": parts})


def _others(part: dict[str, Any]) -> int:
    asked = part["calls_of_the_listing"]
    others = sum(number for name, number in asked.items() if name not in ("find", "ls", "walk"))
    return int(others + part["num_calls_of_the_plan"])


def manifest(bench: Bench) -> Measured:
    """A million shards, on the driver."""
    num_records, output = bench.some(NUM_RECORDS), bench.folder / "scored"
    request, run_id = "f" * 64, new_run_id()
    paths = [f"date=2026-01-{number // 50_000 + 1:02d}/part-{number:07d}.parquet" for number in range(num_records)]
    size_bytes = write_manifest(output, paths, request, run_id)
    part = run_part("manifest", output, request, NUM_GPUS)
    report = run_part("report", output)
    assert part["num_done"] == part["num_records"] == report["num_shards"] == num_records
    what = f"{num_records:,} records"
    lines = [
        Line(f"manifest: {what}, load", part["load_s"], "s", at_most=5),
        Line("manifest: peak memory of the process that loaded it", part["load_peak_mib"], "MiB", at_most=1024),
        Line("manifest: plan of as many shards, all done", part["plan_s"], "s"),
        Line("manifest: peak memory with the listing, after the plan", part["plan_peak_mib"], "MiB"),
        Line("manifest: plan of as many shards, all pending, sorted", part["plan_pending_s"], "s"),
        Line(f"manifest: cut into {part['num_units']:,} units", part["divide_s"], "s"),
        Line("manifest: these units as rows for Ray Data", part["units_as_rows_s"], "s"),
        Line("manifest: bytes of these rows", part["units_as_rows_mib"], "MiB"),
        Line("manifest: peak memory, after that", part["divide_peak_mib"], "MiB"),
        Line(f"manifest: the profile of {num_records:,} shards, for latest.json", report["report_s"], "s"),
        Line("manifest: peak memory of that, beside the manifest's", report["peak_mib"] - report["before_mib"], "MiB"),
    ]
    return Measured(lines, {"manifest_bytes": size_bytes, "num_labels": NUM_LABELS, "part": part, "report": report})


def s3(bench: Bench) -> Measured:
    """S3's answers have a thousand keys each, and to read them takes processor time; each request is a round trip."""
    num_objects = bench.some(NUM_LISTED, 2000)
    shard = next(word_archive(bench.folder / "one-shard", [TINY_ROWS]).iterdir())
    with serving("store", num_objects) as facts:
        environment = {**traced(bench), "BERTRAY_STUB_S_A_ROW": "0", **s3_environment(facts["endpoint"])}
        parts = [run_part("listing", "s3://bench/archive", environment=environment) for _ in range(NUM_REPEATS)]
        asked = run_part("requests", bench.bundle, shard, "s3://bench/scoring", NUM_ASKED, environment=environment)
    assert parts[0]["num_files"] == num_objects
    cpu_s = statistics.median(part["cpu_s"] for part in parts)
    lines = [
        Line("s3: a listing, processor time for 1,000 keys", 1e6 * cpu_s / num_objects, "ms"),
        Line("s3: requests for a tiny shard", sum(asked["of_shards"].values()) / NUM_ASKED, ""),
        Line(
            "s3: requests for a manifest file, at the run's end",
            sum(asked["of_manifest_files"].values()) / NUM_ASKED,
            "",
        ),
    ]
    return Measured(lines, {"num_objects": num_objects, "listings": parts, "num_asked": NUM_ASKED, "requests": asked})


def publishing(bench: Bench) -> Measured:
    """What was staged in one run becomes visible."""
    num_shards = bench.some(NUM_PUBLISHED)
    local = [run_part("publishing", bench.folder / f"scored-{repeat}", num_shards) for repeat in range(NUM_REPEATS)]
    with slow_store(S_A_REQUEST) as environment:
        remote = run_part("publishing", "s3://bench/scored", num_shards, environment={**traced(bench), **environment})
    local_s, what = statistics.median(part["publish_s"] for part in local), f"{num_shards:,} staged shards"
    lines = [
        Line(f"publishing: {what}, on a local disk", local_s, "s", at_most=5),
        Line(f"publishing: {what}, on a store with {S_A_REQUEST} s a request", remote["publish_s"], "s", at_most=60),
        Line("publishing, of it: processor time of the driver", remote["cpu_s"], "s"),
    ]
    return Measured(lines, {"local": local, "remote": remote})


def reading(bench: Bench) -> Measured:
    """What an actor does beside tokens and model: Parquet to distinct texts, predictions to Parquet."""
    archive = word_archive(bench.folder / "archive", [bench.some(READ_ROWS)] * 2)
    environment = {**traced(bench), "BERTRAY_STUB_S_A_ROW": "0"}
    parts = [
        run_part("shards", bench.bundle, archive, bench.folder / f"scored-{repeat}", environment=environment)
        for repeat in range(NUM_REPEATS)
    ]
    part = sorted(parts, key=lambda one: one["score_s"])[NUM_REPEATS // 2]
    lines = [
        Line("reading: rows a second, in one process", part["num_rows"] / part["score_s"], "/s"),
        Line("reading: Parquet a second", part["num_bytes"] / part["score_s"] / 2**20, "MiB/s"),
    ]
    return Measured(lines, {"words_a_text": WORDS_A_TEXT, "runs": parts})


def tiny(bench: Bench) -> Measured:
    """Many tiny shards with a real, small model."""
    num_shards = bench.some(NUM_TINY)
    archive = tiny_archive(bench.folder / "archive", num_shards)
    run = score(bench, archive, bench.folder / "scored", "--device", "cpu", "--num-actors", 1)
    units = run.spans["UnitScorer.score"]
    end_s = max(unit.end_s for unit in units)
    window_s = end_s - units[0].start_s
    model_s = sum(span.wall_s for span in run.spans["Bundle.answer_tokens"])
    lines = [
        Line(f"tiny: {num_shards:,} shards of {TINY_ROWS} rows, one actor, the whole process", run.wall_s, "s"),
        Line("tiny: for a shard, of all", 1000 * run.wall_s / num_shards, "ms"),
        Line(
            "tiny: for a shard, from the first unit's start to the last one's end", 1000 * window_s / num_shards, "ms"
        ),
        Line("tiny, of it: the model", 1000 * model_s / num_shards, "ms"),
        Line("tiny: until the first unit starts", units[0].start_s - run.start_s, "s"),
        Line("tiny: after the last unit's end", run.end_s - end_s, "s"),
    ]
    return Measured(lines, {"num_units": len(units), "summary": _kept(run.summary)})


def far(bench: Bench) -> Measured:
    """The same, on a store that takes its time; without Ray."""
    import s3fs

    num_shards = bench.some(NUM_FAR)
    archive = tiny_archive(bench.folder / "archive", num_shards)
    with slow_store(S_A_REQUEST) as environment:
        keys = {"key": "bench", "secret": "bench", "endpoint_url": environment["AWS_ENDPOINT_URL"]}
        store = s3fs.S3FileSystem(**keys, skip_instance_cache=True)
        store.put(f"{archive}/", "bench/archive/", recursive=True)
        places = "s3://bench/archive", "s3://bench/scored"
        run = score(bench, *places, "--device", "cpu", "--num-actors", 0, environment={**traced(bench), **environment})
    assert run.summary["num_shards_committed"] == num_shards, run.summary
    units = run.spans["UnitScorer.score"]
    window_s = max(unit.end_s for unit in units) - units[0].start_s
    what = f"{num_shards:,} shards of {TINY_ROWS} rows on a store with {S_A_REQUEST} s a request"
    lines = [
        Line(f"far: {what}, the whole process", run.wall_s, "s"),
        Line("far: for a shard, from the first unit's start to the last one's end", 1000 * window_s / num_shards, "ms"),
    ]
    return Measured(lines, {"summary": _kept(run.summary)})


MEASUREMENTS: dict[str, Callable[[Bench], Measured]] = {
    measurement.__name__: measurement
    for measurement in (
        fixed,
        nothing,
        planning,
        manifest,
        s3,
        publishing,
        reading,
        tiny,
        far,
        units,
        handing,
        ramp,
        efficiency,
    )
}


def _kept(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "output"}  # a temporary folder


if __name__ == "__main__":
    main()
