"""The nightly job: score every shard of an archive that has no predictions yet.

1. lock      one run at a time on an output; complete what a run that died has begun   [storage.lock]
2. plan      one listing of the input, compared with what is published and staged      [scoring.manifest]
3. stream    units of pending shards -> a pool of processes that hold the model        [scoring.score_unit]
4. stage     each shard becomes a file in staging/, and then a record in staged/       [scoring.staging]
5. judge     do the staged predictions look like the published ones?                   [scoring.gate]
6. publish   staging/ -> predictions/, staged/ -> manifest/, then runs/latest.json     [scoring.publish]
7. show      runs/<run-id>/report.html and index.html                                   [reports.run, reports.index]

A shard that fails is listed with its path and reason, and the others continue. To recover, run the command again.
With --plan it stops after step 2 and estimates the time. A run with nothing to do starts neither Ray nor torch, so this
module imports neither.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.guard import keep, torch_summary
from bertray.bundle.info import BundleInfo, was_replaced
from bertray.bundle.isolated import IsolatedBundle
from bertray.cli import EXIT_HELD, EXIT_OK, EXIT_SHARDS_FAILED, JobResult
from bertray.drivers import ray_address
from bertray.drivers.forecast import preview
from bertray.errors import RequestError
from bertray.metrics.profile import Profile
from bertray.reports.pages import add_page
from bertray.reports.terminal import print_scoring, print_verdict
from bertray.schema import RECORD_SCHEMA
from bertray.scoring.archive import Archive, list_shards, open_archive, remember, resolved
from bertray.scoring.config import ScoreConfig
from bertray.scoring.gate import Verdict, judge
from bertray.scoring.listing import PREDICTIONS
from bertray.scoring.manifest import Manifest, Plan, fingerprint, plan, precision_before
from bertray.scoring.pool import LocalPool, Pool
from bertray.scoring.publish import announced_again, complete, describe, merged, prune, publish
from bertray.scoring.refusals import bundle_for, refuse_mixture, refuse_obstacles, refuse_unasked
from bertray.scoring.runs import (
    MAX_LISTED_SHARDS,
    MAX_REASONS,
    NOW,
    RUNS,
    Announcement,
    Published,
    Rate,
    Recorder,
    Runs,
    profile_of,
    request_of,
)
from bertray.scoring.score_shard import STEP_BYTES
from bertray.scoring.score_unit import Request
from bertray.scoring.staging import Staging
from bertray.scoring.units import ENGINE_FOLDER, divide
from bertray.storage.location import FileInfo
from bertray.storage.lock import RunLock, new_run_id
from bertray.tasks.task import TASKS
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Some shards that any process of the run should be able to read.
_NUM_SAMPLES = 8
# In a minute of scoring, the start of the actors no longer counts for much: the rate is a better forecast.
_LONG_ENOUGH_S = 60.0
# A run that died was scoring the first pending shards; it recorded everything older than a few seconds.
_MAX_SUSPECTS = 1000
_LAST, _VALIDATION = "what was announced last", "the bundle's validation rows"

OpenPool = Callable[[Request, list[FileInfo]], AbstractContextManager[Pool]]


@dataclass(frozen=True)
class ScoreResult:
    """The result of a scoring run.

    Attributes:
        output: the output folder.
        summary: the figures that the command line prints; docs/glossary.md explains them.
        failures: path and reason of every shard that failed; the next run tries it again.
        older: shards that could not be scored, whose published file is of an earlier version or request; some of them.
        verdict: the gate's verdict; None: there is nothing to announce.
        shards_with_errors: those with most rows that have an error: path, num_rows_error, num_rows, failure.
    """

    output: str
    summary: dict[str, Any]
    failures: list[dict[str, str]]
    older: list[str]
    verdict: Verdict | None
    shards_with_errors: list[dict[str, Any]]

    @property
    def is_held(self) -> bool:
        """Whether the gate holds the run back: predictions are staged and not published."""
        return self.verdict is not None and self.verdict.is_held


def run(config: ScoreConfig, *, open_pool: OpenPool | None = None) -> JobResult:
    """The job of the command line; see `score`."""
    if config.plan:
        facts = preview(config)
        print_scoring(facts, [], title="plan: nothing was scored")
        return JobResult(facts)
    scored = score(config, open_pool=open_pool)
    print_scoring(scored.summary, scored.failures, older=scored.older)
    if scored.verdict and scored.verdict.reasons:
        print_verdict(scored.verdict, scored.shards_with_errors)
    return JobResult(
        scored.summary, EXIT_HELD if scored.is_held else EXIT_SHARDS_FAILED if scored.failures else EXIT_OK
    )


def score(config: ScoreConfig, *, open_pool: OpenPool | None = None) -> ScoreResult:
    """Score pending shards, and announce the run if the gate passes it.

    Args:
        open_pool: opens the pool that scores units; None: the pool that `config` asks for.

    Raises:
        RequestError: bundle, input, output or columns do not fit; nothing was started.
        LockedError: another run is using this output, or has taken it over from this run.
    """
    started_s = time.monotonic()
    if config.plan:
        raise RequestError("plan is an option of the command line, which scores nothing then: leave it out")
    config, source, output = resolved(config)
    info = bundle_for(config)
    archive = open_archive(config, source, output)
    run_id, prunes = new_run_id(), config.prune or config.prune_many
    if prunes and not archive.is_whole:
        raise RequestError(f"--prune needs the whole archive as --input, and {source} is a part of it: leave it out")
    request_fingerprint = fingerprint(info, config)
    with RunLock(output, run_id).held() as lock:
        if lock.was_left_behind:
            output.remove_unfinished()
            (output / PREDICTIONS).remove_unfinished()  # it may be a link
        complete(output)
        manifest, staging, runs = Manifest(output), Staging(output), Runs(output)
        announced = runs.latest() or announced_again(output, TASKS[info.problem_type].answers(info))
        if announced and announced.run_id >= run_id:
            raise RequestError(
                f"run {announced.run_id} of {output} is later than this machine's time, {run_id}: set its clock"
            )
        records = manifest.latest()
        todo = plan(archive.shards, records, staging.records(), request_fingerprint, is_whole=archive.is_whole)
        differences = runs.differences(announced, config) if announced and todo.pending else []
        refuse_mixture(archive, records, request_fingerprint)
        refuse_unasked(todo, differences, config)
        if not prunes:
            paths = [shard.path for shard in (*todo.pending, *todo.staged)]
            refuse_obstacles(output, paths, "name the whole archive as --input, and say --prune")
        _log_plan(todo, differences, prune=prunes)
        if todo.pending and (decision := precision_before(output, info, config)):
            keep(output / ENGINE_FOLDER, info, decision)  # before an actor decides otherwise
        recorder = Recorder(runs, run_id, staging, request_fingerprint, lock)
        engine: dict[str, Any] = {"engine": "openvino" if config.engine == "openvino" else "torch"}
        if todo.pending and open_pool is None and config.num_actors != 0:
            ray_address.prepare()
        remember(archive, output, has_moved=config.input_moved)
        if todo.pending or todo.staged:
            asked = {"config": config.model_dump(), "bundle_fingerprint": info.fingerprint(), "versions": versions()}
            runs.begin(run_id, asked, {**todo.counts(), "pending_bytes": todo.pending_bytes})
        if todo.pending:
            _log.info("scoring %.1f MB in run %s", todo.pending_bytes / 1e6, run_id)
            request = Request(
                config=config,
                archive=str(archive.root),
                fingerprint=request_fingerprint,
                bundle_fingerprint=info.fingerprint(),
                lock_number=lock.number,
                samples=tuple(one.path for one in archive.shards[:: max(1, len(archive.shards) // _NUM_SAMPLES)]),
                suspects=_suspects(todo, runs, lock) if config.num_actors == 0 else frozenset(),
            )
            if config.engine == "openvino":
                from bertray.bundle.openvino import prepare  # imports torch

                # Export once, to where actors on other nodes and the next run find it.
                engine = prepare(config.bundle, config.precision, output / ENGINE_FOLDER).summary()
            try:
                engine["num_actors"], archive = _stream(request, archive, todo, recorder, staging, open_pool or pool_of)
            except (KeyboardInterrupt, SystemExit):
                lock.check()  # else another run may be writing there
                staging.folder.remove_unfinished()
                raise
            if config.engine != "openvino":  # the scoring processes have chosen the precision
                engine |= torch_summary(output / ENGINE_FOLDER, info, config.precision, recorder.precision)
        elif not todo.staged:
            _log.info("nothing to do: every shard is published under this bundle and these columns")
        if not todo.pending and lock.was_left_behind:  # by a run for another request
            staging.remove_stale(archive, todo.staged, request_fingerprint)
        if todo.pending or lock.was_left_behind:
            staging.finish(run_id)
        new = RECORD_SCHEMA.empty_table()
        if todo.pending or todo.staged:
            new = staging.records_of(archive, request_fingerprint)
        known = runs.failed_last(announced) if announced and recorder.failures else set()
        failed = [one["path"] for one in recorder.failures if one["path"] not in known]
        profile = profile_of(new)
        # A failure that is old, or alone, changes nothing that could be published.
        has_news = len(new) > 0 or (bool(failed) and not announced)
        references, verdict = _references(announced, info), None
        if has_news:
            num_shards = len(new) + len(failed)
            verdict = judge(profile, references, num_shards, len(failed), config, info.problem_type)
        is_held = verdict is not None and verdict.is_held
        num_pruned = 0
        if prunes and is_held:
            _log.info("--prune waits until what is held is published")
        elif prunes:
            lock.check()
            # Hours have passed since the first listing, which was made before the lock.
            present = list_shards(source, output, shards=config.shards)
            num_pruned = prune(output, run_id, present, request_fingerprint, many=config.prune_many)
        published: Published | None = None  # None: what is announced stays
        had_older = announced and announced.published and announced.published.num_shards_older
        if verdict or recorder.failures or had_older:
            left = merged(manifest.latest(RECORD_SCHEMA), new)
            published = describe(archive, left, request_fingerprint, announced, TASKS[info.problem_type].answers(info))
        summary = {
            "output": str(output),
            "run_id": run_id if todo.pending or verdict else None,
            **todo.counts(),
            "num_shards_older": published.num_shards_older if published else 0,
            **archive.listing.counts(),
            "num_outputs_pruned": num_pruned,
            **recorder.summary(time.monotonic() - started_s),
            **engine,
            **(verdict.summary() if verdict else {"gate": None}),
        }
        if verdict:
            lock.check()
            rate = recorder.rate(engine["num_actors"]) if todo.pending else None
            report = {"failures": recorder.failures, "movements": verdict.table(), "rate": rate and rate.model_dump()}
            profiles = {name: one.model_dump() for name, one in {NOW: profile, **references}.items()}
            answers = TASKS[info.problem_type].answers(info)
            report |= {
                "errors": dict(recorder.errors.most_common(MAX_REASONS)),
                "profiles": profiles,
                "answers": answers,
            }
            runs.finish(run_id, {**summary, **report})
            if not is_held:
                refuse_obstacles(output, new["path"].to_pylist(), "say --prune-many; else move it away")
                announcement = _announcement(run_id, profile, announced, verdict, info, rate)
                update = {"published": published, "request": request_of(config, info.fingerprint())}
                publish(output, new, announcement.model_copy(update=update))
        elif published and (latest := runs.latest()) and latest.published != published:
            lock.check()  # there are only failures, or what was older is not any more
            runs.announce(latest.model_copy(update={"published": published}))
        if todo.pending or verdict:
            add_page(output / RUNS / run_id)
            add_page(output)
    older = published.older if published else []
    return ScoreResult(str(output), summary, recorder.failures, older, verdict, _worst(new, recorder.failures))


def _worst(records: pa.Table, failures: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The shards with most errors: path, num_rows_error, num_rows and failure."""
    with_errors = records.filter(pc.greater(records["num_rows_error"], 0))
    rows = with_errors.select(["path", "num_rows_error", "num_rows"]).to_pylist()
    rows += [{"path": one["path"], "num_rows_error": 0, "num_rows": 0, "failure": one["reason"]} for one in failures]
    ordered = sorted(rows, key=lambda row: (-row["num_rows_error"], row["path"]))
    return [{"failure": None, **row} for row in ordered[:MAX_LISTED_SHARDS]]


def _references(announced: Announcement | None, info: BundleInfo) -> dict[str, Profile]:
    """What the gate compares new predictions with, by its name there."""
    found = {_LAST: announced.profile} if announced else {}
    if info.validation_profile and not _was_accepted(announced, info):
        found[_VALIDATION] = info.validation_profile
    return found


def _announcement(
    run_id: str,
    profile: Profile,
    announced: Announcement | None,
    verdict: Verdict,
    info: BundleInfo,
    measured: Rate | None,
) -> Announcement:
    rate = announced.rate if announced else None
    if measured and (rate is None or measured.wall_s >= min(rate.wall_s, _LONG_ENOUGH_S)):
        rate = measured
    differs = any(one.is_beyond for one in verdict.movements if one.against == _VALIDATION)
    accepted = info.fingerprint() if differs or _was_accepted(announced, info) else None
    # The next run is compared with the last rows that there were: an empty shard must not end all comparison.
    if announced and not profile.num_rows_scored:
        profile = announced.profile
    return Announcement(run_id=run_id, profile=profile, accepted_bundle=accepted, rate=rate)


def _was_accepted(announced: Announcement | None, info: BundleInfo) -> bool:
    """Whether a person has accepted that the archive differs from the bundle's validation rows."""
    return announced is not None and announced.accepted_bundle == info.fingerprint()


def _log_plan(todo: Plan, differences: list[str], *, prune: bool) -> None:
    other = "; ".join(differences) or "another bundle, column, engine or precision"
    reasons = {"new": todo.new, "changed": todo.changed, f"scored before by another request, {other}": todo.anew}
    why = ", ".join(f"{len(shards)} {reason}" for reason, shards in reasons.items() if shards)
    _log.info("%d shards to score%s, %d done before", len(todo.pending), f" ({why})" if why else "", todo.num_done)
    if todo.gone and not prune:
        _log.info("%d shards left the archive; their predictions stay (--prune removes them)", len(todo.gone))


def _suspects(todo: Plan, runs: Runs, lock: RunLock) -> frozenset[str]:
    """Pending shards that may crash their reader: those that failed last and, after a crash, the first ones."""
    first = todo.pending[:_MAX_SUSPECTS] if lock.was_left_behind else []
    return frozenset(runs.failed_last() | {shard.path for shard in first})


@contextmanager
def pool_of(request: Request, pending: list[FileInfo]) -> Iterator[Pool]:
    """Open the pool that the request's configuration asks for.

    Raises:
        RequestError: this machine or cluster cannot do it.
    """
    config = request.config
    if config.num_actors == 0:
        with IsolatedBundle(request.model_spec(config.device)) as bundle:
            if bundle.info.fingerprint() != request.bundle_fingerprint:
                raise was_replaced(config.bundle)
            bundle.ready()
            _log.info("the model runs in a child process (%s)", bundle.device)
            yield LocalPool(replace(request, step_bytes=STEP_BYTES[bundle.device]), bundle, interrupt=bundle.close)
        return
    from bertray.drivers import actor_pool, cluster  # importing Ray takes seconds

    with cluster.session():
        yield actor_pool.ActorPool(request, pending)


def _stream(
    request: Request, archive: Archive, todo: Plan, recorder: Recorder, staging: Staging, open_pool: OpenPool
) -> tuple[int, Archive]:
    """Score pending shards, again if they are rewritten meanwhile, or the place where they were to be scored fails.

    Returns:
        How many processes held the model, and the archive as it is now.
    """
    pending, kept = recorder.adopt(todo.pending), [*todo.staged, *todo.pending]
    if not pending:
        staging.remove_stale(archive, kept, request.fingerprint)
        return 0, archive
    with open_pool(request, pending) as pool:
        staging.remove_stale(archive, kept, request.fingerprint)
        while pending:
            work = divide(pending, pool.unit_bytes, pool.num_processes, request.fingerprint, staging.files())
            # Closed here: what a stop leaves half-written is removed when nobody writes any more.
            with closing(pool.run(work)) as outcomes:
                changed = recorder.follow(outcomes, work)
            now = {path: archive.root / path for path in changed}
            versions_now = {path: replace(place.info(), path=path) for path, place in now.items() if place.exists()}
            left = [versions_now.get(one.path, one) for one in recorder.left(pending)]
            gone = changed - versions_now.keys()
            # A pass that ended early may have staged what nobody has reported.
            pending = recorder.adopt([one for one in left if one.path not in gone])
            listed = {shard.path: shard for shard in (*archive.shards, *versions_now.values())}
            archive = replace(archive, shards=[*listed.values()])
            if pending:
                _log.warning("%d shards are to be scored in another pass", len(pending))
        return pool.num_processes, archive
