"""Labelled files become a data set: what bertray prepare does.

1. read     labelled files -> text, label, source, source_row             bertray.data.readers
2. spell    labels that are one label alike                               bertray.data.labels
3. clean    take out empty, duplicate and contradictory rows, and count   bertray.data.cleaning
4. split    train / validation / test: your own files, or held out        bertray.data.splits
5. separate a text or group on two given sides leaves the training side
6. encode   labels in sorted order become 0 … n-1; a held-out label that is out of scope becomes -1
7. write    train.parquet, validation.parquet, test.parquet, labels.json, and report.json last

With several labels a row (problem type multi_label_classification) the steps are the same, over sets of labels; with
numbers (regression) there is nothing to spell or to encode.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bertray.data.cleaning import Cleaned, clean, drop_shared
from bertray.data.config import PrepareConfig
from bertray.data.dataset import LABELS_FILE, REPORT_FILE
from bertray.data.labels import one_spelling, warn_of_alike
from bertray.data.readers import GROUP, read_labelled
from bertray.data.splits import hold_out
from bertray.errors import RequestError, listed
from bertray.formats.files import find_files
from bertray.metrics.profile import given_labels
from bertray.schema import SPLITS
from bertray.storage.location import Location
from bertray.storage.outputs import put_json, put_records, refuse_in_bundle, refuse_to_replace
from bertray.tasks.task import task_of_rows
from bertray.versions import versions

_log = logging.getLogger(__name__)

_MAX_LISTED = 5


@dataclass(frozen=True)
class PrepareResult:
    """A data set that was prepared."""

    output: str  # the folder of the data set
    labels: tuple[str, ...]  # by id; of numbers, the name of the model's one output
    num_rows: dict[str, int]  # by split
    warnings: list[str]  # what a person should look at
    report: dict[str, Any]  # the content of report.json: what became of every row that was read


def prepare(config: PrepareConfig) -> PrepareResult:
    """Read, clean, split and write a data set.

    Raises:
        RequestError: unreadable input, no usable row, unseen labels in a held-out split, an out-of-scope label that no
            row has, or too few rows to split; nothing is written.
    """
    output = Location.of(config.output)
    refuse_in_bundle(output)
    sources = {"input": config.input}
    sources |= {name: [path] for name in ("validation", "test") if (path := getattr(config, name))}
    files = {name: _find(paths, output, config) for name, paths in sources.items()}
    names = [REPORT_FILE, *(f"{name}.parquet" for name in SPLITS), LABELS_FILE]
    refuse_to_replace(output, names, overwrite=config.overwrite)
    rows, oos_label = one_spelling({name: _read(name, files[name], config) for name in files}, config.oos_label)
    config = config.model_copy(update={"oos_label": oos_label})
    cleaned = {name: _clean(name, rows.pop(name), paths, config.max_spread) for name, paths in sources.items()}
    # A text or group in two given splits leaves the one nearer to training.
    for name, held_out in (("validation", "test"), ("input", "test"), ("input", "validation")):
        if name in cleaned and held_out in cleaned:
            cleaned[name].rows, rows_out = drop_shared(cleaned[name].rows, cleaned[held_out].rows, held_out)
            cleaned[name].rows_out += rows_out
            if not cleaned[name].rows.num_rows:
                raise RequestError(
                    f"all texts of --{name} are in --{held_out} too, so no row is left: give other files"
                )
    splits = _split(cleaned, config)
    task = task_of_rows(splits["train"])
    if task.outputs and (empty := [name for name, rows in splits.items() if not rows.num_rows]):
        raise RequestError(f"no row is left for the {empty[0]} split. Add rows or check the columns and the report")
    # A row with several labels counts for each of them.
    counts = {name: Counter(given_labels(rows).to_pylist()) for name, rows in splits.items()}
    named = [] if task.outputs else _sorted_labels(splits, counts, config.oos_label)
    warnings = [*warn_of_alike(sum(counts.values(), Counter())), *_warn_of_absent(named, counts)]
    warnings += task.warnings(splits)
    report, labels = _report(config, cleaned, splits, counts, named, warnings), [*(task.outputs or named)]
    for warning in warnings:
        _log.warning("warning: %s", warning)
    (output / REPORT_FILE).remove()  # without a report the folder is no data set: a crash leaves no mixture
    for name, rows in splits.items():
        put_records(output / f"{name}.parquet", task.encoded(rows, labels))
    put_json(output / LABELS_FILE, labels)
    put_json(output / REPORT_FILE, report)
    return PrepareResult(str(output), tuple(labels), report["splits"], warnings, report)


def _find(patterns: list[str], output: Location, config: PrepareConfig) -> list[Location]:
    files = [file for pattern in patterns for file in find_files(pattern, [config.text_column, config.label_column])]
    # A data set has a train.parquet; the folder that the rows come from may have one too.
    if held := [file for file in files if output.contains(file)]:
        raise RequestError(f"--output {output} holds {held[0]}, which is read: choose another folder")
    return files


def _read(name: str, files: list[Location], config: PrepareConfig) -> pa.Table:
    rows = read_labelled(files, config)
    if not rows.num_rows:
        raise RequestError(f"--{name} {files[0]}{' …' * (len(files) > 1)} has no rows")
    return rows


def _clean(name: str, rows: pa.Table, patterns: list[str], max_spread: float | None) -> Cleaned:
    cleaned = clean(rows, max_spread)
    if not cleaned.rows.num_rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in cleaned.rows_out.most_common())
        raise RequestError(
            f"none of the {rows.num_rows} rows of --{name} {' '.join(patterns)} can be used: {reasons}. Are "
            "--text-column and --label-column the right ones?"
        )
    _log.info("%s: %d rows read, %d stay after cleaning", name, rows.num_rows, cleaned.rows.num_rows)
    return cleaned


def _split(cleaned: dict[str, Cleaned], config: PrepareConfig) -> dict[str, pa.Table]:
    rows = cleaned["input"].rows
    num_rows = rows.num_rows
    splits = {name: part.rows for name, part in cleaned.items() if name != "input"}
    for name, fraction in (("test", config.test_fraction), ("validation", config.validation_fraction)):
        if name in splits:
            continue
        # Both fractions are of all kept rows, so the second is a larger share of what the first has left.
        share = fraction * num_rows / max(rows.num_rows, 1)
        groups = rows[GROUP].to_pylist() if GROUP in rows.column_names else None
        staying, held_out = hold_out(task_of_rows(rows).strata(rows), share, config.seed, groups)
        splits[name], rows = rows.take(pa.array(held_out)), rows.take(pa.array(staying))
    splits["train"] = rows
    return {name: splits[name] for name in SPLITS}


def _warn_of_absent(labels: list[str], counts: dict[str, Counter[str]]) -> list[str]:
    """A warning that counts the classes of which validation or test has no row; none if there are none."""
    absent = {name: [label for label in labels if not counts[name][label]] for name in SPLITS if name != "train"}
    first = [label for label in labels if any(label in of_split for of_split in absent.values())][:_MAX_LISTED]
    if not first:
        return []
    lacking = " and ".join(f"{name} lacks {len(of_split)}" for name, of_split in absent.items() if of_split)
    return [
        f"of the {len(labels)} classes {lacking}: no score says how well they are learnt. Such are "
        f"{', '.join(map(repr, first))}; {REPORT_FILE} has all. Add rows of them, or merge them with others"
    ]


def _sorted_labels(splits: dict[str, pa.Table], counts: dict[str, Counter[str]], oos_label: str | None) -> list[str]:
    """The training labels, sorted; a held-out `oos_label` that is none of them is no class.

    Raises:
        RequestError: fewer than two labels, a split without a row of a class, a held-out label that training never
            sees, or an `oos_label` that no row has.
    """
    labels = sort_labels(list(counts["train"]))
    if len(labels) < 2:
        raise RequestError(f"the training rows have {len(labels)} distinct labels ({labels}); a classifier needs two")
    trained = f"training has {listed(map(repr, labels))}"
    if oos_label is not None and not any(oos_label in of_split for of_split in counts.values()):
        raise RequestError(
            f"no row has the label {oos_label!r} of --oos-label: correct its spelling, or leave it out; {trained}"
        )
    for name, rows in splits.items():
        unseen = {label: count for label, count in sorted(counts[name].items()) if label not in counts["train"]}
        num_rows_oos = unseen.pop(oos_label, 0) if oos_label is not None else 0
        if rows.num_rows == num_rows_oos:
            what = "row of a class" if num_rows_oos else "row"
            raise RequestError(f"no {what} is left for the {name} split. Add rows or check the columns and the report")
        if unseen:
            named = listed(f"{label!r} ({count} rows)" for label, count in unseen.items())
            raise RequestError(
                f"the {name} split has labels that no training row has: {named}. Add training rows with them, take "
                f"them out of {name}, {task_of_rows(rows).unseen_advice}or correct the spelling; {trained}"
            )
    return labels


def sort_labels(labels: list[str]) -> list[str]:
    """Sorted order, numbers by their value: 2 before 10."""
    numeric = all(re.fullmatch(r"-?[0-9]{1,999}", label) for label in labels)
    return sorted(labels, key=(lambda label: (int(label), label)) if numeric else None)


def _report(
    config: PrepareConfig,
    cleaned: dict[str, Cleaned],
    splits: dict[str, pa.Table],
    counts: dict[str, Counter[str]],
    labels: list[str],
    warnings: list[str],
) -> dict[str, Any]:
    num_rows, task = {name: rows.num_rows for name, rows in splits.items()}, task_of_rows(splits["train"])
    for name, part in cleaned.items():
        assert part.num_rows_in == part.rows.num_rows + part.rows_out.total(), f"rows of {name} were lost"
    assert sum(part.rows.num_rows for part in cleaned.values()) == sum(num_rows.values())
    report: dict[str, Any] = {
        "num_rows_in": sum(part.num_rows_in for part in cleaned.values()),
        "num_rows_kept": sum(num_rows.values()),
        "num_rows_out": dict(sorted(sum((part.rows_out for part in cleaned.values()), Counter()).items())),
        "splits": num_rows,
        "labels": {label: {name: counts[name][label] for name in SPLITS} for label in labels},
        "problem_type": task.problem_type,
        "oos_label": config.oos_label,
    }
    if config.oos_label is not None:
        report["num_rows_oos"] = {name: counts[name][config.oos_label] for name in SPLITS}
    report |= task.counted(splits)
    report["sources"] = {
        name: {
            "num_rows_in": part.num_rows_in,
            "num_rows_kept": part.rows.num_rows,
            "num_rows_out": dict(sorted(part.rows_out.items())),
            "num_label_conflicts": part.num_conflicts,
            "label_conflicts": part.conflicts,
        }
        for name, part in cleaned.items()
    }
    return report | {"warnings": warnings, "config": config.model_dump(), "versions": versions()}
