"""A labelled data set: made once by jobs.prepare, read by training and evaluation.

1. read     labelled files -> text, label, source, source_row             bertray.labelled
2. clean    empty, duplicate and contradictory rows go out, counted       bertray.cleaning
3. split    train / validation / test: your own files, or held out        bertray.splits
4. separate a text or group on two sides leaves the training side
5. encode   labels in sorted order become 0 … n-1
6. write    train.parquet, validation.parquet, test.parquet, labels.json, and report.json last
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bertray.cleaning import Cleaned, clean, drop_shared
from bertray.config import PrepareConfig
from bertray.errors import RequestError
from bertray.labelled import GROUP, find_files, read_labelled
from bertray.schema import DATASET_SCHEMA, LABEL, LABEL_ID, SPLITS
from bertray.splits import hold_out
from bertray.storage import Location
from bertray.versions import versions

_log = logging.getLogger(__name__)

LABELS_FILE, REPORT_FILE = "labels.json", "report.json"


@dataclass(frozen=True)
class Dataset:
    """A prepared data set in storage; splits are read when asked for."""

    location: Location
    labels: tuple[str, ...]  # the label of id i stands at position i

    @classmethod
    def open(cls, uri: str) -> Dataset:
        """Open the folder that jobs.prepare wrote.

        Raises:
            RequestError: it is not one, or was not finished.
        """
        location = Location.of(uri)
        if not (location / REPORT_FILE).exists():
            raise RequestError(
                f"{location} is no finished data set: it has no {REPORT_FILE}. Make one with "
                f"python -m jobs.prepare --input FILES --output {uri}"
            )
        return cls(location, tuple(json.loads((location / LABELS_FILE).read_bytes())))

    def split(self, name: str) -> pa.Table:
        """The rows of one split, in `schema.DATASET_SCHEMA`."""
        with (self.location / f"{name}.parquet").open() as file:
            return pq.ParquetFile(file).read()

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


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Read, clean, split and write a data set; returns the report that is also written as report.json.

    Raises:
        RequestError: unreadable input, unseen labels in a held-out split, too few rows to split; nothing is written.
    """
    output = Location.of(config.output)
    sources = {"input": config.input}
    sources |= {name: [path] for name in ("validation", "test") if (path := getattr(config, name))}
    _refuse_own_input(output, sources)
    num_rows_in: dict[str, int] = {}
    cleaned: dict[str, Cleaned] = {}
    for name, patterns in sources.items():
        rows = read_labelled(
            patterns,
            text_column=config.text_column,
            label_column=config.label_column,
            group_column=config.group_column,
        )
        num_rows_in[name] = rows.num_rows
        cleaned[name] = clean(rows)
        _log.info("%s: %d rows read, %d stay after cleaning", name, rows.num_rows, cleaned[name].rows.num_rows)

    _separate(cleaned)
    splits, warnings = _split(cleaned, config)
    labels = _encode(splits)
    report = _report(config, num_rows_in, cleaned, splits, labels, warnings)
    for warning in warnings:
        _log.warning("warning: %s", warning)
    _write(output, splits, labels, report)
    return report


def _refuse_own_input(output: Location, sources: dict[str, list[str]]) -> None:
    """A data set has a train.parquet; so may have the folder that the rows come from."""
    for patterns in sources.values():
        for file in (file for pattern in patterns for file in find_files(pattern)):
            if output.contains(file):
                raise RequestError(f"--output {output} holds {file}, which is read: writing there could destroy it")


def _separate(cleaned: dict[str, Cleaned]) -> None:
    """What stands on two given sides leaves the one nearer to training: test > validation > input."""
    for name, held_out in (("validation", "test"), ("input", "test"), ("input", "validation")):
        if name in cleaned and held_out in cleaned:
            separated = drop_shared(cleaned[name].rows, cleaned[held_out].rows, held_out)
            cleaned[name].rows = separated.rows
            cleaned[name].rows_out += separated.rows_out


def _split(cleaned: dict[str, Cleaned], config: PrepareConfig) -> tuple[dict[str, pa.Table], list[str]]:
    rows = cleaned["input"].rows
    num_rows, warnings = rows.num_rows, []
    splits = {name: part.rows for name, part in cleaned.items() if name != "input"}
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if name in splits:
            continue
        # Both shares are of all the kept rows, so the second is a larger share of what the first has left.
        share = fraction * num_rows / max(rows.num_rows, 1)
        groups = rows[GROUP].to_pylist() if GROUP in rows.column_names else None
        staying, held_out, absent = hold_out(rows[LABEL].to_pylist(), share, config.seed, groups)
        if absent:
            warnings.append(f"{name} has no row of these classes, too small to share: {', '.join(absent)}")
        splits[name], rows = rows.take(pa.array(held_out)), rows.take(pa.array(staying))
    splits["train"] = rows
    return {name: splits[name] for name in SPLITS}, warnings


def _encode(splits: dict[str, pa.Table]) -> list[str]:
    """Number the training labels in sorted order, in place.

    Raises:
        RequestError: fewer than two labels, an empty split, or a held-out label that training never sees.
    """
    labels = sort_labels(pc.unique(splits["train"][LABEL]).to_pylist())
    if len(labels) < 2:
        raise RequestError(f"the training rows have {len(labels)} distinct labels ({labels}); a classifier needs two")
    for name, rows in splits.items():
        if rows.num_rows == 0:
            raise RequestError(f"no row is left for the {name} split. Add rows or check the columns and the report")
        ids = pc.index_in(rows[LABEL], value_set=pa.array(labels))
        if ids.null_count:
            unseen = Counter(rows[LABEL].filter(pc.is_null(ids)).to_pylist())
            listed = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(unseen.items()))
            raise RequestError(
                f"the {name} split has labels that no training row has: {listed}. Add training rows with them, take "
                f"them out of {name}, or correct the spelling; training has {', '.join(map(repr, labels))}"
            )
        splits[name] = rows.append_column(LABEL_ID, ids.cast(pa.int32())).select(DATASET_SCHEMA.names)
    return labels


def sort_labels(labels: list[str]) -> list[str]:
    """Sorted order, numbers by their value: 2 before 10."""
    numeric = all(re.fullmatch(r"-?\d+", label) for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if numeric else None)


def _report(
    config: PrepareConfig,
    num_rows_in: dict[str, int],
    cleaned: dict[str, Cleaned],
    splits: dict[str, pa.Table],
    labels: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    sources = {}
    for name, part in cleaned.items():
        assert num_rows_in[name] == part.rows.num_rows + part.rows_out.total(), f"rows of {name} were lost"
        sources[name] = {
            "num_rows_in": num_rows_in[name],
            "num_rows_kept": part.rows.num_rows,
            "num_rows_out": dict(sorted(part.rows_out.items())),
            "num_label_conflicts": part.num_conflicts,
            "label_conflicts": part.conflicts,
        }
    counts = {name: Counter(rows[LABEL].to_pylist()) for name, rows in splits.items()}
    assert sum(part.rows.num_rows for part in cleaned.values()) == sum(rows.num_rows for rows in splits.values())
    return {
        "num_rows_in": sum(num_rows_in.values()),
        "num_rows_kept": sum(rows.num_rows for rows in splits.values()),
        "num_rows_out": dict(sorted(sum((part.rows_out for part in cleaned.values()), Counter()).items())),
        "splits": {name: rows.num_rows for name, rows in splits.items()},
        "labels": {label: {name: counts[name][label] for name in SPLITS} for label in labels},
        "sources": sources,
        "warnings": warnings,
        "config": config.model_dump(),
        "versions": versions(),
    }


def _write(output: Location, splits: dict[str, pa.Table], labels: list[str], report: dict[str, Any]) -> None:
    (output / REPORT_FILE).remove()  # without a report the folder is no data set: a crash leaves no mixture
    for name, rows in splits.items():
        buffer = io.BytesIO()
        pq.write_table(rows.cast(DATASET_SCHEMA), buffer, compression="zstd")
        (output / f"{name}.parquet").put(buffer.getvalue())
    (output / LABELS_FILE).put(_json(labels))
    (output / REPORT_FILE).put(_json(report))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
