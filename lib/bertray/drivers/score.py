"""The nightly job: every shard of an archive that has no predictions yet gets them.

1. lock      one run at a time on an output                                            [storage.lock]
2. plan      one listing of the input, held against the manifest                       [scoring.manifest]
3. stream    units of pending shards -> a pool of processes that hold the model         [scoring.score_unit]
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
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bertray.bundle.guard import torch_summary
from bertray.bundle.info import BundleInfo, read_info, was_replaced
from bertray.bundle.isolated import IsolatedBundle
from bertray.cli import EXIT_HELD, EXIT_OK, EXIT_SHARDS_FAILED, JobResult, keep_ray_on_loopback
from bertray.errors import RequestError
from bertray.reports.terminal import print_scoring, print_verdict
from bertray.scoring.archive import Archive, list_shards, probe, remember, resolved
from bertray.scoring.config import ScoreConfig
from bertray.scoring.gate import Verdict, judge
from bertray.scoring.manifest import Manifest, Plan, fingerprint, plan
from bertray.scoring.runs import Announcement, Rate, Recorder, Runs, Unannounced
from bertray.scoring.score_shard import STEP_BYTES
from bertray.scoring.score_unit import LocalPool, Pool, Request
from bertray.scoring.units import ENGINE_FOLDER, Work, divide
from bertray.storage.location import FileInfo, Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.versions import versions

_log = logging.getLogger(__name__)

# Of shards that are rewritten while they are read.
_MAX_PASSES = 3
# A run that died had these in hand, in the same order; what it had done for longer than some seconds is recorded.
_MAX_SUSPECTS = 1000
# What the gate holds new predictions against.
_LAST, _VALIDATION = "what was announced last", "the bundle's validation rows"


OpenPool = Callable[[Request, list[FileInfo]], AbstractContextManager[Pool]]


@dataclass(frozen=True)
class ScoreResult:
    """What a scoring run came to.

    Attributes:
        output: its place.
        summary: the figures that the command line prints; docs say what each means.
        failures: path and reason of every shard that failed; the next run tries it again.
        verdict: what the gate says; None: nothing is to be announced.
        shards_with_errors: those with most rows that have an error: path, num_rows_error, num_rows, failure.
    """

    output: str
    summary: dict[str, Any]
    failures: list[dict[str, str]]
    verdict: Verdict | None
    shards_with_errors: list[dict[str, Any]]

    @property
    def is_held(self) -> bool:
        """Whether the gate holds the run back: predictions are in place, and not announced."""
        return self.verdict is not None and self.verdict.is_held


def run(config: ScoreConfig, *, open_pool: OpenPool | None = None) -> JobResult:
    """The job of the command line; see `score`."""
    if config.plan:
        from bertray.drivers.score_plan import preview

        facts = preview(config)
        print_scoring(facts, [], title="plan: nothing was scored")
        return JobResult(facts)
    scored = score(config, open_pool=open_pool)
    print_scoring(scored.summary, scored.failures)
    if scored.verdict and scored.verdict.reasons:
        print_verdict(scored.verdict, scored.shards_with_errors)
    if scored.is_held:
        return JobResult(scored.summary, EXIT_HELD)
    return JobResult(scored.summary, EXIT_SHARDS_FAILED if scored.failures else EXIT_OK)


@contextmanager
def pool_of(request: Request, pending: list[FileInfo]) -> Iterator[Pool]:
    """The pool that the request's configuration asks for, inside the block.

    Args:
        pending: what is to be scored.

    Raises:
        RequestError: this machine or cluster cannot do what was asked.
    """
    if request.config.num_actors == 0:
        with _local_pool(request) as pool:
            yield pool
        return
    keep_ray_on_loopback()
    # Ray: seconds, which a run with nothing to do need not take.
    from bertray.drivers import actor_pool, cluster

    with cluster.session():
        yield actor_pool.ActorPool(request, actor_pool.place(request.config, pending))


@contextmanager
def _local_pool(request: Request) -> Iterator[Pool]:
    config = request.config
    with IsolatedBundle(request.model_spec(config.device)) as bundle:
        if bundle.info.fingerprint() != request.bundle_fingerprint:
            raise was_replaced(config.bundle)
        bundle.ready()
        _log.info("the model runs in a child process (%s)", bundle.device)
        yield LocalPool(replace(request, step_bytes=STEP_BYTES[bundle.device]), bundle)


def score(config: ScoreConfig, *, open_pool: OpenPool | None = None) -> ScoreResult:
    """Score what is pending, and announce it if the gate lets it pass.

    Args:
        open_pool: opens what units are scored by; None: what `config` asks for.

    Raises:
        RequestError: bundle, input, output or columns do not fit; nothing was started.
        LockedError: another run is at work on this output, or has taken it from this one.
    """
    started_s = time.monotonic()
    if config.plan:
        raise RequestError("plan is an option of the command line, which scores nothing then: leave it out")
    config, source, output = resolved(config)
    info = read_info(Location.of(config.bundle))
    archive = list_shards(source, output, has_moved=config.input_moved)
    run_id = new_run_id()
    if config.prune and not archive.is_whole:
        raise RequestError(f"--prune needs the whole archive as --input, and {source} is a part of it: leave it out")
    probe(archive, config)
    request_fingerprint = fingerprint(info, config)
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
        todo = plan(archive.shards, manifest.latest(), request_fingerprint, is_whole=archive.is_whole)
        _log_plan(todo, config)
        recorder = Recorder(manifest, runs, run_id, output, request_fingerprint, lock)
        engine: dict[str, Any] = {"engine": "openvino" if config.engine == "openvino" else "torch"}
        if todo.pending:
            runs.begin(run_id, _request(config, info), {**todo.counts(), "pending_bytes": todo.pending_bytes})
            _log.info("scoring %.1f MB in run %s", todo.pending_bytes / 1e6, run_id)
            request = Request(
                config=config,
                archive=str(archive.root),
                fingerprint=request_fingerprint,
                bundle_fingerprint=info.fingerprint(),
                lock_number=lock.number,
                suspects=_suspects(todo, runs, lock) if config.num_actors == 0 else frozenset(),
            )
            engine = _prepare_engine(config, output)
            engine["num_actors"] = _stream(request, archive, todo, recorder, open_pool or pool_of)
            if config.engine != "openvino":  # what the processes have decided
                engine |= torch_summary(output / ENGINE_FOLDER, info, config.precision, recorder.precision)
        else:
            _log.info("nothing to do: every shard is committed under this bundle and these columns")
            # Maybe by a run that had recorded its last shard, and not yet removed its parts.
            if lock.was_left_behind:
                recorder.remove_stale(Work(), archive)
                recorder.finish()
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
            **recorder.summary(time.monotonic() - started_s),
            **engine,
            **(verdict.summary() if verdict else {"gate": None}),
        }
        if verdict:
            lock.check()
            runs.finish(run_id, {**summary, "failures": recorder.failures, "movements": verdict.table()})
            if not verdict.is_held:
                measured = recorder.rate(summary["num_actors"]) if todo.pending else None
                runs.announce(_announcement(run_id, news, announced, verdict, info, measured))
    return ScoreResult(str(output), summary, recorder.failures, verdict, news.shards_with_errors)


def _suspects(todo: Plan, runs: Runs, lock: RunLock) -> frozenset[str]:
    """Pending shards that may end the process which reads them: what failed last; after a run that died, the first."""
    first = todo.pending[:_MAX_SUSPECTS] if lock.was_left_behind else []
    return frozenset(runs.failed_last() | {shard.path for shard in first})


def _prepare_engine(config: ScoreConfig, output: Location) -> dict[str, Any]:
    """Do once what every process would do, and say what the summary should of the engine.

    Raises:
        RequestError: the engine is not installed, or cannot run the model.
    """
    if config.engine != "openvino":
        return {"engine": "torch"}
    from bertray.bundle.openvino import prepare  # torch

    # Beside the predictions, where actors on other nodes find it, and the next run.
    return prepare(config.bundle, config.precision, output / ENGINE_FOLDER).summary()


def _stream(request: Request, archive: Archive, todo: Plan, recorder: Recorder, open_pool: OpenPool) -> int:
    """Score pending shards, those again that are rewritten meanwhile; returns how many processes held the model."""
    pending = todo.pending
    with open_pool(request, pending) as pool:
        recorder.begin(todo.replaced)
        for num_passes in range(1, _MAX_PASSES + 1):
            work = divide(pending, pool.unit_bytes, pool.num_processes, request.fingerprint, recorder.staged())
            if num_passes == 1:
                recorder.remove_stale(work, archive)
            changed = recorder.follow(pool.run(work), work, is_last_pass=num_passes == _MAX_PASSES)
            if not changed:
                break
            pending = [FileInfo(path, now.size_bytes, now.version) for path, now in _listed(archive.root, changed)]
            _log.warning("%d shards were rewritten while they were read; reading them again", len(pending))
        num_processes = pool.num_processes
    recorder.finish()
    return num_processes


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
