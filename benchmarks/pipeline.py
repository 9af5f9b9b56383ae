"""How much of the time the model of one actor is at work: shards one after the other, and in the pipeline.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --units 4

Reading, tokenizing, writing and committing are real. In the place of the model stands one that takes as long as
BERT-base would on a GPU at 3.4 million tokens a second: for each batch it sleeps 85 % of the time, as a host does while
the GPU computes, and spins in Python for 15 % of it, as a host does while it launches kernels. A unit is a shard of one
step of a GPU (64 MiB of text). Each run is a process of its own, with as many cores as its column says; a spare core
is one beside that of the model's thread.

busy: what the model needed for the tokens, of the time from the first unit's start to the last one's end. The other
lines are seconds of all threads in a second of that time: waiting for the model's turn counts as the model's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import ROOT, write_result
from benchmarks.scale_data import linked_archive
from benchmarks.tiny import tiny_bundle
from bertray import Bundle
from bertray.model.runtime import ModelThread
from bertray.scoring import score_shard
from bertray.scoring.config import ScoreConfig
from bertray.scoring.pipeline import Pipeline
from bertray.scoring.score_shard import STEP_BYTES
from bertray.scoring.score_unit import Request, UnitScorer
from bertray.scoring.units import Unit
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import TokenColumn

TOKENS_A_S, BATCH_TOKENS, SPINS = 3_400_000, 65_536, 0.15
ROWS_A_SHARD = 148_000  # some 64 MiB of text
NUM_UNITS, NUM_ROUNDS = 26, 1
STAGES = ("reading", "tokenizing", "the model", "writing")


class SlowEncoder:
    """Takes the time of a model, and gives every sequence the same logits."""

    precision = "none"

    def __init__(self, num_labels: int) -> None:
        self._num_labels = num_labels
        self.needed_s = 0.0

    def logits(self, tokens: TokenColumn) -> np.ndarray:
        for _ in range(max(1, tokens.num_tokens // BATCH_TOKENS)):
            batch_s = min(BATCH_TOKENS, tokens.num_tokens) / TOKENS_A_S
            time.sleep((1 - SPINS) * batch_s)
            began_s = time.thread_time()
            while time.thread_time() - began_s < SPINS * batch_s:
                pass
            self.needed_s += batch_s
        return np.zeros((len(tokens.lengths_S), self._num_labels), dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=NUM_UNITS)
    parser.add_argument(
        "--one", nargs=5, metavar=("HOW", "BUNDLE", "ARCHIVE", "OUTPUT", "CORES"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(*options.one)))
        return
    cores = sorted(os.sched_getaffinity(0))
    ways = [(how, spare) for spare in (0, min(4, len(cores) - 1)) for how in ("one after the other", "pipeline")]
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as name:
        folder = Path(name)
        bundle = tiny_bundle(folder / "bundle")
        archive = linked_archive(folder / "archive", options.units, ROWS_A_SHARD)
        found = {}
        for number, (how, spare) in enumerate(ways):
            some = ",".join(map(str, cores[: spare + 1]))
            arguments = ["--one", how, str(bundle), str(archive), str(folder / f"scored-{number}"), some]
            command = [sys.executable, "-m", "benchmarks.pipeline", *arguments]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            found[f"{how}, {spare} spare"] = json.loads(done.stdout.splitlines()[-1])
            print(how, spare, done.stdout.splitlines()[-1], file=sys.stderr)

    def line(what: str, form: str) -> str:
        return f"| {what} | {' | '.join(format(one[what], form) for one in found.values())} |"

    head = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    lines = [*head, line("wall_s", ".1f"), line("busy", ".1%"), *(line(stage, ".2f") for stage in STAGES)]
    write_result("pipeline", "busy", "\n".join(lines), {"units": options.units, "runs": found})


def _one(how: str, bundle_uri: str, archive: str, output: str, cores: str) -> dict[str, Any]:
    os.sched_setaffinity(0, map(int, cores.split(",")))
    bundle = Bundle.load(bundle_uri, "fp32", "cpu")
    encoder = SlowEncoder(len(bundle.labels))
    bundle.encoder = encoder  # type: ignore[assignment]
    spent = _timed(bundle)
    config = ScoreConfig(bundle=bundle_uri, input=archive, output=output)
    scorer = UnitScorer(Request(config, archive, "request", "bundle", 0, STEP_BYTES["cuda"]))
    units = [Unit(shards=(shard,)) for shard in Location.of(archive).files((".parquet",))]
    began_s = time.monotonic()
    if how == "pipeline":
        bundle.model_thread = ModelThread()
        with Pipeline(scorer, bundle, STEP_BYTES["cuda"]) as line:
            outcomes = [outcome for waiting in [line.submit(unit) for unit in units] for outcome in waiting.result()]
    else:
        outcomes = [outcome for unit in units for outcome in scorer.score(unit, bundle)]
    wall_s = time.monotonic() - began_s
    failures = [one.failure for one in outcomes if one.failure]
    assert len(outcomes) == len(units) and not failures, failures
    spent["writing"] = spent.pop("all") - sum(spent.values())
    return {"wall_s": wall_s, "busy": encoder.needed_s / wall_s, **{what: s / wall_s for what, s in spent.items()}}


def _timed(bundle: Bundle) -> Counter[str]:
    """Seconds of all threads by stage; `all`: in a shard from its opening to its staged file."""
    spent, lock = Counter[str](), threading.Lock()

    def timed(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def measured(*args: Any, **kwargs: Any) -> Any:
            began_s = time.monotonic()
            try:
                return call(*args, **kwargs)
            finally:
                with lock:
                    spent[what] += time.monotonic() - began_s

        return measured

    def timed_steps(*args: Any) -> Any:
        found = steps(*args)
        while (step := timed("reading", lambda: next(found, None))()) is not None:
            yield step

    steps = score_shard.steps
    score_shard.steps = timed_steps  # type: ignore[assignment]
    bundle.tokenize = timed("tokenizing", bundle.tokenize)  # type: ignore[method-assign]
    bundle.answer_tokens = timed("the model", bundle.answer_tokens)  # type: ignore[method-assign]
    UnitScorer._scored = timed("all", UnitScorer._scored)  # type: ignore[method-assign]
    return spent


if __name__ == "__main__":
    main()
