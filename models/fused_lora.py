"""A LoRA layer as one operation: x W^T + b + s (x A^T) B^T without the intermediate results that PEFT's layer writes.

The adapter's two products are tiny; adding, scaling and keeping their results for the backward pass is what costs. The
sum goes straight into the base layer's output, and its gradient into that of the input.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.linear import product, suits


class FusedLoraLinear(LoraLinear):
    """PEFT's layer; wherever something else than one plain adapter without dropout is active, its own forward runs."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) -> (..., out)."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        plain = name in self.lora_A and name not in self.lora_variant and not (self.disable_adapters or self.merged)
        if not plain or kwargs or not isinstance(self.lora_dropout[name], nn.Identity) or not self._suits(x, name):
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        weights = (base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight)
        return _Product.apply(x, *weights, self.scaling[name])  # type: ignore[return-value]

    def _suits(self, x: Tensor, name: str) -> bool:
        base: Any = self.get_base_layer()
        if torch.is_autocast_enabled("cpu") or x.numel() == 0 or base.weight.requires_grad:
            return False
        weights: list[Any] = [base.weight, self.lora_A[name].weight, self.lora_B[name].weight]
        return suits(x) and all(map(suits, weights))


def fuse_lora(model: Any) -> Any:
    """Let the model's LoRA layers on a CPU compute in one operation, in place; returns the model."""
    for module in model.modules():
        if type(module) is LoraLinear:
            base: Any = module.get_base_layer()
            if suits(base.weight):
                module.__class__ = FusedLoraLinear
    return model


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows_ND = x.reshape(-1, x.shape[-1])
        low_NR = product(rows_ND, a)
        out = product(rows_ND, weight, bias).addmm_(low_NR, b.t(), alpha=scale)
        ctx.save_for_backward(rows_ND, low_NR, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_ND, low_NR, weight, a, b = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_low_NR = product(grad_NO, b.t()).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product(grad_NO, weight.t()).addmm_(grad_low_NR, a).view(ctx.shape)
        grad_a = product(grad_low_NR.t(), rows_ND.t())
        grad_b = product(low_NR.t(), grad_NO.t()).mul_(ctx.scale).t()  # its transpose is twice as fast
        return grad_x, None, None, grad_a, grad_b, None
