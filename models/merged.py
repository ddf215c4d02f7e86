"""A LoRA policy with its adapter added to its weights, for decoding: one product a layer instead of three.

The sum lives in tensors of its own. Merging in place and taking it back, as PEFT does, would leave rounding errors in
the frozen weights at every step.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import nn

from models.linear import AVAILABLE, PackedLinear
from models.shared_prompt import base_model


def can_merge(model: Any) -> bool:
    """Whether every adapter of the model is plain LoRA on 32-bit linear layers, in the CPU's memory."""
    if not isinstance(model, PeftModel) or model.active_adapters != [model.active_adapter]:
        return False
    adapted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    plain = all(isinstance(module, LoraLinear) and not any(module.use_dora.values()) for module in adapted)
    others = {type(module).__name__ for module in model.modules()} & {"ModulesToSaveWrapper", "TrainableTokensWrapper"}
    here = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in model.parameters())
    return AVAILABLE and plain and here and not others


@torch.no_grad()
def merged(model: PeftModel, into: Any = None) -> Any:
    """The model without its wrapper, with W + s B A for every adapted W; `into` is what an earlier call returned.

    All other tensors are the model's own, or copies of frozen ones.
    """
    base = base_model(model)
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLinear)}
    inside = tuple(f"{name}." for name in adapted)
    others = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside)
    }
    if into is None:
        own: dict[int, Any] = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        into = copy.deepcopy(base, own).eval()
        for module in into.modules():  # a trainer's patch of a forward would lead back to the original
            module.__dict__.pop("forward", None)
    for name, module in {**adapted, **others}.items():
        if isinstance(module, LoraLinear):
            layer: Any = module.get_base_layer()
            weight = layer.weight + module.get_delta_weight(model.active_adapter)
        else:
            layer, weight = module, module.weight
        place = into.get_submodule(name)
        if not isinstance(place, PackedLinear):
            into.set_submodule(name, PackedLinear(weight, layer.bias))
        elif isinstance(module, LoraLinear):
            place.pack(weight)
    return into
