"""What a GPU is asked in its first eight minutes: is it right, how fast is it, what brings more.

    benchmarks/gpu.sh
    benchmarks/gpu.sh --quick --output FOLDER
    benchmarks/gpu.sh --device cpu            a try of all parts with tiny shapes, in a minute; no figure of it counts

Parts run in order of their value, each in a process of its own, and each writes FOLDER/PART.json after every check or
figure: a machine that is taken away costs what is not done yet, a part that hangs or fails costs itself. What a part
needs that is not installed is said at the start. Nothing but torch (from 2.11), transformers, numpy and pyarrow is
needed by most.

What of the library CUDA alone reaches, and the part that runs it:

    model/attention.py     _on_cuda, has_kernel, kernel_works                             attention, logits, training
    model/runtime.py       put (pinned copies), resolve_device, resolve_precision         logits, training
                           is_out_of_memory                                               logits, training
    model/encoder.py       run_batches where memory is short                              logits
    training/loop.py       fit_into_memory; validation where memory is short              training
    training/optimizer.py  AdamW on the device, gradients in two precisions               training, trainer
    training/learner.py    largest_part, torch's own dropout, kernel's gradients          training, trainer
    bundle/guard.py        fp16 where there is no bf16: its arithmetic by                 logits, levers

Not run, for they need Ray, several GPUs or a bundle: gradients over NCCL (training/learner.py), the
device of actors and workers (drivers/), the device of a child process (bundle/isolated.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # whoever asks for a GPU must not begin to use it: see fork

import transformers  # before any part, so that all share its import  # noqa: F401

from benchmarks.gpu import correct, speed
from benchmarks.gpu.part import Part, Size
from benchmarks.gpu.stand_in import standing_in
from bertray.versions import versions


class Spec(NamedTuple):
    """A part of the run, and at most so many seconds of it: in all, and with --quick."""

    run: Callable[[Part], None]
    at_most_s: float
    quick_s: float
    needs: tuple[str, ...] = ()


TRAINING = ("pydantic", "psutil", "fsspec", "botocore")
PARTS = {
    "machine": Spec(speed.machine, 30, 20),
    "attention": Spec(correct.attention, 60, 30),
    "logits": Spec(correct.logits, 60, 30),
    "engine": Spec(speed.engine, 120, 50),
    "training": Spec(correct.training, 70, 40, TRAINING),
    "trainer": Spec(speed.trainer, 70, 30, (*TRAINING, "accelerate")),
    "levers": Spec(speed.levers, 80, 30),
}
ALL_S, QUICK_S = 465, 165


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/TIME-gpu")
    options = parser.parse_args()
    deadline_s = time.monotonic() + (QUICK_S if options.quick else ALL_S)
    now = datetime.now(UTC)
    output = options.output or Path("benchmarks/results") / f"{now:%Y-%m-%dT%H%M}-gpu"
    output.mkdir(parents=True, exist_ok=True)
    missing = {name: [package for package in PARTS[name].needs if not find_spec(package)] for name in options.only}
    print(f"{now:%Y-%m-%d %H:%M}, {json.dumps(versions())}", flush=True)
    for name, packages in missing.items():
        if packages:
            print(f"{name} is left out: pip install {' '.join(packages)}", flush=True)
    size = Size.of(options.device, is_quick=options.quick)
    counts: dict[str, int] = {}
    for name in options.only:
        if missing[name]:
            continue
        spec = PARTS[name]
        left_s = min(spec.quick_s if options.quick else spec.at_most_s, deadline_s - time.monotonic())
        if left_s < 5:
            why = "--quick" if options.quick and not spec.quick_s else "time is up"
            print(f"{name} is left out: {why}", flush=True)
            counts["left out"] = counts.get("left out", 0) + 1
            continue
        part = Part(name, output / f"{name}.json", options.device, size)
        for result, number in run_alone(part, spec.run, left_s).items():
            counts[result] = counts.get(result, 0) + number
    print(f"{', '.join(f'{number} {result}' for result, number in counts.items())}; written to {output}")
    sys.exit(1 if counts.get("failed") else 0)


def run_alone(part: Part, run: Callable[[Part], None], limit_s: float) -> dict[str, int]:
    """Run a part in a process of its own; how many of its checks passed, failed, …"""
    started_s = time.monotonic()
    print(f"\n== {part.name}, at most {limit_s:.0f} s", flush=True)
    part.file.unlink(missing_ok=True)
    # A copy of this process, which has imported all and not yet looked at the GPU.
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(part, run))
    process.start()
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
        part.read()
        part.say(f"the part as a whole: no end after {limit_s:.0f} s", "failed")
    elif process.exitcode:
        part.read()
        part.say(f"the part as a whole: exit code {process.exitcode}", "failed")
    part.read()
    print(f"-- {part.name}: {time.monotonic() - started_s:.1f} s", flush=True)
    return part.counts()


def _begin(part: Part, run: Callable[[Part], None]) -> None:
    if part.device == "cpu":
        for one in standing_in():
            one.start()
    run(part)


if __name__ == "__main__":
    main()
