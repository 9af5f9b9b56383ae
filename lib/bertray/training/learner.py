"""A classifier set up for training: batches without padding, bf16 if every rank has it, a compact vocabulary.

Training and scoring run a model in the same `Layout`: the last layer is finished for the first tokens only. Training
adds:

1. The table of word embeddings holds only the tokens that the texts use. The others would have zero gradients and
   keep the encoder's embeddings.  [training.token_files]
2. In bf16, weights, activations and gradients have 16 bits, except in the last layer; the optimizer keeps the weights
   in 32 bits.  [training.optimizer]
3. On CPUs, numpy draws the masks of dropout as whole arrays, three times as fast as torch's own dropout, which takes a
   tenth of a step. They are a function of (seed, step), so a checkpoint needs no state of a generator.

With several ranks, each holds the whole model, and NCCL or Gloo averages the gradients.

Legend: B sequences of a batch, C classes, D dimensions of an embedding, V tokens of the compact vocabulary.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from bertray.errors import RequestError
from bertray.model import attention
from bertray.model.adapter import Layout, replace_layers, to_precision
from bertray.model.runtime import is_out_of_memory, resolve_precision
from bertray.tokenization.tokenizer import Sequences
from bertray.training.batches import micro_batches
from bertray.types import Precision

_log = logging.getLogger(__name__)

_NUM_VALUES = 1 << 16  # of the 16 random bits that decide on an element of a mask
_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


def least_of_ranks(own: int, device: torch.device) -> int:
    """The least of the ranks' values."""
    if not torch.distributed.is_initialized():
        return own
    least = torch.tensor(int(own), device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least.item())


class Learner:
    """A classifier in training.

    Args:
        model: a transformers sequence classifier, fp32, on the CPU; changed in place.
        vocabulary_V: the encoder's ids of the compact vocabulary, ascending.
        recompute: recompute activations in backward (gradient checkpointing): less memory, a third more time.

    Attributes:
        precision: fp32 or bf16, the same on all ranks.

    Raises:
        RequestError: the device lacks the precision, or the model gradient checkpointing.
    """

    def __init__(
        self, model: Any, vocabulary_V: np.ndarray, device: torch.device, precision: Precision, recompute: bool = False
    ) -> None:
        self.model = self._parallel = model
        # The machines of a cluster may differ in what `auto` means and in what their attention can do.
        has_bf16 = least_of_ranks(resolve_precision(precision, device) == "bf16", device)
        self.precision: Literal["fp32", "bf16"] = "bf16" if has_bf16 else "fp32"
        dtype = torch.bfloat16 if has_bf16 else torch.float32
        can_pack = not has_bf16 or attention.kernel_works(device, dtype, model.config, with_gradients=True)
        self.layout = Layout(model.eval(), can_pack=bool(least_of_ranks(can_pack, device)))
        _freeze_unused(model, self.layout)
        self._vocabulary_V = torch.tensor(vocabulary_V)
        self.embedding_name, self._embeddings_VD = _compact(model, self._vocabulary_V)
        self._masks = Masks()
        if recompute:
            if not model.supports_gradient_checkpointing:
                raise RequestError(
                    f"--gradient-checkpointing: {type(model).__name__} does not support it; leave it out"
                )
            # transformers 5.23 warns of the older name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        elif device.type == "cpu":  # only torch's own generator can draw a mask again in backward
            replace_layers(model, torch.nn.Dropout, lambda layer: MaskedDropout(layer.p, self._masks))
        self._exact: dict[str, torch.Tensor] = {}  # weights before they are rounded
        if has_bf16:
            self._exact = {name: weights.detach().clone() for name, weights in model.named_parameters()}
        to_precision(model, device, dtype)

    def exchange_gradients(self) -> None:
        """Average gradients over the ranks from now on; the weights must not move in memory any more."""
        self._parallel = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def seed(self, *words: int) -> None:
        """Make dropout a function of these numbers from now on."""
        self._masks.seed(*words)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def logits(self, tokens: Sequences, rows: np.ndarray) -> torch.Tensor:
        """logits_BC (float32) of sequences of this rank; dropout depends on the model's mode."""
        return self.layout.forward(self.model, tokens, rows)

    def add_gradients(self, tokens: Sequences, rows: np.ndarray, loss_of: Any, *, is_last: bool) -> torch.Tensor:
        """Run forward and backward on a part of a step, and return the loss.

        Args:
            loss_of: logits_BC -> the loss.
            is_last: this is the step's last part: its backward averages gradients over the ranks.
        """
        with nullcontext() if is_last or self._parallel is self.model else self._parallel.no_sync():
            loss: torch.Tensor = loss_of(self.layout.forward(self._parallel, tokens, rows))
            loss.backward()
        return loss.detach()

    def largest_part(self, tokens: Sequences, rows: np.ndarray, loss_of: Any, token_budget: int) -> int:
        """Try smaller and smaller parts of a heavy step until one fits into the GPU's memory.

        Args:
            loss_of: logits_BC and their sequences -> the loss.
            token_budget: tokens of a part if memory suffices.

        Returns:
            Tokens of the part that fits; 0: not one sequence fits.
        """
        self.model.train()
        while True:
            part, *others = micro_batches(rows, tokens.lengths_S, token_budget)
            num_tokens = int(tokens.lengths_S[part].sum())
            try:
                for _ in range(2 if others else 1):  # a step holds the gradients of one part while it runs another
                    loss_of(self.logits(tokens, part), part).backward()
                return min(num_tokens, token_budget)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            finally:
                self.model.zero_grad()
            # Outside the except block, where no exception holds the activations.
            torch.cuda.empty_cache()
            if len(part) == 1:
                return 0
            token_budget = num_tokens // 2
            _log.info("out of memory: steps are run in parts of %d tokens", token_budget)

    def take_exact_weights(self) -> dict[str, torch.Tensor]:
        """The trained weights by name, fp32, as they were before rounding; only once, to free their memory."""
        trained = [name for name, weights in self.model.named_parameters() if weights.requires_grad]
        return {name: self._exact.pop(name) for name in trained if name in self._exact}

    def complete(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All weights of the model (fp32), with the whole table of word embeddings.

        Args:
            weights: the trained ones by name, on the CPU.
        """
        table_VD = self._embeddings_VD.clone()
        table_VD[self._vocabulary_V] = weights[self.embedding_name]
        untrained = {name: held.cpu().float() for name, held in self.model.state_dict().items() if name not in weights}
        return {**untrained, **self._exact, **weights, self.embedding_name: table_VD}


def _freeze_unused(model: Any, layout: Layout) -> None:
    """Freeze weights that the logits do not depend on, which would have no gradient."""
    layout.probe(model).sum().backward()
    for weights in model.parameters():
        weights.requires_grad_(weights.grad is not None)
    model.zero_grad()


def _compact(model: Any, vocabulary_V: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Cut the embedding table down to the vocabulary; returns its name and the whole table."""
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    whole_VD = table.weight.detach()
    table.weight = torch.nn.Parameter(whole_VD[vocabulary_V])
    table.num_embeddings = len(vocabulary_V)
    return f"{name}.weight", whole_VD


class Masks:
    """Draws masks of dropout with numpy's SFC64."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, *words: int) -> None:
        self._generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence(words)))

    def draw(self, shape: torch.Size, rate: float, dtype: torch.dtype) -> torch.Tensor:
        """Factors of activations: 0 with probability `rate`, else 1 / (1 - rate)."""
        num_elements = shape.numel()
        words = self._generator.integers(0, 2**64, -(-num_elements // 4), dtype=np.uint64)
        is_kept = words.view(np.int16)[:num_elements] >= round(rate * _NUM_VALUES) - _NUM_VALUES // 2
        # As integers of the same width: numpy multiplies them a dozen times as fast as torch casts a bool.
        kept = torch.tensor([1 / (1 - rate)], dtype=dtype).view(_INTEGERS[dtype]).numpy()
        return torch.from_numpy(is_kept * kept).view(dtype).view(shape)


class MaskedDropout(torch.nn.Module):
    """Replaces a `torch.nn.Dropout`."""

    def __init__(self, rate: float, masks: Masks) -> None:
        super().__init__()
        self.p = rate  # models read it under this name
        self._masks = masks

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return states
        return states * self._masks.draw(states.shape, self.p, states.dtype)
