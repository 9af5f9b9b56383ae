"""The bare engine, text to logits, beside what people run today; without Ray, without the network.

    python -m benchmarks.engine                       MiniLM (extra 'demo') on real sentences
    python -m benchmarks.engine --bundle bundle       the same with a bundle's model; with OpenVINO, if it is installed

On CPUs; `benchmarks/gpu.sh` asks a GPU the same. Every row of the table is measured in the same run, in turns; tokens
are those of the texts, padding is not counted. `of the products` is the model's arithmetic a second over that of a
large bf16 matrix product of this run.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)
from transformers.utils import logging as transformers_logging

from benchmarks.results import ROOT, SHARED_DATA, interleaved, write_result
from bertray.model.encoder import Encoder
from bertray.tokenization.tokenizer import ColumnTokenizer, TokenColumn

BATCH_SIZE = 32  # of the peers
NUM_TEXTS = 1000
SAMPLE = 0.25  # share of the texts that slow peers get
MATRIX_SIZE = 2048


@dataclass
class Subject:
    """What is run: texts, their tokenizer, and a model that each peer gets a copy of."""

    name: str
    texts: list[str]
    tokenizer: Any
    model: Any
    max_length: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="a bundle of bertray train")
    parser.add_argument("--texts", type=Path, help="a Parquet file with a column text")
    parser.add_argument("--num-texts", type=int)
    parser.add_argument("--join", type=int, default=1, help="so many consecutive texts make one")
    parser.add_argument("--max-length", type=int, help="tokens a text is cut to; default: 512, or the bundle's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; default: all")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.max_length is None:
        info = json.loads((options.bundle / "bundle.json").read_text()) if options.bundle else {}
        options.max_length = info.get("max_length", 512)
    if options.threads:
        torch.set_num_threads(options.threads)
    _measure(_minilm(options), options)


def _measure(subject: Subject, options: argparse.Namespace) -> None:
    columnar = ColumnTokenizer(subject.tokenizer.backend_tokenizer, subject.max_length)
    column = pa.array(subject.texts)
    tokens = columnar.encode(column)
    sample = random.Random(0).sample(range(len(subject.texts)), round(SAMPLE * len(subject.texts)))
    sampled = [subject.texts[index] for index in sample]
    num_sampled_tokens = int(tokens.lengths_S[sample].sum())

    runs: dict[str, tuple[int, Callable[[], object]]] = {}
    classify = pipeline(
        "text-classification",
        model=copy.deepcopy(subject.model),
        tokenizer=subject.tokenizer,
        device="cpu",
        batch_size=BATCH_SIZE,
    )
    runs[f"transformers.pipeline, batch {BATCH_SIZE}, fp32"] = (
        num_sampled_tokens,
        lambda: classify(sampled, truncation=True, max_length=subject.max_length),
    )
    for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        peer = SortedPadded(subject, copy.deepcopy(subject.model).to(dtype).eval(), BATCH_SIZE)
        name = f"sorted, padded batches of {BATCH_SIZE}, SDPA, {short}"
        runs[name] = (num_sampled_tokens, lambda peer=peer: peer.logits(sampled))
    encoders = {
        f"bertray, torch, {precision}": Encoder(copy.deepcopy(subject.model), precision, "cpu")
        for precision in ("fp32", "bf16")
    }
    for name, encoder in encoders.items():
        runs[name] = (
            tokens.num_tokens,
            lambda encoder=encoder: encoder.logits(columnar.encode(pa.array(subject.texts))),
        )

    openvino: dict[str, Any] = {}
    if options.bundle and find_spec("openvino"):
        openvino = _add_openvino(runs, options.bundle, tokens, column)

    for _, run in runs.values():  # warm up
        run()
    products = [_product_rate()]
    walls_s = interleaved({name: run for name, (_, run) in runs.items()}, options.repeats)
    products.append(_product_rate())
    product_rate = max(products)

    base = next(iter(runs))
    rates = {name: num_tokens / walls_s[name] for name, (num_tokens, _) in runs.items()}
    lines = ["| what | tokens/s | texts/s | ratio | of the products |", "|---|---|---|---|---|"]
    mean_length = tokens.num_tokens / len(tokens.lengths_S)
    flop_a_token = flop(subject.model, tokens.lengths_S) / tokens.num_tokens
    for name, rate in rates.items():
        share = rate * flop_a_token / product_rate
        lines.append(
            f"| {name} | {rate:.0f} | {rate / mean_length:.1f} | {rate / rates[base]:.2f} | {100 * share:.0f} % |"
        )
    lines += ["", f"A bf16 matrix product of {MATRIX_SIZE}² runs at {product_rate / 1e9:.0f} GFLOP/s here."]
    facts = {
        "texts": subject.name,
        "num_texts": len(subject.texts),
        "num_texts_of_slow_peers": len(sampled),
        "num_tokens": tokens.num_tokens,
        "mean_tokens": round(mean_length, 1),
        "max_length": subject.max_length,
        "num_parameters": sum(one.numel() for one in subject.model.parameters()),
        "flop_a_token": round(flop_a_token),
        "product_gflop_per_s": [round(rate / 1e9, 1) for rate in products],
        "num_threads": torch.get_num_threads(),
        "token_budget": next(reversed(encoders.values())).token_budget,
        "repeats": options.repeats,
        "openvino": openvino,
        "wall_s": {name: round(wall_s, 3) for name, wall_s in walls_s.items()},
    }
    write_result("engine", f"cpu-{subject.name}", "\n".join(lines), facts)


def _add_openvino(
    runs: dict[str, tuple[int, Callable[[], object]]], bundle: Path, tokens: TokenColumn, column: pa.Array
) -> dict[str, Any]:
    """Add the bundle's exported model in bf16 and, if it loses no accuracy, in int8; returns what was decided."""
    from bertray.bundle.openvino import open_bundle
    from bertray.storage.location import Location

    facts = {}
    with tempfile.TemporaryDirectory(prefix="bertray-bench-") as cache:
        for precision in ("bf16", "int8"):
            opened, facts[precision] = open_bundle(str(bundle), "openvino", precision, cache=Location.of(cache))
            runs[f"bertray, OpenVINO, {opened.encoder.precision}"] = (
                tokens.num_tokens,
                lambda opened=opened: opened.encoder.logits(opened.tokenizer.encode(column)),
            )
    return facts


class SortedPadded:
    """What sentence-transformers does: sort all texts by length, batches of so many texts, padded to the longest."""

    def __init__(self, subject: Subject, model: Any, batch_size: int) -> None:
        self._tokenizer, self._max_length = subject.tokenizer, subject.max_length
        self._model, self._batch_size = model, batch_size

    @torch.inference_mode()
    def logits(self, texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        parts = []
        for start in range(0, len(order), self._batch_size):
            batch = self._tokenizer(
                [texts[index] for index in order[start : start + self._batch_size]],
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(self._model.device)
            parts.append(self._model(**batch).logits.float().cpu())
        return torch.cat(parts).numpy()


def _minilm(options: argparse.Namespace) -> Subject:
    from bertray.model.sources import encoder_folder

    path = options.texts or SHARED_DATA / "csabstruct" / "train.parquet"
    if not path.exists() and not options.texts:
        path = ROOT / "demo" / "archive"
    if not path.exists():
        sys.exit(f"{path} is missing: run make demo, or give --texts FILE")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    column = pa.concat_tables([pq.read_table(file, columns=["text"]) for file in files])["text"].drop_null()
    texts = [text for text in column.to_pylist() if text.strip()]
    if options.join > 1:
        texts = [" ".join(texts[start : start + options.join]) for start in range(0, len(texts), options.join)]
    texts = random.Random(0).sample(texts, min(len(texts), options.num_texts or NUM_TEXTS))
    folder = options.bundle or encoder_folder("minilm")
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = path.parent.name if path.is_file() else path.name
    return Subject(name, texts, tokenizer, model.eval(), options.max_length)


def flop(model: Any, lengths_S: np.ndarray) -> float:
    """Floating-point operations of the encoder's matrix products on sequences of these lengths."""
    encoder = getattr(model, model.base_model_prefix)
    linear = sum(
        2 * layer.in_features * layer.out_features
        for name, layer in encoder.named_modules()
        if isinstance(layer, torch.nn.Linear) and "pooler" not in name
    )
    attention = 4 * model.config.num_hidden_layers * model.config.hidden_size * np.square(lengths_S, dtype=float)
    return float(linear * lengths_S.sum() + attention.sum())


def _product_rate() -> float:
    """Floating-point operations a second of a large bf16 matrix product: the best of some."""
    size = MATRIX_SIZE
    one, other = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    best_s = float("inf")
    for _ in range(8):
        started_s = time.perf_counter()
        one @ other
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * size**3 / best_s


if __name__ == "__main__":
    main()
