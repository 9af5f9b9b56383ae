"""The folder of a training run, beside the bundle that it makes, while the run lasts.

    .bundle.training/
      lock/                  one run at a time                        [bertray.run_lock]
      rows/                  token ids of the data set                [bertray.training_rows]
      run.json               what is being trained: written after rows/
      checkpoints/           what the run goes on from                [bertray.checkpoints]

A run that ended before its bundle was made, however it ended, is gone on with by the same command. Options that change
nothing but speed, memory or where things are written may differ then; with others the command is refused.
"""

from __future__ import annotations

import json
from typing import Any

from bertray.config import TrainConfig
from bertray.errors import RequestError
from bertray.storage import Location

_RUN_FILE = "run.json"
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
)


class TrainingRun:
    """The run that makes the bundle at some place.

    Args:
        output: of the bundle.

    Attributes:
        location: the run's folder.
        rows, checkpoints: folders in it.
    """

    def __init__(self, output: Location) -> None:
        self.location = output.parent() / f".{output.name}.training"
        self.rows, self.checkpoints = self.location / "rows", self.location / "checkpoints"

    def can_go_on(self, config: TrainConfig, data_fingerprint: str) -> bool:
        """Whether a run of these options is there to go on with; what is there of one that had not begun is removed.

        Raises:
            RequestError: one of other options, or on other data, is there.
        """
        file = self.location / _RUN_FILE
        if config.restart:
            file.remove()
        if not file.exists():
            self.rows.remove()
            self.checkpoints.remove()
            return False
        before, now = json.loads(file.read_bytes()), _described(config, data_fingerprint)
        if differences := [
            f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]
        ]:
            raise RequestError(
                f"a training run that has not ended is at {self.location}, with other options: "
                f"{', '.join(differences)}. Go on with it by the command that it was begun with, or say --restart to "
                "begin anew"
            )
        return True

    def begin(self, config: TrainConfig, data_fingerprint: str) -> None:
        """Say what is being trained; `rows` are there."""
        text = json.dumps(_described(config, data_fingerprint), indent=2, ensure_ascii=False)
        (self.location / _RUN_FILE).put(f"{text}\n".encode())


def _described(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    return {**config.model_dump(mode="json", exclude=set(_FREE)), "data_fingerprint": data_fingerprint}
