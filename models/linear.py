"""Linear layers on a CPU by the faster of the two libraries of 32-bit products that torch ships, oneDNN and MKL.

`torch.nn.functional.linear` calls MKL, which takes slower code paths on other makers' processors than Intel's: there
oneDNN was 1.1 to 2.3 times as fast for a small model's layers, in both directions. On Intel's MKL is ahead by 5 to 40%,
in LoRA's thin products two times (docs/performance.md). The values differ by rounding only. Everything that is not a
plain 32-bit tensor on a CPU goes torch's own way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class FastLinear(nn.Linear):
    """nn.Linear whose products the faster library computes."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, (..., out)."""
        return linear(input, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer without gradients, whose weight is stored in oneDNN's own order for products with few rows.

    A small one stays as it is where MKL is the faster library.
    """

    ROWS = 64  # the number of rows that the order is best for
    SMALL = 2**19  # weights

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.pack(weight)

    def pack(self, weight: Tensor) -> None:
        """Take another weight, (out, in)."""
        as_is = not USE_ONEDNN and weight.numel() < self.SMALL
        self.packed = weight.detach() if as_is else torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.ROWS)

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, (..., out)."""
        return product(input, self.packed, self.bias)


def use_fastest(model: Any) -> Any:
    """Let the faster library compute the model's linear layers, in place; returns the model.

    Names and tensors stay as they are.
    """
    for module in model.modules():
        if type(module) is nn.Linear and suits(module.weight):
            module.__class__ = FastLinear
    return model


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear, by the faster library: x (..., in), weight (out, in), bias (out) -> (..., out)."""
    if not (USE_ONEDNN and suits(x) and suits(weight)) or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)  # type: ignore[return-value]
    return product(x, weight, bias)


def suits(tensor: Tensor) -> bool:
    """Whether oneDNN may compute with it: 32 bits, on a CPU, no shard of a distributed tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter)
    return plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu" and AVAILABLE


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for tensors that suit oneDNN. Both factors may be transposed views; there is no gradient."""
    if not (USE_ONEDNN or weight.is_mkldnn):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """oneDNN's product with its gradients; the operator has none of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_x = product(grad, weight.t()) if wants_x else None
        grad_weight = product(rows.t(), x.flatten(0, -2).t()) if wants_weight else None
        return grad_x, grad_weight, rows.sum(0) if wants_bias else None


def _is_intel() -> bool:
    """Whether Linux says that this processor is Intel's; nothing is known elsewhere."""
    about = Path("/proc/cpuinfo")
    return about.is_file() and "GenuineIntel" in about.read_text(encoding="utf-8", errors="replace")


AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
USE_ONEDNN = AVAILABLE and not (torch.backends.mkl.is_available() and _is_intel())
