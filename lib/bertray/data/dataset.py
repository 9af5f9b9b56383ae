"""A labelled data set: made once by bertray prepare, read by training and evaluation.

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
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.errors import RequestError
from bertray.schema import (
    LABEL_ID,
    LABEL_IDS,
    NO_CLASS,
)
from bertray.storage.location import Location
from bertray.types import ProblemType

LABELS_FILE, REPORT_FILE = "labels.json", "report.json"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set in storage; splits are read when asked for."""

    location: Location
    labels: tuple[str, ...]  # the label of id i stands at position i
    problem_type: ProblemType
    oos_label: str | None  # the label of texts that fit no class; one of `labels` if training rows have it

    @classmethod
    def open(cls, uri: str) -> Dataset:
        """Open the folder that bertray prepare wrote.

        Raises:
            RequestError: it is not one, or was not finished.
        """
        location = Location.of(uri)
        if not (location / REPORT_FILE).exists():
            if location.is_file():
                raise RequestError(
                    f"{location} is a file, and no data set. Make one of it with "
                    f"bertray prepare --input {uri} --output DATASET"
                )
            raise RequestError(
                f"{location} is no finished data set: it has no {REPORT_FILE}. Make one with "
                f"bertray prepare --input FILES --output {uri}"
            )
        report = json.loads((location / REPORT_FILE).read_bytes())
        return cls(
            location,
            tuple(json.loads((location / LABELS_FILE).read_bytes())),
            # A data set made before there was a choice does not name them.
            report.get("problem_type", "single_label_classification"),
            report.get("oos_label"),
        )

    def split(self, name: str) -> pa.Table:
        """The rows of one split, in `schema.DATASET_SCHEMA`, or `MULTI_LABEL_SCHEMA` with several labels a row.

        Validation and test may have rows out of scope (label id `schema.NO_CLASS`): see `in_scope`.
        """
        with (self.location / f"{name}.parquet").open() as file:
            return pq.ParquetFile(file).read()

    def in_scope(self, rows: pa.Table) -> pa.Table:
        """Without the rows that have no class to be learnt or predicted; with several labels a row, all rows."""
        if self.problem_type == "multi_label_classification":
            return rows
        return rows.filter(pc.not_equal(rows[LABEL_ID], NO_CLASS))

    def targets(self, rows: pa.Table) -> np.ndarray:
        """What a model is to predict of rows of this data set.

        Returns:
            Label ids, int64 [N], `schema.NO_CLASS` for rows out of scope; or with several labels a row 1.0 where a row
            has a label and 0.0 elsewhere, float32 [N, C].
        """
        if self.problem_type == "single_label_classification":
            return np.asarray(rows[LABEL_ID].to_numpy(), dtype=np.int64)
        targets_NC = np.zeros((rows.num_rows, len(self.labels)), dtype=np.float32)
        row_of_label = np.repeat(np.arange(rows.num_rows), pc.list_value_length(rows[LABEL_IDS]).to_numpy())
        targets_NC[row_of_label, pc.list_flatten(rows[LABEL_IDS]).to_numpy()] = 1.0
        return targets_NC

    def num_rows(self, split: str) -> int:
        """Rows of a split, from the file's footer alone."""
        with (self.location / f"{split}.parquet").open() as file:
            return int(pq.ParquetFile(file).metadata.num_rows)

    def fingerprint(self) -> str:
        """sha256 over what training reads: train.parquet, validation.parquet and labels.json."""
        digest = hashlib.sha256()
        for name in ("train.parquet", "validation.parquet", LABELS_FILE):
            digest.update(hashlib.sha256((self.location / name).read_bytes()).digest())
        return digest.hexdigest()
