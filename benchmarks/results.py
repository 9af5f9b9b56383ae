"""What all benchmarks share: interleaved runs, and dated result files with hardware and versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bertray.versions import versions

ROOT = Path(__file__).parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def interleaved(runs: dict[str, Callable[[], object]], num_repeats: int) -> dict[str, float]:
    """Seconds of every run: the median of `num_repeats` rounds in which each has its turn, for machines drift."""
    walls_s: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(num_repeats):
        for name, run in runs.items():
            started_s = time.perf_counter()
            run()
            walls_s[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(walls) for name, walls in walls_s.items()}


def write_result(benchmark: str, subject: str, text: str, facts: dict[str, Any]) -> Path:
    """Print a result and write it to a dated file, with what it depends on."""
    print(text)
    now = datetime.now(UTC)
    facts = {
        "date": now.isoformat(timespec="seconds"),
        "processor": processor(),
        "num_cpus": os.cpu_count(),
        "gpu": _gpu(),
        "versions": versions(),
        **facts,
    }
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{now:%Y-%m-%dT%H%M}-{benchmark}-{subject}.md"
    path.write_text(f"# benchmarks/{benchmark}.py\n\n{text}\n\n```json\n{json.dumps(facts, indent=2)}\n```\n")
    print(f"written to {path.relative_to(ROOT)}")
    return path


def processor() -> str:
    """Its name, and the instructions that matter for bf16."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        flags = info.read_text()
        model = next((line.partition(":")[2].strip() for line in flags.splitlines() if "model name" in line), "")
        found = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_vnni") if flag in flags]
        return f"{model} ({', '.join(found) or 'no bf16'})"
    return platform.processor()


def _gpu() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
