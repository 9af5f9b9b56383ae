"""A classifier set up for training: batches without padding, bf16 where the machine has it, a compact vocabulary.

What is trained is what is scored with: the same `Layout`, so the last layer finishes the first tokens alone. Beside it:

1. The table of word embeddings holds the tokens that the texts use; the others, whose gradients are zero, keep the
   encoder's weights.  [training.token_files]
2. In bf16 weights, states and gradients are 16 bits wide, but for the last layer; the optimizer keeps the weights in
   32 bits.  [training.optimizer]
3. On CPUs dropout draws its masks in arrays.  [training.dropout]

Legend: B sequences of a batch, C classes, V tokens of the vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from bertray.errors import RequestError
from bertray.model import attention
from bertray.model.adapter import Layout, to_precision
from bertray.model.runtime import is_out_of_memory, resolve_precision
from bertray.tokenization.tokenizer import Sequences
from bertray.training import dropout
from bertray.training.batches import micro_batches
from bertray.training.ranks import on_all_ranks, rank_and_world_size
from bertray.types import Precision

_log = logging.getLogger(__name__)


class Learner:
    """A classifier that is being trained.

    Args:
        model: a transformers sequence classifier, fp32, on the CPU; changed in place.
        vocabulary_V: the encoder's ids of the compact vocabulary, ascending.
        device: what to train on.
        precision: of weights, states and gradients.
        gradient_checkpointing: keep no states of the layers but compute them again in backward: less memory, a third
            more time.

    Attributes:
        model: its weights are in `precision`.
        precision: fp32 or bf16.
        num_averaged: ranks over which gradients are averaged; 1: they are this rank's own.

    Raises:
        RequestError: the device lacks the precision, or the model gradient checkpointing.
    """

    def __init__(
        self,
        model: Any,
        vocabulary_V: np.ndarray,
        device: torch.device,
        precision: Precision,
        *,
        gradient_checkpointing: bool = False,
    ) -> None:
        self.model, self._device = model, device
        # `auto` may be another on each of a cluster's machines, and so may be what its attention can do.
        has_bf16 = on_all_ranks(resolve_precision(precision, device) == "bf16", device)
        self.precision: Literal["fp32", "bf16"] = "bf16" if has_bf16 else "fp32"
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        can_pack = dtype == torch.float32 or attention.kernel_works(device, dtype, model.config, with_gradients=True)
        self.layout = Layout(model.eval(), can_pack=on_all_ranks(can_pack, device))
        _freeze_unused(model, self.layout)
        self._vocabulary_V = torch.tensor(vocabulary_V)
        self.embedding_name, self._embeddings_VD = _compact(model, self._vocabulary_V)
        if gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise RequestError(
                    f"--gradient-checkpointing: {type(model).__name__} does not support it; leave it out"
                )
            # transformers 5.23 warns of the older name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self._masks = dropout.Masks()
        if device.type == "cpu" and not gradient_checkpointing:  # which draws a mask twice, by torch's own generator
            dropout.replace(model, self._masks)
        self._exact: dict[str, torch.Tensor] = {}
        if dtype != torch.float32:
            self._exact = {name: weights.detach().clone() for name, weights in model.named_parameters()}
        to_precision(model, device, dtype)
        self._parallel, self.num_averaged = model, 1

    def exchange_gradients(self) -> None:
        """From here on average gradients over the ranks; the weights have found their place."""
        self.num_averaged = rank_and_world_size()[1]
        if self.num_averaged > 1:
            self._parallel = DistributedDataParallel(self.model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def seed(self, *words: int) -> None:
        """Make dropout, from here on, a function of these numbers."""
        self._masks.seed(*words)
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))

    def logits(self, tokens: Sequences, rows: np.ndarray) -> torch.Tensor:
        """logits_BC (float32) of sequences of this rank alone, by the model as it is: in training or evaluation."""
        return self.layout.forward(self.model, tokens, rows)

    def add_gradients(self, tokens: Sequences, rows: np.ndarray, loss_of: Any, *, is_last: bool) -> torch.Tensor:
        """Forward and backward of a part of a step.

        Args:
            loss_of: logits_BC -> the loss whose gradients are added.
            is_last: of the parts of this step; its backward averages gradients over the ranks.

        Returns:
            The loss.
        """
        if self._parallel is self.model or is_last:
            loss = loss_of(self.layout.forward(self._parallel, tokens, rows))
            loss.backward()
        else:
            with self._parallel.no_sync():
                loss = loss_of(self.layout.forward(self._parallel, tokens, rows))
                loss.backward()
        detached: torch.Tensor = loss.detach()
        return detached

    def room_for(self, tokens: Sequences, rows: np.ndarray, loss_of: Any, token_budget: int) -> tuple[int, int] | None:
        """Try how large a part of a step on these sequences fits into the GPU's memory.

        Args:
            loss_of: logits_BC and their sequences -> the loss.
            token_budget: of a part, where memory suffices.

        Returns:
            Tokens that a part may hold, and those of the largest that was tried, beyond which steps are run in parts;
            None: not one sequence fits.
        """
        held = token_budget
        while len(rows):
            part, *others = micro_batches(rows, tokens.lengths_S, token_budget)
            held = int(tokens.lengths_S[part].sum())
            try:
                self.rehearse(tokens, part, lambda logits_BC, part=part: loss_of(logits_BC, part), is_whole=not others)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # Here, where the exception no longer holds what was computed.
            torch.cuda.empty_cache()
            if len(part) == 1:
                return None
            token_budget = held // 2
            _log.info("out of memory: steps are run in parts of %d tokens", token_budget)
        return token_budget, min(token_budget, held)

    def rehearse(self, tokens: Sequences, rows: np.ndarray, loss_of: Any, *, is_whole: bool) -> None:
        """Forward and backward of this rank alone, for the memory that they take; nothing is kept.

        Args:
            is_whole: no other part's gradients are held meanwhile.
        """
        self.model.train()
        try:
            for _ in range(1 if is_whole else 2):
                loss_of(self.logits(tokens, rows)).backward()
        finally:
            for weights in self.model.parameters():
                weights.grad = None

    def take_exact_weights(self) -> dict[str, torch.Tensor]:
        """By name, in 32 bits, the trained weights as they were before they were rounded; once, for they are large."""
        trained = {name for name, weights in self.model.named_parameters() if weights.requires_grad}
        taken = {name: weights for name, weights in self._exact.items() if name in trained}
        self._exact = {name: weights for name, weights in self._exact.items() if name not in trained}
        return taken

    def complete(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All of the model's weights (fp32), with the whole table of word embeddings in the place of the compact one.

        Args:
            weights: those that are trained, by name, on the CPU.
        """
        table_VD = self._embeddings_VD.clone()
        table_VD[self._vocabulary_V] = weights[self.embedding_name]
        others = {name: held.cpu().float() for name, held in self.model.state_dict().items() if name not in weights}
        others |= self._exact
        return {**others, **weights, self.embedding_name: table_VD}


def _freeze_unused(model: Any, layout: Layout) -> None:
    """Do not train what the logits do not depend on: it would have no gradient."""
    layout.probe(model).sum().backward()
    for weights in model.parameters():
        weights.requires_grad_(weights.grad is not None)
        weights.grad = None


def _compact(model: Any, vocabulary_V: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Leave the rows of the embedding table that the texts use; returns its name and what it was."""
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    whole_VD = table.weight.detach()
    table.weight = torch.nn.Parameter(whole_VD[vocabulary_V])
    table.num_embeddings = len(vocabulary_V)
    return f"{name}.weight", whole_VD
