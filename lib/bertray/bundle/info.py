"""The folder of a model bundle: what bundle.json says, and whether every file is the one it speaks of.

    bundle/
      config.json, model.safetensors       the classifier, labels in its id2label
      tokenizer.json, …                    its tokenizer
      README.md                            the model card
      learning_curves.svg, tensorboard/    how training went; not hashed, for no prediction depends on it
      trials.json, trials.parquet          the search that found its options (bertray tune); not hashed
      bundle.json                          what is here: sha256 of every file, labels, length, origin, metrics; last

`bertray.bundle.bundle` makes a classifier of it. Here nothing is loaded that takes time to import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    model_validator,
)

from bertray.errors import BundleError
from bertray.metrics.profile import Profile
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE, sha256_of
from bertray.types import LongDocuments, ProblemType

CARD_FILE = "README.md"
# For people. TensorBoard's event files are stamped with times, so that no two runs write the same.
CURVES_FILE, EVENTS_FOLDER = "learning_curves.svg", "tensorboard"
TRIALS_JSON, TRIALS_PARQUET = "trials.json", "trials.parquet"


class BundleInfo(BaseModel):
    """What bundle.json holds."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    labels: tuple[str, ...]  # by id
    problem_type: ProblemType = "single_label_classification"
    max_length: int  # tokens of a window, special tokens included
    long_documents: LongDocuments = (
        "truncate"  # what is read of a text that is longer; see bertray.tokenization.windows
    )
    stride: int | None = None  # tokens that its neighbouring windows share at least; None: truncate
    encoder: str  # what was fine-tuned: Hub id, folder or package
    data_fingerprint: str  # Dataset.fingerprint() of the training data
    training: dict[str, Any]  # the job's configuration
    metrics: dict[str, float]  # of the kept epoch, on validation
    history: list[dict[str, float]]  # one entry an epoch
    validation_profile: Profile | None = None  # what it says of the validation rows; bundles made before have none
    # How sure it is, see `metrics.calibration`. Bundles made before have none of these, and give the same as ever.
    temperature: PositiveFloat = 1.0  # by which its logits were divided, in the weights: for the record
    calibration: dict[str, float] = {}  # ece_before, ece_after, nll_before, nll_after, on validation; empty: not done
    thresholds: tuple[float, ...] | None = None  # of each label's probability, by id; with several labels a row alone
    review_below: NonNegativeFloat | None = None  # a row of a lower score is to be reviewed; above 1: every row
    target_precision: float | None = Field(None, gt=0, lt=1)  # that review_below was chosen for
    oos_label: str | None = None  # of texts out of scope in the training data; not in `labels` if none was trained on
    versions: dict[str, str]  # of Python and the packages that matter
    files: dict[str, str]  # sha256 of every other file that predictions may depend on

    @model_validator(mode="after")
    def _stride_belongs_to_windows(self) -> Self:
        if (self.stride is None) != (self.long_documents == "truncate"):
            raise ValueError(f"long_documents {self.long_documents} does not go with stride {self.stride}")
        return self

    @model_validator(mode="after")
    def _thresholds_belong_to_labels(self) -> Self:
        if self.thresholds is not None:
            if self.problem_type != "multi_label_classification":
                raise ValueError(f"thresholds do not go with problem_type {self.problem_type}")
            if len(self.thresholds) != len(self.labels):
                raise ValueError(f"there are {len(self.thresholds)} thresholds for {len(self.labels)} labels")
        return self

    @model_validator(mode="after")
    def _a_precision_needs_its_score(self) -> Self:
        # Without a score nothing would be reviewed, which is the opposite of a precision that is never reached.
        if self.target_precision is not None and self.review_below is None:
            raise ValueError(f"target_precision {self.target_precision} does not go without review_below")
        return self

    def fingerprint(self) -> str:
        """What makes two bundles predict alike: the same files, read in the same way, and their output alike."""
        read: dict[str, Any] = {
            "files": self.files,
            "max_length": self.max_length,
            "long_documents": self.long_documents,
        }
        # Added later: a bundle without them keeps its fingerprint, and what it has scored stays scored.
        added: dict[str, Any] = {
            "stride": self.stride,
            "thresholds": self.thresholds,
            "review_below": self.review_below,
        }
        if self.problem_type != "single_label_classification":
            added["problem_type"] = self.problem_type
        read |= {name: value for name, value in added.items() if value is not None}
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


@contextmanager
def opened(uri: str) -> Iterator[tuple[Path, BundleInfo]]:
    """A bundle's folder as a verified local one, and its bundle.json, inside the block.

    Raises:
        BundleError: the folder is missing, incomplete or altered.
    """
    location = Location.of(uri)
    info = read_info(location)
    with location.local_copy() as folder:
        verify(folder, info, uri)
        yield folder, info


def read_info(location: Location) -> BundleInfo:
    """Read bundle.json without loading the model.

    Raises:
        BundleError: it is missing or not what bertray train writes.
    """
    file = location / BUNDLE_FILE
    if not file.exists():
        raise BundleError(
            f"{location} is no model bundle: it has no {BUNDLE_FILE}. Make one with "
            f"bertray train --data DATASET --output {'BUNDLE' if location.exists() else location}"
        )
    try:
        info = BundleInfo.model_validate_json(file.read_bytes())
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise BundleError(f"{file} cannot be read: {wrong}. Train the bundle again") from error
    if info.format_version != 1:
        raise BundleError(f"{file} is of format {info.format_version}; this version of bertray reads format 1")
    return info


def was_replaced(uri: str) -> BundleError:
    """The error of a process that finds another bundle than the job began with."""
    return BundleError(f"the bundle {uri} was replaced while the job ran. Run it again")


def verify(folder: Path, info: BundleInfo, name: str) -> None:
    """Check every file of a bundle against its recorded sha256.

    Raises:
        BundleError: a file is missing, differs, or was not there when the bundle was made.
    """
    if added := sorted(_content(folder) - set(info.files)):
        raise BundleError(f"the bundle {name} was altered: {', '.join(added)} is not its own. Take it out")
    for file, expected in info.files.items():
        path = folder / file
        if not path.is_file():
            raise BundleError(f"the bundle {name} is incomplete: {file} is missing. Copy or train it again")
        actual = sha256_of(path)
        if actual != expected:
            raise BundleError(
                f"the bundle {name} was altered: {file} has sha256 {actual[:12]}…, bundle.json says {expected[:12]}…. "
                "Copy or train it again"
            )


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a bundle folder that predictions may depend on, by relative path."""
    return {name: sha256_of(folder / name) for name in sorted(_content(folder))}


def _content(folder: Path) -> set[str]:
    """Files of a bundle that predictions may depend on: neither what is for people, nor other tools' hidden notes."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for_people = {BUNDLE_FILE, CARD_FILE, CURVES_FILE, TRIALS_JSON, TRIALS_PARQUET}
    return {name for name in names - for_people if not name.startswith((".", f"{EVENTS_FOLDER}/"))}
