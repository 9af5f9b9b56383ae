"""bertray predict: classify a few texts from the command line or standard input."""

import json
import os
import sys
from collections.abc import Iterable
from itertools import islice

import pyarrow as pa

from bertray.bundle.info import read_info
from bertray.cli import JobResult
from bertray.drivers.config import PredictConfig
from bertray.storage.location import Location

# Lines of standard input that are classified together: enough for a batch, few enough for a pipe to see output soon.
_CHUNK = 256


def run(config: PredictConfig) -> JobResult:
    """The job of the command line."""
    read_info(Location.of(config.bundle))  # a missing bundle is refused before torch is imported
    from bertray.bundle.openvino import open_bundle

    bundle, _ = open_bundle(config.bundle, config.engine, config.precision)
    # Bytes: what is not UTF-8 is an error of its line, as in an archive.
    texts: Iterable[bytes] = map(os.fsencode, config.texts)
    if not config.texts:
        texts = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
    chunk_size = 1 if not config.texts and sys.stdin.isatty() else _CHUNK
    rest = iter(texts)
    try:
        while chunk := list(islice(rest, chunk_size)):
            predictions = bundle.predict_column(pa.array(chunk, pa.large_binary())).to_pylist()
            for text, prediction in zip(chunk, predictions, strict=True):
                line = {"text": text.decode(errors="replace"), **prediction}
                print(json.dumps(line, ensure_ascii=False), file=sys.__stdout__, flush=True)
    except BrokenPipeError:  # the reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return JobResult(None)
