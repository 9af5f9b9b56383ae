"""AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101) over 32-bit weights, and its learning rates.

Where the model computes in bf16 the optimizer keeps a 32-bit copy of the weights: an update smaller than 1/256 of a
weight would be lost in bf16. A step casts the gradients, steps the 32-bit weights and rounds them into the model.
"""

from __future__ import annotations

import re
from typing import Any

import psutil
import torch

from bertray.errors import RequestError
from bertray.model.runtime import CGROUP
from bertray.training.config import TrainingOptions

_LAYER_NUMBER = re.compile(r"\.(?:layers?|h|blocks?)\.(\d+)\.")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_GRAD_NORM = 1.0  # gradients are scaled down to this norm, as BERT's were


def learning_rate_factor(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """The share of the peak learning rate at a step (from 1): a linear rise to 1, then a linear fall towards 0."""
    if step <= num_warmup_steps:
        return step / num_warmup_steps
    return (num_steps - step + 1) / (num_steps - num_warmup_steps + 1)


def check_memory(model: Any) -> None:
    """Check that weights, moments and gradients fit into this machine's free memory.

    Raises:
        RequestError: they do not fit.
    """
    num_weights = num_bytes = 0
    for weights in model.parameters():
        if weights.requires_grad:
            num_weights += weights.numel()
            # The weight, its two moments and its gradient have 32 bits each; in bf16 the model's own weight and
            # gradient come on top.
            num_bytes += weights.numel() * (20 if weights.element_size() == 2 else 16)
    available = _available_bytes()
    if num_bytes > available:
        raise RequestError(
            f"training {num_weights:,} weights takes {num_bytes / 2**30:.1f} GiB beside what a step needs, and "
            f"{available / 2**30:.1f} GiB are free: use a smaller --encoder, or run fewer workers on a machine"
        )


def _available_bytes() -> int:
    """Memory that this process may still take, also in a container with a limit."""
    available: int = psutil.virtual_memory().available
    limit = CGROUP / "memory.max"  # bytes, or "max"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return available
    facts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    # What the kernel keeps of files that were read, it gives back when memory is short.
    used = int((CGROUP / "memory.current").read_text()) - int(facts["inactive_file"])
    return min(available, int(most) - used)


class Optimizer:
    """Trains the weights of a model.

    Args:
        model: every trained weight must have a gradient before each step; steps write into the model.
        options: learning_rate is the peak, for the topmost layer; weight_decay is for matrices, biases and norms, which
            are vectors, have none; the learning rate of a layer is layer_decay of the rate of the layer above (Howard
            and Ruder 2018, https://arxiv.org/abs/1801.06146): embeddings are the lowest layer, the head is the highest.
        exact: the 32-bit weights by name, if the model's were rounded from them.
    """

    def __init__(self, model: Any, options: TrainingOptions, exact: dict[str, torch.Tensor]) -> None:
        trained = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
        self._names, self._model_weights = list(trained), list(trained.values())
        self._learning_rate = options.learning_rate
        self._masters = [self._master(name, weights, exact) for name, weights in trained.items()]
        rounded = [pair for pair in zip(self._model_weights, self._masters, strict=True) if pair[0] is not pair[1]]
        self._rounded = [weights for weights, _ in rounded]
        self._gradients = [torch.zeros_like(master) for _, master in rounded]
        for (_, master), gradient in zip(rounded, self._gradients, strict=True):
            master.grad = gradient
        depths = _depths(self._names, model.base_model_prefix)
        groups: dict[tuple[float, float], list[torch.Tensor]] = {}
        for depth, master in zip(depths, self._masters, strict=True):
            decay = options.weight_decay if master.ndim > 1 else 0.0
            groups.setdefault((options.layer_decay ** (max(depths) - depth), decay), []).append(master)
        self._adamw = torch.optim.AdamW(
            [
                {"params": masters, "weight_decay": decay, "factor": factor}
                for (factor, decay), masters in groups.items()
            ],
            fused=True,
        )
        self._begin(0)

    @staticmethod
    @torch.no_grad()
    def _master(name: str, weights: torch.Tensor, exact: dict[str, torch.Tensor]) -> torch.Tensor:
        """The 32-bit weights that are stepped: the model's own if it has 32 bits."""
        master = weights if weights.dtype == torch.float32 else weights.detach().float()
        return master.copy_(exact[name]) if name in exact else master

    def _begin(self, num_steps: int) -> None:
        for master in self._masters:
            state = self._adamw.state[master]
            state["step"] = torch.tensor(float(num_steps), device=master.device)
            for name in _MOMENTS:
                state.setdefault(name, torch.zeros_like(master))

    @torch.no_grad()
    def step(self, factor: float) -> torch.Tensor:
        """Take one step and forget the gradients.

        Args:
            factor: the share of the peak learning rate, see `learning_rate_factor`.

        Returns:
            The norm of the gradients before they were scaled; a scalar on the device.
        """
        taken = [weights.grad for weights in self._rounded if weights.grad is not None]
        if taken:
            torch._foreach_copy_(self._gradients, taken)
        norm = torch.nn.utils.clip_grad_norm_(self._masters, _MAX_GRAD_NORM)
        for group in self._adamw.param_groups:
            group["lr"] = self._learning_rate * factor * group["factor"]
        self._adamw.step()
        for weights in self._model_weights:
            weights.grad = None
        self._publish()
        return norm

    def weights(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of the 32-bit weights by name."""
        return self._copies(self._masters)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of everything that a later run needs to continue."""
        return {
            f"{kind}/{name}": held
            for kind, tensors in self._state().items()
            for name, held in self._copies(tensors).items()
        }

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor], num_steps: int) -> None:
        """Continue where `state` was called, after `num_steps` steps."""
        self._begin(num_steps)
        for kind, held in self._state().items():
            torch._foreach_copy_(held, [tensors[f"{kind}/{name}"] for name in self._names])
        self._publish()

    def _state(self) -> dict[str, list[torch.Tensor]]:
        moments = {name: [self._adamw.state[master][name] for master in self._masters] for name in _MOMENTS}
        return {"weights": self._masters, **moments}

    def _copies(self, tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: held.detach().to("cpu", copy=True) for name, held in zip(self._names, tensors, strict=True)}

    @torch.no_grad()
    def _publish(self) -> None:
        """Let the model compute with the new weights."""
        torch._foreach_copy_(self._model_weights, self._masters)


def _depths(names: list[str], encoder: str) -> list[int]:
    """The layer of each weight: 0 for embeddings, 1 … for layers, and one more for everything above them."""
    numbers = [_LAYER_NUMBER.search(name) for name in names]
    top = max((int(number[1]) for number in numbers if number), default=-1) + 2
    return [
        int(number[1]) + 1 if number else 0 if name.startswith(f"{encoder}.embeddings") else top
        for name, number in zip(names, numbers, strict=True)
    ]
