"""A run of the fine-tuning loop without Ray, in seconds: what tests of the loop share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import BertForSequenceClassification

from bertray.model.pretrained import load_tokenizer
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.training import token_files
from bertray.training.checkpoints import Checkpoints
from bertray.training.config import TrainConfig
from bertray.training.loop import FineTuning
from bertray.training.tracking import StepRecord
from bertray.types import ProblemType

NUM_ROWS, NUM_LABELS = 160, 3
_WORDS = ["apple banana cherry mango", "wheel engine motor brake", "wave shore tide fish"]


def write_rows(folder: Path) -> None:
    """Texts of 7 to 28 tokens that a word tells apart."""
    rng = np.random.default_rng(0)
    tokenizer = ColumnTokenizer(load_tokenizer("minilm", 64)[0].backend_tokenizer, 64)
    splits = {}
    for name, num_rows in (("train", NUM_ROWS), ("validation", 40)):
        ids = rng.integers(0, NUM_LABELS, num_rows)
        texts = [
            f"the {rng.choice(_WORDS[label].split())} of day {row} " + "and so on " * int(rng.integers(0, 8))
            for row, label in enumerate(ids)
        ]
        splits[name] = tokenizer.encode(pa.array(texts)), pa.array([[one] for one in ids], pa.large_list(pa.int32()))
    token_files.write(Location.of(str(folder)), splits, 30522, num_kept=1)


def config(**options: Any) -> TrainConfig:
    settings = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-3, "precision": "fp32", "max_length": 64}
    return TrainConfig(data="unused", output="unused", **{**settings, **options})


def checkpoints_in(folder: Path, settings: TrainConfig) -> Checkpoints:
    """As often as the settings have it."""
    minutes, steps = settings.checkpoint_minutes, settings.checkpoint_steps
    return Checkpoints(Location.of(str(folder)), every_minutes=minutes, every_steps=steps)


@dataclass
class Recorder:
    """A watcher that remembers, and lets the run end at a step."""

    stop_at: int | None = None
    amid_evaluation: bool = False  # where no steps are taken, rather than upon one
    records: list[StepRecord] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        self.records += records
        last_step = self.records[-1].step if self.records else 0
        return self.stop_at is not None and last_step >= self.stop_at and bool(records) != self.amid_evaluation

    def epoch(self, metrics: dict[str, float]) -> None:
        self.epochs.append(metrics)


def small_model(dropout: float = 0.1) -> BertForSequenceClassification:
    from tests.conftest import tiny_config

    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(tiny_config(initializer_range=0.2, **rates))


@contextmanager
def opened_run(
    rows: Path,
    settings: TrainConfig | None = None,
    watcher: Recorder | None = None,
    checkpoints: Checkpoints | None = None,
    model: Any = None,
    problem_type: ProblemType = "single_label_classification",
) -> Iterator[FineTuning]:
    """A run that has not begun."""
    settings = settings or config()
    with token_files.opened(Location.of(str(rows))) as (splits, vocabulary_V):
        yield FineTuning(
            settings,
            model or small_model(),
            splits,
            vocabulary_V,
            problem_type,
            device=torch.device("cpu"),
            watcher=watcher or Recorder(),
            checkpoints=checkpoints,
            keep=settings.keep,
            patience=settings.patience,
        )


def fine_tune(
    rows: Path, settings: TrainConfig, watcher: Recorder, checkpoints: Checkpoints | None = None, model: Any = None
) -> FineTuning:
    """Run to the end, or to where the watcher ends it."""
    with opened_run(rows, settings, watcher, checkpoints, model) as run:
        run.run()
    return run


# Batches of 13 leave a last one of 4, which not all of 4 ranks would get two rows of.
OF_SEVERAL_RANKS = {"epochs": 5, "batch_size": 13, "checkpoint_steps": 5}


def run_rank(folder: Path, name: str, rank: int, world_size: int, port: int) -> None:
    """One rank of several, without dropout, from the checkpoint in FOLDER/NAME; rank 0 writes FOLDER/NAME.pt.

    "bf16" train in that, the others in fp32.
    """
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size
    )
    settings = config(**OF_SEVERAL_RANKS, precision="bf16" if name == "bf16" else "auto")
    # Of machines of which one has bf16.
    torch.cpu._is_amx_tile_supported = lambda: False
    torch.cpu._is_avx512_bf16_supported = lambda: rank == 0
    watcher, checkpoints = Recorder(), checkpoints_in(folder / name, settings)
    run = fine_tune(folder / "rows", settings, watcher, checkpoints, small_model(dropout=0.0))
    assert run.world_size == world_size and isinstance(run.learner._parallel, torch.nn.parallel.DistributedDataParallel)
    assert torch.get_num_threads() == 1
    if rank == 0:
        records = [asdict(record) for record in watcher.records]
        torch.save((records, run.progress.history, run.optimizer.state()), folder / f"{name}.pt")
    # DDP goes before its group, as in a worker of Ray: its end, with Python's lock, of the group's last reference can
    # wait for Gloo's thread, which waits for Python's lock (torch 2.13; seen once in some hundred runs).
    del run
    torch.distributed.destroy_process_group()
