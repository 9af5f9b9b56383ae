"""The checkpoints of a training run, from which it resumes after any interruption.

    .bundle.training/checkpoints/
      step-00000400/tensors.safetensors   weights, and the optimizer's moments
      best-0003/tensors.safetensors       weights of the best epoch so far
      step-00000400.json                  step, best epoch, metrics of all epochs: the commit, written last

1. snapshot  the caller passes copies of its tensors, and goes on while a thread writes them
2. commit    write the .json atomically: the files that it names are complete
3. tidy      remove older checkpoints, and files that no .json names, such as those of a killed run

Randomness and batches are functions of the seed and the step, so a checkpoint holds no state of generators or readers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from bertray.storage.location import Location
from bertray.training.tracking import StepRecord

_COMMIT, _TENSORS = ".json", "tensors.safetensors"


class Progress(BaseModel):
    """How far a run is."""

    step: int = 0  # the last one taken
    epoch_loss_sum: float = 0.0  # over the steps of the unfinished epoch
    epoch_wall_s: float = 0.0
    history: list[dict[str, float]] = []  # metrics of each finished epoch
    records: list[StepRecord] = []  # of some steps, for the curves
    best_epoch: int = 0
    unit: tuple[float, float] = (0.0, 1.0)  # of the weights' outputs: of numbers, mean and deviation of the training's
    is_done: bool = False


class Checkpoints:
    """The checkpoints of one run; one process writes them.

    Args:
        folder: of this run only.
        before_commit: called before each commit; raises if another process has taken over the run.
        every_minutes: time between two checkpoints.
        every_steps: steps between two checkpoints, instead of `every_minutes`.
    """

    def __init__(
        self,
        folder: Location,
        before_commit: Callable[[], None] = lambda: None,
        *,
        every_minutes: float = 10.0,
        every_steps: int | None = None,
    ) -> None:
        self._folder, self._before_commit = folder, before_commit
        self._every_minutes, self._every_steps = every_minutes, every_steps
        self._saved_s = time.monotonic()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def latest(self) -> Progress | None:
        """Progress at the latest checkpoint; None: there is no checkpoint."""
        commits = [info.path for info in self._folder.files((_COMMIT,))]
        return Progress.model_validate_json((self._folder / commits[-1]).read_bytes()) if commits else None

    def load(self, progress: Progress) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint."""
        return self._read(_step_name(progress))

    def load_best(self, progress: Progress) -> dict[str, torch.Tensor]:
        """The weights of a checkpoint's best epoch: all of the classifier, fp32, on the CPU."""
        return self._read(_best_name(progress))

    def is_due(self, step: int) -> bool:
        """Whether to save a checkpoint after this step; raises as `wait`."""
        if self._every_steps:
            return step % self._every_steps == 0
        # Not while one is being written: steps must not wait for slow storage.
        if self._writing and not self._writing.done():
            return False
        self.wait()
        return time.monotonic() - self._saved_s >= 60 * self._every_minutes

    def save(
        self, progress: Progress, tensors: dict[str, torch.Tensor] | None, best: dict[str, torch.Tensor] | None
    ) -> None:
        """Wait until the last checkpoint is written, then start to write this one.

        Args:
            tensors: copies that nobody changes; None: the run is done and needs none.
            best: likewise, the weights of the best epoch; None: an earlier checkpoint holds them.
        """
        self.wait()
        self._writing = self._writer.submit(self._write, progress.model_copy(deep=True), tensors, best)
        self._saved_s = time.monotonic()

    def wait(self) -> None:
        """Wait until the last checkpoint is in storage.

        Raises:
            RequestError: it could not be written.
        """
        if self._writing:
            self._writing.result()

    def remove_unfinished(self) -> None:
        """Remove half-written files of a killed run."""
        self._folder.remove_unfinished()
        self._tidy(others_write=False)

    def _write(
        self, progress: Progress, tensors: dict[str, torch.Tensor] | None, best: dict[str, torch.Tensor] | None
    ) -> None:
        if tensors is not None:
            self._put(_step_name(progress), tensors)
        if best is not None:
            self._put(_best_name(progress), best)
        self._before_commit()
        (self._folder / f"{_step_name(progress)}{_COMMIT}").put(progress.model_dump_json().encode())
        self._tidy(others_write=True)

    def _put(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        with (self._folder / name / _TENSORS).staged() as path:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)

    def _read(self, name: str) -> dict[str, torch.Tensor]:
        with (self._folder / name).local_copy() as path:
            return load_file(path / _TENSORS)

    def _tidy(self, *, others_write: bool) -> None:
        """Remove what the latest commit does not name.

        Args:
            others_write: keep what is ahead of the latest commit. If this rank 0 was taken for dead but lives, its
                successor writes to the same folder, and may be about to commit those files.
        """
        latest = self.latest()
        named = {_step_name(latest), _best_name(latest)} if latest else set()
        paths = [info.path for info in self._folder.files()]
        paths.sort(key=lambda path: not path.endswith(_COMMIT))  # commits go before the files that they name
        for path in paths:
            name = path.partition("/")[0].removesuffix(_COMMIT)
            is_ahead = name > max((one for one in named if one[:5] == name[:5]), default=name)  # "step-" or "best-"
            if name not in named and not (others_write and is_ahead):
                (self._folder / path).remove()


def _step_name(progress: Progress) -> str:
    return f"step-{progress.step:08d}"


def _best_name(progress: Progress) -> str:
    return f"best-{progress.best_epoch:04d}"
