"""Scoring without Ray and without a model: the pool of one process, with a stub in the place of its model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa

from bertray.drivers.score import OpenPool
from bertray.schema import PREDICTION_SCHEMA
from bertray.scoring.pool import LocalPool
from bertray.scoring.score_unit import Request
from bertray.storage.location import FileInfo


class Stub:
    """Says of every text its first letter, and of an empty one an error."""

    precision = "none"
    schema = PREDICTION_SCHEMA

    def predict_column(self, texts: pa.Array) -> pa.Table:
        return pa.Table.from_pylist([_predicted(text) for text in texts.to_pylist()], schema=PREDICTION_SCHEMA)


def _predicted(text: bytes | None) -> dict[str, Any]:
    if not text:
        return {
            "label": None,
            "score": None,
            "review": True,
            "num_tokens": 0,
            "truncated": False,
            "error": "text is empty",
        }
    return {
        "label": text[:1].decode(),
        "score": 1 / (1 + len(text) % 7),
        "review": False,
        "num_tokens": len(text),
        "truncated": False,
        "error": None,
    }


def stub_pool(unit_bytes: int = 2 << 20) -> OpenPool:
    """For `score(config, open_pool=…)`; shards of three times so many bytes are cut, and read in small steps."""

    @contextmanager
    def open_pool(request: Request, _: list[FileInfo]) -> Iterator[LocalPool]:
        pool = LocalPool(replace(request, step_bytes=300), Stub())
        pool.unit_bytes = unit_bytes
        yield pool

    return open_pool
