"""Prompt sharing equals plain forwards in the model families where it holds, and is refused where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from models.decode_attention import Groups
from models.kv_cache import RoomyLayer
from models.rollout import sample
from models.self_check import (
    check_trees,
    difference,
    rollout_problem,
    sharing_problem,
)
from models.shared_prompt import (
    attention_masks,
    branch_logps,
    logit_transform,
    pack,
    pack_for_forward,
    packed_hidden,
    plain_logps,
    shared_logps,
)
from tests.conftest import tiny_llama

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BERT = {"cls_token_id": 1, "sep_token_id": 2}
SHARING = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen2-window": Qwen2Config(**SHAPE, use_sliding_window=True, **WINDOW),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=4),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, **WINDOW),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, **WINDOW),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0, residual_multiplier=0.5),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "cohere2": Cohere2Config(**SHAPE, logit_scale=0.25, **WINDOW),
    "hyperclovax": HyperCLOVAXConfig(**SHAPE, logits_scaling=0.25),
}


def tiny(name: str) -> PreTrainedModel:
    """A tiny random model of a family; Gemma 2's soft caps need eager attention."""
    torch.manual_seed(0)
    attention = "eager" if name == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(SHARING[name], attn_implementation=attention).eval()


@pytest.mark.parametrize("name", SHARING)
@torch.no_grad()
def test_sharing_holds(name: str) -> None:
    """Log-probabilities by plain forwards, greedy rollouts by `generate`; the windows are shorter than the texts."""
    model = tiny(name)
    assert sharing_problem(model) is None
    assert rollout_problem(model, exact=True) is None
    trees = check_trees(259)
    for tree, shared in zip(trees, shared_logps(model, trees), strict=True):
        for branch, logps in zip(tree.branches, shared, strict=True):
            torch.testing.assert_close(logps, plain_logps(model, tree.prompt, branch), atol=1e-4, rtol=0)
        (group,) = sample(model, [tree.prompt], group_size=2, max_new_tokens=8, temperature=0, eos_ids=[])
        ids = torch.tensor([tree.prompt])
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert group == [greedy[0, len(tree.prompt) :].tolist()] * 2


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "gemma3", "qwen2-window"])
@torch.no_grad()
def test_the_window_matters_here(name: str) -> None:
    """The test above could not fail if the tiny windows changed nothing."""
    model = tiny(name)
    tree = check_trees(259)[0]
    narrow = plain_logps(model, tree.prompt, tree.branches[0])
    model.config.sliding_window = 64
    assert (plain_logps(model, tree.prompt, tree.branches[0]) - narrow).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["granite", "cohere", "cohere2", "hyperclovax"])
@torch.no_grad()
def test_the_logit_scale_matters_here(name: str) -> None:
    """Nor could it if the head's factor changed nothing: log-softmax of the bare head is far from the model's."""
    model = tiny(name)
    assert logit_transform(model.config) == (0.25, None)
    tree = check_trees(259)[0]
    hidden = model.get_decoder()(input_ids=torch.tensor([tree.prompt])).last_hidden_state[0, -1:]
    bare = model.get_output_embeddings()(hidden).log_softmax(-1)[0, tree.branches[0][0]]
    assert (plain_logps(model, tree.prompt, tree.branches[0])[0] - bare).abs() > 0.05


class HalfLogits(LlamaForCausalLM):
    """A model of its own kind: its config does not tell what it does to its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits / 2
        return out


def test_a_model_with_an_unknown_head_is_scored_without_sharing(caplog: pytest.LogCaptureFixture) -> None:
    model, trees = HalfLogits(tiny_llama().config).eval(), check_trees(259)
    with torch.no_grad():
        plain = [[plain_logps(model, tree.prompt, branch) for branch in tree.branches] for tree in trees]
        assert (shared_logps(model, trees)[0][0] - plain[0][0]).abs().max() > 0.1  # what would be said otherwise
        with caplog.at_level("WARNING", logger="traitdose"):
            for _ in range(2):
                torch.testing.assert_close(branch_logps(model, trees), plain, atol=0, rtol=0)
    assert [record.getMessage().split(". ")[-1] for record in caplog.records] == [
        "Every reply gets a forward of its own"
    ]


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: AutoModelForCausalLM.from_config(MambaConfig(**SHAPE, state_size=4)), "recur"),
        (lambda: AutoModelForCausalLM.from_config(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])), "conv"),
        (lambda: AutoModelForCausalLM.from_config(ModernBertDecoderConfig(**SHAPE, **BERT)), "no decoder"),
    ],
    ids=["mamba", "lfm2", "modernbert"],
)
def test_recurrent_and_hybrid_models_are_known_by_their_structure(model: Any, word: str) -> None:
    torch.manual_seed(0)
    hybrid = model().eval()
    assert word in (sharing_problem(hybrid) or "")
    trees = check_trees(259)
    with torch.no_grad():  # scoring takes a forward for every branch instead, and a reward model says no
        for tree, branches in zip(trees, branch_logps(hybrid, trees), strict=True):
            for branch, logps in zip(tree.branches, branches, strict=True):
                torch.testing.assert_close(logps, plain_logps(hybrid, tree.prompt, branch))
    with pytest.raises(ValueError, match="cannot share prompts: its"):
        packed_hidden(hybrid.get_decoder(), pack(trees))


def test_an_attention_without_4d_masks_is_known_by_its_name() -> None:
    model = tiny_llama()
    model.config._attn_implementation = "kernels-community/vllm-flash-attn3"
    assert "vllm-flash-attn3" in (sharing_problem(model) or "")


def careless(forward: Any) -> LlamaForCausalLM:
    """A Llama whose decoder is called by `forward(decoder, **inputs)`."""

    class Careless(LlamaForCausalLM):
        def get_decoder(self) -> Any:
            inner = self.model

            class Decoder(torch.nn.Module):
                config, dtype, _is_stateful = inner.config, torch.float32, False

                def forward(self, **inputs: Any) -> Any:
                    return forward(inner, **inputs)

            return Decoder()

    return Careless(tiny_llama().config).eval()


def test_a_model_that_drops_the_mask_is_found_by_its_numbers() -> None:
    model = careless(lambda decoder, attention_mask, tree_layout, **inputs: decoder(**inputs))
    assert "differ" in (sharing_problem(model) or "")
    assert sharing_problem(careless(lambda decoder, **inputs: decoder(**inputs))) is None


def test_a_model_that_fails_on_the_layout_is_found() -> None:
    def refuse(decoder: Any, **inputs: Any) -> Any:
        raise NotImplementedError("one mask for all\nis enough")

    assert sharing_problem(careless(refuse)) == "the shared forward raised NotImplementedError: one mask for all"


def test_a_cache_that_forgets_is_found_by_the_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RoomyLayer.batch_repeat_interleave

    def forget(layer: RoomyLayer, repeats: int) -> None:
        whole(layer, repeats)
        layer.whole[0].zero_()

    monkeypatch.setattr(RoomyLayer, "batch_repeat_interleave", forget)
    model = tiny_llama()
    model.set_attn_implementation("eager")  # decodes from copies of the prompt's keys
    assert rollout_problem(model, exact=True) is not None


def test_groups_that_forget_are_found_by_the_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Groups.begin

    def forget(groups: Groups, *args: Any) -> None:
        whole(groups, *args)
        groups.states[0][0].zero_()

    monkeypatch.setattr(Groups, "begin", forget)
    assert rollout_problem(tiny_llama(), exact=True) is not None


def test_tolerances() -> None:
    plain = torch.zeros(10)
    assert difference(plain + 9e-5, plain, exact=True) is None
    assert "0.0002" in (difference(plain + 2e-4, plain, exact=True) or "")
    assert difference(plain + 0.04, plain, exact=False) is None
    assert difference(plain + 0.06, plain, exact=False) is not None
    assert difference(plain * float("nan"), plain, exact=False) is not None


def test_the_layout_for_a_models_own_forward_predicts_one_token_a_row() -> None:
    trees = check_trees(259)
    packed, labels = pack_for_forward(trees)
    row = packed.input_ids[0].tolist()
    first = trees[0]
    assert row[:8] == first.prompt[:-1]
    assert row[8:12] == [first.prompt[-1], *first.branches[0][:-1]]
    assert labels[0, 8:12].tolist() == first.branches[0]
    assert packed.position_ids[0, 8:12].tolist() == [8, 9, 10, 11]
    assert packed.targets.tolist() == [t for tree in trees for branch in tree.branches for t in branch]
    with torch.no_grad():
        model = tiny_llama()
        mask = attention_masks(packed, model.config, model.dtype)
        logits = model(input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=mask).logits[0]
        ours = logits.log_softmax(-1)[packed.predictors].gather(1, packed.targets[:, None])[:, 0]
        plain = torch.cat([plain_logps(model, t.prompt, b) for t in trees for b in t.branches])
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
