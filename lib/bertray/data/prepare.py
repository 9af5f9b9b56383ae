"""Labelled files become a data set: what bertray prepare does.

1. read     labelled files -> text, label, source, source_row             bertray.data.readers
2. clean    empty, duplicate and contradictory rows go out, counted       bertray.data.cleaning
3. split    train / validation / test: your own files, or held out        bertray.data.splits
4. separate a text or group on two sides leaves the training side
5. encode   labels in sorted order become 0 … n-1; a held-out label that is out of scope becomes -1
6. write    train.parquet, validation.parquet, test.parquet, labels.json, and report.json last

With several labels a row (problem type multi_label_classification) the steps are the same, over sets of labels.
"""

from __future__ import annotations

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

from bertray.data.cleaning import Cleaned, clean, drop_shared
from bertray.data.config import PrepareConfig
from bertray.data.dataset import LABELS_FILE, REPORT_FILE
from bertray.data.readers import GROUP, find_files, read_labelled
from bertray.data.splits import hold_out
from bertray.errors import RequestError
from bertray.schema import (
    DATASET_SCHEMA,
    LABEL,
    LABEL_ID,
    LABEL_IDS,
    LABELS,
    MULTI_LABEL_SCHEMA,
    NO_CLASS,
    SOURCE,
    SOURCE_ROW,
    SPLITS,
    TEXT,
)
from bertray.storage.location import Location
from bertray.storage.outputs import refuse_in_bundle
from bertray.types import ProblemType
from bertray.versions import versions

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareResult:
    """What became of labelled files.

    Attributes:
        output: the data set's place.
        labels: by id.
        num_rows: of every split.
        warnings: what a person should look at.
        report: what report.json holds: every row that was read, by what became of it.
    """

    output: str
    labels: tuple[str, ...]
    num_rows: dict[str, int]
    warnings: list[str]
    report: dict[str, Any]


def prepare(config: PrepareConfig) -> PrepareResult:
    """Read, clean, split and write a data set.

    Raises:
        RequestError: unreadable input, no row that can be used, unseen labels in a held-out split, an out-of-scope
            label that no row has, too few rows to split; nothing is written.
    """
    output = Location.of(config.output)
    refuse_in_bundle(output)
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
            separator=config.separator,
        )
        num_rows_in[name] = rows.num_rows
        if not rows.num_rows:
            raise RequestError(f"--{name} {' '.join(patterns)} has no rows")
        cleaned[name] = clean(rows)
        if not cleaned[name].rows.num_rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in cleaned[name].rows_out.most_common())
            raise RequestError(
                f"none of the {rows.num_rows} rows of --{name} {' '.join(patterns)} can be used: {reasons}. Are "
                "--text-column and --label-column the right ones?"
            )
        _log.info("%s: %d rows read, %d stay after cleaning", name, rows.num_rows, cleaned[name].rows.num_rows)

    _separate(cleaned)
    splits, warnings = _split(cleaned, config)
    labels = _encode(splits, config.oos_label)
    report = _report(config, num_rows_in, cleaned, splits, labels, warnings)
    for warning in warnings:
        _log.warning("warning: %s", warning)
    _write(output, splits, labels, report)
    return PrepareResult(str(output), tuple(labels), report["splits"], warnings, report)


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
            cleaned[name].rows, rows_out = drop_shared(cleaned[name].rows, cleaned[held_out].rows, held_out)
            cleaned[name].rows_out += rows_out


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
        labels = rows[LABELS if config.multi_label else LABEL].to_pylist()
        staying, held_out, absent = hold_out(labels, share, config.seed, groups)
        if absent:
            warnings.append(f"{name} has no row of these classes, too small to share: {', '.join(absent)}")
        splits[name], rows = rows.take(pa.array(held_out)), rows.take(pa.array(staying))
    splits["train"] = rows
    return {name: splits[name] for name in SPLITS}, warnings


def _encode(splits: dict[str, pa.Table], oos_label: str | None) -> list[str]:
    """Number the training labels in sorted order, in place; a held-out `oos_label` that is none of them is no class.

    Raises:
        RequestError: fewer than two labels, a split without a row of a class, a held-out label that training never
            sees, or an `oos_label` that no row has.
    """
    counts = {name: _count_labels(rows) for name, rows in splits.items()}
    labels = sort_labels(list(counts["train"]))
    if len(labels) < 2:
        raise RequestError(f"the training rows have {len(labels)} distinct labels ({labels}); a classifier needs two")
    if oos_label is not None and not any(oos_label in of_split for of_split in counts.values()):
        raise RequestError(
            f"no row has the label {oos_label!r} of --oos-label: correct its spelling, or leave the option out; "
            f"training has {', '.join(map(repr, labels))}"
        )
    for name, rows in splits.items():
        unseen = {label: count for label, count in sorted(counts[name].items()) if label not in counts["train"]}
        num_rows_of_no_class = unseen.pop(oos_label, 0) if oos_label is not None else 0
        if rows.num_rows == num_rows_of_no_class:
            what = "row of a class" if num_rows_of_no_class else "row"
            raise RequestError(f"no {what} is left for the {name} split. Add rows or check the columns and the report")
        if unseen:
            listed = ", ".join(f"{label!r} ({count} rows)" for label, count in unseen.items())
            no_class = "" if LABELS in rows.column_names else "name the one that stands for no class with --oos-label, "
            raise RequestError(
                f"the {name} split has labels that no training row has: {listed}. Add training rows with them, take "
                f"them out of {name}, {no_class}or correct the spelling; training has {', '.join(map(repr, labels))}"
            )
        splits[name] = _with_ids(rows, labels)
    return labels


def _count_labels(rows: pa.Table) -> Counter[str]:
    """Rows with each label; a row with several counts for each of them."""
    labels = pc.list_flatten(rows[LABELS]) if LABELS in rows.column_names else rows[LABEL]
    return Counter(labels.to_pylist())


def _with_ids(rows: pa.Table, labels: list[str]) -> pa.Table:
    """Rows in the schema of the data set; a row's labels in the order of their ids."""
    if LABELS not in rows.column_names:
        ids = pc.index_in(rows[LABEL], value_set=pa.array(labels)).fill_null(NO_CLASS)
        return rows.append_column(LABEL_ID, ids).select(DATASET_SCHEMA.names).cast(DATASET_SCHEMA)
    id_of = {label: number for number, label in enumerate(labels)}
    ids_of_rows = [sorted(id_of[label] for label in of_row) for of_row in rows[LABELS].to_pylist()]
    columns = {name: rows[name] for name in (TEXT, SOURCE, SOURCE_ROW)}
    columns[LABELS] = [[labels[number] for number in of_row] for of_row in ids_of_rows]
    return pa.table({**columns, LABEL_IDS: ids_of_rows}).select(MULTI_LABEL_SCHEMA.names).cast(MULTI_LABEL_SCHEMA)


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
    counts = {name: _count_labels(rows) for name, rows in splits.items()}
    assert sum(part.rows.num_rows for part in cleaned.values()) == sum(rows.num_rows for rows in splits.values())
    problem_type: ProblemType = "multi_label_classification" if config.multi_label else "single_label_classification"
    report: dict[str, Any] = {
        "num_rows_in": sum(num_rows_in.values()),
        "num_rows_kept": sum(rows.num_rows for rows in splits.values()),
        "num_rows_out": dict(sorted(sum((part.rows_out for part in cleaned.values()), Counter()).items())),
        "splits": {name: rows.num_rows for name, rows in splits.items()},
        "labels": {label: {name: counts[name][label] for name in SPLITS} for label in labels},
        "problem_type": problem_type,
        "oos_label": config.oos_label,
    }
    if config.oos_label is not None:
        report["num_rows_oos"] = {name: counts[name][config.oos_label] for name in SPLITS}
    if config.multi_label:
        report["num_rows_by_labels"] = _num_rows_by_labels(splits)
    return report | {
        "sources": sources,
        "warnings": warnings,
        "config": config.model_dump(),
        "versions": versions(),
    }


def _num_rows_by_labels(splits: dict[str, pa.Table]) -> dict[str, dict[str, int]]:
    """Rows of every split that have 0, 1, 2, and 3 or more labels."""
    num_labels = {name: pc.min_element_wise(pc.list_value_length(rows[LABELS]), 3) for name, rows in splits.items()}
    counts = {name: Counter(of_split.to_pylist()) for name, of_split in num_labels.items()}
    return {
        shown: {name: counts[name][number] for name in SPLITS} for number, shown in enumerate(("0", "1", "2", "3+"))
    }


def _write(output: Location, splits: dict[str, pa.Table], labels: list[str], report: dict[str, Any]) -> None:
    (output / REPORT_FILE).remove()  # without a report the folder is no data set: a crash leaves no mixture
    for name, rows in splits.items():
        buffer = io.BytesIO()
        pq.write_table(rows, buffer, compression="zstd")
        (output / f"{name}.parquet").put(buffer.getvalue())
    (output / LABELS_FILE).put(_json(labels))
    (output / REPORT_FILE).put(_json(report))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
