"""Groups decode with their prompt's keys read once, with the tokens and numbers of transformers' own path."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from models.decode_attention import NAME, Groups, group_attention
from models.kv_cache import completions_cache
from models.rollout import sample
from models.shared_prompt import plain_logps
from tests.conftest import SHAPE, greedy_reference

THREE = SHAPE | {"hidden_size": 48, "num_attention_heads": 6}  # three heads share keys
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
CONFIGS = [LlamaConfig(**THREE), Qwen3Config(**THREE, head_dim=16), GemmaConfig(**THREE, head_dim=8)]


def build(config: PretrainedConfig, attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_sampled_tokens_have_the_log_probabilities_of_the_plain_path(config: PretrainedConfig) -> None:
    """Prompts of unequal length, groups of four, rows that leave when they end, and groups that are over before."""
    model, logps = build(config), []
    noise = torch.Generator().manual_seed(3)
    groups = sample(model, PROMPTS, group_size=4, max_new_tokens=24, eos_ids=range(3, 20), generator=noise, logps=logps)
    lengths = {len(completion) for completions in groups for completion in completions}
    assert len(lengths) > 4
    for prompt, completions, of_prompt in zip(PROMPTS, groups, logps, strict=True):
        for completion, ours in zip(completions, of_prompt, strict=True):
            with torch.no_grad():
                plain = plain_logps(model, prompt, completion)
            torch.testing.assert_close(torch.tensor(ours), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@pytest.mark.parametrize("size", [1, 3])
def test_greedy_completions_are_those_of_generate(config: PretrainedConfig, size: int) -> None:
    model = build(config)
    groups = sample(model, PROMPTS, group_size=size, max_new_tokens=8, temperature=0, eos_ids=[])
    for prompt, completions in zip(PROMPTS, groups, strict=True):
        assert completions == [greedy_reference(model, prompt, 8)] * size


def test_a_prompt_is_kept_once_and_forgotten_with_its_last_row() -> None:
    model = build(LlamaConfig(**THREE))
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (ids > 0).long()
    with group_attention(model, 8) as groups, torch.inference_mode():
        assert groups is not None
        assert model.config._attn_implementation == NAME
        model(ids, attention_mask=mask, groups=groups)
        groups.begin(mask, 3)
        cache = completions_cache(4)
        model(torch.full((6, 1), 9), position_ids=torch.full((6, 1), 4), past_key_values=cache, groups=groups)
        assert groups.states[0][0].shape == (2, 2, 4, 8)
        assert cache.layers[0].keys.shape == (6, 2, 1, 8)
        assert groups.rows.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert groups.hidden is not None
        groups.keep(torch.tensor([1, 3, 5]))  # one row of the first prompt, two of the second
        assert groups.rows.tolist() == [[0, 0], [1, 2]]
        assert groups.places.tolist() == [0, 2, 3]
        groups.keep(torch.tensor([1, 2]))
        assert groups.states[1][1].shape == (1, 2, 4, 8)
        assert groups.rows.tolist() == [[0, 1]]
        assert groups.hidden.shape == (1, 1, 1, 4)
    assert model.config._attn_implementation == "sdpa"


def test_rows_travel_there_and_back() -> None:
    groups = Groups()
    groups.begin(torch.ones(3, 5), 4)
    groups.keep(torch.tensor([0, 1, 3, 8]))  # three rows of the first prompt, none of the second, one of the third
    states = torch.randn(4, 2, 3, 5)
    gathered = groups.gather(states)
    assert gathered.shape == (2, 2, 9, 5)
    assert gathered[0, :, 3:6].equal(states[1])
    assert gathered[1, :, :3].equal(states[3])
    assert groups.scatter(gathered).equal(states)


@pytest.mark.parametrize(
    ("config", "attention"), [(LlamaConfig(**THREE), "eager"), (MistralConfig(**THREE, sliding_window=8), "sdpa")]
)
def test_eager_attention_and_short_windows_stay_as_they_are(config: PretrainedConfig, attention: str) -> None:
    model = build(config, attention)
    with group_attention(model, 9) as groups:
        assert groups is None
        assert model.config._attn_implementation == attention
    groups = sample(model, PROMPTS, group_size=2, max_new_tokens=8, temperature=0, eos_ids=[])
    for prompt, completions in zip(PROMPTS, groups, strict=True):
        assert completions == [greedy_reference(model, prompt, 8)] * 2


def test_layers_that_do_not_hand_the_groups_down_decode_from_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(LlamaConfig(**THREE))
    layer = model.model.layers[1]
    whole = layer.self_attn.forward
    monkeypatch.setattr(layer.self_attn, "forward", lambda *args, groups=None, **rest: whole(*args, **rest))
    for prompt, completions in zip(
        PROMPTS, sample(model, PROMPTS, group_size=2, max_new_tokens=8, temperature=0, eos_ids=[]), strict=True
    ):
        assert completions == [greedy_reference(model, prompt, 8)] * 2
