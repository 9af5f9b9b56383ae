"""Classify a few texts with a bundle: one JSON object a text on stdout.

python -m jobs.predict --bundle bundle "B.Sc. in Physics, 2014" "Python, SQL, Spark"
python -m jobs.predict --bundle bundle < texts.txt | jq -r .label
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from bertray.cli import Outcome, run_job
from bertray.config import PredictConfig

# Lines of standard input classified at a time: enough to batch, few enough that a pipe sees output soon.
_CHUNK = 256


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(PredictConfig, _run, argv, __doc__ or "")


def _run(config: PredictConfig) -> Outcome:
    from bertray.bundle import Bundle

    bundle = Bundle.load(config.bundle, config.precision)
    lines = (line.rstrip("\r\n") for line in sys.stdin)
    for texts in _chunks(config.texts or lines):
        for text, prediction in zip(texts, bundle.predict(texts), strict=True):
            line = json.dumps({"text": text, **prediction._asdict()}, ensure_ascii=False)
            print(line, file=sys.__stdout__, flush=True)
    return Outcome(None)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


if __name__ == "__main__":
    sys.exit(main())
