"""A Hugging Face sequence classifier run over token columns: tokens in, logits out, sequences in input order.

1. A batch is a budget of tokens, sequences of like length in it                        [bertray.packing]
2. Where the model uses transformers' attention interface, its sequences lie end to end in one row, without padding;
   other models get a padded rectangle. Which of both is found out by trying.           [bertray.attention]
3. The head sees the first token of each sequence alone, and the last layer finishes no other, if that is the same.

Legend: S sequences, C classes, B sequences of a batch, L tokens of its longest, T all its tokens, D size of a state.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from bertray import attention, prepacked
from bertray.choices import Device, Precision
from bertray.errors import RequestError
from bertray.first_tokens import finish_first_tokens_alone
from bertray.packing import pack, packed_batches, pad, padded_batches
from bertray.ragged import offsets
from bertray.tokenization import TokenColumn

_log = logging.getLogger(__name__)

# Tokens of one forward pass. On CPUs activations of a larger batch leave the cache; a GPU wants enough work a launch.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 65536}
# Logits of the same sequences, batched otherwise, differ by rounding in fp32, some 1e-6; where other positions or other
# sequences' tokens are read, by more than this even with random weights.
_TOLERANCE = 1e-4
# What a model's own code raises at inputs that it was not made for.
_MODEL_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)


def resolve_device(device: Device) -> torch.device:
    """What `auto` means here: the GPU if torch sees one.

    Raises:
        RequestError: cuda was asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f"--device cuda: torch {torch.__version__} sees no GPU here; check nvidia-smi and torch's build"
        )
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `auto` means on this device.

    Raises:
        RequestError: bf16 was asked for on a GPU without it. (A CPU without it emulates it, slowly but rightly.)
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not has_bf16:
            name = torch.cuda.get_device_name(device)
            raise RequestError(f"--precision bf16: {name} has no bf16 arithmetic; use --precision fp32 or auto")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    return precision


class Encoder:
    """A model on a device, ready to classify.

    Args:
        model: a transformers sequence classifier; it is moved to the device and converted in place.
        precision: of weights and activations; the last layer is fp32 always, for bf16 would tie close labels.
        device: auto: the GPU if there is one.

    Attributes:
        is_packed: whether batches have no padding.
        is_cut: whether the last layer finishes the first tokens alone.
        token_budget: tokens of a batch; halved where they do not fit into the GPU's memory.
    """

    def __init__(self, model: Any, precision: Precision = "auto", device: Device = "auto") -> None:
        self.device = resolve_device(device)
        self.precision = resolve_precision(precision, self.device)
        self.token_budget = TOKEN_BUDGET[self.device.type]
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.model = model.float().cpu().eval()
        self.pad_id = model.config.pad_token_id or 0
        self._first_position = _first_position(model)
        self._first_tokens_B: torch.Tensor | None = None  # of the batch at work, where it is packed
        self.is_packed = self.is_cut = False
        self._adapt(can_pack=dtype == torch.float32 or attention.kernel_works(self.device, dtype))
        self.model.to(self.device, dtype)
        if dtype != torch.float32:
            _keep_last_layer_fp32(self.model)
            if self.device.type == "cpu" and prepacked.is_available():
                prepacked.prepack(self.model, self.token_budget)

    @torch.inference_mode()
    def logits(self, tokens: TokenColumn) -> np.ndarray:
        """logits_SC (float32) of every sequence.

        Raises:
            torch.OutOfMemoryError: one sequence alone does not fit into the GPU's memory.
        """
        rows_done: list[np.ndarray] = []
        outputs: list[torch.Tensor] = []
        budget = self.token_budget
        batches = deque(self._batches(tokens.lengths_S, budget))
        while batches:
            rows = batches.popleft()
            try:
                outputs.append(self._forward(tokens, rows))
                rows_done.append(rows)
                continue
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    raise
            # Here, where the exception no longer holds the batch's activations.
            torch.cuda.empty_cache()
            budget //= 2
            left = np.concatenate([rows, *batches])
            batches = deque(left[part] for part in self._batches(tokens.lengths_S[left], budget))
        if budget < self.token_budget:
            _log.warning("out of GPU memory: batches are of %d tokens from now on, not %d", budget, self.token_budget)
            self.token_budget = budget
        logits_SC = np.empty((len(tokens.lengths_S), self.model.config.num_labels), dtype=np.float32)
        if outputs:
            # Copied at the end: the host lays out batches while the GPU is at work on earlier ones.
            logits_SC[np.concatenate(rows_done)] = torch.cat(outputs).cpu().numpy()
        return logits_SC

    def _batches(self, lengths_S: np.ndarray, budget: int) -> list[np.ndarray]:
        return (packed_batches if self.is_packed else padded_batches)(lengths_S, budget)

    def _forward(self, tokens: TokenColumn, rows: np.ndarray) -> torch.Tensor:
        """logits_BC (float32) of one batch, on the device."""
        if not self.is_packed:
            input_ids_BL, mask_BL = pad(tokens, rows, self.pad_id)
            output = self.model(input_ids=self._put(input_ids_BL), attention_mask=self._put(mask_BL))
        else:
            batch = pack(tokens, rows)
            packing = attention.Packing(
                self._put(batch.offsets_B1.astype(np.int32)), batch.runs(), int(tokens.lengths_S[rows].max())
            )
            self._first_tokens_B = packing.offsets_B1[:-1].long()
            output = self.model(
                input_ids=self._put(batch.input_ids_T)[None],
                position_ids=self._put(batch.position_ids_T + self._first_position)[None],
                packing=packing,
            )
        logits_BC: torch.Tensor = output.logits.float()
        return logits_BC

    def _put(self, array: np.ndarray) -> torch.Tensor:
        tensor, device = torch.from_numpy(array), self.model.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    @torch.inference_mode()
    def _adapt(self, *, can_pack: bool) -> None:
        """Do without padding, and without what the head does not read, if the logits are then the same.

        Tried in fp32 on the CPU, where a wrong token makes more difference than rounding.
        """
        encoder = getattr(self.model, self.model.base_model_prefix, None)
        if encoder is None:
            return
        probe = _probe(self.model.config)
        try:
            expected = self._forward_probe(probe)
        except _MODEL_ERRORS as error:
            _log.info("%s is run as it is (%s: %s)", type(self.model).__name__, type(error).__name__, error)
            return
        if can_pack and self.model._supports_attention_backend:
            before = self.model.config._attn_implementation
            handle = encoder.register_forward_hook(self._only_first_tokens, with_kwargs=True)
            self.model.set_attn_implementation(attention.NAME)
            self.is_packed = True
            if not self._gives(expected, probe, "padded batches"):
                self.is_packed = False
                handle.remove()
                self.model.set_attn_implementation(before)
        handle = finish_first_tokens_alone(encoder, self._select_first_tokens)
        if handle:
            self.is_cut = True
            if not self._gives(expected, probe, "all tokens of the last layer"):
                self.is_cut = False
                handle.remove()

    def _forward_probe(self, probe: TokenColumn) -> torch.Tensor:
        """Logits of two batches of different shape."""
        every = np.arange(len(probe.lengths_S))
        return torch.cat([self._forward(probe, every), self._forward(probe, every[1:])])

    def _gives(self, expected: torch.Tensor, probe: TokenColumn, otherwise: str) -> bool:
        try:
            difference = (self._forward_probe(probe) - expected).abs().max().item()
        except _MODEL_ERRORS as error:
            difference, why = float("inf"), f"{type(error).__name__}: {error}"
        else:
            why = f"logits differ by {difference:.3g}"
        if difference <= _TOLERANCE * max(1.0, expected.abs().max().item()):
            return True
        _log.info("%s is run on %s (%s)", type(self.model).__name__, otherwise, why)
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


def _first_position(model: Any) -> int:
    """The position of a text's first token: 0, or in RoBERTa's family the one after the padding's."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return 0 if padding is None else padding + 1


def _probe(config: Any) -> TokenColumn:
    """Random sequences of three odd lengths, the longest above the span of local attention where there is one."""
    rng = np.random.default_rng(0)
    longest = min(93, (getattr(config, "max_position_embeddings", None) or 512) - 9)
    lengths_S = np.array([longest, 9, 9, 3])
    pad_id = config.pad_token_id or 0
    ids_T = rng.integers(1, config.vocab_size, lengths_S.sum()).astype(np.int32)
    ids_T[ids_T == pad_id] = (pad_id + 1) % config.vocab_size
    return TokenColumn(ids_T, offsets(lengths_S), np.arange(4), np.zeros(4, dtype=bool), pa.nulls(4, pa.string()))


def scale_logits(model: Any, temperature: float) -> bool:
    """Divide a classifier's logits by a temperature, in the weights and bias of its last linear layer.

    Whatever reads the model then gives calibrated scores, with no code of ours: a pipeline, an export, another engine.

    Args:
        model: a transformers sequence classifier in fp32, on any device; changed in place.
        temperature: of `calibration.fit_temperature`, above 0.

    Returns:
        Whether the logits are now divided. Where the model does more than that layer to make them, it is as it was, and
        its temperature is 1: the log says so.
    """
    assert temperature > 0, temperature
    last, was_training = _last_layer(model), model.training
    before = {name: weights.clone() for name, weights in last.state_dict().items()} if last else {}
    model.eval()
    try:
        expected = _probe_logits(model) / temperature
        for weights in last.parameters() if last else ():
            weights.data /= temperature
        difference = (_probe_logits(model) - expected).abs().max().item()
        if difference <= _TOLERANCE * max(1.0, expected.abs().max().item()):
            return True
        why = f"its last linear layer alone does not divide logits by {temperature:.4g}: off by {difference:.3g}"
    except _MODEL_ERRORS as error:
        why = f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    if last:
        last.load_state_dict(before)
    _log.warning("warning: %s stays uncalibrated (%s)", type(model).__name__, why)
    return False


@torch.inference_mode()
def _probe_logits(model: Any) -> torch.Tensor:
    """Logits of random sequences in a padded batch."""
    probe = _probe(model.config)
    batch = pad(probe, np.arange(len(probe.lengths_S)), model.config.pad_token_id or 0)
    input_ids_BL, mask_BL = (torch.from_numpy(array).to(model.device) for array in batch)
    logits: torch.Tensor = model(input_ids=input_ids_BL, attention_mask=mask_BL).logits
    return logits


def _keep_last_layer_fp32(model: Any) -> None:
    """Let the linear layer that gives the logits compute in fp32: 0.02 % of the work, three more digits."""
    last = _last_layer(model)
    if last is not None:
        last.float()
        last.register_forward_pre_hook(lambda _layer, inputs: tuple(one.float() for one in inputs))


def _last_layer(model: Any) -> torch.nn.Linear | None:
    """The linear layer that gives the logits, as far as its shape tells."""
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    return next((layer for layer in reversed(layers) if layer.out_features == model.config.num_labels), None)
