"""A merged copy says what the adapted model says, and leaves its weights alone."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from models.merged import can_merge, merged
from tests.conftest import tiny_llama


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)).eval()


def shake(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_the_copy_follows_the_adapter_and_the_weights_stay() -> None:
    model, ids = adapted(), torch.tensor([[5, 6, 7, 8, 9]])
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora" not in name}
    first = merged(model)
    assert first(ids).logits.allclose(model(ids).logits, atol=1e-5)
    shake(model)
    assert not first(ids).logits.allclose(model(ids).logits, atol=1e-2)
    second = merged(model, into=first)
    assert second is first
    assert second(ids).logits.allclose(model(ids).logits, atol=1e-4)
    assert all(value.equal(model.state_dict()[name]) for name, value in before.items())
    shared = first.get_input_embeddings().weight
    assert shared.data_ptr() == model.get_base_model().get_input_embeddings().weight.data_ptr()


def test_a_merged_copy_is_the_same_whenever_it_is_made() -> None:
    model = adapted()
    kept = merged(model)
    for _ in range(3):
        shake(model)
        merged(model, into=kept)
    fresh = merged(model)
    assert all(value.equal(fresh.state_dict()[name]) for name, value in kept.state_dict().items())


def test_a_patched_forward_is_not_copied() -> None:
    model, ids = adapted(), torch.tensor([[5, 6, 7, 8, 9]])
    base = model.get_base_model()
    forward = base.forward
    base.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    copied = merged(model)
    before = copied(ids).logits
    shake(model)
    assert copied(ids).logits.equal(before)


def test_what_is_not_plain_lora_is_not_merged(tiny_model: LlamaForCausalLM) -> None:
    assert can_merge(adapted())
    assert not can_merge(tiny_model)
    assert not can_merge(adapted(use_dora=True))
    assert not can_merge(adapted(modules_to_save=["lm_head"]))
    assert not can_merge(adapted().bfloat16())
