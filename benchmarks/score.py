"""`jobs.score` end to end, beside transformers.pipeline on a sample of the same texts, in the same run.

    python -m benchmarks.score
    python -m benchmarks.score --archive archive --bundle bundle --sample 300

Without options: the bundle of `make demo` on the pages of ../shared/data/bulk_cpp_docs, or on the demo's own archive.
The pipeline is measured before and after `jobs.score`, since a machine's speed drifts; the ratio is what counts.
Prints a Markdown table and writes it, with hardware, versions and configuration, to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import pipeline

from bertray import Bundle
from bertray.versions import versions

ROOT = Path(__file__).parent.parent
PIPELINE_BATCH_SIZE = 32


def main() -> None:
    pages = ROOT.parent / "shared" / "data" / "bulk_cpp_docs"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, default=pages if pages.is_dir() else ROOT / "demo" / "archive")
    parser.add_argument("--bundle", type=Path, default=ROOT / "demo" / "bundle")
    parser.add_argument("--sample", type=int, default=200, help="texts that the pipeline gets, each time")
    parser.add_argument("--num-actors", type=int, default=None)
    options = parser.parse_args()
    for path in (options.archive, options.bundle):
        if not path.is_dir():
            sys.exit(f"{path} is missing: run make demo, or give --archive and --bundle")

    bundle = Bundle.load(str(options.bundle))
    sample = _sample(options.archive, options.sample)
    num_tokens = bundle.tokenizer.encode(pa.array(sample)).num_tokens
    classify = pipeline("text-classification", model=str(options.bundle), device=bundle.encoder.device)
    classify(sample[:PIPELINE_BATCH_SIZE], truncation=True, max_length=bundle.info.max_length)  # warm up

    def run_pipeline() -> float:
        started_s = time.perf_counter()
        classify(sample, batch_size=PIPELINE_BATCH_SIZE, truncation=True, max_length=bundle.info.max_length)
        return time.perf_counter() - started_s

    before_s = run_pipeline()
    score = _run_score(options)
    after_s = run_pipeline()
    wall_s = (before_s + after_s) / 2
    reference = {"rows_per_s": len(sample) / wall_s, "tokens_per_s": num_tokens / wall_s}
    table = _table(
        [
            (f"transformers.pipeline, batch {PIPELINE_BATCH_SIZE}, fp32, {len(sample)} texts", reference),
            (f"jobs.score, {bundle.encoder.precision}, {score['num_rows']} texts, start-up included", score),
        ]
    )
    print(table)
    del score["output"]  # a temporary folder
    _write(table, options, bundle, {"pipeline_wall_s": [before_s, after_s], "score": score})


def _sample(archive: Path, num_texts: int) -> list[str]:
    texts = [
        text
        for shard in sorted(archive.rglob("*.parquet"))
        for text in pq.ParquetFile(shard).read(["text"])["text"].to_pylist()
        if text and text.strip()
    ]
    return random.Random(0).sample(texts, min(num_texts, len(texts)))


def _run_score(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as output:
        command = [sys.executable, "-m", "jobs.score", "--bundle", options.bundle, "--input", options.archive]
        actors = ["--num-actors", str(options.num_actors)] if options.num_actors else []
        finished = subprocess.run(
            [*map(str, command), "--output", output, *actors], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
    summary: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return summary


def _table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    base = rows[0][1]["tokens_per_s"]
    lines = ["| what | texts/s | tokens/s | ratio |", "|---|---|---|---|"]
    for name, figures in rows:
        ratio = figures["tokens_per_s"] / base
        lines.append(f"| {name} | {figures['rows_per_s']:.1f} | {figures['tokens_per_s']:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def _write(table: str, options: argparse.Namespace, bundle: Bundle, details: dict[str, Any]) -> None:
    now = datetime.now(UTC)
    facts = {
        "date": now.isoformat(timespec="seconds"),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "encoder": bundle.info.encoder,
        "bundle_fingerprint": bundle.info.fingerprint(),
        "max_length": bundle.info.max_length,
        "archive": options.archive.name,
        "sample": options.sample,
        "num_actors": options.num_actors,
        **details,
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{now:%Y-%m-%dT%H%M}-score-{options.archive.name}.md"
    path.write_text(f"# benchmarks/score.py\n\n{table}\n\n```json\n{json.dumps(facts, indent=2)}\n```\n")
    print(f"written to {path.relative_to(ROOT)}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        flags = info.read_text()
        model = next((line.partition(":")[2].strip() for line in flags.splitlines() if "model name" in line), "")
        found = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
        return f"{model} ({', '.join(found) or 'no bf16'})"
    return platform.processor()


if __name__ == "__main__":
    main()
