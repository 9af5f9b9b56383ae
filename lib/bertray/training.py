"""From a data set to a bundle: the driver's side of training.

1. check     data set, encoder, output and cluster, before any time is spent
2. run       `finetuning.train_on_worker` on every worker of a Ray TorchTrainer
3. choose    the epoch with the best macro-F1 on validation
4. bundle    its weights, the tokenizer, the model card, bundle.json
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from pyarrow.fs import FSSpecHandler, LocalFileSystem, PyFileSystem
from ray.train.torch import TorchTrainer

from bertray import cluster
from bertray.bundle import seal
from bertray.bundle_folder import BUNDLE_FILE
from bertray.config import TrainConfig
from bertray.dataset import Dataset
from bertray.errors import BertrayError, RequestError
from bertray.finetuning import PROFILE_FILE, train_on_worker
from bertray.pretrained import load_tokenizer
from bertray.profile import Profile
from bertray.progress import ProgressBar
from bertray.storage import Location

_log = logging.getLogger(__name__)

_KEPT_BY = "f1_macro"
_NOT_SCORES = ("num_train_tokens", "wall_s")


def train(config: TrainConfig) -> dict[str, Any]:
    """Fine-tune, keep the best epoch and write the bundle; returns the summary.

    Raises:
        RequestError: something about data, encoder, output or cluster does not fit; nothing was started.
    """
    started_s = time.monotonic()
    output = Location.of(config.output)
    _check_output(output, config)
    dataset = Dataset.open(config.data)
    tokenizer, _ = load_tokenizer(config.encoder, config.max_length, config.overlap)
    # Workers may run in other folders: from here on places are absolute.
    update = {"data": str(dataset.location), "output": str(output)}
    if Path(config.encoder).expanduser().is_dir():
        update["encoder"] = str(Path(config.encoder).expanduser().resolve())
    config = config.model_copy(update=update)

    # Checkpoints of the run, beside the bundle because every worker can reach that place; removed when it is done.
    scratch = output.parent() / f".{output.name}.train-{time.strftime('%Y%m%dT%H%M%S')}"
    try:
        with cluster.session():
            checkpoint, best, history = _fit(config, dataset, scratch)
    except BaseException:  # also Ctrl-C; when the session has ended, for until then workers may write there
        scratch.remove()
        raise
    try:
        with tempfile.TemporaryDirectory(prefix="bertray-") as temporary:
            folder = Path(temporary) / "bundle"
            checkpoint.to_directory(folder)
            profile_file = folder / PROFILE_FILE
            profile = Profile.model_validate_json(profile_file.read_text())
            profile_file.unlink()
            tokenizer.save_pretrained(folder)
            info = seal(
                folder,
                labels=dataset.labels,
                max_length=config.max_length,
                long_documents=config.long_documents,
                stride=config.overlap,
                encoder=config.encoder,
                data_fingerprint=dataset.fingerprint(),
                training=config.model_dump(),
                metrics={name: value for name, value in best.items() if name not in _NOT_SCORES},
                history=history,
                validation_profile=profile,
            )
            output.put_folder(folder, last=BUNDLE_FILE)
    except BaseException:
        _log.error("the bundle could not be written; the trained weights are in %s", checkpoint.path)
        raise
    scratch.remove()
    wall_s = time.monotonic() - started_s
    num_tokens = sum(epoch["num_train_tokens"] for epoch in history)
    return {
        "output": str(output),
        "best_epoch": int(best["epoch"]),
        "validation": info.metrics,
        "num_train_tokens": int(num_tokens),
        "train_tokens_per_s": round(num_tokens / sum(epoch["wall_s"] for epoch in history), 1),
        "wall_s": round(wall_s, 1),
        "fingerprint": info.fingerprint(),
    }


def _check_output(output: Location, config: TrainConfig) -> None:
    """Refuse to replace anything but a bundle."""
    if output.contains(Location.of(config.data)):
        raise RequestError(f"--output {output} holds --data {config.data}: choose a folder of its own for the bundle")
    if not output.exists() or (not output.is_file() and not output.files()):
        return
    if not config.overwrite:
        raise RequestError(f"--output {output} exists. Choose another folder, or replace a bundle with --overwrite")
    if not (output / BUNDLE_FILE).exists():
        raise RequestError(f"--output {output} exists and is no bundle (it has no {BUNDLE_FILE}): it is not replaced")


def _fit(
    config: TrainConfig, dataset: Dataset, scratch: Location
) -> tuple[Any, dict[str, float], list[dict[str, float]]]:
    """Run the workers; returns the best checkpoint, its epoch's metrics, and those of every epoch."""
    placement = cluster.place(config.device, config.num_workers, "--num-workers")
    num_rows = dataset.num_rows("train")
    num_steps = -(-num_rows // config.batch_size) * config.epochs
    _log.info(
        "fine-tuning %s on %d rows of %d labels; epochs: %d of %s%d steps; workers: %d, each with %s",
        config.encoder,
        num_rows,
        len(dataset.labels),
        config.epochs,
        "" if config.overlap is None else "at least ",
        num_steps // config.epochs,
        placement.num_processes,
        placement.share,
    )
    filesystem = LocalFileSystem() if scratch.is_local else PyFileSystem(FSSpecHandler(scratch.fs))
    board = ray.remote(num_cpus=0)(_Board).remote()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"config": config.model_dump(), "board": board},
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.num_processes,
            use_gpu=placement.use_gpu,
            resources_per_worker={"CPU": placement.cpus_each, **({"GPU": 1} if placement.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=scratch.name,
            storage_path=scratch.parent().path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=_KEPT_BY, checkpoint_score_order="max"
            ),
        ),
    )
    try:
        with _shown(board, num_steps):
            result = _run(trainer)
    except ray.train.WorkerGroupError as error:
        # What a worker said on purpose is the message; anything else keeps Ray's, with the worker's traceback.
        said = next((one for one in error.worker_failures.values() if isinstance(one, BertrayError)), None)
        raise said or error from error
    history: list[dict[str, float]] = ray.get(board.epochs.remote())
    checkpoint, best = max(result.best_checkpoints, key=lambda pair: pair[1][_KEPT_BY])
    return checkpoint, best, history


class _Board:
    """Where rank 0 says how far it is and the driver looks."""

    def __init__(self) -> None:
        self._step, self._num_steps, self._note = 0, 0, "starting workers"
        self._epochs: list[dict[str, float]] = []

    def post(self, step: int, num_steps: int, note: str) -> None:
        self._step, self._num_steps, self._note = step, num_steps, note

    def post_epoch(self, metrics: dict[str, float]) -> None:
        self._epochs.append(metrics)

    def state(self) -> tuple[int, int, str, int]:
        return self._step, self._num_steps, self._note, len(self._epochs)

    def epochs(self) -> list[dict[str, float]]:
        return self._epochs


def _run(trainer: TorchTrainer) -> ray.train.Result:
    """`trainer.fit()`, in a thread: in the main one Ray 2.60 takes SIGINT over, and ends the process without a word."""
    done: Future[ray.train.Result] = Future()

    def run() -> None:
        try:
            done.set_result(trainer.fit())
        except BaseException as error:  # whatever it is, the main thread raises it
            done.set_exception(error)

    threading.Thread(target=run, name="trainer", daemon=True).start()
    return done.result()


@contextmanager
def _shown(board: Any, num_steps: int) -> Iterator[None]:
    """Show the board's state while the block runs."""
    done = threading.Event()

    def show() -> None:
        num_logged = 0
        with ProgressBar("training", num_steps, "steps") as bar:
            while True:
                last_look = done.wait(0.5)
                step, num_steps_found, note, num_epochs = ray.get(board.state.remote())
                bar.update(step, note, num_steps_found)
                for metrics in ray.get(board.epochs.remote())[num_logged:] if num_epochs > num_logged else []:
                    _log.info(
                        "epoch %d: train loss %.4f, validation loss %.4f, accuracy %.4f, macro-F1 %.4f, %.0f s",
                        *(metrics[key] for key in ("epoch", "train_loss", "loss", "accuracy", "f1_macro", "wall_s")),
                    )
                num_logged = num_epochs
                if last_look:
                    return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
