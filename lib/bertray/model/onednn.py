"""Linear layers whose weights are reordered once for oneDNN's matrix kernels (bf16 on CPUs).

torch's own layer passes plain weights, which oneDNN reorders in each call. torch's compiler emits the operators used
here for a frozen model; calling them directly needs no compilation.
"""

from __future__ import annotations

import torch


class PrepackedLinear(torch.nn.Module):
    """A frozen copy of a bf16 linear layer, for inference only, in the best layout for inputs of `num_tokens` rows."""

    def __init__(self, linear: torch.nn.Linear, num_tokens: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_tokens)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, self._weight, self._bias, "none", [], "")
        return outputs


def is_available() -> bool:
    """Whether this build of torch has oneDNN and the operators, and the processor has bf16."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )


def prepack(module: torch.nn.Module, num_tokens: int) -> None:
    """Replace every bf16 linear layer in a module."""
    for name, child in module.named_children():
        if type(child) is torch.nn.Linear and child.weight.dtype == torch.bfloat16:
            setattr(module, name, PrepackedLinear(child, num_tokens))
        else:
            prepack(child, num_tokens)
