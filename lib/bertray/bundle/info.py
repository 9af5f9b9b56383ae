"""The folder of a model bundle: the content of bundle.json, and the check of every file against it.

    bundle/
      config.json, model.safetensors       the classifier, with the labels in id2label
      tokenizer.json, …                    its tokenizer
      README.md                            the model card
      report.html, tensorboard/            how training went; not hashed, because no prediction depends on it
      trials.json                          the search that found its options (bertray tune); not hashed
      bundle.json                          sha256 of every file, labels, length, origin, metrics; written last

`bertray.bundle.bundle` loads the classifier. This module imports nothing slow.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, ValidationError, model_validator

from bertray.cli import did_you_mean
from bertray.errors import BundleError
from bertray.metrics.profile import Profile
from bertray.storage import local
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE, PAGE_FILE, sha256_of
from bertray.tasks.regression import ValueFacts
from bertray.tasks.task import TASKS
from bertray.types import UNNAMED_PROBLEM_TYPE, LongDocuments, ProblemType

_log = logging.getLogger(__name__)

# Copies of remote bundles that nobody has opened for so long are removed when another one is fetched.
_KEPT_S = 7 * 86_400.0
# Nobody waits longer for the process that fetches one: it may hang.
_FETCH_S = 900.0
_OF_FINGERPRINT = {"stride", "thresholds", "review_below", "problem_type", "values"}
CARD_FILE = "README.md"
EVENTS_FOLDER, TRIALS_FILE = "tensorboard", "trials.json"
_OLD_FILES = {"learning_curves.svg", "trials.parquet"}


class BundleInfo(BaseModel):
    """The content of bundle.json. Bundles made before a field existed use its default."""

    model_config = ConfigDict(frozen=True)

    format_version: int = 1
    labels: tuple[str, ...]  # in the order of their ids
    problem_type: ProblemType = UNNAMED_PROBLEM_TYPE
    max_length: int  # tokens of a window, special tokens included
    long_documents: LongDocuments = "truncate"  # how a longer text is read; see bertray.tokenization.windows
    stride: int | None = None  # tokens by which its windows overlap at least; None: truncate
    origin: Literal["trained", "adopted"] = "trained"  # by bertray train or tune; by others, see bertray adopt
    encoder: str  # Hub id, folder or package of the encoder that was fine-tuned, or of the classifier that was adopted
    encoder_commit: str | None = None  # that of a Hub id
    # Dataset.fingerprint() of the training data; of an adopted model: of the data that it was measured on, or None.
    data_fingerprint: str | None = None
    training: dict[str, Any]  # the job's configuration
    metrics: dict[str, float]  # of the bundle on validation; epoch and train_loss: of the kept epoch
    history: list[dict[str, float]] = []  # one entry per epoch; of an adopted model: none
    validation_profile: Profile | None = None  # of its predictions on the validation rows
    # How sure it is, see `metrics.calibration`.
    temperature: PositiveFloat = 1.0  # the weights of the last layer were divided by it
    calibration: dict[str, float] = {}  # on validation; see `calibrate`; empty: not done
    thresholds: tuple[float, ...] | None = None  # probability from which each label is given; only with several a row
    review_below: NonNegativeFloat | None = None  # rows with a lower score need review; above 1: every row
    target_precision: float | None = Field(None, gt=0, lt=1)  # review_below was chosen for it
    values: ValueFacts | None = None  # intervals and cuts; only of a bundle that gives numbers
    oos_label: str | None = None  # the training data's label for texts out of scope; in `labels` if it was trained on
    versions: dict[str, str]  # of Python and the packages that matter
    files: dict[str, str]  # sha256 of every other file that predictions may depend on

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if (self.stride is None) != (self.long_documents == "truncate"):
            raise ValueError(f"long_documents {self.long_documents} does not go with stride {self.stride}")
        TASKS[self.problem_type].check(self)
        if leading_out := [name for name in self.files if name.startswith("/") or ".." in name.split("/")]:
            raise ValueError(f"the file {leading_out[0]!r} lies outside of the bundle")
        if self.target_precision is not None and self.review_below is None:  # then nothing would be reviewed
            raise ValueError(f"target_precision {self.target_precision} does not go without review_below")
        return self

    def fingerprint(self) -> str:
        """Equal for two bundles that predict the same: same files, same reading of texts, same output."""
        facts = {"files": self.files, "max_length": self.max_length, "long_documents": self.long_documents}
        # Only in the fingerprint if they are set: a bundle made before they existed keeps its fingerprint.
        fields, values = type(self).model_fields, self.model_dump(include=_OF_FINGERPRINT)
        facts |= {name: value for name, value in values.items() if value != fields[name].default}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def opened(uri: str) -> Iterator[tuple[Path, BundleInfo]]:
    """A bundle's folder, local and verified, and its bundle.json, inside the block.

    Raises:
        BundleError: the folder is missing, incomplete or altered.
    """
    location = Location.of(uri)
    info = read_info(location)
    if not location.is_local:
        try:
            folder = _kept(location, info)
        except OSError as error:  # no home that can be written, a full disk, no file locks, the files of somebody else
            _log.warning("warning: no copy of %s is kept here, so each process fetches it: %s", uri, error)
        else:
            yield folder, info
            return
    with location.local_copy() as folder:
        _verify(folder, info, uri)
        yield folder, info


def home_cache(name: str) -> Location:
    """A folder of this user's cache: $XDG_CACHE_HOME/bertray/NAME, by default in ~/.cache."""
    return Location.of(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "bertray" / name


def _remove_old(cache: Path) -> None:
    """Remove what nobody has opened for long. The lock files stay: others may be waiting for one."""
    for old in cache.iterdir():
        # Another process may be opening or removing the same one, or it is of another user.
        with suppress(OSError):  # also the lock's Timeout
            if old.is_dir() and time.time() - old.stat().st_mtime > _KEPT_S:
                with FileLock(f"{old}.lock", timeout=0):
                    # Renamed first, so that nobody takes what is half-removed for a bundle.
                    shutil.rmtree(old.rename(f"{old}.{os.getpid()}"))


def _kept(location: Location, info: BundleInfo) -> Path:
    """A copy of a remote bundle, fetched and verified once for all processes of this user and machine.

    Raises:
        OSError: none can be kept.
    """
    cache = Path(home_cache("bundles").path)
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / info.fingerprint()
    with FileLock(f"{folder}.lock", timeout=_FETCH_S):
        # Who tidies up a cache may have taken single files.
        if not all((folder / name).is_file() for name in info.files):
            _remove_old(cache)
            with location.local_copy(cache) as copy:
                _verify(copy, info, str(location))
                for name in info.files:  # or after a power failure it would have files that nobody verifies again
                    local.sync(copy / name)
                local.remove(folder)
                copy.rename(folder)
        os.utime(folder)
    return folder


def read_info(location: Location) -> BundleInfo:
    """Read bundle.json without loading the model.

    Raises:
        BundleError: it is missing or invalid.
    """
    file = location / BUNDLE_FILE
    if not file.exists():
        is_there = location.exists()
        close = "" if is_there or not location.is_local else did_you_mean(location.name, location.parent().folders())
        raise BundleError(
            f"{location} is no model bundle: it {f'has no {BUNDLE_FILE}' if is_there else 'does not exist'}.{close} "
            f"Make one with bertray train --data DATASET --output {'BUNDLE' if is_there else location}"
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
    """The error when a process finds another bundle than the job began with."""
    return BundleError(f"the bundle {uri} was replaced while the job ran. Run it again")


def _verify(folder: Path, info: BundleInfo, name: str) -> None:
    if added := sorted(_content(folder) - set(info.files)):
        raise BundleError(f"the bundle {name} was altered: {', '.join(added)} does not belong to it. Remove it")
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
    """sha256 of every file in a bundle that predictions may depend on, by relative path."""
    return {name: sha256_of(folder / name) for name in sorted(_content(folder))}


def _content(folder: Path) -> set[str]:
    """Files that predictions may depend on: neither those for people nor hidden ones, which other tools write."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    for_people = {BUNDLE_FILE, CARD_FILE, PAGE_FILE, TRIALS_FILE, *_OLD_FILES}
    return {name for name in names - for_people if not name.startswith((".", f"{EVENTS_FOLDER}/"))}
