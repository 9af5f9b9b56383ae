"""A bundle and an archive that take seconds to make: for benchmarks that count rows or faults, not tokens a second."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel
from transformers.utils import logging as transformers_logging

from bertray.bundle.bundle import seal
from bertray.data.config import PrepareConfig
from bertray.data.prepare import prepare
from bertray.model.sources import encoder_folder

WORDS_A_TEXT = 60


def tiny_bundle(folder: Path) -> Path:
    """A classifier of two tiny layers with random weights."""
    transformers_logging.disable_progress_bar()
    folder.mkdir()
    labels = ("a", "b", "c")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_folder("minilm"), trust_remote_code=False).save_pretrained(folder)
    keys = ("learning_rate", "batch_size", "weight_decay", "warmup_fraction", "precision", "seed", "epochs", "data")
    figures = {"epoch": 1.0, "train_loss": 0.0, "loss": 0.0, "accuracy": 0.0, "f1_macro": 0.0, "wall_s": 0.0}
    seal(
        folder,
        labels=labels,
        max_length=128,
        encoder="random weights",
        data_fingerprint="0" * 64,
        training=dict.fromkeys(keys, 0) | {"keep": "best"},
        metrics=figures,
        history=[figures],
    )
    return folder


def tiny_encoder(folder: Path) -> Path:
    """What can be fine-tuned: two tiny layers with random weights."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder_folder("minilm"), trust_remote_code=False).save_pretrained(folder)
    return folder


def tiny_dataset(folder: Path) -> Path:
    """Some hundred texts of two labels."""
    rows = [{"text": f"the {word} of day {day}", "label": word} for day in range(60) for word in ("apple", "wave")]
    source = folder.with_suffix(".jsonl")
    source.write_text("\n".join(map(json.dumps, rows)))
    prepare(PrepareConfig(input=[str(source)], output=str(folder)))
    return folder


def word_archive(folder: Path, rows_by_shard: list[int]) -> Path:
    """Shards of random words, some 450 bytes a text, of which none comes twice."""
    folder.mkdir()
    vocabulary = AutoTokenizer.from_pretrained(encoder_folder("minilm"), trust_remote_code=False).get_vocab()
    words = np.array(sorted(word for word in vocabulary if word.isalpha() and len(word) > 2))
    rng = np.random.default_rng(0)
    for shard, num_rows in enumerate(rows_by_shard):
        picked = words[rng.integers(len(words), size=(num_rows, WORDS_A_TEXT))]
        texts = pa.array([" ".join(row) for row in picked])
        pq.write_table(pa.table({"text": texts}), folder / f"part-{shard:05d}.parquet", row_group_size=50_000)
    return folder
