"""A part of the run: its shapes, and a file of what it has found that is whole after every finding."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from bertray.tokenization.tokenizer import TokenColumn
from bertray.tokenization.windows import offsets

VOCABULARY_SIZE = 30_522


class Size(NamedTuple):
    """How large what is run is."""

    is_tiny: bool
    rounds: int
    layers: int  # of a model that is measured
    few_layers: int  # of one that is compared
    width: int
    heads: int
    mean_lengths: tuple[int, ...]
    tokens: int  # of a round of ours; slower peers get a tenth
    matrix: int
    texts_compared: int
    steps: int  # of a training that is measured

    @classmethod
    def of(cls, device: str, *, is_quick: bool) -> Size:
        if device == "cpu":
            return cls(True, 1, 2, 2, 64, 4, (30,), 2_000, 128, 30, 3)
        if is_quick:
            return cls(False, 3, 12, 4, 768, 12, (128,), 1_000_000, 8192, 100, 100)
        return cls(False, 5, 12, 4, 768, 12, (30, 128, 512), 2_000_000, 8192, 500, 300)


@dataclass
class Part:
    """What a part has found so far.

    Attributes:
        device: cuda, or cpu, where a stand-in takes the kernel's place and nothing is large.
    """

    name: str
    file: Path
    device: str
    size: Size
    found: list[dict[str, Any]] = field(default_factory=list)

    def say(self, what: str, result: str, **facts: Any) -> None:
        """Keep a finding, print it, and write all."""
        self.found.append({"what": what, "result": result, **facts})
        shown = ", ".join(f"{name} {_short(value)}" for name, value in facts.items())
        print(f"{result:>9}  {what}{': ' if shown else ''}{shown}", flush=True)
        beside = self.file.with_suffix(".tmp")
        beside.write_text(json.dumps(self.found, indent=1) + "\n")
        beside.replace(self.file)  # at once: the part may be ended at any time

    def read(self) -> None:
        """Take what the part's own process has written."""
        self.found = json.loads(self.file.read_text()) if self.file.exists() else []

    def counts(self) -> dict[str, int]:
        """How many findings of each result."""
        return dict(Counter(one["result"] for one in self.found))

    def check(self, what: str, difference: Callable[[], float], at_most: float) -> None:
        """Whether a difference is small; an error is a failure of this check alone, unless the GPU is lost."""
        try:
            found = difference()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            traceback.print_exc()
            self.say(what, "failed", error=f"{type(error).__name__}: {error}")
            return
        is_small = math.isfinite(found) and found <= at_most
        self.say(what, "passed" if is_small else "failed", difference=found, at_most=at_most)

    def rates(self, runs: dict[str, tuple[int, float, Callable[[], object]]], rate: float, **facts: Any) -> None:
        """Measure runs in turns, and keep of each the median tokens a second and the share of the matrix rate.

        Args:
            runs: by name: tokens, floating-point operations a token, and what is run. One that raises is a failure.
            rate: operations a second of a large bf16 matrix product on this machine.
        """
        walls_s: dict[str, list[float]] = {}
        for name, (_, _, run) in runs.items():  # compile, warm up
            try:
                self.wall_s(run)
                walls_s[name] = []
            except torch.AcceleratorError:
                raise
            except Exception as error:
                traceback.print_exc()
                self.say(name, "failed", error=f"{type(error).__name__}: {error}", **facts)
        for _ in range(self.size.rounds):
            for name, walls in walls_s.items():
                walls.append(self.wall_s(runs[name][2]))
        for name, walls in walls_s.items():
            num_tokens, flop_a_token, _ = runs[name]
            tokens_per_s = num_tokens / float(np.median(walls))
            share = round(tokens_per_s * flop_a_token / rate, 4)
            self.say(name, "measured", tokens_per_s=round(tokens_per_s), share=share, walls_s=walls, **facts)

    def wall_s(self, run: Callable[[], object]) -> float:
        """Seconds until the device is done."""
        started_s = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - started_s

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def matrix_rate(self) -> float:
        """Floating-point operations a second of a large bf16 matrix product: the best of some."""
        size, best_s = self.size.matrix, math.inf
        one, other = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        for _ in range(10):
            best_s = min(best_s, self.wall_s(lambda: one @ other))
        return 2 * size**3 / best_s

    def bert(self, num_layers: int, **changes: Any) -> Any:
        """A BERT classifier of random weights, of BERT-base's width."""
        torch.manual_seed(0)
        width = self.size.width
        config = BertConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=width,
            num_hidden_layers=num_layers,
            num_attention_heads=self.size.heads,
            intermediate_size=4 * width,
            num_labels=4,
            **changes,
        )
        return BertForSequenceClassification(config).eval()


def random_tokens(lengths_S: np.ndarray) -> TokenColumn:
    """Random words, Zipf's law among them, between the two special tokens."""
    rng = np.random.default_rng(0)
    ids_T = (103 + np.minimum(rng.zipf(1.2, int(lengths_S.sum())), VOCABULARY_SIZE - 104)).astype(np.int32)
    offsets_S1 = offsets(lengths_S)
    ids_T[offsets_S1[:-1]], ids_T[offsets_S1[1:] - 1] = 101, 102
    num = len(lengths_S)
    return TokenColumn(ids_T, offsets_S1, np.arange(num), np.zeros(num, bool), pa.nulls(num, pa.string()))


def made_up_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's, of a vocabulary of made-up words: w0, w1, …"""
    words = [f"w{number}" for number in range(VOCABULARY_SIZE - 5)]
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def made_up_texts(lengths: np.ndarray) -> list[str]:
    """Texts of so many tokens, special ones included; words follow Zipf's law, as in languages."""
    num_words = VOCABULARY_SIZE - 5
    counts = lengths.astype(int) - 2
    ranks = np.minimum(np.random.default_rng(0).zipf(1.2, int(counts.sum())), num_words) - 1
    return [" ".join(f"w{rank}" for rank in part) for part in np.split(ranks, np.cumsum(counts)[:-1])]


def lengths_about(mean: int, num_tokens: int) -> np.ndarray:
    """Lengths of texts of half to one and a half the mean, cut at 512 tokens as a window cuts them."""
    rng = np.random.default_rng(mean)
    return np.minimum(rng.integers(mean // 2, mean + mean // 2, max(8, num_tokens // mean)), 512)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "/".join(map(_short, value))
    return f"{value:,}" if type(value) is int else str(value)
