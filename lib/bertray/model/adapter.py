"""Adapt a transformers classifier in place: the layout of its batches, its precision, and its last layer.

1. If the model uses transformers' attention interface, the sequences of a batch lie end to end in one row, without
   padding. Other models get a padded rectangle. A trial run decides.                  [tokenization.batching]
2. The head reads only the first token of each sequence, so the last layer finishes only these, if the logits agree.
3. The last linear layer, which gives the logits, takes a first bias and a temperature, and computes in fp32.

Scoring and training both run their batches through a `Layout`.

Legend: S sequences, B sequences of a batch, C classes, L tokens of its longest, T all its tokens, D size of a state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bertray.errors import RequestError
from bertray.model import attention
from bertray.model.buckets import Rectangles
from bertray.model.runtime import put
from bertray.tokenization.batching import equal_runs, num_filler, pack, packed_batches, pad, padded_batches
from bertray.tokenization.tokenizer import Sequences
from bertray.tokenization.windows import offsets

_log = logging.getLogger(__name__)

# Logits of the same sequences in other batches differ by some 1e-6 in fp32. A wrong position, or a token of another
# sequence, makes a larger difference than this even with random weights.
_TOLERANCE = 1e-4
# A model's own code raises these for inputs that it does not support.
_MODEL_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


class Layout:
    """Adapts a classifier in place, and lays batches out for it.

    Args:
        model: a transformers sequence classifier, fp32, on the CPU, in evaluation mode: only there does a wrong token
            make more difference than rounding. It may be moved, converted and trained afterwards.
        can_pack: attention over packed rows works where the model is going to run.
    """

    def __init__(self, model: Any, *, can_pack: bool) -> None:
        self.is_packed = False  # batches have no padding
        self.is_cut = False  # the last layer finishes only the first token of each sequence
        self._pad_id = model.config.pad_token_id or 0
        self._first_position = first_position(model)
        self._first_tokens_B: torch.Tensor | None = None  # of the current batch, if it is packed
        self._adapt(model, can_pack)

    def batches(self, lengths_S: np.ndarray, budget: int) -> list[np.ndarray]:
        """The sequences of each batch of at most `budget` tokens, longest first."""
        return (packed_batches if self.is_packed else padded_batches)(lengths_S, budget)

    def forward(self, model: Any, tokens: Sequences, rows: np.ndarray) -> torch.Tensor:
        """logits_BC (float32) of one batch, on the device.

        Args:
            model: the adapted model, or a wrapper of it.
            rows: the sequences of the batch; those of equal length stand together.
        """
        if not self.is_packed:
            return padded_logits(model, tokens, rows, self._pad_id)
        logits_BC: torch.Tensor = self._forward_packed(model, tokens, rows)
        return logits_BC.float()

    def _forward_packed(self, model: Any, tokens: Sequences, rows: np.ndarray) -> Any:
        lengths_B, weight = tokens.lengths_S[rows], next(model.parameters())
        has_kernel, rectangles = attention.has_kernel(weight.device, weight.dtype), None
        input_ids_T, position_ids_T, offsets_B1 = pack(tokens, rows)
        position_ids_T += self._first_position
        if torch.is_grad_enabled() and not has_kernel:
            # oneDNN makes kernels for every shape; few numbers of tokens let it reuse them.
            filler = (0, num_filler(len(input_ids_T)))
            input_ids_T = np.pad(input_ids_T, filler, constant_values=self._pad_id)
            position_ids_T = np.pad(position_ids_T, filler, constant_values=self._first_position)
            rectangles = Rectangles(lengths_B, len(input_ids_T), weight.device)
        runs = () if has_kernel or rectangles else equal_runs(offsets_B1)
        parts = (input_ids_T, position_ids_T, offsets_B1)
        on_device = put(np.concatenate(parts), weight.device)  # one copy, because each has a fixed cost on a GPU
        ids, positions, starts = on_device.split([len(part) for part in parts])
        self._first_tokens_B = starts[:-1]
        packing = attention.Packing(starts.int(), int(lengths_B.max()), runs, rectangles)
        return model(input_ids=ids[None], position_ids=positions[None], packing=packing).logits

    @torch.no_grad()  # not inference_mode: tensors that a model keeps from the probe could not be trained with
    def _adapt(self, model: Any, can_pack: bool) -> None:
        """Leave out padding, and states that the head does not read, if the logits stay the same."""
        encoder = getattr(model, model.base_model_prefix, None)
        if encoder is None:
            return
        try:
            expected = self.probe(model)
        except _MODEL_ERRORS as error:
            _log.info("%s is run as it is (%s: %s)", type(model).__name__, type(error).__name__, error)
            return
        if not model._supports_attention_backend:
            _log.info("%s is run on padded batches (its attention cannot be replaced)", type(model).__name__)
        elif can_pack:
            before = model.config._attn_implementation
            hook = encoder.register_forward_hook(self._keep_first_tokens, with_kwargs=True)
            model.set_attn_implementation(attention.NAME)
            self.is_packed = True
            if not self._gives(expected, model, "padded batches"):
                self.is_packed = False
                hook.remove()
                model.set_attn_implementation(before)
        if (output := _last_attention_output(encoder)) is not None:
            # The last layer's attention needs the keys and values of all tokens. What follows, three quarters of the
            # layer's arithmetic, is then computed only for first tokens: an eighth less in all with 6 layers, a
            # sixteenth with 12. The inputs are what attention gave, and the states that are added to it.
            hook = output.register_forward_pre_hook(lambda _, inputs: tuple(map(self._first_tokens_of, inputs)))
            self.is_cut = True
            if not self._gives(expected, model, "all tokens of the last layer"):
                self.is_cut = False
                hook.remove()

    def probe(self, model: Any) -> torch.Tensor:
        """Logits of random sequences in two batches of different shape; the model is on the CPU."""
        probe = probe_sequences(model.config)
        rows = np.arange(len(probe.lengths_S))
        return torch.cat([self.forward(model, probe, rows), self.forward(model, probe, rows[1:])])

    def _gives(self, expected: torch.Tensor, model: Any, otherwise: str) -> bool:
        if why := disagreement(expected, lambda: self.probe(model)):
            _log.info("%s is run on %s (%s)", type(model).__name__, otherwise, why)
        return not why

    def _first_tokens_of(self, states: torch.Tensor) -> torch.Tensor:
        """[1, T, D] -> [1, B, D] of a packed row, [B, L, D] -> [B, 1, D] of a padded batch."""
        return states[:, self._first_tokens_B] if self.is_packed else states[:, :1]

    def _keep_first_tokens(self, encoder: Any, _: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the encoder: give the head a packed row as a batch of first tokens [B, 1, D]."""
        states_BD = output.last_hidden_state[0] if self.is_cut else output.last_hidden_state[0, self._first_tokens_B]
        output.last_hidden_state = states_BD[:, None]
        if getattr(encoder, "pooler", None) is not None:
            output.pooler_output = encoder.pooler(output.last_hidden_state)
        return output


def disagreement(expected: torch.Tensor, give: Callable[[], torch.Tensor]) -> str:
    """Why a model does not give these logits; empty: it does."""
    try:
        difference = (give() - expected).abs().max().item()
    except _MODEL_ERRORS as error:
        return f"{type(error).__name__}: {error}"
    is_near = difference <= _TOLERANCE * max(1.0, expected.abs().max().item())
    return "" if is_near else f"logits differ by {difference:.3g}"


def padded_logits(model: Any, tokens: Sequences, rows: np.ndarray, pad_id: int) -> torch.Tensor:
    """logits_BC (float32) of a padded batch, on the model's device."""
    device = next(model.parameters()).device
    input_ids_BL, mask_BL = (put(array, device) for array in pad(tokens, rows, pad_id))
    logits_BC: torch.Tensor = model(input_ids=input_ids_BL, attention_mask=mask_BL).logits
    return logits_BC.float()


def first_position(model: Any) -> int:
    """The position of a text's first token: 0, or in RoBERTa's family the one after the padding's."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else padding + 1


def probe_sequences(config: Any, lengths: list[int] | None = None) -> Sequences:
    """Random sequences; by default four, the longest beyond the span of local attention if the model has it."""
    rng = np.random.default_rng(0)
    longest = min(93, (getattr(config, "max_position_embeddings", None) or 512) - 9)
    lengths_S = np.array(lengths or [longest, 9, 9, 3])
    pad_id = config.pad_token_id or 0
    ids_T = rng.integers(1, config.vocab_size, lengths_S.sum()).astype(np.int32)
    ids_T[ids_T == pad_id] = (pad_id + 1) % config.vocab_size
    return Sequences(ids_T, offsets(lengths_S), np.arange(len(lengths_S)))


def _last_attention_output(encoder: Any) -> Any:
    """The module after the last layer's attention; None if the encoder is not built as BERT's family is."""
    layers = getattr(getattr(encoder, "encoder", None), "layer", None)
    return getattr(getattr(layers[-1], "attention", None), "output", None) if layers else None


def scale_logits(model: Any, temperature: float) -> bool:
    """Divide a classifier's logits by a temperature, in the weights and bias of its last linear layer.

    Every tool that reads the model, such as a pipeline or an export, then gives calibrated scores.

    Args:
        model: in fp32, on any device, in evaluation mode.

    Returns:
        Whether the logits are divided. If the layer alone does not determine them, the model stays as it was and the
        log says why.
    """
    assert temperature > 0 and not model.training, temperature
    last = last_layer(model)
    before = {name: weights.clone() for name, weights in last.state_dict().items()} if last else {}
    try:
        expected = _probe_logits(model) / temperature
        for weights in last.parameters() if last else ():
            weights.data /= temperature
        why = disagreement(expected, lambda: _probe_logits(model))
    except _MODEL_ERRORS as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        if last:
            last.load_state_dict(before)
        message = "warning: %s stays uncalibrated: its last linear layer alone does not divide logits by %.4g (%s)"
        _log.warning(message, type(model).__name__, temperature, why)
    return not why


@torch.no_grad()
def change_unit(model: Any, mean: float, deviation: float) -> None:
    """Change the last layer so that the model answers `mean + deviation * output`.

    Raises:
        RequestError: no layer with a bias gives the output.
    """
    last = last_layer(model)
    if last is None or last.bias is None:
        raise RequestError(
            f"{type(model).__name__} has no last layer with a bias, which bertray needs to predict numbers in their "
            "own unit: use another --encoder"
        )
    last.weight *= deviation
    last.bias.mul_(deviation).add_(mean)


@torch.no_grad()
def begin_with_logits(model: Any, logits_C: torch.Tensor) -> None:
    """Make a new classifier start with about these logits for any text, by the bias of its last layer.

    A trained head, whose bias is not zero, stays as it is. If there is no such bias the log says so.
    """
    last = last_layer(model)
    if last is None or last.bias is None:
        missing = "layer that gives the logits was found" if last is None else "bias in the layer that gives the logits"
        _log.warning("warning: %s cannot begin at the labels' shares: no %s", type(model).__name__, missing)
    elif not last.bias.any():
        last.bias.copy_(logits_C)


@torch.no_grad()
def _probe_logits(model: Any) -> torch.Tensor:
    probe = probe_sequences(model.config)
    return padded_logits(model, probe, np.arange(len(probe.lengths_S)), model.config.pad_token_id or 0)


def to_precision(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device, and its weights to a precision.

    Buffers keep theirs: rotary frequencies in bf16 would misplace distant tokens. The layer that gives the logits
    stays in fp32, which is 0.02 % of the work and gives three more digits: weights divided by a temperature give logits
    divided by it.
    """
    last = last_layer(model)
    exact = set(last.parameters()) if last is not None else set()
    for weights in model.parameters():
        weights.data = weights.data.to(torch.float32 if weights in exact else dtype)
    model.to(device)
    if dtype != torch.float32 and last is not None:
        last.register_forward_pre_hook(lambda _layer, inputs: tuple(one.float() for one in inputs))


def replace_layers(module: Any, kind: type, make: Callable[[Any], torch.nn.Module]) -> None:
    """Put what `make` makes of it in the place of every layer of just this kind below a module."""
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, make(child))
        else:
            replace_layers(child, kind, make)


@torch.no_grad()
def redraw(head: torch.nn.Linear, config: Any) -> None:
    """Give a head new random weights, as transformers does."""
    head.weight.normal_(std=getattr(config, "initializer_range", None) or 0.02)
    if head.bias is not None:
        head.bias.zero_()


def last_layer(model: Any) -> torch.nn.Linear | None:
    """The last linear layer with an output for each label."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == model.config.num_labels), None)
