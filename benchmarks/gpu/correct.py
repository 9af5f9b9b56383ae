"""Is it right: attention without padding, logits, steps of training, and what is done where memory is short.

Everything is held against fp32 with padding, by transformers and torch alone, on this machine.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks.gpu.part import VOCABULARY_SIZE, Part, random_tokens
from bertray.model import attention as packed
from bertray.model.adapter import Layout, to_precision
from bertray.model.encoder import Encoder
from bertray.tokenization.batching import pad
from bertray.tokenization.tokenizer import Sequences
from bertray.tokenization.windows import offsets

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def attention(part: Part) -> None:
    """The kernel with heads of three sizes, then whole models: logits and gradients."""
    from torch.nn.attention.varlen import varlen_attn

    part.say("arguments of varlen_attn", "measured", signature=str(inspect.signature(varlen_attn)))
    window = 5 if part.size.is_tiny else 65
    for head_size in (26, 32, 64):
        for name, dtype in DTYPES.items():
            for reach in (None, window):
                part.check(
                    f"attention and its gradients, heads of {head_size}, {name}, window {reach}",
                    lambda size=head_size, dtype=dtype, reach=reach: _of_kernel(part, size, dtype, reach),
                    0.02,
                )
    for name, model in _models(part).items():
        try:
            logits, gradients, is_packed = _of_model(part, model)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            part.say(f"{name} in bf16", "failed", error=f"{type(error).__name__}: {error}")
            continue
        how = "packed" if is_packed else "padded"
        part.check(f"{name}, {how} in bf16: logits", lambda logits=logits: logits, 0.05)
        part.check(f"{name}, {how} in bf16: gradients, 1 - cosine", lambda gradients=gradients: gradients, 0.02)


def _of_kernel(part: Part, head_size: int, dtype: torch.dtype, window: int | None) -> float:
    """The largest difference of states and gradients, as a share of the largest value."""
    generator = torch.Generator().manual_seed(0)
    lengths_B = np.array([21, 9, 9, 1]) if part.size.is_tiny else np.array([512, 200, 93, 9, 9, 3, 1])
    num_tokens = int(lengths_B.sum())
    qkv = [torch.randn(1, 4, num_tokens, head_size, generator=generator).to(part.device, dtype) for _ in range(3)]
    weights = torch.randn(1, num_tokens, 4, head_size, generator=generator).to(part.device)
    offsets_B1 = torch.from_numpy(offsets(lengths_B)).to(part.device, torch.int32)
    documents_T = torch.arange(len(lengths_B)).repeat_interleave(torch.from_numpy(lengths_B))
    is_seen_TT = documents_T[:, None] == documents_T
    if window:
        is_seen_TT &= (torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)).abs() < window
    is_seen_TT = is_seen_TT.to(part.device)

    def by_kernel(inputs: list[torch.Tensor]) -> torch.Tensor:
        packing = packed.Packing(offsets_B1, int(lengths_B.max()))
        return packed.packed_attention(torch.nn.Module(), *inputs, None, packing=packing, sliding_window=window)[0]

    def by_mask(inputs: list[torch.Tensor]) -> torch.Tensor:
        return scaled_dot_product_attention(*inputs, attn_mask=is_seen_TT).transpose(1, 2)

    def found(attend: Callable[[list[torch.Tensor]], torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [one.to(dtype).requires_grad_() for one in qkv]
        states = attend(inputs)
        return [states, *torch.autograd.grad((states.float() * weights).sum(), inputs)]

    pairs = zip(found(by_kernel, dtype), found(by_mask, torch.float32), strict=True)
    return max(((one.float() - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def _models(part: Part) -> dict[str, Any]:
    size = part.size
    sizes = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": size.width,
        "num_hidden_layers": size.few_layers,
        "num_attention_heads": size.heads,
        "num_labels": 4,
    }
    local = {"local_attention": 16 if size.is_tiny else 128, "global_attn_every_n_layers": 2}
    special = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "cls_token_id": 101, "sep_token_id": 102}
    torch.manual_seed(0)
    configs = {
        "Bert": transformers.BertConfig(**sizes, intermediate_size=4 * size.width),
        "MPNet": transformers.MPNetConfig(**sizes, intermediate_size=4 * size.width),
        "ModernBert": transformers.ModernBertConfig(**sizes, **local, **special, intermediate_size=size.width * 3 // 2),
    }
    return {
        name: getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
        for name, config in configs.items()
    }


def _of_model(part: Part, model: Any) -> tuple[float, float, bool]:
    """Differences of logits and of gradients (1 - cosine), and whether batches had no padding."""
    device, rng = torch.device(part.device), np.random.default_rng(0)
    lengths_B = np.sort(rng.integers(3, 40 if part.size.is_tiny else 300, 24))[::-1]
    tokens, every = random_tokens(lengths_B), np.arange(24)
    targets = torch.from_numpy(rng.integers(0, 4, 24)).to(device)
    reference = copy.deepcopy(model).to(device)
    input_ids, mask = (torch.from_numpy(one).to(device) for one in pad(tokens, every, model.config.pad_token_id or 0))
    expected = reference(input_ids=input_ids, attention_mask=mask).logits
    cross_entropy(expected, targets).backward()

    can_pack = packed.kernel_works(device, torch.bfloat16, model.config, with_gradients=True)
    layout = Layout(model, can_pack=can_pack)
    to_precision(model, device, torch.bfloat16)
    logits = layout.forward(model, tokens, every)
    cross_entropy(logits, targets).backward()
    named = dict(reference.named_parameters())
    pairs = [
        (weights.grad.float().flatten(), named[name].grad.flatten())
        for name, weights in model.named_parameters()
        if weights.grad is not None and named[name].grad is not None
    ]
    ours, theirs = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
    return _apart(logits.detach(), expected.detach()), 1 - cosine.item(), layout.is_packed


def _apart(ours: Any, theirs: Any) -> float:
    """The largest difference, as a share of the largest value."""
    ours, theirs = (np.asarray(torch.as_tensor(one).float().cpu()) for one in (ours, theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def logits(part: Part) -> None:
    """Logits of many texts beside a CPU in fp32; then with too little memory."""
    rng = np.random.default_rng(0)
    lengths_S = rng.integers(3, 41 if part.size.is_tiny else 129, part.size.texts_compared)
    lengths_S[::20] = 41 if part.size.is_tiny else 512
    tokens = random_tokens(lengths_S)
    model = part.bert(part.size.layers, initializer_range=0.05)
    expected_SC = Encoder(copy.deepcopy(model), "fp32", "cpu").logits(tokens)
    margins_S = np.diff(np.sort(expected_SC, axis=1)[:, -2:], axis=1)[:, 0]
    for precision, at_most in (("fp32", 1e-3), ("bf16", 0.05), ("fp16", 0.01)):

        def difference(precision: Any = precision) -> float:
            encoder = Encoder(copy.deepcopy(model), precision, part.device)
            logits_SC = encoder.logits(tokens)
            is_same_S = logits_SC.argmax(axis=1) == expected_SC.argmax(axis=1)
            is_clear_S = margins_S > 0.02 * np.abs(expected_SC).max()
            same = {"same_labels": float(is_same_S.mean()), "of_clear_ones": float(is_same_S[is_clear_S].mean())}
            part.say(f"labels in {precision}", "measured", is_packed=encoder.layout.is_packed, **same)
            return _apart(logits_SC, expected_SC)

        part.check(f"logits of {len(expected_SC)} texts, {precision}", difference, at_most)

    def short() -> float:
        encoder = Encoder(copy.deepcopy(model), "bf16", part.device)
        before_SC, budget = encoder.logits(tokens), encoder.token_budget
        with short_of_memory(part, num_bytes=60 << 20):
            logits_SC = encoder.logits(tokens)
        assert encoder.token_budget < budget, "memory was not short"
        part.say("tokens of a batch with 60 MiB to spare", "measured", tokens=encoder.token_budget, before=budget)
        return _apart(logits_SC, before_SC)

    part.check("scoring with too little memory", short, 0.05)


@contextmanager
def short_of_memory(part: Part, num_bytes: int) -> Iterator[None]:
    """Leave so many bytes of the GPU's memory; on a CPU, refuse batches of more than 300 tokens."""
    if part.device == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = Layout.forward

    def limited(self: Layout, model: Any, tokens: Sequences, rows: np.ndarray) -> torch.Tensor:
        if tokens.lengths_S[rows].sum() > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, model, tokens, rows)

    with patch.object(Layout, "forward", limited):
        yield


def training(part: Part) -> None:
    """One step and fifty, beside a CPU in fp32; then with too little memory, in steps and in validation."""
    from benchmarks.gpu.runs import TrainingRun

    num_steps = 5 if part.size.is_tiny else 50
    model = part.bert(part.size.few_layers, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    expected_first, expected = (TrainingRun(model, "cpu", "fp32", number).run() for number in (1, num_steps))
    part.say("losses on a CPU", "measured", first=expected.losses[0], last=expected.losses[-1])
    for precision, at_most_first, at_most_all in (("fp32", 2e-3, 0.02), ("bf16", 0.03, 0.1)):

        def first(precision: Any = precision) -> float:
            one = TrainingRun(model, part.device, precision, 1).run()
            pairs = ((one.losses[0], expected_first.losses[0]), (one.norms[0], expected_first.norms[0]))
            return max(abs(ours - theirs) / theirs for ours, theirs in pairs)

        def all_steps(precision: Any = precision) -> float:
            run = TrainingRun(model, part.device, precision, num_steps).run()
            part.say(f"losses in {precision}", "measured", first=run.losses[0], last=run.losses[-1])
            ours, theirs = ([*one.losses, one.validation_loss] for one in (run, expected))
            return float(np.abs(np.subtract(ours, theirs)).mean() / expected.losses[0])

        part.check(f"one step, {precision}: loss and norm of the gradients", first, at_most_first)
        part.check(f"{num_steps} steps, {precision}: losses, mean difference", all_steps, at_most_all)

    def short_steps() -> float:
        run = TrainingRun(model, part.device, "bf16", 3, num_texts=256 if part.device == "cuda" else 32)
        fit = run.tuning.fit_into_memory if part.device == "cuda" else run.rehearse_as_on_a_gpu
        fit()
        whole = run.tuning.token_budget  # the tokens of the heaviest step
        with short_of_memory(part, num_bytes=400 << 20):
            fit()
            budget = run.tuning.token_budget
            assert budget < whole, "memory was not short"
            found = run.run()
        part.say("tokens of a part of a step", "measured", tokens=budget, before=whole)
        return 0.0 if np.isfinite(found.losses).all() else float("inf")

    part.check("steps with too little memory", short_steps, 0.0)

    def short_validation() -> float:
        num_rows = 64 if part.size.is_tiny else 2000
        whole = TrainingRun(model, part.device, "bf16", 2, num_validation_rows=num_rows).run()
        with_less = TrainingRun(model, part.device, "bf16", 2, num_validation_rows=num_rows)
        # Once the steps are done.
        found = with_less.run(before_validation=lambda: short_of_memory(part, num_bytes=150 << 20))
        budget = with_less.tuning.validation_budget
        assert budget < with_less.whole_budget, "memory was not short"
        part.say("tokens of a batch of validation", "measured", tokens=budget, before=with_less.whole_budget)
        return abs(found.validation_loss - whole.validation_loss) / whole.validation_loss

    part.check("validation with too little memory", short_validation, 0.02)
