"""A thousand times kill -9 during `bertray score`, in portions; every output must come out as if nothing had happened.

    python -m benchmarks.kills --local 100
    python -m benchmarks.kills --ray 20

A portion goes on where the newest file `results/*-kills-thousand.md` ends, with another seed, and appends a line:

1. undisturbed   two requests, with and without the texts among the kept columns: their predictions and their time
2. disturb       run a request and kill at a moment that is uniform over that time: with the local pool the driver, or
                 once a run its model's process; with Ray the driver, or several actors of a run that goes on
3. compare       after some kills the request runs to its end: the same bytes, nothing staged or half-written, verified
4. go on         with the other request in the same output, which scores all again; then with a new output

The model has two tiny layers. The first difference ends the script, and the folder with the output is kept.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.chaos import Stage, at_work, check, clean, finish, predictions, same, say, start
from benchmarks.results import ROOT, write_result
from benchmarks.tiny import tiny_bundle, word_archive

# Rows by shard: most share units, the last ones are cut into parts.
SHARDS = [*[10] * 100, *[500] * 4, 5500]
KILLS_A_ROUND = 8  # until a request is let go to its end
COLUMNS = ["date", "portion", "of what", "state of the output", "runs to their end", "seed", "s", "total"]
PHASES = ("start", "scoring", "publishing", "tidying up")


@dataclass(frozen=True)
class Request:
    """A command, beside what it gives undisturbed."""

    stage: Stage
    options: tuple[str, ...]
    environment: dict[str, str]

    def command(self, output: Path) -> list[str]:
        return [*self.stage.command(output), *self.options, "--rescore"]

    def finish(self, output: Path) -> None:
        finish(self.command(output), self.environment)

    def undisturbed(self, output: Path) -> Request:
        """The request, measured."""
        started_s = time.monotonic()
        self.finish(output)
        stage = replace(self.stage, wall_s=time.monotonic() - started_s, undisturbed=predictions(output))
        return replace(self, stage=stage)


def _model_of(job: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job.pid).children():
            if "bertray.bundle.isolated" in process.cmdline():
                yield process


@contextmanager
def _cluster() -> Iterator[dict[str, str]]:
    """One for all runs of a portion, as to start Ray takes longer than to score. Actors may outlive their driver."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 2, "object_store_memory": 150_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        yield {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()


def _actors_of(_: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    return (process for process, name in at_work(os.getpid()) if "ScoringActor" in name)


class Pool(NamedTuple):
    """What is killed beside the driver, how often in one run, and in which share of the moments."""

    name: str
    options: tuple[str, ...]
    cluster: Callable[[], AbstractContextManager[dict[str, str]]]
    shards: list[int]
    victim: str
    victims: Callable[[subprocess.Popen[bytes]], Iterator[psutil.Process]]
    # A model's process that dies twice over the same texts condemns them; an actor's units are tried again ten times.
    most: int
    share: float
    share_begun: float  # of the runs in which nothing is killed before a file is staged; Ray's start takes long
    may_fail: bool  # a model's process that dies before it has read any text ends the run, which says so


POOLS = (
    Pool(
        "local",
        ("--num-actors", "0"),
        partial(nullcontext, {}),
        SHARDS,
        "model",
        _model_of,
        most=1,
        share=0.3,
        share_begun=0.0,
        may_fail=True,
    ),
    Pool(
        "ray",
        (),
        _cluster,
        [*SHARDS, *[5500] * 6],
        "actor",
        _actors_of,
        most=6,
        share=0.9,
        share_begun=0.7,
        may_fail=False,
    ),
)


class Portion:
    """Kills of one pool; counts them."""

    def __init__(self, pool: Pool, folder: Path, num_kills: int, seed: int) -> None:
        self._pool, self._folder, self._num_kills = pool, folder, num_kills
        self._chance = random.Random(seed)
        self.killed, self.phases = Counter[str](), Counter[str]()
        self.num_ended = self.num_failed = 0
        self._wall_s = 0.0

    def run(self) -> None:
        """Kill until the portion is done; its last request has come to its end then."""
        with self._pool.cluster() as environment:
            self._run(environment)

    def _run(self, environment: dict[str, str]) -> None:
        bundle, archive = (
            tiny_bundle(self._folder / "bundle"),
            word_archive(self._folder / "archive", self._pool.shards),
        )
        stage = Stage(self._folder, bundle, archive, {}, 0, 0, self._chance)
        requests = [
            Request(stage, (*self._pool.options, *options), environment).undisturbed(
                self._folder / f"undisturbed-{number}"
            )
            for number, options in enumerate([(), ("--keep-columns", "text")])
        ]
        self._wall_s = min(request.stage.wall_s for request in requests)  # the other one had to wait for the machine
        say(f"undisturbed: {self._wall_s:.1f} s")
        output = self._folder / "output"
        number = 0
        while self.killed.total() < self._num_kills:
            self._round(requests[number % 2], output)
            say(f"{self.killed.total()} kills, {self.num_ended} requests came to their end")
            number += 1
            if number % 2 == 0:
                shutil.rmtree(output)

    def _round(self, request: Request, output: Path) -> None:
        until = min(self._num_kills, self.killed.total() + KILLS_A_ROUND)
        while self.killed.total() < until and not self._disturbed(request, output):
            pass
        request.finish(output)  # nothing to do if the disturbed run has come to its end
        self.num_ended += 1
        same(request.stage, predictions(output))
        clean(output)

    def _disturbed(self, request: Request, output: Path) -> bool:
        """Run once, and kill; whether the run came to its end all the same."""
        began_s, num_victims = time.time(), 0
        job = start(request.command(output), request.environment)
        if self._chance.random() < self._pool.share_begun:
            while job.poll() is None and _phase(output, began_s) == "start":
                time.sleep(0.05)
        while True:
            try:
                # After the first kill sooner: one run takes several.
                code = job.wait(self._chance.uniform(0, self._wall_s / (3 if num_victims else 1)))
                break
            except subprocess.TimeoutExpired:
                phase = _phase(output, began_s)
            victims = list(self._pool.victims(job)) if num_victims < self._pool.most else []
            self.phases[phase] += 1
            if victims and self._chance.random() < self._pool.share:
                self._chance.choice(victims).kill()
                self.killed[self._pool.victim] += 1
                num_victims += 1
            else:
                job.kill()
                job.wait()
                self.killed["driver"] += 1
                return False
        self.num_failed += code != 0
        check(code == 0 or (num_victims > 0 and self._pool.may_fail), f"a run ended with {code}")
        return code == 0


def _phase(output: Path, began_s: float) -> str:
    """How far a run has come, judged by the files in its output. Files of earlier runs count too."""
    if (output / "publishing").exists():
        return "publishing"
    if any((output / "staging").rglob("*.parquet")):
        return "scoring"
    latest = output / "runs" / "latest.json"
    return "tidying up" if latest.exists() and latest.stat().st_mtime > began_s else "start"


def _results() -> Path:
    """The newest file of results; a new one if there is none."""
    found = sorted((ROOT / "benchmarks" / "results").glob("*-kills-thousand.md"))
    return found[-1] if found else write_result("kills", "thousand", __doc__.partition("\n")[0], {})


def _append(path: Path, pool: Pool, portion: Portion, seed: int, wall_s: float) -> None:
    """Write a portion's line, with the totals of all lines."""
    lines = [line.split("|") for line in path.read_text().splitlines() if line.startswith("| 2")]
    totals = Counter({pool.name: portion.killed.total()})
    for line in lines:
        name, num_kills = line[2].split()
        totals[name] += int(num_kills)
    cells = [
        f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        f"{pool.name} {portion.killed.total()}",
        ", ".join(f"{count} x {what}" for what, count in sorted(portion.killed.items())),
        ", ".join(f"{what} {portion.phases[what]}" for what in PHASES),
        f"{portion.num_ended}, same bytes"
        + f"; {portion.num_failed} failed with their model" * bool(portion.num_failed),
        str(seed),
        f"{wall_s:.0f}",
        ", ".join(f"{name} {count}" for name, count in sorted(totals.items())),
    ]
    head = [] if lines else [f"\n| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    with path.open("a") as file:
        file.writelines(f"{line}\n" for line in [*head, f"| {' | '.join(cells)} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for pool in POOLS:
        parser.add_argument(f"--{pool.name}", type=int, default=0, help="number of kills")
    wanted = vars(parser.parse_args())
    # Beside other work, threads that spin make a run 4 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for pool in POOLS:
        if not wanted[pool.name]:
            continue
        path, started_s = _results(), time.monotonic()
        seed = sum(line.startswith("| 2") for line in path.read_text().splitlines())
        folder = Path(tempfile.mkdtemp(prefix="bertray-kills-"))
        portion = Portion(pool, folder, wanted[pool.name], seed)
        try:
            portion.run()
        except BaseException:
            say(f"{pool.name}, seed {seed}, after {portion.killed.total()} kills; the output is kept in {folder}")
            raise
        shutil.rmtree(folder)
        _append(path, pool, portion, seed, time.monotonic() - started_s)
        say(path.read_text().splitlines()[-1])


if __name__ == "__main__":
    main()
