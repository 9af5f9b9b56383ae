"""Memory of `bertray score`: the driver and a model actor over 10,000 and over 1,000,000 rows.

    python -m benchmarks.memory
    python -m benchmarks.memory --rows 10000 100000

A model of two tiny layers stands in for a real one: it is rows that are counted here, not tokens a second. The texts
are random words, some 450 bytes each, so that 10,000 rows are several steps of an actor and no text comes twice. What
is reported is the peak of each process's resident memory, read from the system while the job runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.results import ROOT, write_result
from benchmarks.tiny import WORDS_A_TEXT, tiny_bundle, word_archive

ROWS_A_SHARD = 250_000
POLL_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    options = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as folder:
        bundle = tiny_bundle(Path(folder) / "bundle")
        for num_rows in options.rows:
            sizes = [min(ROWS_A_SHARD, num_rows - start) for start in range(0, num_rows, ROWS_A_SHARD)]
            archive = word_archive(Path(folder) / f"archive-{num_rows}", sizes)
            runs[num_rows] = _score(bundle, archive, Path(folder) / f"scored-{num_rows}")
    first = runs[options.rows[0]]
    lines = ["| rows | driver, MiB | model actor, MiB | wall, s | driver / first | actor / first |", "|---" * 6 + "|"]
    for num_rows, run in runs.items():
        lines.append(
            f"| {num_rows} | {run['driver_mib']:.0f} | {run['actor_mib']:.0f} | {run['wall_s']:.0f} "
            f"| {run['driver_mib'] / first['driver_mib']:.2f} | {run['actor_mib'] / first['actor_mib']:.2f} |"
        )
    write_result(
        "memory", "rows", "\n".join(lines), {"rows_a_shard": ROWS_A_SHARD, "words_a_text": WORDS_A_TEXT, "runs": runs}
    )


def _score(bundle: Path, archive: Path, output: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.score", "--bundle", bundle, "--input", archive, "--output", output]
    arguments = [*map(str, command), "--num-actors", "1", "--device", "cpu"]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        driver = psutil.Process(job.pid)
        peaks = {"driver": 0, "actor": 0}
        while job.poll() is None:
            _note_peaks(driver, peaks)
            time.sleep(POLL_S)
        assert job.stdout is not None
        summary = json.loads(job.stdout.read().splitlines()[-1])
    if job.returncode or not peaks["actor"]:
        sys.exit(f"jobs.score ended with {job.returncode}; peaks seen: {peaks}")
    return {"driver_mib": peaks["driver"] / 2**20, "actor_mib": peaks["actor"] / 2**20, "wall_s": summary["wall_s"]}


def _note_peaks(driver: psutil.Process, peaks: dict[str, int]) -> None:
    try:
        peaks["driver"] = max(peaks["driver"], _own_bytes(driver))
        for process in driver.children(recursive=True):
            if "ScoringActor" in " ".join(process.cmdline()):
                peaks["actor"] = max(peaks["actor"], _own_bytes(process))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return  # it ended between being listed and being looked at


def _own_bytes(process: psutil.Process) -> int:
    """Resident memory without what is shared with others: Ray's object store is counted in every process."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


if __name__ == "__main__":
    main()
