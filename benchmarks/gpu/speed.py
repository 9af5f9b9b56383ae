"""How fast is it, beside what people run today; and what of the engine's choices brings how much.

Rates are medians of rounds in which each has its turn; shares are of a large bf16 matrix product, before the rounds.
"""

from __future__ import annotations

import copy
import platform
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import pipeline

from benchmarks.engine import SortedPadded, Subject, flop
from benchmarks.gpu.part import Part, lengths_about, made_up_texts, made_up_tokenizer, random_tokens
from benchmarks.results import processor
from bertray.model.encoder import Encoder
from bertray.tokenization.tokenizer import ColumnTokenizer, Sequences

PEER_SHARE = 0.1  # of the tokens that slower peers get
BATCH_SIZE = 256


def machine(part: Part) -> None:
    """What it is, and what it can do at most."""
    facts: dict[str, Any] = {"processor": processor(), "python": platform.python_version()}
    if part.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "bytes": properties.total_memory, "cuda": str(torch.version.cuda)}
    part.say("machine", "measured", **facts)
    part.say("bf16 matrix product", "measured", flop_per_s=part.matrix_rate(), rows=part.size.matrix)
    num_bytes = (1 << 20) if part.size.is_tiny else (2 << 30)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=part.device)
    target = torch.empty_like(source)
    wall_s = min(part.wall_s(lambda: target.copy_(source)) for _ in range(5))
    part.say("copy on the device", "measured", bytes_per_s=2 * num_bytes / wall_s)
    one = torch.ones(8, device=part.device)
    wall_s = min(part.wall_s(lambda: [one.add_(1) for _ in range(1000)]) for _ in range(3)) / 1000
    part.say("launch of a kernel", "measured", wall_s=wall_s)


def engine(part: Part) -> None:
    """bertray and its peers, for short, middling and long texts."""
    model, tokenizer = part.bert(part.size.layers), made_up_tokenizer()
    for mean in part.size.mean_lengths:
        rate = part.matrix_rate()
        texts = made_up_texts(lengths_about(mean, part.size.tokens))
        columnar = ColumnTokenizer(tokenizer.backend_tokenizer, 512)
        column = pa.array(texts)
        tokens = columnar.encode(column)
        few = texts[: round(PEER_SHARE * len(texts))]
        few_lengths = tokens.lengths_S[: len(few)]

        def entry(lengths_S: np.ndarray, run: Any) -> tuple[int, float, Any]:
            return int(lengths_S.sum()), flop(model, lengths_S) / int(lengths_S.sum()), run

        encoder = Encoder(copy.deepcopy(model), "bf16", part.device)
        runs = {
            "bertray, bf16, from tokens": entry(tokens.lengths_S, lambda e=encoder, t=tokens: e.logits(t)),
            "bertray, bf16, from texts": entry(
                tokens.lengths_S, lambda e=encoder, c=column, t=columnar: e.logits(t.encode(c))
            ),
        }
        # First alone: no peer that cannot be built costs them.
        part.rates(runs, rate, mean_tokens=mean)
        subject = Subject("", texts, tokenizer, model, 512)
        half = copy.deepcopy(model).to(part.device, torch.bfloat16)
        padded = SortedPadded(subject, half, BATCH_SIZE)
        runs["sorted, padded, SDPA, bf16"] = entry(few_lengths, lambda p=padded, f=few: p.logits(f))
        classify = pipeline(
            "text-classification",
            model=copy.deepcopy(model).half() if part.device == "cuda" else copy.deepcopy(model),
            tokenizer=tokenizer,
            device=part.device,
            batch_size=BATCH_SIZE,
        )
        runs["transformers.pipeline, fp16"] = entry(
            few_lengths, lambda c=classify, f=few: c(f, truncation=True, max_length=512)
        )
        if peer := _sentence_transformers(part, model, tokenizer):
            runs["sentence-transformers, flash attention, bf16"] = entry(few_lengths, lambda p=peer, f=few: p(f))
        part.rates(runs, rate, mean_tokens=mean)


def _sentence_transformers(part: Part, model: Any, tokenizer: Any) -> Any:
    missing = [name for name in ("sentence_transformers", "flash_attn") if not find_spec(name)]
    if missing or part.device != "cuda":
        why = f"{', '.join(missing)} not installed" if missing else "needs a GPU"
        part.say("sentence-transformers, flash attention, bf16", "skipped", why=why)
        return None
    from sentence_transformers import SentenceTransformer

    folder = tempfile.mkdtemp()
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kwargs = {"attn_implementation": "flash_attention_2", "dtype": torch.bfloat16}
    encoder = SentenceTransformer(folder, device=part.device, model_kwargs=kwargs)
    return lambda texts: encoder.encode(texts, batch_size=BATCH_SIZE)


def levers(part: Part) -> None:
    """Token budgets; fp16 beside bf16; the host's share."""
    mean = 30 if part.size.is_tiny else 128
    rate, model = part.matrix_rate(), part.bert(part.size.layers)
    tokens = random_tokens(lengths_about(mean, part.size.tokens))
    num_tokens = tokens.num_tokens
    flop_a_token = flop(model, tokens.lengths_S) / num_tokens

    def encoder(precision: Any = "bf16", budget: int | None = None) -> Encoder:
        made = Encoder(copy.deepcopy(model), precision, part.device)
        made.token_budget = budget or made.token_budget
        return made

    budgets = (500, 1000) if part.size.is_tiny else (16_384, 32_768, 65_536, 131_072, 262_144)
    encoders = {f"batches of {budget} tokens": encoder(budget=budget) for budget in budgets}
    encoders["fp16"] = encoder("fp16")
    runs = {name: (num_tokens, flop_a_token, lambda e=made: e.logits(tokens)) for name, made in encoders.items()}
    part.rates(runs, rate, mean_tokens=mean)

    made = encoders[f"batches of {budgets[len(budgets) // 2]} tokens"]
    batches = made.layout.batches(tokens.lengths_S, made.token_budget)
    nothing = _Nothing(made.model)
    with torch.inference_mode():
        part.wall_s(lambda: made.layout.forward(nothing, tokens, batches[0]))
        wall_s = part.wall_s(lambda: [made.layout.forward(nothing, tokens, rows) for rows in batches])
        part.say("host: laying out batches", "measured", wall_s=wall_s, tokens_per_s=round(num_tokens / wall_s))
        part.wall_s(lambda: made.layout.forward(made.model, tokens, batches[0]))
        started_s = time.perf_counter()
        for rows in batches[:8]:
            made.layout.forward(made.model, tokens, rows)
        launched_s = (time.perf_counter() - started_s) / len(batches[:8])
        part.synchronize()
        done_s = (time.perf_counter() - started_s) / len(batches[:8])
    part.say("a batch: until it is launched, until it is done", "measured", launched_s=launched_s, done_s=done_s)


class _Nothing(torch.nn.Module):
    """In the place of a model: it takes a batch, and computes nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._weight = next(model.parameters())

    def forward(self, *, input_ids: torch.Tensor, **_: Any) -> Any:
        return _Given(input_ids.new_zeros((1, 1), dtype=torch.float32))


class _Given:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


def trainer(part: Part) -> None:
    """Fine-tuning beside transformers.Trainer, with the same model, texts and batches."""
    from benchmarks.gpu.runs import TrainingRun, made_up_rows

    mean, num_texts = (30, 8) if part.size.is_tiny else (128, 64)
    rate, model = part.matrix_rate(), part.bert(part.size.layers)
    rows = made_up_rows(part.size.steps * num_texts, mean, seed=0).tokens
    # Three times the arithmetic of a forward pass: one more for the states, one for the weights.
    flop_a_token = 3 * flop(model, rows.lengths_S) / rows.num_tokens
    rounds = 1 if part.size.is_tiny else 2
    for number in range(rounds):
        torch.cuda.empty_cache()
        ours = TrainingRun(model, part.device, "bf16", part.size.steps, num_texts=num_texts, mean_length=mean).run()
        share = round(ours.tokens_per_s * flop_a_token / rate, 4)
        facts = {"mean_tokens": mean, "texts_a_step": num_texts, "round": number}
        part.say("bertray", "measured", tokens_per_s=round(ours.tokens_per_s), share=share, **facts)
        torch.cuda.empty_cache()
        tokens_per_s = _by_trainer(part, copy.deepcopy(model), rows, num_texts)
        share = round(tokens_per_s * flop_a_token / rate, 4)
        part.say(
            "Trainer, bf16, grouped by length, fused AdamW",
            "measured",
            tokens_per_s=round(tokens_per_s),
            share=share,
            times=round(ours.tokens_per_s / tokens_per_s, 3),
            **facts,
        )


def _by_trainer(part: Part, model: Any, rows: Sequences, num_texts: int) -> float:
    """Tokens a second of the Trainer's steps but the first quarter."""
    from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

    ids = [one.tolist() for one in np.split(rows.ids_T, rows.offsets_S1[1:-1])]
    texts = [
        {"input_ids": one, "attention_mask": [1] * len(one), "labels": one[1] - 200, "length": len(one)} for one in ids
    ]
    num_steps = -(-len(ids) // num_texts)
    first = max(1, num_steps // 4)
    ends_s: dict[int, float] = {}

    class Stopwatch(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step in (first, num_steps):
                part.synchronize()
                ends_s[state.global_step] = time.perf_counter()

    # The name of the option since transformers 5.
    grouping: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
        grouping = {"group_by_length": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=str(Path(folder)),
            per_device_train_batch_size=num_texts,
            num_train_epochs=1,
            learning_rate=1e-4,
            optim="adamw_torch_fused",
            bf16=True,
            **grouping,
            dataloader_num_workers=0 if part.size.is_tiny else 4,
            use_cpu=part.device == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        collator = DataCollatorWithPadding(made_up_tokenizer())
        Trainer(model, arguments, train_dataset=texts, data_collator=collator, callbacks=[Stopwatch()]).train()
    share = (num_steps - first) / num_steps
    return share * rows.num_tokens / (ends_s[num_steps] - ends_s[first])
