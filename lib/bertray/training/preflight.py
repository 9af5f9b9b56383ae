"""What is refused before any time is spent: outputs that would be lost, data that cannot be learnt."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from bertray.bundle.info import read_info
from bertray.data.dataset import Dataset
from bertray.errors import BertrayError, DivergedError, RequestError
from bertray.schema import SOURCE, SOURCE_ROW, TEXT
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE, refuse_in_bundle
from bertray.training.config import TrainConfig, TrainingOptions
from bertray.training.run_folder import TrainingRun

_log = logging.getLogger(__name__)

_MAX_ROWS_NAMED = 5

Config = TypeVar("Config", bound=TrainingOptions)


def check_output(output: Location, config: TrainConfig, run: TrainingRun) -> None:
    """Refuse to replace anything but a bundle, or what the run itself has begun to write."""
    if output.contains(Location.of(config.data)):
        raise RequestError(f"--output {output} holds --data {config.data}: choose a folder of its own for the bundle")
    refuse_in_bundle(output, output.ancestors())
    if not output.exists() or (not output.is_file() and output.is_empty()) or run.has_left_half_a_bundle():
        return
    if not config.overwrite:
        raise RequestError(f"--output {output} exists. Choose another folder, or replace a bundle with --overwrite")
    if not (output / BUNDLE_FILE).exists():
        raise RequestError(f"--output {output} exists and is no bundle (it has no {BUNDLE_FILE}): it is not replaced")


def check_data(dataset: Dataset, config: TrainingOptions) -> None:
    """Refuse what could not be learnt, or only by chance."""
    rows = dataset.in_scope(dataset.split("train"))
    num_rows, num_labels = rows.num_rows, len(dataset.labels)
    if num_labels > num_rows:
        raise RequestError(
            f"{dataset.location} has {num_labels} labels and {num_rows} training rows; there must be more rows than "
            "labels. Is --label-column of bertray prepare right?"
        )
    if pc.count_distinct(rows[TEXT]).as_py() < 2:
        raise RequestError(
            f"all {num_rows} training texts in {dataset.location} are the same. Is --text-column of bertray "
            "prepare the right one?"
        )
    if config.sampling == "balanced" and dataset.problem_type == "multi_label_classification":
        raise RequestError(
            "--sampling balanced: rows of several labels cannot be drawn so that all labels are alike; use "
            "--class-weights balanced"
        )


def with_absolute_places(config: Config, dataset: Dataset, output: Location) -> Config:
    """The same configuration for workers, which may run in other folders."""
    update = {"data": str(dataset.location), "output": str(output)}
    if Path(config.encoder).expanduser().is_dir():
        update["encoder"] = str(Path(config.encoder).expanduser().resolve())
    return config.model_copy(update=update)


def with_rows(error: DivergedError, dataset: Dataset) -> BertrayError:
    """The same, with the places of the rows that the step read."""
    rows = dataset.split("train").take(pa.array(error.rows))
    places = [
        f"{source}, row {row}"
        for source, row in zip(rows[SOURCE].to_pylist(), rows[SOURCE_ROW].to_pylist(), strict=True)
    ]
    more = len(places) - _MAX_ROWS_NAMED
    listed = "; ".join(places[:_MAX_ROWS_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return BertrayError(f"{error}. That step read {listed}")


def check_origin(encoder: str, data_fingerprint: str, *, is_audit: bool = False) -> None:
    """See that an encoder which is a bundle of ours does not know what it is to be tested or judged on.

    Args:
        data_fingerprint: of the data set at hand.
        is_audit: it is to judge rows of that.

    Raises:
        RequestError: it was fine-tuned on the rows that it is to judge.
    """
    folder = Path(encoder).expanduser()
    if not (folder / BUNDLE_FILE).is_file():
        return
    is_same = read_info(Location.of(str(folder))).data_fingerprint == data_fingerprint
    if is_same and is_audit:
        raise RequestError(
            f"--encoder {encoder} was fine-tuned on these rows, and knows their labels, wrong ones too: give the "
            "encoder that it was made from"
        )
    if not is_same:
        _log.warning(
            "warning: --encoder %s was fine-tuned on another data set: where that had rows that stand in the "
            "validation or test split here%s, scores on them are too good",
            encoder,
            ", or among those to be judged," if is_audit else "",
        )
