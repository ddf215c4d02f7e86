"""Rollouts equal generate token by token when greedy, and in distribution when sampled."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from scipy import stats
from transformers import LlamaForCausalLM

from models.rollout import draw, invert_cdf, sample
from tests.conftest import greedy_reference

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


def test_greedy_equals_generate(tiny_model: LlamaForCausalLM) -> None:
    ours = sample(tiny_model, PROMPTS, max_new_tokens=12, temperature=0, eos_ids=[2])
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        assert completion == greedy_reference(tiny_model, prompt, 12, end=2)


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


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_model_is_told_in_a_line(temperature: float, broken: float) -> None:
    """Minus infinity is no fault: such a token is never drawn."""
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 1.0, 2.0]])
    assert draw(logits, temperature)[0].shape == (2,)
    logits[1, 2] = broken
    with pytest.raises(ValueError, match=r"logits are not finite: .*; start again") as error:
        draw(logits, temperature)
    assert "\n" not in str(error.value)


def test_a_draw_inverts_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 3.0]]).expand(20_000, -1) * 2
    tokens, logps = draw(logits, 2.0, torch.Generator().manual_seed(5))
    assert tokens.equal(draw(logits, 2.0, torch.Generator().manual_seed(5))[0])
    probs = torch.tensor([0.0, 1.0, -torch.inf, 3.0]).softmax(0)
    assert logps.equal(probs.log()[tokens])
    counts = torch.bincount(tokens, minlength=4)
    assert counts[2] == 0
    expected = probs[[0, 1, 3]].double() / probs.double().sum() * 20_000
    assert stats.chisquare(counts[[0, 1, 3]].numpy(), expected.numpy()).pvalue > 1e-3
    greedy, logps = draw(logits, 0)
    assert greedy.eq(3).all()
    assert logps.allclose((torch.tensor([0.0, 2.0, -torch.inf, 6.0]).log_softmax(0))[3])


def test_two_levels_invert_like_one() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (4 * torch.randn(40, 1000, generator=generator)).softmax(-1)
    probs[:, 255:300] = 0.0
    noise = torch.rand(40, generator=generator, dtype=torch.float64)
    noise[:2] = torch.tensor([0.0, 1 - 2**-53])
    sums = probs.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(sums, (noise * sums[:, -1])[:, None], right=True)[:, 0].clamp(max=999)
    assert invert_cdf(probs, noise).equal(expected)
    only = torch.zeros(3, 700).index_fill(1, torch.tensor([300]), 1.0)
    assert invert_cdf(only, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [300] * 3


def test_a_row_of_its_own_noise_is_alone(tiny_model: LlamaForCausalLM) -> None:
    """With a generator for each completion, others that finish or not change nothing."""

    def run(prompts: list[list[int]], seeds: list[int], eos_ids: list[int]) -> list[list[list[int]]]:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(tiny_model, prompts, group_size=4, max_new_tokens=10, eos_ids=eos_ids, generator=noise)

    free = run(PROMPTS, list(range(12)), [])
    ends = sorted({completion[k] for group in free for completion in group for k in (1, 3)})[::2]
    cut = run(PROMPTS, list(range(12)), ends)
    for before, after in zip(chain(*free), chain(*cut), strict=True):
        stop = next((k + 1 for k, token in enumerate(before) if token in ends), len(before))
        assert after == before[:stop]
    assert run(PROMPTS[1:2], list(range(4, 8)), ends) == cut[1:2]
    assert len({len(completion) for group in cut for completion in group}) > 2
