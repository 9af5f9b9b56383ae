"""Classify a few texts with a bundle: one JSON object a text on stdout.

python -m jobs.predict --bundle bundle "B.Sc. in Physics, 2014" "Python, SQL, Spark"
python -m jobs.predict --bundle bundle < texts.txt | jq -r .label
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from bertray.cli import Outcome, leave, run_job
from bertray.drivers.config import PredictConfig

# Lines of standard input classified at a time: enough to batch, few enough that a pipe sees output soon.
_CHUNK = 256


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(PredictConfig, _run, argv, __doc__ or "")


def _run(config: PredictConfig) -> Outcome:
    import pyarrow as pa

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
    return Outcome(None)


def _chunks(texts: Iterable[bytes], num_texts: int) -> Iterator[list[bytes]]:
    rest = iter(texts)
    while chunk := list(islice(rest, num_texts)):
        yield chunk


if __name__ == "__main__":
    leave(main())
