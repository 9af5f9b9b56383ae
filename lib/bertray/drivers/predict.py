"""A few texts from the command line or standard input: the driver of bertray predict."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa

from bertray.bundle.info import read_info
from bertray.cli import JobResult
from bertray.drivers.config import PredictConfig
from bertray.storage.location import Location

# Lines of standard input classified at a time: enough to batch, few enough that a pipe sees output soon.
_CHUNK = 256


def run(config: PredictConfig) -> JobResult:
    """The job of the command line."""
    read_info(Location.of(config.bundle))  # a place without a bundle is refused before torch is imported
    from bertray.bundle.openvino import open_bundle

    bundle, _ = open_bundle(config.bundle, config.engine, config.precision)
    # Bytes: what is not UTF-8 is an error of its line, as in an archive.
    texts: Iterable[bytes] = map(os.fsencode, config.texts)
    num_together = _CHUNK
    if not config.texts:
        texts = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
        num_together = 1 if sys.stdin.isatty() else _CHUNK
    try:
        for chunk in _chunks(texts, num_together):
            predictions = bundle.predict_column(pa.array(chunk, pa.large_binary())).to_pylist()
            for text, prediction in zip(chunk, predictions, strict=True):
                line = {"text": text.decode(errors="replace"), **prediction}
                print(json.dumps(line, ensure_ascii=False), file=sys.__stdout__, flush=True)
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return JobResult(None)


def _chunks(texts: Iterable[bytes], num_texts: int) -> Iterator[list[bytes]]:
    rest = iter(texts)
    while chunk := list(islice(rest, num_texts)):
        yield chunk
