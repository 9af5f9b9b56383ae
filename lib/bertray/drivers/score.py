"""The nightly job: every shard of an archive that has no predictions yet gets them.

1. lock      one run at a time on an output                                            [storage.lock]
2. plan      one listing of the input, held against the manifest                       [scoring.plan]
3. stream    units of pending shards -> a pool of actors, each with the model in memory [drivers.actor_pool]
4. score     the shard becomes a predictions file, put in one atomic step              [scoring.score_unit]
5. commit    the shard's record goes into the manifest                                 [scoring.manifest]
6. judge     does what is new look like what was before?                               [scoring.gate]
7. announce  runs/<run-id>/summary.json, then runs/latest.json                         [scoring.runs]

What fails with a shard is listed with its path and reason; the others go on. Running again is the recovery. Here
nothing is imported that takes time: a run that has nothing to do starts neither Ray nor torch.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

from bertray.bundle.info import BundleInfo, read_info
from bertray.errors import RequestError
from bertray.scoring.archive import Archive, list_shards, probe, remember, resolved
from bertray.scoring.config import ScoreConfig
from bertray.scoring.gate import Verdict, judge
from bertray.scoring.manifest import Manifest, fingerprint
from bertray.scoring.plan import Plan, plan
from bertray.scoring.recorder import Bookkeeper
from bertray.scoring.runs import Announcement, Rate, Runs, Unannounced
from bertray.scoring.units import Work
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Of shards that are rewritten while they are read.
_MAX_PASSES = 3
# What the gate holds new predictions against.
_LAST, _VALIDATION = "what was announced last", "the bundle's validation rows"


class Scored(NamedTuple):
    """What a run comes to. A failure has the shard's path and the reason; no verdict: nothing is to be announced."""

    summary: dict[str, Any]
    failures: list[dict[str, str]]
    verdict: Verdict | None
    shards_with_errors: list[dict[str, Any]]


def score(config: ScoreConfig) -> Scored:
    """Score what is pending, and announce it if the gate lets it pass.

    Raises:
        RequestError: bundle, input, output or columns do not fit; nothing was started.
        LockedError: another run is at work on this output, or has taken it from this one.
    """
    started_s = time.monotonic()
    config, source, output = resolved(config)
    info = read_info(Location.of(config.bundle))
    archive = list_shards(source, output, has_moved=config.input_moved)
    run_id = new_run_id()
    if config.prune and not archive.is_whole:
        raise RequestError(f"--prune needs the whole archive as --input, and {source} is a part of it: leave it out")
    probe(archive, config)
    with RunLock(output, run_id).held() as lock:
        if lock.was_left_behind:
            output.remove_unfinished()
        manifest, runs = Manifest(output), Runs(output)
        announced = runs.latest()
        if announced and announced.run_id >= run_id:
            raise RequestError(
                f"run {announced.run_id} of {output} was later than now, {run_id}: set this machine's clock"
            )
        remember(archive, output, has_moved=config.input_moved)
        todo = plan(archive.shards, manifest.latest(), fingerprint(info, config), is_whole=archive.is_whole)
        _log_plan(todo, config)
        books = Bookkeeper(manifest, runs, run_id, output, fingerprint(info, config), lock)
        engine: dict[str, Any] = {"engine": "openvino" if config.engine == "openvino" else "torch"}
        if todo.pending:
            runs.begin(run_id, _request(config, info), {**todo.counts(), "pending_bytes": todo.pending_bytes})
            if todo.replaced:
                # A run that ends before their new records are written leaves files of both kinds: only those that have
                # a record count as done, whatever is asked for next.
                manifest.forget(run_id, todo.replaced)
            _log.info("scoring %.1f MB in run %s", todo.pending_bytes / 1e6, run_id)
            engine = _stream(config, info, archive, todo.pending, books)
        else:
            _log.info("nothing to do: every shard is committed under this bundle and these columns")
            # Maybe by a run that had recorded its last shard, and not yet removed its parts.
            if lock.was_left_behind:
                books.remove_stale(Work(), archive)
                books.finish()
        num_pruned = 0
        if config.prune:
            lock.check()
            # Listed anew: the listing is from before the lock, and hours have passed.
            num_pruned = _prune(output, manifest, run_id, list_shards(source, output).shards)
        # A part of the archive does not say what else is still there.
        present = archive.paths() if archive.is_whole else None
        news = runs.unannounced(announced, present)
        verdict = _judge(news, announced, info, config) if news.num_shards else None
        summary = {
            "output": str(output),
            "run_id": run_id if todo.pending or verdict else None,
            **todo.counts(),
            "num_outputs_pruned": num_pruned,
            **books.summary(time.monotonic() - started_s),
            **engine,
            **(verdict.summary() if verdict else {"gate": None}),
        }
        if verdict:
            lock.check()
            runs.finish(run_id, {**summary, "failures": books.failures, "movements": verdict.table()})
            if not verdict.is_held:
                measured = books.rate(summary["num_actors"]) if todo.pending else None
                runs.announce(_announcement(run_id, news, announced, verdict, info, measured))
    return Scored(summary, books.failures, verdict, news.shards_with_errors)


def _stream(
    config: ScoreConfig, info: BundleInfo, archive: Archive, pending: list[FileInfo], books: Bookkeeper
) -> dict[str, Any]:
    """Score pending shards, those again that are rewritten meanwhile; what the summary should say of the engine."""
    from bertray.drivers import (
        actor_pool,  # Ray and torch: seconds, which a run with nothing to do need not take
        cluster,
    )

    engine = actor_pool.prepare_engine(config, Location.of(config.output))
    with cluster.session():
        placement = actor_pool.place(config, pending)
        actors = actor_pool.Pool(config, info, archive.root, placement, books.lock.number)
        for num_passes in range(1, _MAX_PASSES + 1):
            work = actors.divide(pending, books.staged())
            if num_passes == 1:
                books.remove_stale(work, archive)
            changed = books.follow(actors.outcomes(work), work, is_last_pass=num_passes == _MAX_PASSES)
            if not changed:
                break
            pending = [FileInfo(path, now.size_bytes, now.version) for path, now in _listed(archive.root, changed)]
            _log.warning("%d shards were rewritten while they were read; reading them again", len(pending))
    books.finish()
    return {**engine, "num_actors": placement.num_processes}


def _listed(archive: Location, paths: list[str]) -> list[tuple[str, FileInfo]]:
    return [(path, (archive / path).info()) for path in paths if (archive / path).exists()]


def _log_plan(todo: Plan, config: ScoreConfig) -> None:
    reasons = [
        f"{len(shards)} {reason}"
        for shards, reason in (
            (todo.new, "new"),
            (todo.changed, "changed"),
            (todo.anew, "scored before with another bundle, column, engine or precision"),
        )
        if shards
    ]
    why = f" ({', '.join(reasons)})" if reasons else ""
    _log.info("%d shards to score%s, %d done before", len(todo.pending), why, todo.num_done)
    if todo.gone and not config.prune:
        _log.info("%d shards left the archive; their predictions stay (--prune removes them)", len(todo.gone))


def _prune(output: Location, manifest: Manifest, run_id: str, shards: list[FileInfo]) -> int:
    """Remove predictions of shards that the archive has no more; their number.

    The manifest forgets them first: after a crash in between, files that nobody lists are left, for the next time.
    """
    present = {shard.path for shard in shards}
    extra = [info.path for info in (output / "predictions").files((".parquet",)) if info.path not in present]
    if extra:
        manifest.forget(run_id, extra)
        for path in extra:
            (output / "predictions" / path).remove()
        _log.info("removed %d predictions files of shards that left the archive", len(extra))
    return len(extra)


def _judge(news: Unannounced, announced: Announcement | None, info: BundleInfo, config: ScoreConfig) -> Verdict:
    references = {}
    if announced:
        references[_LAST] = announced.profile
    if info.validation_profile and not (announced and announced.accepted_bundle == info.fingerprint()):
        references[_VALIDATION] = info.validation_profile
    return judge(news.profile, references, news.num_shards, news.num_shards_failed, config)


def _announcement(
    run_id: str,
    news: Unannounced,
    before: Announcement | None,
    verdict: Verdict,
    info: BundleInfo,
    measured: Rate | None,
) -> Announcement:
    differs = any(movement.is_beyond for movement in verdict.movements if movement.against == _VALIDATION)
    was_accepted = before is not None and before.accepted_bundle == info.fingerprint()
    accepted = info.fingerprint() if differs or was_accepted else None
    rate = before.rate if before else None
    if measured and measured.says_more_than(rate):
        rate = measured
    return Announcement(run_id=run_id, profile=news.profile, accepted_bundle=accepted, rate=rate)


def _request(config: ScoreConfig, info: BundleInfo) -> dict[str, Any]:
    return {"config": config.model_dump(), "bundle_fingerprint": info.fingerprint(), "versions": versions()}
