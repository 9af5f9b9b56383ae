"""What a training run leaves in storage while it lasts, so that it can go on from there after whatever happened to it.

    .bundle.training/checkpoints/
      step-00000400/tensors.safetensors   weights and moments of the optimizer
      best-0003/tensors.safetensors       weights after the best epoch so far, and the logits of the validation rows
      step-00000400.json                  step, best epoch, metrics of every epoch: written last

1. snapshot  the caller hands over copies; the run goes on while a thread writes them
2. commit    the .json, in one atomic step: what it names is there, whole
3. tidy      older checkpoints, and files that no .json names, are removed; also those of a run that was killed

A step's randomness follows from its number, so no state of a generator is kept, and no place in the data.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file

from bertray.storage.location import Location
from bertray.storage.lock import check_held
from bertray.training.config import TrainConfig
from bertray.training.tracking import StepRecord

_COMMIT, _TENSORS = ".json", "tensors.safetensors"
_VALIDATION_LOGITS = "validation_logits_NC"  # beside the weights in the file of an epoch


class Progress(BaseModel):
    """How far a run is."""

    model_config = ConfigDict(frozen=True)

    step: int = 0
    epoch_loss_sum: float = 0.0  # of the epoch at work
    epoch_wall_s: float = 0.0
    history: list[dict[str, float]] = Field(default_factory=list)  # metrics of every finished epoch
    records: list[StepRecord] = Field(default_factory=list)  # of some steps, for the curves
    best_epoch: int = 0
    is_done: bool = False


class Best(NamedTuple):
    """The best epoch so far.

    Attributes:
        weights: all of the classifier's, in fp32, on the CPU.
        validation_logits_NC: of the validation rows in scope; rows without tokens at the end may be missing.
    """

    weights: dict[str, torch.Tensor]
    validation_logits_NC: np.ndarray


class Checkpoints:
    """The checkpoints of one run; one process writes them.

    Args:
        folder: of this run alone.
        num_kept: so many of the latest stay.
        before_commit: called before a checkpoint is committed; raises where another process has taken the run over.
        every_minutes: between two of them.
        every_steps: instead of that.
    """

    def __init__(
        self,
        folder: Location,
        num_kept: int = 1,
        before_commit: Callable[[], None] | None = None,
        *,
        every_minutes: float = 10.0,
        every_steps: int | None = None,
    ) -> None:
        self._folder, self._num_kept, self._before_commit = folder, num_kept, before_commit
        self._every_minutes, self._every_steps = every_minutes, every_steps
        self._saved_s = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def latest(self) -> Progress | None:
        """How far the latest checkpoint is; None: there is none."""
        commits = self._commits()
        return Progress.model_validate_json((self._folder / commits[-1]).read_bytes()) if commits else None

    def load(self, progress: Progress) -> dict[str, torch.Tensor]:
        """Weights and moments of a checkpoint."""
        return self._read(_step_name(progress.step))

    def load_best(self, progress: Progress) -> Best:
        """What was given to `save` as the best."""
        weights = self._read(_best_name(progress.best_epoch))
        return Best(validation_logits_NC=weights.pop(_VALIDATION_LOGITS).numpy(), weights=weights)

    def is_due(self, step: int) -> bool:
        """Whether it is time for one, after this step.

        Raises:
            RequestError: the one before could not be written.
        """
        if self._every_steps:
            return step % self._every_steps == 0
        # Only what is not waited for: a store that is slower than the interval must not hold the steps up.
        return time.monotonic() - self._saved_s >= 60 * self._every_minutes and not self.is_busy()

    def is_busy(self) -> bool:
        """Whether a checkpoint is being written now.

        Raises:
            RequestError: the one before could not be written.
        """
        if self._writing is None or not self._writing.done():
            return self._writing is not None
        self._writing.result()
        return False

    def save(self, progress: Progress, tensors: dict[str, torch.Tensor] | None, best: Best | None) -> None:
        """Begin to write a checkpoint, when the one before is written.

        Args:
            tensors: copies that nobody changes; None: the run is done and needs none.
            best: likewise; None: it was saved before.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, progress, tensors, best)
        self._saved_s = time.monotonic()

    def wait(self) -> None:
        """Until what was handed over is in storage.

        Raises:
            RequestError: it could not be written.
        """
        if self._writing is not None:
            self._writing.result()

    def remove_unfinished(self) -> None:
        """Remove what a run that was killed has left half-written."""
        self._folder.remove_unfinished()
        self._tidy(others_write=False)

    def _write(self, progress: Progress, tensors: dict[str, torch.Tensor] | None, best: Best | None) -> None:
        if tensors is not None:
            self._put(_step_name(progress.step), tensors)
        if best is not None:
            logits_NC = torch.from_numpy(best.validation_logits_NC)
            self._put(_best_name(progress.best_epoch), {**best.weights, _VALIDATION_LOGITS: logits_NC})
        if self._before_commit:
            self._before_commit()
        (self._folder / f"{_step_name(progress.step)}{_COMMIT}").put(progress.model_dump_json().encode())
        self._tidy()

    def _put(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        with (self._folder / name / _TENSORS).staged() as path:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        with (self._folder / name).local_copy() as path:
            return load_file(path / _TENSORS)

    def _commits(self) -> list[str]:
        return [info.path for info in self._folder.files((_COMMIT,))]

    def _tidy(self, *, others_write: bool = True) -> None:
        """Remove what no commit names.

        Args:
            others_write: a rank 0 that was taken for dead may live beside the one that follows it: what lies ahead of
                the latest commit may be of a checkpoint that the other is about to commit.
        """
        commits = self._commits()
        kept = commits[-self._num_kept :]
        named = set(kept)
        names = ("", "")
        for commit in kept:
            progress = json.loads((self._folder / commit).read_bytes())
            names = _step_name(progress["step"]), _best_name(progress["best_epoch"])
            named |= {f"{name}/{_TENSORS}" for name in names}
        unnamed = [info.path for info in self._folder.files() if info.path not in named]
        if others_write:
            unnamed = [path for path in unnamed if not any(_is_ahead(path, latest) for latest in names)]
        # A checkpoint's commit goes before what it names.
        for path in sorted(unnamed, key=lambda path: not path.endswith(_COMMIT)):
            (self._folder / path).remove()


def _is_ahead(path: str, latest: str) -> bool:
    """Whether a file is of a later step, or epoch, than the folder of that name is."""
    folder = path.partition("/")[0]
    return folder.partition("-")[0] == latest.partition("-")[0] and folder > latest


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _best_name(epoch: int) -> str:
    return f"best-{epoch:04d}"


def checkpoints_of(config: TrainConfig, folder: Location, run_folder: Location, lock_number: int) -> Checkpoints:
    """The checkpoints of a run, as its options have them; none is committed when the run's lock is lost.

    Args:
        folder: of the checkpoints.
        run_folder: that the lock is on; its number.
    """
    return Checkpoints(
        folder,
        config.keep_checkpoints,
        partial(check_held, run_folder, lock_number),
        every_minutes=config.checkpoint_minutes,
        every_steps=config.checkpoint_steps,
    )
