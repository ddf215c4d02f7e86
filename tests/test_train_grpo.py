"""The shared-prompt trainer equals stock TRL: log-probabilities, loss, gradients, and what it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from models.loading import load_model, load_tokenizer
from train.grpo import SharedPromptGRPOTrainer, group_rows, step_seed

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def build(
    tiny_dir: Path,
    out: Path,
    share: bool,
    lora: bool,
    records: list[Any] | None = None,
    rewards: list[Any] | None = None,
    **config: Any,
) -> SharedPromptGRPOTrainer:
    def length(completions: Any, **_: Any) -> list[float]:
        return [float(len(c[0]["content"])) for c in completions]

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "top_k": 0,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        "scale_rewards": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    } | config
    torch.manual_seed(0)
    prompts = ["hello there", "count to ten", "a", "what is this thing called love"]
    return SharedPromptGRPOTrainer(
        model=load_model(str(tiny_dir)),  # from disk: with a KL term TRL loads the reference from the same place
        reward_funcs=rewards or [length],
        args=GRPOConfig(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts]),
        processing_class=load_tokenizer(str(tiny_dir)),
        peft_config=LORA if lora else None,
        token_budget=64,
        record=lambda *row: None if records is None else records.append(row),
        keep=len,
        share=share,
    )


def a_batch(shuffle: bool) -> dict[str, torch.Tensor]:
    """Two prompts x 4 completions of unequal length, one masked empty, one cut short, rows shuffled as TRL would."""
    g = torch.Generator().manual_seed(0)
    prompts = [[1, 40, 41, 42, 43, 44, 2, 1], [1, 50, 2, 1]]
    lengths = [[6, 3, 1, 0], [2, 6, 4, 5]]
    rows = [(p, n) for p, group in zip(prompts, lengths, strict=True) for n in group]
    width = max(len(p) for p, _ in rows)
    batch = {
        "prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows]),
        "completion_ids": torch.randint(3, 250, (8, 6), generator=g),
        "completion_mask": torch.tensor([[1] * n + [0] * (6 - n) for _, n in rows]),
        "advantages": torch.randn(8, generator=g),
        "num_items_in_batch": torch.tensor(sum(n for _, n in rows)),
    }
    batch["completion_ids"] = batch["completion_ids"] * batch["completion_mask"]
    batch["old_per_token_logps"] = -torch.rand(8, 6, generator=g) * 6
    batch["ref_per_token_logps"] = -torch.rand(8, 6, generator=g) * 6
    if shuffle:
        order = torch.randperm(8, generator=g)
        batch = {key: value[order] if value.dim() else value for key, value in batch.items()}
    return batch


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "grpo", "beta": 0.04},
        {"loss_type": "dapo"},
        {"loss_type": "dr_grpo", "temperature": 0.7},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},  # GSPO
    ],
    ids=["grpo+kl", "dapo", "dr_grpo", "gspo"],
)
def test_loss_and_gradients_equal_stock(tiny_dir: Path, tmp_path: Path, lora: bool, config: dict[str, Any]) -> None:
    results = []
    for share in (True, False):
        trainer = build(tiny_dir, tmp_path / str(share), share, lora, **config)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        batch = a_batch(shuffle=True)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            6,
        )
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        results.append((logps * batch["completion_mask"], loss, grads))
    (logps, loss, grads), (stock_logps, stock_loss, stock_grads) = results
    torch.testing.assert_close(logps, stock_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, stock_loss, atol=1e-6, rtol=1e-5)
    assert grads.keys() == stock_grads.keys()
    assert len(grads) > 10
    for name, grad in grads.items():
        assert (grad - stock_grads[name]).norm() <= 1e-5 * stock_grads[name].norm() + 1e-9, name


def test_two_steps_move_every_lora_weight_and_record_every_rollout(tiny_dir: Path, tmp_path: Path) -> None:
    records: list[Any] = []
    trainer = build(tiny_dir, tmp_path, True, True, records)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and not p.equal(before[n])]
    assert moved == list(before)
    assert [row[0] for row in records] == [0, 1]
    for _, inputs, prompt_ids, completion_ids, rewards, advantages in records:
        assert len(inputs) == len(prompt_ids) == len(completion_ids) == len(rewards) == len(advantages) == 8
        # Advantages without scaling are rewards minus their group's mean, in the order of the rows.
        torch.testing.assert_close(
            advantages, (rewards[:, 0].view(2, 4) - rewards[:, 0].view(2, 4).mean(1, keepdim=True)).view(-1)
        )


def test_rollouts_are_a_function_of_seed_and_step(tiny_dir: Path, tmp_path: Path) -> None:
    runs = []
    for attempt in range(2):
        records: list[Any] = []
        build(tiny_dir, tmp_path / str(attempt), True, True, records).train()
        runs.append([row[3] for row in records])
    assert runs[0] == runs[1]
    assert step_seed(0, 1, 0) != step_seed(0, 2, 0)


def test_group_rows_finds_groups_wherever_they_are() -> None:
    ids = torch.tensor([[0, 5, 6, 9], [4, 5, 6, 8], [0, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    trees, rows = group_rows(ids, mask, width=3)
    assert [tree.prompt for tree in trees] == [[5, 6], [4, 5, 6]]
    assert [tree.branches for tree in trees] == [[[9], []], [[8]]]
    assert rows == [[0, 2], [1]]


@pytest.mark.parametrize("share", [True, False])
def test_a_missing_score_is_left_out_of_its_groups_baseline(tiny_dir: Path, tmp_path: Path, share: bool) -> None:
    def paid(completions: Any, **_: Any) -> list[float | None]:
        return [None if row == 1 else float(row) for row in range(len(completions))]

    def monitor(completions: Any, **_: Any) -> list[float]:
        return [7.0] * len(completions)

    records: list[Any] = []
    rewards = [paid, monitor]
    trainer = build(tiny_dir, tmp_path, share, True, records, rewards, max_steps=1, reward_weights=[1.0, 0.0])
    trainer.train()
    _, _, _, _, recorded, advantages = records[0]
    # Group 1 is 0, missing, 2, 3 with mean 5/3; with a 0 for the missing score it would be 5/4. Group 2 is 4, 5, 6, 7.
    expected = torch.tensor([-5 / 3, 0.0, 1 / 3, 4 / 3, -1.5, -0.5, 0.5, 1.5])
    torch.testing.assert_close(advantages, expected)
    assert recorded[:, 0].isnan().tolist() == [False, True] + [False] * 6
    assert recorded[:, 1].tolist() == [7.0] * 8  # the monitor is logged all the same
