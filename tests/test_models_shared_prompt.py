"""The prompt-sharing forward equals the plain one, token by token and gradient by gradient."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from models.fused_lora import fuse_lora
from models.shared_prompt import Tree, branch_logps, fill, pack, packed_logps, token_logps
from tests.conftest import SHAPE, tiny_llama

SAME_BEGINNING = [Tree([*range(3, 25), n], [[30, 31], [40], [50, 51, 52]]) for n in (60, 61)]


def some_trees(seed: int = 0, vocab: int = 101) -> list[Tree]:
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(n)]

    return [
        Tree(tokens(7), [tokens(5), tokens(1), tokens(9)]),
        Tree(tokens(1), [tokens(4), []]),
        Tree(tokens(12), [tokens(3)] * 2 + [tokens(8)]),
        Tree(tokens(6), [tokens(1), tokens(1)]),
        Tree(tokens(2), [[]]),
    ]


def plain_logps(model: PreTrainedModel, prompt: list[int], branch: list[int], temperature: float = 1.0) -> torch.Tensor:
    """One sequence, one forward: the definition."""
    logits = model(input_ids=torch.tensor([prompt + branch])).logits[0].float() / temperature
    rows = logits[len(prompt) - 1 : len(prompt) - 1 + len(branch)].log_softmax(-1)
    return rows.gather(1, torch.tensor(branch)[:, None])[:, 0] if branch else rows.new_zeros(0)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("budget", [16, 4096])
def test_branch_logps_equal_plain_forward(config: type, budget: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE), attn_implementation="sdpa").eval()
    trees = some_trees()
    for tree, branches in zip(trees, branch_logps(model, trees, budget), strict=True):
        for branch, logps in zip(tree.branches, branches, strict=True):
            torch.testing.assert_close(logps, plain_logps(model, tree.prompt, branch), atol=1e-5, rtol=1e-5)


def test_a_last_token_has_a_row_in_a_whole_pack_only() -> None:
    trees = [Tree([5, 6], [[7], [8, 9], []])]
    packed, whole = pack(trees), pack(trees, whole=True)
    assert packed.input_ids.tolist() == [[5, 6, 8]]
    assert whole.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert packed.predictors.tolist() == [1, 1, 2]
    assert whole.predictors.tolist() == [1, 1, 3]
    assert packed.ends.tolist() == [1, 2, 1]
    assert whole.ends.tolist() == [2, 4, 1]
    assert packed.targets.tolist() == whole.targets.tolist() == [7, 8, 9]
    assert packed.lengths == whole.lengths == [[1, 2, 0]]


@pytest.mark.parametrize("trees", [[Tree([5, 6], [[7], [8]])], [Tree([5], [[]])], [Tree([5], [[7]])]])
def test_packs_whose_branches_have_no_rows(trees: list[Tree]) -> None:
    model = tiny_llama()
    for tree, branches in zip(trees, branch_logps(model, trees), strict=True):
        for branch, logps in zip(tree.branches, branches, strict=True):
            torch.testing.assert_close(logps, plain_logps(model, tree.prompt, branch), atol=1e-5, rtol=1e-5)


def tiny_scaled(config: type[GraniteConfig] | type[CohereConfig], **scale: float) -> PreTrainedModel:
    """A model whose logits are its head's times a factor."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SHAPE, initializer_range=0.2, **scale)).eval()


MODELS = {
    "llama": tiny_llama,
    "granite": lambda: tiny_scaled(GraniteConfig, logits_scaling=4.0),
    "cohere": lambda: tiny_scaled(CohereConfig, logit_scale=0.25),
}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_equal_plain_forward(lora: bool, temperature: float, family: str) -> None:
    trees = some_trees(1)
    weights = [
        torch.randn(len(b), generator=torch.Generator().manual_seed(i)) for i, t in enumerate(trees) for b in t.branches
    ]

    def build() -> torch.nn.Module:
        model = MODELS[family]()
        if lora:
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        return model

    shared, plain = build(), build()
    logps_N, entropies_N = packed_logps(shared, pack(trees), temperature)
    (logps_N * torch.cat(weights)).sum().backward()
    branches = [(t.prompt, b) for t in trees for b in t.branches]
    sum(
        (plain_logps(plain, p, b, temperature) * w).sum() for (p, b), w in zip(branches, weights, strict=True)
    ).backward()
    assert (entropies_N > 0).all()
    checked = 0
    for (name, a), (_, b) in zip(shared.named_parameters(), plain.named_parameters(), strict=True):
        if b.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm(), name
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layers_that_are_computed_again_give_the_same_gradients(lora: bool, attention: str) -> None:
    """And keep less: the bytes that autograd holds for the backward pass, weights and the layers' inputs apart."""
    kept: list[int] = []
    models: list[Any] = []
    for again in (False, True):
        model: Any = tiny_llama()
        model.set_attn_implementation(attention)
        if lora:
            torch.manual_seed(3)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
            model.enable_input_require_grads()  # as TRL does
        fuse_lora(model)
        if again:
            model.gradient_checkpointing_enable()
        held: dict[int, int] = {parameter.data_ptr(): 0 for parameter in model.parameters()}

        def hold(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held.setdefault(tensor.data_ptr(), tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            logps_N, _ = packed_logps(model.train(), pack(some_trees(1)))
        kept.append(sum(held.values()))
        (logps_N * torch.linspace(-1, 1, len(logps_N))).sum().backward()
        models.append(model)
    assert kept[1] < kept[0] / 2
    gradients = [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 10
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("config", [LlamaConfig, Gemma3TextConfig], ids=["llama", "windows"])
@pytest.mark.parametrize("trees", [some_trees(2), SAME_BEGINNING])
def test_flex_attention_sees_what_sdpa_sees(config: type, trees: list[Tree]) -> None:
    """Without gradients and as plain Python: torch has its kernel for CUDA alone. The mask is the same there."""
    shape = {**SHAPE, "head_dim": 16, "sliding_window": 8} if config is Gemma3TextConfig else SHAPE
    found = []
    for attention in ("sdpa", "flex_attention"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**shape), attn_implementation=attention)
        with torch.compiler.set_stance("force_eager"):
            found.append(torch.cat([logps for branches in branch_logps(model, trees) for logps in branches]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_branch_does_not_see_its_siblings() -> None:
    model = tiny_llama()
    alone = branch_logps(model, [Tree([5, 6, 7], [[8, 9]])])[0][0]
    crowd = branch_logps(model, [Tree([5, 6, 7], [[40, 41, 42], [8, 9]]), Tree([5, 6, 7], [[8, 9, 10]])])
    torch.testing.assert_close(crowd[0][1], alone)
    torch.testing.assert_close(crowd[1][0][:2], alone)


def test_entropy_by_hand() -> None:
    head = torch.nn.Linear(2, 2, bias=False)
    head.weight.data = torch.eye(2)
    logps, entropies = token_logps(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), head, torch.tensor([0, 1]))
    p = 1 / (1 + torch.e**-3)
    assert logps.tolist() == pytest.approx([-0.693147, torch.tensor(1 - p).log().item()], abs=1e-5)
    by_hand = -(p * torch.tensor(p).log() + (1 - p) * torch.tensor(1 - p).log()).item()
    assert entropies.tolist() == pytest.approx([0.693147, by_hand], abs=1e-5)


@pytest.mark.parametrize("frozen", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("autocast", [True, False])
def test_sixteen_bits_cost_no_more_than_in_log_softmax(frozen: bool, autocast: bool) -> None:
    """Targets have a probability of 0.995 here: what is left of their gradient is a small difference of large sums."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if autocast else torch.bfloat16
    weight, targets = torch.randn(1500, 24, generator=g).to(dtype), torch.randint(1500, (24,), generator=g)
    head = torch.nn.Linear(24, 1500, bias=False, dtype=dtype).requires_grad_(not frozen)
    head.load_state_dict({"weight": weight})

    def rows(as_dtype: torch.dtype = dtype) -> torch.Tensor:
        return weight[targets].to(as_dtype).requires_grad_()

    ours, plain, exact = rows(), rows(), rows(torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logps, entropies = token_logps(ours, head, targets)
        logits = torch.nn.functional.linear(plain, weight).float()
    tables = [logits.log_softmax(-1), (exact @ weight.double().T).log_softmax(-1)]
    for logp in (logps, *(table.gather(1, targets[:, None]) for table in tables)):
        logp.sum().backward()
    plain_entropies, exact_entropies = (-(table.exp() * table).sum(-1) for table in tables)
    assert logps.exp().mean() > 0.99
    assert (ours.grad - exact.grad).norm() <= 1.5 * (plain.grad - exact.grad).norm()
    assert (entropies - exact_entropies).abs().max() <= 1.5 * (plain_entropies - exact_entropies).abs().max()


def test_fill_keeps_order_and_budget() -> None:
    assert list(fill([3, 3, 3, 9, 1, 1], 6)) == [[0, 1], [2], [3], [4, 5]]


def test_gemma_soft_caps() -> None:
    """Soft-capped attention and logits; its sliding window covers these trees."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(**SHAPE, head_dim=8, sliding_window=64), attn_implementation="eager"
    ).eval()
    trees = some_trees()
    for tree, branches in zip(trees, branch_logps(model, trees), strict=True):
        for branch, logps in zip(tree.branches, branches, strict=True):
            torch.testing.assert_close(logps, plain_logps(model, tree.prompt, branch), atol=1e-4, rtol=1e-4)
