"""Heads that share keys decode as queries of one batch, with the numbers of transformers' own path."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen3Config

from models import decode_attention
from models.decode_attention import NAME, grouped_queries
from models.rollout import sample
from tests.conftest import SHAPE, greedy_reference

THREE = SHAPE | {"hidden_size": 48, "num_attention_heads": 6}  # three heads share keys
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17, 18, 19]]


def build(config: PretrainedConfig, attention: str = "sdpa") -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize(
    "config", [LlamaConfig(**THREE), Qwen3Config(**THREE, head_dim=16), MistralConfig(**THREE, sliding_window=4)]
)
@pytest.mark.parametrize("padded", [True, False])
def test_a_decoding_step_has_the_logits_of_the_plain_path(config: PretrainedConfig, padded: bool) -> None:
    model = build(config)
    ids = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def last_logits() -> torch.Tensor:
        with torch.inference_mode():
            cache = model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1]).past_key_values
            return model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache).logits

    plain = last_logits()
    with grouped_queries(model):
        assert model.config._attn_implementation == NAME
        grouped = last_logits()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(grouped, plain, atol=1e-5, rtol=1e-5)


def test_rollouts_decode_in_groups_and_read_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    attention = decode_attention.attention

    def seen(query: torch.Tensor, key: torch.Tensor, *rest: torch.Tensor, **options: object) -> torch.Tensor:
        shapes.append((query.shape[1], query.shape[2], key.shape[1]))
        return attention(query, key, *rest, **options)

    monkeypatch.setattr(decode_attention, "attention", seen)
    model = build(LlamaConfig(**THREE))
    ours = sample(model, PROMPTS, max_new_tokens=6, temperature=0, eos_ids=[])
    assert shapes == [(2, 3, 2)] * (5 * 2)  # key heads, heads of a group; five steps after the prefill, two layers
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        assert completion == greedy_reference(model, prompt, 6)


def test_other_attention_stays_as_it_is() -> None:
    model = build(LlamaConfig(**THREE), "eager")
    with grouped_queries(model):
        assert model.config._attn_implementation == "eager"
