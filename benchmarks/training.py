"""What benchmarks of training share: prepared data sets, and a run of the loop without Ray, tested on the test rows."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import SHARED_DATA
from bertray.data.config import PrepareConfig
from bertray.data.dataset import Dataset
from bertray.data.prepare import prepare
from bertray.metrics.classification import summary_metrics
from bertray.model.encoder import Encoder
from bertray.model.pretrained import load_classifier, load_tokenizer
from bertray.schema import LABEL_ID, TEXT
from bertray.storage.location import Location
from bertray.tokenization.tokenizer import ColumnTokenizer
from bertray.training import token_files
from bertray.training.config import TrainConfig
from bertray.training.loop import FineTuning
from bertray.training.tracking import StepRecord

SINGLE_LABEL = "single_label_classification"


@dataclass
class Quiet:
    """A watcher that keeps the records."""

    on_epoch: Callable[[], None] = lambda: None
    records: list[StepRecord] = field(default_factory=list)

    def steps(self, records: list[StepRecord], num_steps: int) -> bool:
        self.records += records
        return False

    def epoch(self, metrics: dict[str, float]) -> None:
        self.on_epoch()

    def tokens_per_s(self) -> list[float]:
        """Of each epoch, without validation; of each look, all steps have the same."""
        epochs: dict[int, list[float]] = {}
        for record in self.records:
            epochs.setdefault(math.ceil(record.epoch - 1e-9), []).append(1 / record.tokens_per_s)
        return [len(inverse) / sum(inverse) for inverse in epochs.values()]


@dataclass(frozen=True)
class Run:
    """What a run of training gave."""

    tokens_per_s: list[float]  # of each epoch: without validation, without what precedes the first step
    wall_s: float
    accuracy: float  # on the test rows, in fp32
    f1_macro: float
    history: list[dict[str, float]]
    last: tuple[float, float]  # accuracy and macro-F1 of the last epoch's weights


class Subject:
    """A data set of ../shared/data, prepared once: cleaned, tokenised, its official test rows for the test."""

    def __init__(self, name: str, folder: Path, encoder: str = "minilm", max_length: int = 128) -> None:
        source = SHARED_DATA / name
        config = PrepareConfig(
            input=[str(source / "train.parquet")],
            validation=str(source / "dev.parquet") if (source / "dev.parquet").exists() else None,
            test=str(source / "test.parquet"),
            output=str(folder / name),
        )
        prepare(config)
        self.name, self.encoder, self.max_length = name, encoder, max_length
        self.data = config.output
        self.dataset = Dataset.open(self.data)
        self.tokenizer, encoder_config = load_tokenizer(encoder, max_length)
        self._column_tokenizer = ColumnTokenizer(self.tokenizer.backend_tokenizer, max_length)
        self._rows = Location.of(str(folder / f"{name}-rows"))
        token_files.write_rows(self._rows, self.dataset, self._column_tokenizer, encoder_config)
        tokens = self._column_tokenizer.encode(self.dataset.split("train")[TEXT])
        self.num_train_tokens = tokens.num_tokens
        self.train_ids = [one.tolist() for one in np.split(tokens.ids_T, tokens.offsets_S1[1:-1])]
        self.train_labels = self.dataset.split("train")[LABEL_ID].to_pylist()

    def config(self, **options: Any) -> TrainConfig:
        return TrainConfig(data=self.data, output="unused", encoder=self.encoder, max_length=self.max_length, **options)

    def classifier(self, seed: int) -> Any:
        return load_classifier(self.encoder, self.dataset.labels, SINGLE_LABEL, seed)

    def run(self, *, on_epoch: Callable[[], None] = lambda: None, **options: Any) -> Run:
        """Fine-tune with the loop of bertray train, and test."""
        config, watcher = self.config(**options), Quiet(on_epoch)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with token_files.opened(self._rows) as (splits, vocabulary_V):
            tuning = FineTuning(
                config,
                self.classifier(config.seed),
                splits,
                vocabulary_V,
                SINGLE_LABEL,
                device=device,
                watcher=watcher,
                keep=config.keep,
                patience=config.patience,
            )
            started_s = time.perf_counter()
            tuning.run()
            wall_s = time.perf_counter() - started_s
        history = tuning.progress.history
        last, best = tuning.learner.complete(tuning.optimizer.weights()), tuning.best
        return Run(watcher.tokens_per_s(), wall_s, *self.test_weights(best), history, self.test_weights(last))

    def test_weights(self, weights: dict[str, torch.Tensor]) -> tuple[float, float]:
        """`test` of the encoder with these weights."""
        model = self.classifier(0)
        model.load_state_dict(weights)
        return self.test(model)

    def test(self, model: Any) -> tuple[float, float]:
        """Accuracy and macro-F1 on the test rows, in fp32."""
        rows = self.dataset.split("test")
        logits_NC = Encoder(model, "fp32").logits(self._column_tokenizer.encode(rows[TEXT]))
        metrics = summary_metrics(rows[LABEL_ID].to_numpy(), logits_NC.argmax(axis=1), len(self.dataset.labels))
        return metrics["accuracy"], metrics["f1_macro"]


@contextmanager
def prepared(*names: str) -> Iterator[list[Subject]]:
    """Subjects in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="bertray-benchmark-") as folder:
        yield [Subject(name, Path(folder)) for name in names]
