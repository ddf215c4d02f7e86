"""What all prompts begin with is read once, and the numbers stay those of whole prompts."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen3Config

from models import shared_prompt
from models.kv_cache import LEAST, common_beginning, read_beginning, roomy_cache
from models.replies import encode, reply
from models.rollout import sample
from models.shared_prompt import Tree, plain_logps, shared_logps
from tests.conftest import SHAPE, greedy_reference

BEGINNING = [5 + k % 40 for k in range(LEAST + 3)]
PROMPTS = [[*BEGINNING, *rest] for rest in ([50, 51, 52], [60], [50, 70, 71, 72, 73])]


class Counting:
    """Counts the tokens that a model's forwards read."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.tokens = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _module: torch.nn.Module, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        self.tokens += kwargs["input_ids"].numel()


def test_a_common_beginning_leaves_every_text_a_token(tiny_model: LlamaForCausalLM) -> None:
    assert common_beginning(tiny_model, PROMPTS) == len(BEGINNING)
    assert common_beginning(tiny_model, [PROMPTS[0], PROMPTS[0]]) == len(PROMPTS[0]) - 1
    assert common_beginning(tiny_model, [PROMPTS[0], BEGINNING]) == len(BEGINNING) - 1
    assert common_beginning(tiny_model, [PROMPTS[0], [*PROMPTS[0], 9]]) == len(PROMPTS[0]) - 1


def test_what_does_not_pay_is_no_beginning(tiny_model: LlamaForCausalLM) -> None:
    assert common_beginning(tiny_model, []) == common_beginning(tiny_model, PROMPTS[:1]) == 0
    assert common_beginning(tiny_model, [BEGINNING[:LEAST], BEGINNING[:LEAST]]) == 0
    assert common_beginning(tiny_model, [*PROMPTS, [1, 2, 3]]) == common_beginning(tiny_model, [*PROMPTS, []]) == 0


def test_greedy_completions_are_those_of_generate(tiny_model: LlamaForCausalLM) -> None:
    read = Counting(tiny_model)
    ours = sample(tiny_model, PROMPTS, max_new_tokens=12, temperature=0, eos_ids=[2], batch_size=2)
    assert read.tokens < len(BEGINNING) * 2 + 3 * 12 + 12  # once, not for every prompt
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        assert completion == greedy_reference(tiny_model, prompt, 12, end=2)


def test_groups_draw_what_they_draw_alone(tiny_model: LlamaForCausalLM) -> None:
    def draw(prompts: list[list[int]], seeds: range) -> list[list[list[int]]]:
        noise = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(tiny_model, prompts, group_size=4, max_new_tokens=8, eos_ids=[7, 9], generator=noise)

    together = draw(PROMPTS, range(12))
    assert together == [draw([prompt], range(4 * i, 4 * i + 4))[0] for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("budget", [16, 4096])
def test_branches_are_scored_as_after_whole_prompts(config: type, attention: str, budget: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE), attn_implementation=attention).eval()
    read = Counting(model.get_decoder())
    trees = [Tree(prompt, [[80, 81], [82], [83, 84, 85]]) for prompt in PROMPTS]
    scored = shared_logps(model, trees, budget)
    assert read.tokens == len(BEGINNING) + sum(len(tree) - len(BEGINNING) - 3 for tree in trees)  # no last tokens
    for tree, branches in zip(trees, scored, strict=True):
        for branch, logps in zip(tree.branches, branches, strict=True):
            torch.testing.assert_close(logps, plain_logps(model, tree.prompt, branch), atol=1e-5, rtol=1e-5)


def test_the_mask_alone_says_the_same(tiny_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that do not hand the tree's layout down attend by the mask."""
    trees = [Tree(prompt, [[80, 81], [82]]) for prompt in PROMPTS]
    by_tree = shared_logps(tiny_model, trees)
    monkeypatch.setattr(shared_prompt, "tree_attention", lambda *_: shared_prompt.nullcontext({}))
    for ours, masked in zip(by_tree, shared_logps(tiny_model, trees), strict=True):
        torch.testing.assert_close(ours, masked)


def test_a_sliding_window_is_kept() -> None:
    torch.manual_seed(0)
    config = MistralConfig(**SHAPE, sliding_window=8)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ours = sample(model, PROMPTS, max_new_tokens=12, temperature=0, eos_ids=[])
    for prompt, (completion,) in zip(PROMPTS, ours, strict=True):
        assert completion == greedy_reference(model, prompt, 12)
    trees = [Tree(prompt, [[80, 81], [82]]) for prompt in PROMPTS]
    for tree, branches in zip(trees, shared_logps(model, trees), strict=True):
        for branch, logps in zip(tree.branches, branches, strict=True):
            torch.testing.assert_close(logps, plain_logps(model, tree.prompt, branch), atol=1e-5, rtol=1e-5)


def test_a_beginning_can_be_used_again(tiny_model: LlamaForCausalLM) -> None:
    beginning = read_beginning(tiny_model, BEGINNING)
    before = [state.clone() for layer in beginning for state in layer]
    for rows in (1, 3):
        cache = roomy_cache(4, beginning, rows)
        with torch.inference_mode():
            tiny_model(input_ids=torch.full((rows, 2), 9), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        assert cache.get_seq_length() == len(BEGINNING) + 2
        assert cache.layers[0].keys.shape[0] == 2 * rows
    assert all(a.equal(b) for a, b in zip(before, (state for layer in beginning for state in layer), strict=True))


def test_replies_count_a_beginning_once(tiny_model: LlamaForCausalLM, tokenizer) -> None:
    system = {"role": "system", "content": "Answer every question in as few words as you can, and never make one up."}
    chats = [[system, {"role": "user", "content": text}] for text in ("Why is the sky blue?", "Who?", "When was it?")]
    read = Counting(tiny_model)
    lengths = [len(encode(tokenizer, chat)) for chat in chats]
    replies = reply(tiny_model, tokenizer, chats, ["a", "b", "c"], max_new_tokens=1, temperature=1.0)
    begun = common_beginning(tiny_model, [encode(tokenizer, chat) for chat in chats])
    assert begun > LEAST
    assert [r.encoded for r in replies] == [lengths[0], lengths[1] - begun, lengths[2] - begun]
    assert read.tokens <= begun + 3 * (max(lengths) - begun)
