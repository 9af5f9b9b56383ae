"""Does an adopted bundle give the logits that transformers' pipeline gives for the model, in fp32?

    python -m benchmarks.adopted

500 real texts, 50 of which exceed every window: sentences of abstracts (csabstruct) and film reviews. The models have
random weights, in the shapes of seven architectures, and tokenizers of three kinds that are trained here; one is
MiniLM, real but for its head.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from benchmarks.results import SHARED_DATA, write_result
from bertray import Bundle
from bertray.__main__ import command
from bertray.model.pretrained import NO_CODE
from bertray.model.sources import encoder_folder

NUM_SHORT, NUM_LONG, LIMIT = 450, 50, 1e-4
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
NAMES: dict[str, Any] = {"id2label": {0: "neg", 1: "neu", 2: "pos"}, "label2id": {"neg": 0, "neu": 1, "pos": 2}}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
OF_DISTILBERT = {"dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128}
OF_DEBERTA = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
BERT_IDS = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "bos_token_id": 101, "eos_token_id": 102}
# Of each architecture: its tokenizer, and its sizes. RoBERTa's family counts positions from 2.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("wordpiece", {**SIZES, "max_position_embeddings": 128}),
    "DistilBert": (
        "wordpiece",
        {**OF_DISTILBERT, "max_position_embeddings": 128},
    ),
    "MPNet": ("wordpiece", {**SIZES, "max_position_embeddings": 130, "pad_token_id": 1}),
    "ModernBert": ("wordpiece", {**SIZES, **BERT_IDS, "max_position_embeddings": 256}),
    "Roberta": ("bpe", {**SIZES, "max_position_embeddings": 130}),
    "XLMRoberta": ("unigram", {**SIZES, "max_position_embeddings": 130}),
    "DebertaV2": ("unigram", {**SIZES, **OF_DEBERTA, "max_position_embeddings": 128}),
}


# The form of FineWeb-Edu's classifier: one output, whose label has no name.
ONE_OUTPUT = "MiniLM, a number"


def main() -> None:
    if not SHARED_DATA.is_dir():
        sys.exit(f"{SHARED_DATA} is missing: it holds csabstruct and movie_reviews_long")
    started_s = time.monotonic()
    texts = _column("csabstruct", "train", NUM_SHORT) + _longest("movie_reviews_long", "test", NUM_LONG)
    rows = [("model", "window", "texts cut", "largest difference", "largest logit")]
    with tempfile.TemporaryDirectory() as temporary:
        for name in (*SHAPES, "MiniLM", ONE_OUTPUT):
            folder = Path(temporary) / name
            _save(name, folder, texts)
            rows.append((name, *_compared(folder, texts)))
    lines = [f"| {' | '.join(map(str, row))} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]
    worst = max(float(row[3]) for row in rows[1:])
    verdict = "met" if worst <= LIMIT else "missed"
    lines += ["", f"The largest difference is {worst:.1g}; at most {LIMIT:g} was asked: {verdict}."]
    write_result("adopted", "pipeline", "\n".join(lines), {"wall_s": round(time.monotonic() - started_s)})


def _compared(folder: Path, texts: list[str]) -> tuple[int, int, str, str]:
    """Window, texts that exceed it, largest difference to the pipeline's logits, and largest logit."""
    output = folder.with_name(f"{folder.name}-bundle")
    assert command("adopt")(["--model", str(folder), "--output", str(output)]) == 0
    bundle = Bundle.load(str(output), "fp32", "cpu")
    tokens, found_NC = bundle.logits(pa.array(texts))
    options: dict[str, Any] = {"dtype": torch.float32, "top_k": None, "device": "cpu"}
    classify = pipeline("text-classification", model=str(folder), trust_remote_code=False, **options)
    window = bundle.info.max_length
    scored = classify(texts, truncation=True, max_length=window, function_to_apply="none")
    logits_of_rows = [{one["label"]: one["score"] for one in row} for row in scored]
    labels = bundle.labels if len(bundle.labels) > 1 else ["LABEL_0"]
    expected_NC = np.array([[of_row[label] for label in labels] for of_row in logits_of_rows])
    difference, largest = np.abs(found_NC - expected_NC).max(), np.abs(expected_NC).max()
    return window, int(tokens.truncated_N.sum()), f"{difference:.1e}", f"{largest:.2f}"


def _save(name: str, folder: Path, texts: list[str]) -> None:
    torch.manual_seed(0)
    minilm = encoder_folder("minilm")
    if name not in SHAPES:
        outputs = {"num_labels": 1} if name == ONE_OUTPUT else NAMES
        model = AutoModelForSequenceClassification.from_pretrained(minilm, **outputs, **NO_CODE)
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(minilm, **NO_CODE).save_pretrained(folder)
        return
    kind, sizes = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(minilm, **NO_CODE) if kind == "wordpiece" else _trained(kind, texts)
    tokenizer.model_max_length = 10**30  # the model's positions decide
    tokenizer.save_pretrained(folder)
    own = {"vocab_size": len(tokenizer), "initializer_range": 0.2, **NAMES}
    own |= {} if kind == "wordpiece" else {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**{**own, **sizes})
    AutoModelForSequenceClassification.from_config(config, trust_remote_code=False).save_pretrained(
        folder, max_shard_size="1MB"
    )


def _trained(kind: str, texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE as RoBERTa's, or a unigram model as SentencePiece's."""
    special = list(SPECIAL.values())
    options: dict[str, Any] = {"vocab_size": 4000, "special_tokens": special, "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token=SPECIAL["unk_token"], **options)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def _column(data: str, split: str, num_rows: int) -> list[str]:
    texts: list[str] = pq.read_table(SHARED_DATA / data / f"{split}.parquet", columns=["text"])["text"].to_pylist()
    return texts[:num_rows]


def _longest(data: str, split: str, num_rows: int) -> list[str]:
    return sorted(_column(data, split, 10**6), key=len)[-num_rows:]


if __name__ == "__main__":
    main()
