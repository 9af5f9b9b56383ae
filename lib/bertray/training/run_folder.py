"""The folder of a training run, or of a search, beside the bundle that it makes, while the run lasts.

    .bundle.training/
      lock/                  one run at a time                        [storage.lock]
      rows/                  token ids of the data set                [training.token_files]
      run.json               what is being trained: written after rows/
      checkpoints/           what the run goes on from                [training.checkpoints]
      tensorboard/           event files                              [training.tracking]
      mlflow_run.json        the run on the tracking server, if there is one
      bundle_begun           what lies at the bundle's place, without bundle.json, is half a bundle of this run's; where
                             a bundle appears in one step there is no such file

A run that ended before its bundle was made, however it ended, is gone on with by the same command. Options that change
nothing but speed, memory, what dropout draws or where things are written may differ then; with others the command is
refused.

A search has such a folder too, `.bundle.tuning/`; what lies in its checkpoints/ says `bertray.drivers.tune`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from bertray.bundle.info import EVENTS_FOLDER
from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.training.config import TrainConfig

_RUN_FILE, _MLFLOW_FILE, _BUNDLE_BEGUN_FILE = "run.json", "mlflow_run.json", "bundle_begun"
# What a run may go on with otherwise.
_FREE = (
    "output",
    "overwrite",
    "restart",
    "num_workers",
    "device",
    "max_failures",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "checkpoint_minutes",
    "checkpoint_steps",
    "keep_checkpoints",
    "mlflow_uri",
    "mlflow_experiment",
    # Of a search: more or fewer trials are the same ones.
    "num_trials",
    "num_concurrent",
)


class TrainingRun:
    """The run that makes the bundle at some place.

    Args:
        output: of the bundle.
        kind: of run.

    Attributes:
        location: the run's folder.
        rows, checkpoints: folders in it.
    """

    def __init__(self, output: Location, kind: Literal["training", "tuning"] = "training") -> None:
        self._kind, self._output = kind, output
        self.location = output.parent() / f".{output.name}.{kind}"
        self.rows, self.checkpoints = self.location / "rows", self.location / "checkpoints"
        self._events = self.location / EVENTS_FOLDER

    def trial_checkpoints(self, number: int) -> Location:
        """The folder of a trial's checkpoints."""
        return self.checkpoints / f"{number:04d}"

    def can_go_on(self, config: TrainConfig, data_fingerprint: str) -> bool:
        """Whether a run of these options is there to go on with; what is there of one that had not begun is removed.

        Raises:
            RequestError: one of other options, or on other data, is there, and has come to a checkpoint.
        """
        file = self.location / _RUN_FILE
        if config.restart:
            file.remove()
        now = _described(config, data_fingerprint)
        before = json.loads(file.read_bytes()) if file.exists() else {}
        differences = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
        if not before or (differences and not self.checkpoints.files()):
            if self.has_left_half_a_bundle():
                self._output.remove()
            files = [self.location / name for name in (_RUN_FILE, _MLFLOW_FILE, _BUNDLE_BEGUN_FILE)]
            for place in (*files, self.rows, self.checkpoints, self._events):
                place.remove()
            return False
        if differences:
            raise RequestError(
                f"a {self._kind} run that has not ended is at {self.location}, with other options: "
                f"{', '.join(differences)}. Go on with it by the command that it was begun with, or say --restart to "
                "begin anew"
            )
        return True

    def begin(self, config: TrainConfig, data_fingerprint: str) -> None:
        """Say what is being trained; `rows` are there."""
        text = json.dumps(_described(config, data_fingerprint), indent=2, ensure_ascii=False)
        (self.location / _RUN_FILE).put(f"{text}\n".encode())

    @contextmanager
    def event_files(self) -> Iterator[Path]:
        """A local folder of the run's event files, inside the block; of a remote run they are copied back after it."""
        if self._events.is_local:
            yield Path(self._events.path)
            return
        with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
            folder = Path(temporary) / EVENTS_FOLDER
            folder.mkdir()
            if self._events.exists():
                with self._events.local_copy() as before:
                    shutil.copytree(before, folder, dirs_exist_ok=True)
            try:
                yield folder
            finally:
                for file in folder.iterdir():
                    (self._events / file.name).put(file.read_bytes())

    def begin_bundle(self) -> None:
        """Say that from now on the bundle is written."""
        if not self._output.is_local:
            (self.location / _BUNDLE_BEGUN_FILE).put(b"")

    def has_left_half_a_bundle(self) -> bool:
        return (self.location / _BUNDLE_BEGUN_FILE).exists() and not (self._output / BUNDLE_FILE).exists()

    def mlflow_run_id(self, uri: str | None) -> str | None:
        """That an earlier attempt has kept, of the same server."""
        file = self.location / _MLFLOW_FILE
        kept: dict[str, str] = json.loads(file.read_bytes()) if file.exists() else {}
        return kept["run_id"] if kept and kept["uri"] == uri else None

    def keep_mlflow_run_id(self, uri: str | None, run_id: str | None) -> None:
        """For later attempts."""
        if run_id is not None:
            (self.location / _MLFLOW_FILE).put(json.dumps({"uri": uri, "run_id": run_id}).encode())


def _described(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    return {**config.model_dump(mode="json", exclude=set(_FREE)), "data_fingerprint": data_fingerprint}
