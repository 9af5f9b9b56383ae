"""How the sequences of a batch are laid out for a model: end to end in one row where it allows that, else padded.

1. Where the model uses transformers' attention interface, sequences lie end to end, without padding; other models get
   a padded rectangle. Which of both is found out by trying.                          [tokenization.batching]
2. The head sees the first token of each sequence alone, and the last layer finishes no other, if that is the same.

Scoring and training both run their batches through a `Layout`.

Legend: S sequences, B sequences of a batch, C classes, L tokens of its longest, T all its tokens, D size of a state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bertray.model import attention
from bertray.model.buckets import Rectangles
from bertray.model.runtime import put
from bertray.tokenization.batching import (
    in_few_shapes,
    num_filler,
    pack,
    packed_batches,
    pad,
    padded_batches,
    power_of_two,
)
from bertray.tokenization.ragged import offsets
from bertray.tokenization.tokenizer import Sequences

_log = logging.getLogger(__name__)

# Logits of the same sequences, batched otherwise, differ by rounding in fp32, some 1e-6; where other positions or other
# sequences' tokens are read, by more than this even with random weights.
TOLERANCE = 1e-4
# What a model's own code raises at inputs that it was not made for.
MODEL_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


class Layout:
    """Adapts a classifier in place and lays batches out for it.

    Args:
        model: a transformers sequence classifier: fp32, on the CPU, in evaluation mode. A wrong token makes more
            difference there than rounding; later it may be moved, converted and trained.
        can_pack: whether the attention over packed rows may be used where the model is going to run.

    Attributes:
        is_packed: whether batches have no padding.
        is_cut: whether the last layer finishes the first tokens alone.
        in_few_shapes: whether packed batches are filled up, for what is compiled or recorded a shape at a time; for
            the kernel alone, and not for gradients: what it leaves in the states of filler is undefined.
    """

    in_few_shapes = False

    def __init__(self, model: Any, *, can_pack: bool) -> None:
        self.pad_id = model.config.pad_token_id or 0
        self.is_packed = self.is_cut = False
        self._first_position = first_position(model)
        self._first_tokens_B: torch.Tensor | None = None  # of the batch at work, where it is packed
        self._adapt(model, can_pack)

    def batches(self, lengths_S: np.ndarray, budget: int) -> list[np.ndarray]:
        """Sequences of each batch of at most `budget` tokens, the longest first."""
        return (packed_batches if self.is_packed else padded_batches)(lengths_S, budget)

    def forward(self, model: Any, tokens: Sequences, rows: np.ndarray) -> torch.Tensor:
        """logits_BC (float32) of one batch, on the device.

        Args:
            model: the adapted one, or what wraps it.
            rows: sequences of the batch; those of equal length stand together.
        """
        logits_BC: torch.Tensor
        if not self.is_packed:
            input_ids_BL, mask_BL = pad(tokens, rows, self.pad_id)
            logits_BC = model(input_ids=_put(input_ids_BL, model), attention_mask=_put(mask_BL, model)).logits
        else:
            logits_BC = self._forward_packed(model, tokens, rows)
        return logits_BC.float()

    def _forward_packed(self, model: Any, tokens: Sequences, rows: np.ndarray) -> torch.Tensor:
        batch, lengths_B, weight = pack(tokens, rows), tokens.lengths_S[rows], next(model.parameters())
        by_kernel, rectangles = attention.has_kernel(weight.device, weight.dtype), None
        longest = int(lengths_B.max())
        if self.in_few_shapes:
            batch, longest = in_few_shapes(batch, self.pad_id), power_of_two(longest)
        input_ids_T, position_ids_T = batch.input_ids_T, batch.position_ids_T + self._first_position
        if torch.is_grad_enabled() and not by_kernel:
            # Numbers of tokens come again, so that oneDNN's kernels, which it makes for every shape, do.
            filler = (0, num_filler(len(input_ids_T)))
            input_ids_T = np.pad(input_ids_T, filler, constant_values=self.pad_id)
            position_ids_T = np.pad(position_ids_T, filler, constant_values=self._first_position)
            rectangles = Rectangles(lengths_B, len(input_ids_T), weight.device)
        runs = () if by_kernel or rectangles else batch.runs()
        parts = (input_ids_T, position_ids_T, batch.offsets_B1)
        on_device = put(np.concatenate(parts), weight.device)  # in one copy: each has its price on a GPU
        ids_T, positions_T, offsets_B1 = on_device.split([len(part) for part in parts])
        self._first_tokens_B = offsets_B1[:-1]
        if self.in_few_shapes:  # sequences that hold no token may begin after the last one
            self._first_tokens_B = self._first_tokens_B.clamp(max=len(input_ids_T) - 1)
        output = model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            packing=attention.Packing(offsets_B1.int(), longest, runs, rectangles),
        )
        logits_BC: torch.Tensor = output.logits
        # A copy: a recorded graph writes over what it has given.
        return logits_BC[: len(rows)].clone() if self.in_few_shapes else logits_BC

    @torch.no_grad()  # not inference_mode: what a model keeps of a probe could not be trained with
    def _adapt(self, model: Any, can_pack: bool) -> None:
        """Do without padding, and without what the head does not read, if the logits are then the same."""
        encoder = getattr(model, model.base_model_prefix, None)
        if encoder is None:
            return
        probe = probe_sequences(model.config)
        try:
            expected = self._forward_probe(model, probe)
        except MODEL_ERRORS as error:
            _log.info("%s is run as it is (%s: %s)", type(model).__name__, type(error).__name__, error)
            return
        if not model._supports_attention_backend:
            _log.info("%s is run on padded batches (its attention cannot be replaced)", type(model).__name__)
        elif can_pack:
            before = model.config._attn_implementation
            handle = encoder.register_forward_hook(self._only_first_tokens, with_kwargs=True)
            model.set_attn_implementation(attention.NAME)
            self.is_packed = True
            if not self._gives(expected, model, probe, "padded batches"):
                self.is_packed = False
                handle.remove()
                model.set_attn_implementation(before)
        handle = finish_first_tokens_alone(encoder, self._select_first_tokens)
        if handle:
            self.is_cut = True
            if not self._gives(expected, model, probe, "all tokens of the last layer"):
                self.is_cut = False
                handle.remove()

    def probe(self, model: Any) -> torch.Tensor:
        """Logits of some random sequences; the model is on the CPU."""
        return self._forward_probe(model, probe_sequences(model.config))

    def _forward_probe(self, model: Any, probe: Sequences) -> torch.Tensor:
        """Logits of two batches of different shape."""
        every = np.arange(len(probe.lengths_S))
        return torch.cat([self.forward(model, probe, every), self.forward(model, probe, every[1:])])

    def _gives(self, expected: torch.Tensor, model: Any, probe: Sequences, otherwise: str) -> bool:
        try:
            difference = (self._forward_probe(model, probe) - expected).abs().max().item()
        except MODEL_ERRORS as error:
            difference, why = float("inf"), f"{type(error).__name__}: {error}"
        else:
            why = f"logits differ by {difference:.3g}"
        if difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            return True
        _log.info("%s is run on %s (%s)", type(model).__name__, otherwise, why)
        return False

    def _select_first_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """[1, T, D] -> [1, B, D] of a packed row, [B, L, D] -> [B, 1, D] of a padded batch."""
        return states[:, self._first_tokens_B] if self.is_packed else states[:, :1]

    def _only_first_tokens(self, encoder: Any, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the encoder below the head: of a packed row, leave the state of each first token.

        To the head, packed sequences then look like a batch [B, 1, D].
        """
        states_BD = output.last_hidden_state[0] if self.is_cut else output.last_hidden_state[0, self._first_tokens_B]
        output.last_hidden_state = states_BD[:, None]
        if getattr(encoder, "pooler", None) is not None:
            output.pooler_output = encoder.pooler(output.last_hidden_state)
        return output


def _put(array: np.ndarray, model: Any) -> torch.Tensor:
    return put(array, next(model.parameters()).device)


def first_position(model: Any) -> int:
    """The position of a text's first token: 0, or in RoBERTa's family the one after the padding's."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else padding + 1


def probe_sequences(config: Any) -> Sequences:
    """Random sequences of three odd lengths, the longest above the span of local attention where there is one."""
    rng = np.random.default_rng(0)
    longest = min(93, (getattr(config, "max_position_embeddings", None) or 512) - 9)
    lengths_S = np.array([longest, 9, 9, 3])
    pad_id = config.pad_token_id or 0
    ids_T = rng.integers(1, config.vocab_size, lengths_S.sum()).astype(np.int32)
    ids_T[ids_T == pad_id] = (pad_id + 1) % config.vocab_size
    return Sequences(ids_T, offsets(lengths_S), np.arange(4))


def finish_first_tokens_alone(encoder: Any, select: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """After the last layer's attention, go on with some states alone.

    A BERT classifier's head reads the state of each sequence's first token, so nothing else need be finished. The last
    layer's attention reads the keys and values of all tokens; what follows it, three quarters of that layer's
    arithmetic, is then computed for the first tokens: an eighth less in all of a model of 6 layers, a sixteenth of 12.

    Args:
        encoder: the part of a classifier below its head.
        select: takes states [..., tokens, D] and returns those of the first tokens.

    Returns:
        A handle whose `remove` undoes it; None where the encoder is not built as BERT's family is.
    """
    layers = getattr(getattr(encoder, "encoder", None), "layer", None)
    output = getattr(getattr(layers[-1], "attention", None), "output", None) if layers else None
    if output is None:
        return None
    # Its inputs: what attention gave, and the states that are added to it.
    return output.register_forward_pre_hook(lambda _, inputs: tuple(map(select, inputs)))
