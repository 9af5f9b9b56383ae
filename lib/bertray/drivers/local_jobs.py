"""The small jobs, which run in this process and need no Ray: prepare, adopt, predict, verify, report and demo.

Each imports what is slow to import itself: predict need not wait for scikit-learn, nor prepare for torch.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from bertray.bundle.info import read_info
from bertray.cli import EXIT_FAILED, EXIT_OK, JobResult, print_json
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.drivers.config import DemoConfig, PredictConfig, ReportConfig, VerifyConfig
from bertray.errors import RequestError
from bertray.reports.pages import add_page, make_page, page_of
from bertray.reports.terminal import print_dataset, print_look, print_problems, print_scoring
from bertray.storage.location import Location
from bertray.storage.lock import RunLock, new_run_id
from bertray.storage.outputs import BUNDLE_FILE, refuse_in_bundle
from bertray.training.config import AdoptConfig

_PREPARE_SUMMARY = ("num_rows_in", "num_rows_kept", "num_rows_out", "splits", "warnings")
# Lines of standard input that are classified together: enough for a batch, few enough for a pipe to see output soon.
_CHUNK = 256
_MAX_PROBLEMS = 100


def run_prepare(config: PrepareConfig) -> JobResult:
    """Prepare a data set and print its report."""
    from bertray.data.prepare import prepare

    prepared = prepare(config)
    print_dataset(prepared.report)
    summary = {key: prepared.report[key] for key in _PREPARE_SUMMARY}
    return JobResult({"output": config.output, "num_labels": len(prepared.report["labels"]), **summary})


def run_adopt(config: AdoptConfig) -> JobResult:
    """Make a bundle of a model that others have fine-tuned."""
    from bertray.model.files import check_files
    from bertray.model.outputs import outputs_of
    from bertray.model.sources import encoder_folder
    from bertray.training.preflight import refuse_meaningless

    started_s = time.monotonic()
    output = Location.of(config.output)

    def check_output() -> None:
        refuse_in_bundle(output)
        if output.exists() and (output.is_file() or not output.is_empty()):
            raise RequestError(f"--output {output} exists: choose another folder")

    check_output()
    dataset = Dataset.open(config.data) if config.data else None
    if (encoder_folder(config.model, "--model") / BUNDLE_FILE).is_file():
        raise RequestError(f"--model {config.model} is a bundle already: give it to bertray score --bundle")
    names, problem_type = outputs_of(config.model, check_files(config.model, "--model"), config.labels, dataset)
    refuse_meaningless(config, problem_type)
    from bertray.training.export import write_adopted

    with RunLock(output.parent() / f".{output.name}.adopting", new_run_id()).held() as lock:

        def finish(folder: Path) -> None:
            add_page(Location.of(str(folder)), place=output)
            lock.check()
            check_output()  # again: time has passed

        try:
            info = write_adopted(config, names, problem_type, dataset, output, finish)
        finally:
            lock.remove_output()
    shown = ("encoder", "encoder_commit", "problem_type", "labels", "max_length", "temperature", "review_below")
    summary: dict[str, Any] = {"output": config.output, **{name: getattr(info, name) for name in shown}}
    summary |= {"validation": info.metrics, "fingerprint": info.fingerprint()}
    return JobResult({**summary, "wall_s": round(time.monotonic() - started_s, 1)})


def run_predict(config: PredictConfig) -> JobResult:
    """Classify texts from the command line or standard input; print one JSON object per text."""
    read_info(Location.of(config.bundle))  # a missing bundle is refused before torch is imported
    from bertray.bundle.openvino import open_bundle

    bundle, _ = open_bundle(config.bundle, config.engine, config.precision)
    # Bytes: what is not UTF-8 is an error of its line, as in an archive.
    texts: Iterable[bytes] = map(os.fsencode, config.texts)
    is_typed = not config.texts and sys.stdin.isatty()
    if is_typed:
        print("type a text and Enter; Ctrl-D ends", file=sys.stderr)
    if not config.texts:
        texts = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    chunk_size = 1 if is_typed else _CHUNK
    rest = iter(texts)
    try:
        while chunk := list(islice(rest, chunk_size)):
            predictions = bundle.predict_column(pa.array(chunk, pa.large_binary())).to_pylist()
            for text, prediction in zip(chunk, predictions, strict=True):
                line = {"text": text.decode(errors="replace"), **prediction}
                print_json(line, sys.__stdout__)
    except BrokenPipeError:  # the reader has read enough
        pass
    return JobResult(None)


def run_verify(config: VerifyConfig) -> JobResult:
    """Check an output of bertray score; print what does not hold."""
    from bertray.scoring.verify import verify

    facts, problems = verify(Location.of(config.output), config.sample, repair=config.repair)
    print_scoring(facts, [], title="verify")
    if problems:
        print_problems(problems, is_repaired=config.repair)
    return JobResult({**facts, "problems": problems[:_MAX_PROBLEMS]}, EXIT_FAILED if problems else EXIT_OK)


def run_report(config: ReportConfig) -> JobResult:
    """Make the pages of outputs."""
    places = [Location.of(path) for path in config.paths]
    return JobResult({"pages": [str(make_page(place, config.page_texts)) for place in places]})


def run_demo(config: DemoConfig) -> JobResult:
    """Write a corpus and run other jobs on it, each as a command that a person could type."""
    from bertray.data.synthetic import write_corpus
    from bertray.model.sources import encoder_folder

    encoder_folder(config.encoder)  # a missing one is refused before anything is written
    refuse_in_bundle(Location.of(config.output))
    folder = Path(config.output)
    labelled = str(write_corpus(folder, config.num_labelled, config.num_archive))
    names = ("archive", "dataset", "bundle", "evaluation", "scored")
    archive, dataset, bundle, evaluation, scored = places = [str(folder / name) for name in names]
    # Many rows to measure on, or chance hides a lead. Without Ray, which takes longer to start than it would save.
    splits = "--group-column document_id --test-fraction 0.4 --overwrite"
    training = f"--num-workers 0 --epochs {config.epochs} --learning-rate {config.learning_rate} --overwrite"
    steps = [
        ["prepare", "--input", labelled, "--output", dataset, *splits.split()],
        ["train", "--data", dataset, "--output", bundle, "--encoder", config.encoder, *training.split()],
        ["evaluate", "--bundle", bundle, "--data", dataset, "--output", evaluation, "--overwrite"],
        ["score", "--bundle", bundle, "--input", archive, "--output", scored, "--keep-columns", "document_id"],
    ]
    for words in steps:
        print(f"\n$ bertray {shlex.join(words)}", flush=True)
        # The job's summary goes to stderr: stdout is for the demo's own.
        command = [sys.executable, "-P", "-m", "bertray", *words]
        exit_code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
        if exit_code != EXIT_OK:
            return JobResult({"failed": f"bertray {words[0]}", "exit_code": exit_code}, exit_code)
    print_look(Path(archive), Path(scored) / "predictions")
    pages = {"bundle page": bundle, "evaluation page": evaluation, "scored page": scored}
    summary = {"labelled": labelled, **dict(zip(names, places, strict=True))}
    summary |= {name: str(page_of(Location.of(place))) for name, place in pages.items()}
    print("where everything lies (open the pages in a browser):")
    for name, place in summary.items():
        print(f"  {name:<16} {place}")
    print("next: notebooks/ (make notebooks), then your own data (README.md)")
    print("a classifier that you already have: bertray adopt --model MODEL --output BUNDLE")
    return JobResult(summary)
