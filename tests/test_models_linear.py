"""Both libraries' products equal torch's, in both directions; whatever oneDNN should not touch goes torch's own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear as stock

from models.fused_lora import FusedLoraLinear, fuse_lora
from models.linear import AVAILABLE, FastLinear, PackedLinear, linear, use_fastest
from tests.conftest import tiny_llama


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each test with either library, whatever this processor prefers."""
    monkeypatch.setattr("models.linear.USE_ONEDNN", request.param)
    return request.param


def test_this_build_of_torch_has_it() -> None:
    assert AVAILABLE


@pytest.mark.parametrize("out", [10, 2**15])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer(out: int, bias: bool, library: bool) -> None:
    """oneDNN's own order for every weight, with MKL for the large one only; another weight takes its place."""
    layer, x = nn.Linear(24, out, bias), torch.randn(3, 24)
    packed = PackedLinear(layer.weight, layer.bias)
    assert packed.packed.is_mkldnn == (library or out > 10)
    torch.testing.assert_close(packed(x), layer(x).detach(), rtol=1e-5, atol=1e-5)
    packed.pack(2 * layer.weight)
    torch.testing.assert_close(packed(x), stock(x, 2 * layer.weight, layer.bias).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool, frozen: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*size: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*size, generator=generator).requires_grad_(grad)

    x, weight, up = leaf(*shape), leaf(10, 24, grad=not frozen), torch.randn(*shape[:-1], 10, generator=generator)
    offset = leaf(10, grad=not frozen) if bias else None
    leaves = [tensor for tensor in (x, weight, offset) if tensor is not None and tensor.requires_grad]
    found = []
    for product in (linear, stock):
        out = product(x, weight, offset)
        found.append([out, *torch.autograd.grad(out, leaves, up)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_views_and_their_gradients() -> None:
    wide = torch.randn(6, 9, 24, requires_grad=True)
    weight = torch.randn(24, 10).t()
    ours, theirs = (product(wide.transpose(0, 1)[1:, ::2], weight) for product in (linear, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out.square().sum(), wide)[0] for out in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "change", [lambda t: t.double(), lambda t: t.bfloat16(), lambda t: t.to("meta"), lambda t: t[:0]]
)
def test_what_does_not_suit_is_left_to_torch(change: Any) -> None:
    x, weight = change(torch.randn(3, 8)), torch.randn(4, 8)
    weight = weight.to(x.device, x.dtype)
    assert linear(x, weight).shape == stock(x, weight).shape
    assert linear(x, weight).dtype == x.dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 8), torch.randn(4, 8)).dtype == torch.bfloat16


def test_a_model_keeps_its_names_and_its_numbers() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
    names, before = list(model.state_dict()), model(ids).logits
    assert use_fastest(model) is model
    assert all(isinstance(module, FastLinear) for module in model.modules() if isinstance(module, nn.Linear))
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.5}, {"use_dora": True}])
def test_a_fused_adapter_is_pefts(settings: dict[str, Any]) -> None:
    """Where it is not plain LoRA, PEFT's own forward runs; in eval mode a dropout is none."""

    def run(fused: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(
            tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
        ).eval()
        generator = torch.Generator().manual_seed(1)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for _, parameter in trained:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        if fused:
            assert sum(isinstance(m, FusedLoraLinear) for m in fuse_lora(model).modules()) == len(trained) // 2
        logits = model(torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])).logits
        logits.square().sum().backward()
        with model.disable_adapter():
            without = model(torch.tensor([[5, 6, 7, 8]])).logits
        return [logits, without, *(p.grad for _, p in trained if p.grad is not None)]

    if settings.get("use_dora"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear", **settings)).eval()
        before = model(torch.tensor([[5, 6, 7, 8]])).logits
        torch.testing.assert_close(fuse_lora(model)(torch.tensor([[5, 6, 7, 8]])).logits, before)
        return
    for ours, theirs in zip(run(True), run(False), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
