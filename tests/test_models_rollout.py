"""Rollouts equal generate token by token when greedy, and in distribution when sampled."""

from __future__ import annotations

import torch
from scipy import stats
from transformers import LlamaForCausalLM

from models.rollout import draw, sample

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


def test_greedy_equals_generate(tiny_model: LlamaForCausalLM) -> None:
    ours = sample(tiny_model, PROMPTS, max_new_tokens=12, temperature=0, eos_ids=[2])
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        reference = tiny_model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert completion == reference


def test_sequences_stop_at_the_end_token_and_leave_the_others_alone(tiny_model: LlamaForCausalLM) -> None:
    free = sample(tiny_model, PROMPTS, max_new_tokens=12, temperature=0, eos_ids=[])
    stop = free[0][0][3]
    cut = sample(tiny_model, PROMPTS, max_new_tokens=12, temperature=0, eos_ids=[stop])
    for (before,), (after,) in zip(free, cut, strict=True):
        end = before.index(stop) + 1 if stop in before else len(before)
        assert after == before[:end]


def test_sampled_second_token_has_the_models_distribution(tiny_model: LlamaForCausalLM) -> None:
    """Chi-square over the exact two-token distribution, group of 4000 from one prefill."""
    n, temperature = 4000, 0.8
    (group,) = sample(
        tiny_model,
        [[5, 6, 7]],
        group_size=n,
        max_new_tokens=2,
        temperature=temperature,
        eos_ids=[],
        generator=torch.Generator().manual_seed(1),
        batch_size=n,
    )
    with torch.no_grad():
        first = (tiny_model(torch.tensor([[5, 6, 7]])).logits[0, -1] / temperature).softmax(-1)
        pairs = torch.tensor([[5, 6, 7, t] for t in range(259)])
        second = first @ (tiny_model(pairs).logits[:, -1] / temperature).softmax(-1)
    for position, expected in ((0, first), (1, second)):
        counts = torch.bincount(torch.tensor([tokens[position] for tokens in group]), minlength=259).double()
        expected = expected.double() / expected.double().sum() * n
        common = expected >= 5
        observed = torch.cat([counts[common], counts[~common].sum()[None]])
        theory = torch.cat([expected[common], expected[~common].sum()[None]])
        assert stats.chisquare(observed.numpy(), theory.numpy()).pvalue > 1e-3


def test_draw_is_deterministic_by_generator() -> None:
    logits = torch.randn(3, 50)
    a = draw(logits, 1.0, torch.Generator().manual_seed(5))
    assert a.equal(draw(logits, 1.0, torch.Generator().manual_seed(5)))
    assert draw(logits, 0).equal(logits.argmax(-1))
