"""`bertray score` end to end, Parquet to Parquet, beside the bare engine on the same texts and transformers.pipeline.

    python -m benchmarks.score
    python -m benchmarks.score --archive archive --bundle bundle --sample 300 --copies 1 --num-actors 2

Without options: the bundle of `make demo` on the pages of ../shared/data/bulk_cpp_docs, or on the demo's own archive.
`bertray score` gets every shard several times, under names of their own, so that start-up is a small part of the run;
texts are compared within a step only, so that no copy is saved. The bare engine is the bundle in this process, on texts
that are in memory, with as many threads as the actor has. It and the pipeline are measured before and after
`bertray score`, since a machine's speed drifts; the ratios are what counts.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import pipeline

from benchmarks.results import ROOT, SHARED_DATA, write_result
from bertray import Bundle
from bertray.scoring.score_shard import STEP_BYTES

PIPELINE_BATCH_SIZE = 32


def main() -> None:
    pages = SHARED_DATA / "bulk_cpp_docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, default=pages if pages.is_dir() else ROOT / "demo" / "archive")
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo" / "bundle")
    parser.add_argument("--sample", type=int, default=200, help="texts that the pipeline gets, each time")
    parser.add_argument("--share", type=float, default=0.3, help="of the archive that the bare engine gets, each time")
    parser.add_argument("--copies", type=int, default=2, help="of each shard that bertray score gets")
    parser.add_argument("--num-actors", type=int, default=None)
    options = parser.parse_args()
    for path in (options.archive, options.bundle):
        if not path.is_dir():
            sys.exit(f"{path} is missing: run make demo, or give --archive and --bundle")

    bundle = Bundle.load(str(options.bundle))
    texts = pa.concat_tables(
        [pq.read_table(shard, columns=["text"]) for shard in sorted(options.archive.rglob("*.parquet"))]
    )
    texts = texts["text"].combine_chunks()
    sample = random.Random(0).sample([text for text in texts.to_pylist() if text and text.strip()], options.sample)
    classify = pipeline("text-classification", model=str(options.bundle), device=bundle.encoder.device)
    classify(sample[:PIPELINE_BATCH_SIZE], truncation=True, max_length=bundle.info.max_length)  # warm up
    bundle.predict_column(texts[:64])

    before = [_run_pipeline(classify, sample, bundle), _run_engine(bundle, texts[: round(options.share * len(texts))])]
    score = _run_score(options)
    after = [_run_engine(bundle, texts[-round(options.share * len(texts)) :]), _run_pipeline(classify, sample, bundle)]
    peers = {"pipeline": [before[0], after[1]], "engine": [before[1], after[0]]}
    rates = {name: statistics.mean(found) for name, found in peers.items()}
    lines = ["| what | tokens/s | beside the pipeline | beside the bare engine |", "|---|---|---|---|"]
    for what, rate in (
        (f"transformers.pipeline, batch {PIPELINE_BATCH_SIZE}, fp32, {len(sample)} texts", rates["pipeline"]),
        (f"bare engine, {bundle.encoder.precision}", rates["engine"]),
        (f"jobs.score, {score['num_rows']} texts, start-up included", score["tokens_per_s"]),
    ):
        lines.append(f"| {what} | {rate:.0f} | {rate / rates['pipeline']:.2f} | {rate / rates['engine']:.2f} |")
    del score["output"]  # a temporary folder
    facts = {
        "encoder": bundle.info.encoder,
        "bundle_fingerprint": bundle.info.fingerprint(),
        "max_length": bundle.info.max_length,
        "archive": options.archive.name,
        "copies_of_each_shard": options.copies,
        "num_actors": options.num_actors,
        "share_of_the_bare_engine": options.share,
        "tokens_per_s_before_and_after": peers,
        "score": score,
    }
    write_result("score", options.archive.name, "\n".join(lines), facts)


def _run_pipeline(classify: Any, sample: list[str], bundle: Bundle) -> float:
    """Tokens a second."""
    num_tokens = bundle.tokenizer.encode(pa.array(sample)).num_tokens
    started_s = time.perf_counter()
    classify(sample, batch_size=PIPELINE_BATCH_SIZE, truncation=True, max_length=bundle.info.max_length)
    return num_tokens / (time.perf_counter() - started_s)


def _run_engine(bundle: Bundle, texts: pa.Array) -> float:
    """Tokens a second, in steps of as much text as an actor's."""
    step_rows = max(1, STEP_BYTES[bundle.encoder.device.type] * len(texts) // texts.nbytes)
    num_tokens = 0
    started_s = time.perf_counter()
    for start in range(0, len(texts), step_rows):
        num_tokens += sum(bundle.predict_column(texts[start : start + step_rows])["num_tokens"].to_pylist())
    return num_tokens / (time.perf_counter() - started_s)


def _run_score(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as folder:
        archive, output = Path(folder) / "archive", Path(folder) / "scored"
        for copy in range(options.copies):
            shutil.copytree(options.archive, archive / f"copy={copy}")
        command = [
            sys.executable,
            "-m",
            "jobs.score",
            "--bundle",
            options.bundle,
            "--input",
            archive,
            "--output",
            output,
            "--accept",  # other texts than the bundle was trained on: the gate would hold them back
        ]
        actors = ["--num-actors", str(options.num_actors)] if options.num_actors else []
        finished = subprocess.run(
            [*map(str, command), *actors],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    summary: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return summary


if __name__ == "__main__":
    main()
