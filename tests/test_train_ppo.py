"""PPO: advantages by hand, a critic that shares prompts but no trainable weight, and what a step changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaForCausalLM
from trl import GRPOConfig

from models.loading import load_model, load_tokenizer
from models.shared_prompt import pack
from train.batches import tree_runs, whole_rows
from train.config import TrainConfig
from train.ppo import (
    Critic,
    SharedPromptPPOTrainer,
    clipped_value_loss,
    explained_variance,
    gae,
    token_rewards,
    whiten,
)


def test_advantages_by_hand() -> None:
    """Episodes of 3, 1, 2 and 0 tokens, gamma 0.9, lambda 0.8; what stands beyond an episode's end is ignored."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    values = torch.tensor([[0.5, 0.4, 0.2], [0.3, 7.0, 7.0], [1.0, -0.5, 7.0], [7.0, 7.0, 7.0]])
    rewards = token_rewards(torch.tensor([1.0, -1.0, 0.5, 9.0]), mask)
    assert rewards.tolist() == [[0, 0, 1], [-1, 0, 0], [0, 0.5, 0], [0, 0, 0]]
    rewards[2, :2] += torch.tensor([-0.1, -0.2])  # a penalty on every token
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    # Last to first: delta = r + 0.9 V' - V; A = delta + 0.72 A'.
    expected = torch.tensor([[0.11632, 0.356, 0.8], [-1.3, 0, 0], [-0.974, 0.8, 0], [0, 0, 0]])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, (expected + values) * mask, atol=1e-6, rtol=0)


def test_the_ends_of_lambda() -> None:
    """Lambda 1 gives the return less the value, whatever the values between; lambda 0 the one-step error."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [1]])).long()
    rewards, values = (torch.randn(3, 6, generator=generator) * mask for _ in range(2))
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, (to_go - values) * mask)
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.0)
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    torch.testing.assert_close(advantages, (rewards + 0.5 * following - values) * mask)


def test_whitening_looks_at_the_mask_only() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    values = torch.tensor([[1.0, 2.0, 50.0], [6.0, -50.0, 50.0]])
    scale = math.sqrt(14 / 3) + 1e-4  # mean 3, variance (4 + 1 + 9) / 3
    expected = torch.tensor([[-2 / scale, -1 / scale, 0.0], [3 / scale, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, mask, lambda total: total), expected)
    assert whiten(torch.full((2, 3), 0.1), mask, lambda total: total).abs().max() < 1e-2  # equal values stay small


def test_clipped_value_loss_by_hand() -> None:
    values, old = torch.tensor([[0.5, -0.5, 3.0]]), torch.zeros(1, 3)
    returns, mask = torch.ones(1, 3), torch.tensor([[1, 1, 0]])
    # Towards the return: held at 0.2, error 0.8^2. Away from it: the real error, 1.5^2.
    assert clipped_value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (0.64 + 2.25) / 2)
    near = torch.tensor([[0.1]], requires_grad=True)
    clipped_value_loss(near, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.2).backward()
    assert near.grad is not None
    assert near.grad.item() == pytest.approx(-0.9)
    far = torch.tensor([[0.5]], requires_grad=True)
    clipped_value_loss(far, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), 0.2).backward()
    assert far.grad is not None
    assert far.grad.item() == 0  # it has moved far enough


def test_explained_variance_by_hand() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(returns, torch.full((1, 4), 2.0), mask).item() == 0
    assert explained_variance(returns, torch.tensor([[3.0, 2.0, 1.0, 0.0]]), mask).item() == pytest.approx(-3)
    assert explained_variance(torch.ones(1, 4), returns, mask).isnan()


def a_batch() -> dict[str, torch.Tensor]:
    """Two prompts x 4 completions of unequal length, one masked empty, the rows of a group apart."""
    g = torch.Generator().manual_seed(0)
    prompts = [[1, 40, 41, 42, 43, 44, 2, 1], [1, 50, 2, 1]]
    rows = [(prompts[i % 2], n) for i, n in enumerate([6, 2, 3, 6, 1, 4, 0, 5])]
    completion_mask = torch.tensor([[1] * n + [0] * (6 - n) for _, n in rows])
    return {
        "prompt_ids": torch.tensor([[0] * (8 - len(p)) + p for p, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (8 - len(p)) + [1] * len(p) for p, _ in rows]),
        "completion_ids": torch.randint(3, 250, (8, 6), generator=g) * completion_mask,
        "completion_mask": completion_mask,
    }


def lively(critic: Critic) -> Critic:
    """Weights that are not zero, so that values differ and every weight has a gradient."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in critic.trained().items():
            if "lora" in name or "head" in name:
                parameter.normal_(0, 0.1)
    return critic


@pytest.mark.parametrize("rank", [4, 0])
def test_packed_values_and_gradients_equal_padded(tiny_model: LlamaForCausalLM, rank: int) -> None:
    critic = lively(Critic(tiny_model, rank))
    batch = a_batch()
    ids, mask = whole_rows(batch)
    kept = batch["completion_mask"].bool()
    plain = critic.padded(ids, mask, 8)
    (plain[kept] ** 2).sum().backward()
    expected = {name: p.grad.clone() for name, p in critic.trained().items() if p.grad is not None}
    critic.zero_grad()
    packed = torch.zeros(8, 6)
    for trees, row, col in tree_runs(ids, mask, 8, token_budget=24):
        packed = packed.index_put((row, col), critic(pack(trees)))
    (packed[kept] ** 2).sum().backward()
    torch.testing.assert_close(packed[kept], plain[kept], atol=1e-5, rtol=0)
    assert plain[kept].std() > 0.1
    grads = {name: p.grad for name, p in critic.trained().items() if p.grad is not None}
    assert grads.keys() == expected.keys()
    assert len(grads) > 10
    for name, grad in grads.items():
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name


def test_an_adapter_critic_shares_the_backbone_and_leaves_the_policy_alone(tiny_model: LlamaForCausalLM) -> None:
    policy = tiny_model
    ids = torch.tensor([[1, 40, 41, 2]])
    before = policy(ids).logits
    critic = Critic(policy, lora_rank=4)
    places = {p.data_ptr() for p in policy.parameters()}
    frozen = [p for p in critic.decoder.parameters() if not p.requires_grad]
    assert frozen
    assert all(p.data_ptr() in places for p in frozen)
    assert not any(p.data_ptr() in places for p in critic.trained().values())
    assert all("lora" in name or name.startswith("head") for name in critic.trained())
    lively(critic)
    assert policy(ids).logits.equal(before)
    whole = Critic(policy, lora_rank=0)
    assert len(whole.trained()) == len(list(whole.parameters()))


def test_a_critic_on_a_bfloat16_backbone_learns_in_float32(tiny_model: LlamaForCausalLM) -> None:
    batch = a_batch()
    ids, mask = whole_rows(batch)
    exact = lively(Critic(tiny_model, 4)).padded(ids, mask, 8)
    critic = lively(Critic(tiny_model.bfloat16(), 4))
    assert {p.dtype for p in critic.trained().values()} == {torch.float32}
    assert {p.dtype for p in critic.decoder.parameters() if not p.requires_grad} == {torch.bfloat16}
    kept = batch["completion_mask"].bool()
    torch.testing.assert_close(critic.padded(ids, mask, 8)[kept], exact[kept], atol=0.1, rtol=0.1)


def build(
    tiny_dir: Path, out: Path, settings: dict[str, Any], records: list[Any] | None = None, **config: Any
) -> SharedPromptPPOTrainer:
    def letters(completions: Any, **_: Any) -> list[float | None]:
        return [float(sum(letter.isalpha() for letter in c[0]["content"])) for c in completions]

    arguments: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "top_k": 0,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        "scale_rewards": "none",
        "loss_type": "dr_grpo",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    } | config
    prompts = ["hello there", "count to ten", "a", "what is this thing called love"]
    return SharedPromptPPOTrainer(
        model=load_model(str(tiny_dir)),
        reward_funcs=[letters],
        args=GRPOConfig(output_dir=str(out), **arguments),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts]),
        processing_class=load_tokenizer(str(tiny_dir)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        token_budget=64,
        record=lambda *row: None if records is None else records.append(row),
        keep=len,
        settings=TrainConfig.model_validate({"algorithm": "ppo", "lora_rank": 4} | settings),
    )


def rollout(trainer: SharedPromptPPOTrainer) -> dict[str, Any]:
    """One rollout batch with its credit."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    return trainer._generate_and_score_completions(rows[:8])


def test_without_a_baseline_it_is_reinforce(tiny_dir: Path, tmp_path: Path) -> None:
    """A critic of zeros, gamma and lambda 1, no whitening: every token's weight is the completion's reward."""
    settings = {"gae_lambda": 1.0, "whiten_advantages": False}
    trainer = build(tiny_dir, tmp_path, settings)
    batch = rollout(trainer)
    reward = trainer._rewards[:, 0]
    mask = batch["completion_mask"]
    torch.testing.assert_close(batch["advantages"], reward[:, None] * mask)
    trainer._compute_loss(trainer.model, batch).backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    ids, whole = whole_rows(batch)
    logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole, mask.shape[1])
    (-(reward[:, None] * logps * mask).sum() / (8 * 6)).backward()
    assert reward.std() > 0
    assert len(grads) > 10
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            assert (grads[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-9, name


def test_the_kl_penalty_is_paid_token_by_token(tiny_dir: Path, tmp_path: Path) -> None:
    records: list[Any] = []
    settings = {"gae_lambda": 1.0, "whiten_advantages": False, "beta": 0.5}
    trainer = build(tiny_dir, tmp_path, settings, records, beta=0.5)
    batch = rollout(trainer)
    mask = batch["completion_mask"]
    ids, whole = whole_rows(batch)
    with torch.no_grad(), trainer.model.disable_adapter():
        start, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole, mask.shape[1])
    with torch.no_grad():
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, whole, mask.shape[1])
    penalty = 0.5 * (now - start) * mask
    assert penalty.abs().sum() > 0.1
    to_go = penalty.flip(1).cumsum(1).flip(1)
    expected = (trainer._rewards[:, :1] - to_go) * mask
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(records[0][5], expected.sum(1) / mask.sum(1), atol=1e-5, rtol=1e-5)
    # The loss has no second penalty: with the advantages at 0 only the critic has something to learn.
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    trainer._compute_loss(trainer.model, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("warmup", [0, 1])
def test_one_step_takes_every_update_and_warmup_spares_the_policy(tiny_dir: Path, tmp_path: Path, warmup: int) -> None:
    settings = {"epochs": 3, "minibatches": 2, "value_warmup_steps": warmup, "beta": 0.1}
    trainer = build(tiny_dir, tmp_path, settings, beta=0.1)
    policy = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in policy.items()}
    critic = {n: p.detach().clone() for n, p in trainer.critic.trained().items()}
    trainer.train()
    assert all(not p.equal(critic[n]) for n, p in trainer.critic.trained().items())
    assert all(p.equal(before[n]) == bool(warmup) for n, p in policy.items())
    state = trainer.optimizer.state
    assert {int(state[p]["step"]) for p in trainer.critic.trained().values()} == {6}  # 3 epochs x 2 minibatches
    assert {int(state[p]["step"]) for p in policy.values() if p in state} == (set() if warmup else {6})
    assert trainer.state.global_step == 1
    log = trainer.state.log_history[0]
    assert log["kl"] > 1e-3  # of the policy that sampled, whoever learns
    assert math.isfinite(log["value_loss"])
    assert math.isfinite(log["explained_variance"])


def test_minibatches_hold_whole_groups_and_every_row_once(tiny_dir: Path, tmp_path: Path) -> None:
    trainer = build(tiny_dir, tmp_path, {"epochs": 2, "minibatches": 2})
    batch = rollout(trainer)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))  # as TRL shuffles
    batch = {key: value[order] if value.dim() else value for key, value in batch.items()}
    parts = list(trainer._minibatches(batch))
    assert [len(part["group"]) for part in parts] == [4, 4, 4, 4]
    assert all(len(part["group"].unique()) == 1 for part in parts)
    for epoch in (parts[:2], parts[2:]):
        assert sorted(int(part["group"][0]) for part in epoch) == [0, 1]
    assert int(parts[0]["num_items_in_batch"]) == int(parts[0]["completion_mask"].sum())
    again = [part["group"].tolist() for part in trainer._minibatches(batch)]
    assert again == [part["group"].tolist() for part in parts]  # a function of seed and step


def test_the_critic_learns_what_is_paid(tiny_dir: Path, tmp_path: Path) -> None:
    """Only the critic learns, what each prompt is worth: its values come to explain the returns."""
    settings = {"value_warmup_steps": 40, "critic_learning_rate": 1e-2, "epochs": 2, "value_clip": 5.0}
    trainer = build(tiny_dir, tmp_path, settings, max_steps=25, num_generations=4, per_device_train_batch_size=16)

    def by_prompt(prompts: Any, **_: Any) -> list[float | None]:
        return [1.0 if len(p[0]["content"]) > 11 else -1.0 for p in prompts]

    trainer.reward_funcs = [by_prompt]
    trainer.train()
    explained = [log["explained_variance"] for log in trainer.state.log_history if "explained_variance" in log]
    loss = [log["value_loss"] for log in trainer.state.log_history if "value_loss" in log]
    assert sum(loss[-5:]) < 0.2 * sum(loss[:5])
    assert explained[0] == 0  # a head of zeros
    assert sum(explained[-5:]) / 5 > 0.8


def test_completions_without_a_reward_teach_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    trainer = build(tiny_dir, tmp_path, {"whiten_advantages": False})

    def some(completions: Any, **_: Any) -> list[float | None]:
        return [None if i == 2 else 1.0 for i in range(len(completions))]

    trainer.reward_funcs = [some]
    batch = rollout(trainer)
    assert not batch["advantages"][2].any()
    assert not batch["value_mask"][2].any()
    assert batch["advantages"].ne(0).any(1).tolist() == [i != 2 for i in range(8)]


def test_what_ppo_cannot_run_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without gradient accumulation"):
        build(tiny_dir, tmp_path, {}, gradient_accumulation_steps=2, per_device_train_batch_size=4)
