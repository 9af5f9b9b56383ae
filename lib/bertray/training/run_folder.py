"""The folder that a training run or a search has beside its bundle until the bundle is finished.

    .bundle.training/
      lock/                  one run at a time                        [storage.lock]
      rows/                  token ids of the data set                [training.token_files]
      run.json               what is trained; written after rows/
      checkpoints/           what the run continues from              [training.checkpoints]
      bundle_begun           on S3, where a bundle does not appear in one step: an output without bundle.json is an
                             unfinished bundle of this run

The same command continues a run that ended before its bundle was finished. Options that change only speed, memory, the
dropout mask or where things are written may differ then; with other options the command is refused.

A search has such a folder too, `.bundle.tuning/`; `bertray.drivers.tune` says what is in its checkpoints/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from bertray.errors import RequestError
from bertray.storage.location import Location
from bertray.storage.outputs import BUNDLE_FILE
from bertray.training.config import TrainConfig

# Options that may differ when a run is continued. Of a search: a trial does not depend on how many there are.
_FREE = {
    "output", "overwrite", "restart", "num_workers", "device", "max_failures", "micro_batch_tokens",
    "gradient_checkpointing", "checkpoint_minutes", "checkpoint_steps", "mlflow_uri", "mlflow_experiment", "num_trials",
    "num_concurrent",
}  # fmt: skip

Kind = Literal["training", "tuning"]


class TrainingRun:
    """The run that makes the bundle at `output`.

    Attributes:
        location: the run's folder.
        rows, checkpoints: folders in it.
    """

    def __init__(self, output: Location, kind: Kind = "training") -> None:
        self._kind, self._output = kind, output
        self.location = output.parent() / f".{output.name}.{kind}"
        self.rows, self.checkpoints = self.location / "rows", self.location / "checkpoints"
        self._run_file, self._bundle_begun = self.location / "run.json", self.location / "bundle_begun"

    def trial_checkpoints(self, number: int) -> Location:
        """The folder of a trial's checkpoints."""
        return self.checkpoints / f"{number:04d}"

    def can_continue(self, config: TrainConfig, data_fingerprint: str) -> bool:
        """Whether there is a run to continue. Removes the files of another run, unless it has a checkpoint.

        Raises:
            RequestError: it has one, and other options or other data.
        """
        if config.restart:
            self._run_file.remove()
        now = _described(config, data_fingerprint)
        before = json.loads(self._run_file.read_bytes()) if self._run_file.exists() else {}
        differences = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if before.get(name) != now[name]]
        if not before or (differences and not self.what_is_kept()):
            if self.has_left_half_a_bundle():
                self._output.remove()
            for place in (self._run_file, self._bundle_begun, self.rows, self.checkpoints):
                place.remove()
            return False
        if differences:
            what = f"other options: {', '.join(differences)}. Continue it with the options that it began with"
            if differences[0].startswith("data_fingerprint"):
                what = f"rows that {config.data} does not have any more. Put the data set back"
            raise RequestError(
                f"an unfinished {self._kind} run is at {self.location}, with {what}, or say --restart to discard it"
            )
        return True

    def begin(self, config: TrainConfig, data_fingerprint: str) -> None:
        """Record what is trained, now that `rows` are written."""
        text = json.dumps(_described(config, data_fingerprint), indent=2, ensure_ascii=False)
        self._run_file.put(f"{text}\n".encode())

    def what_is_kept(self) -> str:
        """What another attempt can continue from, for messages; empty if there is nothing."""
        commits = [info.path for info in self.checkpoints.files((".json",))]
        if not commits:
            return ""
        if self._kind == "training":
            return f"step {int(Path(commits[-1]).stem.removeprefix('step-'))} is kept"
        return f"{sum('/' not in path for path in commits)} finished trials and the checkpoints of others are kept"

    def begin_bundle(self) -> None:
        """Record that the bundle is being written."""
        if not self._output.is_local:
            self._bundle_begun.put(b"")

    def has_left_half_a_bundle(self) -> bool:
        return self._bundle_begun.exists() and not (self._output / BUNDLE_FILE).exists()


def _described(config: TrainConfig, data_fingerprint: str) -> dict[str, Any]:
    return {"data_fingerprint": data_fingerprint, **config.model_dump(mode="json", exclude=_FREE)}
