"""Checks before any time is spent: outputs that would be lost, data that cannot be learnt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import read_info
from bertray.data.dataset import Dataset
from bertray.errors import BertrayError, DivergedError, RequestError, listed
from bertray.model.files import check_files
from bertray.model.sources import lasting
from bertray.schema import SOURCE, SOURCE_ROW, TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE, refuse_in_bundle
from bertray.tasks.task import TASKS
from bertray.training.config import AdoptConfig, TrainConfig, TrainingOptions
from bertray.training.run_folder import TrainingRun
from bertray.types import ProblemType

_log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingOptions)


def refuse_to_replace_data(config: TrainingOptions) -> None:
    """Refuse an output that holds the data set."""
    if Location.of(config.output).contains(Location.of(config.data)):
        raise RequestError(f"--output {config.output} holds --data {config.data}: choose a folder of its own")


def refuse_meaningless(options: TrainingOptions | AdoptConfig, problem_type: ProblemType) -> None:
    """Refuse options that the problem type has no use for."""
    if odd := TASKS[problem_type].meaningless(options):
        raise RequestError(f"{', '.join(odd)} has no meaning with rows for {problem_type}: leave it out")


def open_data(config: TrainingOptions) -> Dataset:
    """Open the data set; refuse one that cannot be learnt, and an encoder that cannot be loaded."""
    dataset = Dataset.open(config.data)
    rows = dataset.in_scope(dataset.split("train"))
    num_rows, num_labels = rows.num_rows, len(dataset.labels)
    refuse_meaningless(config, dataset.problem_type)
    if num_labels > num_rows:
        raise RequestError(
            f"{dataset.location} has {num_labels} labels and {num_rows} training rows; there must be more rows than "
            "labels. Is --label-column of bertray prepare right?"
        )
    if pc.count_distinct(rows[TEXT]).as_py() < 2:
        raise RequestError(
            f"all {num_rows} training texts in {dataset.location} are the same. Is --text-column of bertray prepare "
            "right?"
        )
    check_files(config.encoder)  # may download it
    return dataset


def check_output(config: TrainConfig, run: TrainingRun) -> None:
    """Refuse to replace anything but a bundle on a disk, or what the run itself has begun to write."""
    refuse_to_replace_data(config)
    output = Location.of(config.output)
    refuse_in_bundle(output, output.ancestors())
    if not output.exists() or (not output.is_file() and output.is_empty()) or run.has_left_half_a_bundle():
        return
    if not output.is_local and (output / BUNDLE_FILE).exists():
        free = next(uri for number in count(2) if not Location.of(uri := f"{output}-{number}").exists())
        raise RequestError(
            f"--output {output} is a bundle, and none is replaced on S3, where the old one would be gone before the "
            f"new one is complete: choose another folder, such as --output {free}"
        )
    if not config.overwrite:
        raise RequestError(f"--output {output} exists. Choose another folder, or replace a bundle with --overwrite")
    if not (output / BUNDLE_FILE).exists():
        raise RequestError(f"--output {output} exists and is no bundle (it has no {BUNDLE_FILE}): it is not replaced")


def with_absolute_paths(config: Config, dataset: Dataset) -> Config:
    """The same configuration for workers, which may run in other folders."""
    overrides = TASKS[dataset.problem_type].overrides
    return config.model_copy(
        update={
            **{name: value for name, value in overrides.items() if name in type(config).model_fields},
            "data": str(dataset.location),
            "output": str(Location.of(config.output)),
            "encoder": lasting(config.encoder),
        }
    )


@contextmanager
def naming_rows(dataset: Dataset) -> Iterator[None]:
    """Add to a `DivergedError` from the block where the rows of that step come from."""
    try:
        yield
    except DivergedError as error:
        rows = dataset.split("train").take(pa.array(error.rows)).select([SOURCE, SOURCE_ROW]).to_pylist()
        named = listed((f"row {row[SOURCE_ROW]} of {row[SOURCE]}" for row in rows), 5)
        raise BertrayError(f"{error}. That step read {named}") from error


def check_origin(encoder: str, data_fingerprint: str, *, is_audit: bool = False) -> None:
    """If the encoder is a bundle of ours, check whether it has seen the rows that it will be measured on.

    Raises:
        RequestError: an audit would let it judge the rows that it was fine-tuned on.
    """
    folder = Path(encoder).expanduser()
    if not (folder / BUNDLE_FILE).is_file():
        return
    info = read_info(Location.of(str(folder)))
    is_same = info.data_fingerprint == data_fingerprint and info.origin != "adopted"
    if is_same and is_audit:
        raise RequestError(
            f"--encoder {encoder} was fine-tuned on these rows, and knows their labels, wrong ones too: give the "
            "encoder that it was made from"
        )
    if not is_same:
        _log.warning(
            "warning: --encoder %s was fine-tuned on %s data set. If that one has rows of this one's validation "
            "or test split%s, their scores are too high",
            encoder,
            "an unknown" if info.origin == "adopted" else "another",
            ", or rows that are judged here," if is_audit else "",
        )
