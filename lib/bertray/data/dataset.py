"""A labelled data set: written by bertray prepare, read by training and evaluation.

    dataset/
      train.parquet, validation.parquet, test.parquet   rows, in `schema.DATASET_SCHEMA` or `MULTI_LABEL_SCHEMA`
      labels.json                                       labels, by id
      report.json                                       what was read, kept and taken out; written last

Legend: N rows, C classes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.tasks.task import TASKS
from bertray.types import UNNAMED_PROBLEM_TYPE, ProblemType

LABELS_FILE, REPORT_FILE = "labels.json", "report.json"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set in storage; a split is read when it is asked for."""

    location: Location
    labels: tuple[str, ...]  # by id
    problem_type: ProblemType
    oos_label: str | None  # the label of texts that fit no class; one of `labels` if training rows have it

    @classmethod
    def open(cls, uri: str) -> Dataset:
        """Open a folder that bertray prepare wrote.

        Raises:
            RequestError: the folder is not a data set, or not a finished one.
        """
        location = Location.of(uri)
        if not (location / REPORT_FILE).exists():
            what, files, output = f"no finished data set: it has no {REPORT_FILE}", "FILES", uri
            if location.is_file():
                what, files, output = "a file, not a data set", uri, "DATASET"
            raise RequestError(f"{location} is {what}. Make one with bertray prepare --input {files} --output {output}")
        report = json.loads((location / REPORT_FILE).read_bytes())
        return cls(
            location,
            tuple(json.loads((location / LABELS_FILE).read_bytes())),
            # Older data sets do not have these two.
            report.get("problem_type", UNNAMED_PROBLEM_TYPE),
            report.get("oos_label"),
        )

    def split(self, name: str) -> pa.Table:
        """The rows of one split; validation and test may have rows out of scope (see `in_scope`)."""
        with (self.location / f"{name}.parquet").open() as file:
            return pq.ParquetFile(file).read(use_threads=False)

    def in_scope(self, rows: pa.Table) -> pa.Table:
        """The rows that have a class, without label id `schema.NO_CLASS`; with several labels a row, all rows."""
        return rows.filter(pa.array(TASKS[self.problem_type].is_in_scope(rows)))

    def targets(self, rows: pa.Table) -> np.ndarray:
        """What a model should predict for rows of this data set.

        Label ids (int64 [N]), `NO_CLASS` for rows out of scope; with several labels a row multi-hot (float32 [N, C]).
        """
        return TASKS[self.problem_type].targets(rows, len(self.labels))

    def num_rows(self, split: str) -> int:
        """Number of rows of a split, read from the file's footer."""
        with (self.location / f"{split}.parquet").open() as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    def fingerprint(self) -> str:
        """sha256 of the files that training reads."""
        digest = hashlib.sha256()
        for name in ("train.parquet", "validation.parquet", LABELS_FILE):
            digest.update(hashlib.sha256((self.location / name).read_bytes()).digest())
        return digest.hexdigest()
