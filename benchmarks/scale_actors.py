"""What many actors cost and bring: eight fake GPUs, each a process of its own with a stub for a model."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.scale_data import STUB_ROWS, stub_archive, tiny_archive
from benchmarks.scale_figures import Line, Measured
from benchmarks.scale_runs import NUM_GPUS, Bench, Span, by_process, fake_gpus, on_gpus, run_part, score, spans_of

# Units of a second, and so many of them for each actor.
STUB_S_A_ROW, SHARDS_AN_ACTOR, NUM_UNITS = 1 / STUB_ROWS, 24, 2_000
NUM_HANDED, HANDED_S = 1_000_000, 60


def units(bench: Bench) -> Measured:
    """Every tiny shard is a unit, and costs next to nothing: what is left is handing over."""
    archive = tiny_archive(bench.folder / "archive", bench.some(NUM_UNITS, 32))
    with fake_gpus(bench, s_a_row=0) as environment:
        alone = {**environment, "BERTRAY_STUB_UNIT_SHARDS": "1"}
        run = score(bench, archive, bench.folder / "scored", *on_gpus(NUM_GPUS), environment=alone)
    found = run.spans["UnitScorer.score"]
    window_s = found[-1].end_s - found[0].start_s
    taken = run.spans["Recorder._take"]
    cpu_s = taken[-1].cpu_s - taken[0].cpu_s
    before_s = found[0].start_s - run.first("ActorPool._dataset").start_s
    dataset_s = run.first("ActorPool._dataset").wall_s
    lines = [
        Line(
            f"units: {len(found):,} units of a tiny shard over {NUM_GPUS} actors, for a unit",
            1000 * window_s / len(found),
            "ms",
        ),
        Line("units: processor time of the driver for a unit", 1000 * cpu_s / len(found), "ms"),
        Line("units: to make a Ray Dataset of them, for a unit", 1000 * dataset_s / len(found), "ms"),
        Line("units: from the plan of units to the first unit's start", before_s, "s"),
    ]
    return Measured(lines, {"wall_s": run.wall_s, "driver_cpu_s": cpu_s, "window_s": window_s})


def handing(bench: Bench) -> Measured:
    """Units that are done at once, of which there are many more than are waited for."""
    num_units = bench.some(NUM_HANDED)
    with fake_gpus(bench, s_a_row=0, BERTRAY_STUB_UNITS="1") as environment:
        found = run_part("handing", bench.bundle, num_units, HANDED_S, environment=environment)
    spans = spans_of(Path(environment["BERTRAY_TRACE"]))
    ready_s = min(span.end_s for span in spans["ScoringActor.__init__"])
    lines = [
        Line(
            f"handing: {num_units:,} units planned, from the first ready actor to the first unit's start",
            spans["ScoringActor._begin"][0].start_s - ready_s,  # the first unit lets the model be loaded
            "s",
            at_most=5,
        ),
        Line(f"handing: units done, {NUM_GPUS} actors on the driver's cores", found["num_a_s"], "/s"),
        Line("handing: of a core, the driver at that rate", 100 * found["cpu_share"], "%"),
        Line("handing: the driver's memory", found["peak_mib"], "MiB"),
        Line("handing: of it, before the units are planned", found["before_mib"], "MiB"),
    ]
    return Measured(lines, found)


def ramp(bench: Bench) -> Measured:
    """When the actors are ready, and when they are at work."""
    num_shards = NUM_GPUS * 16
    archive = stub_archive(bench.folder / "archive", num_shards)
    with fake_gpus(bench, STUB_S_A_ROW * min(1, 4 * bench.share)) as environment:
        run = score(bench, archive, bench.folder / "scored", *on_gpus(NUM_GPUS), environment=environment)
    actors = by_process(run.spans["UnitScorer.score"])
    assert len(actors) == NUM_GPUS, f"{len(actors)} of {NUM_GPUS} actors got a unit"
    ready_s = sorted(span.end_s for span in run.spans["ScoringActor.__init__"])
    at_work_s = sorted(found[0].start_s for found in actors.values())
    waits_s = [actors[span.pid][0].start_s - span.end_s for span in run.spans["ScoringActor.__init__"]]
    cpus_s = [span.cpu_s for span in run.spans["ScoringActor.__init__"]]
    lines = [
        Line(
            f"ramp: {NUM_GPUS} actors, from the first one that is ready to the last one at work",
            at_work_s[-1] - ready_s[0],
            "s",
            5,
        ),
        Line("ramp: from the first actor that is ready to the last one that is", ready_s[-1] - ready_s[0], "s"),
        Line("ramp: from an actor's being ready to its first unit, the slowest", max(waits_s), "s"),
        Line("ramp: from the job's start to the first actor that is ready", ready_s[0] - run.start_s, "s"),
        Line("ramp: processor time of an actor until it is ready, no model loaded", statistics.mean(cpus_s), "s"),
    ]
    facts = {"ready_s": [time_s - run.start_s for time_s in ready_s]}
    return Measured(lines, {**facts, "at_work_s": [time_s - run.start_s for time_s in at_work_s]})


def efficiency(bench: Bench) -> Measured:
    """Each actor gets the same work, so that as many times the actors should do as many times the rows a second."""
    lines: list[Line] = []
    facts: dict[str, Any] = {}
    steady: dict[int, float] = {}
    overall: dict[int, float] = {}
    shards_an_actor = bench.some(SHARDS_AN_ACTOR, 16)
    with fake_gpus(bench, STUB_S_A_ROW * min(1, 10 * bench.share)) as environment:
        for num_actors in (1, 2, 4, NUM_GPUS):
            folder = bench.folder / f"actors-{num_actors}"
            archive = stub_archive(folder / "archive", num_actors * shards_an_actor)
            run = score(bench, archive, folder / "scored", *on_gpus(num_actors), environment=environment)
            num_rows = run.summary["num_rows"]
            assert num_rows == num_actors * shards_an_actor * STUB_ROWS, run.summary
            window_s, shares = where_time_goes(run.spans["UnitScorer.score"], run.spans["Bundle.predict_column"])
            steady[num_actors], overall[num_actors] = num_rows / window_s, num_rows / run.wall_s
            facts[str(num_actors)] = {
                "window_s": window_s,
                "wall_s": run.wall_s,
                "shares": shares,
                "busy_while_all_at_work": busy_share(run.spans["UnitScorer.score"], run.spans["Bundle.predict_column"]),
            }
    for num_actors in list(steady)[1:]:
        wanted = 90 if num_actors == NUM_GPUS else None
        for what, rates, at_least in (
            ("from the first unit's start to the last one's end", steady, wanted),
            ("of the whole process", overall, None),
        ):
            per_cent = 100 * rates[num_actors] / (num_actors * rates[1])
            lines.append(Line(f"efficiency: {num_actors} actors, {what}", per_cent, "%", at_least=at_least))
    busy = {num_actors: facts[str(num_actors)]["busy_while_all_at_work"] for num_actors in (1, NUM_GPUS)}
    per_cent = 100 * busy[NUM_GPUS] / busy[1]
    lines.append(Line(f"efficiency: {NUM_GPUS} actors, while all were at work", per_cent, "%"))
    for part, share in facts[str(NUM_GPUS)]["shares"].items():
        lines.append(Line(f"efficiency: of the time of {NUM_GPUS} actors, {part}", 100 * share, "%"))
    return Measured(lines, {"shards_an_actor": shards_an_actor, "rows_a_shard": STUB_ROWS, "runs": facts})


def where_time_goes(units: list[Span], predictions: list[Span]) -> tuple[float, dict[str, float]]:
    """Seconds from the first unit's start to the last one's end, and what the actors did in them, as shares of 1."""
    start_s, end_s = min(unit.start_s for unit in units), max(unit.end_s for unit in units)
    actors = by_process(units).values()
    spent_s = {
        "the model": sum(span.wall_s for span in predictions),
        "not yet at work": sum(found[0].start_s - start_s for found in actors),
        "no work left": sum(end_s - max(one.end_s for one in found) for found in actors),
    }
    all_s = len(actors) * (end_s - start_s)
    shares = {what: wall_s / all_s for what, wall_s in spent_s.items()}
    return end_s - start_s, {**shares, "the model waits": 1 - sum(shares.values())}


def busy_share(units: list[Span], predictions: list[Span]) -> float:
    """Of the actors' time from when the last one started until the first one had no work left: what the model had."""
    actors = by_process(units).values()
    start_s, end_s = max(found[0].start_s for found in actors), min(max(one.end_s for one in found) for found in actors)
    model_s = sum(max(0.0, min(span.end_s, end_s) - max(span.start_s, start_s)) for span in predictions)
    return model_s / (len(actors) * (end_s - start_s))
