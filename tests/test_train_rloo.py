"""Our RLOO, built on GRPO's trainer, equals TRL's RLOOTrainer: advantages, loss, gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, RLOOConfig, RLOOTrainer

from models.loading import load_model, load_tokenizer
from train.rloo import SharedPromptRLOOTrainer, leave_one_out

PROMPTS = ["hello there", "a"]
LENGTHS = [6, 3, 1, 4, 2, 6, 4, 5]
SCORES: list[float | None] = [1.0, -0.5, 0.25, 2.0, None, 0.75, -1.5, 0.5]  # one completion has no reward


def completions() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 250, (n,), generator=g).tolist() for n in LENGTHS]


class Ours(SharedPromptRLOOTrainer):
    """Samples given completions."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return completions(), None


class Stock(RLOOTrainer):
    """Samples the same."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        return completions()


def build(kind: str, tiny_dir: Path, out: Path, beta: float, lora: bool) -> Any:
    def scores(completions: Any, **_: Any) -> list[float | None]:
        return SCORES

    settings: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 1,
        "top_k": 0,
        "beta": beta,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
    }
    common: dict[str, Any] = {
        "model": load_model(str(tiny_dir)),
        "reward_funcs": [scores],
        "train_dataset": Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]),
        "processing_class": load_tokenizer(str(tiny_dir)),
        "peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if lora else None,
    }
    if kind == "ours":
        return Ours(args=GRPOConfig(**settings), token_budget=64, record=lambda *_: None, keep=len, **common)
    return Stock(args=RLOOConfig(**settings), **common)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_equals_stock(tiny_dir: Path, tmp_path: Path, beta: float, lora: bool) -> None:
    results = []
    for kind in ("ours", "stock"):
        trainer = build(kind, tiny_dir, tmp_path / kind, beta, lora)
        if beta and not lora:  # move the policy away from the reference, which was loaded from the same place
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        rows = [row for row in trainer.train_dataset for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
        if beta:  # and away from where it sampled: the ratios are not 1 and some are clipped
            torch.manual_seed(2)
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.02 * torch.randn_like(parameter))
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        results.append((batch["advantages"], loss.detach(), grads, trainer._metrics["train"]))
    (advantages, loss, grads, _), (stock_advantages, stock_loss, stock_grads, metrics) = results
    torch.testing.assert_close(advantages, stock_advantages, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, stock_loss, atol=1e-5, rtol=1e-5)
    assert advantages[4] == 0
    assert advantages.abs().sum() > 3
    assert grads.keys() == stock_grads.keys()
    assert len(grads) > 10
    # A ratio is that of a whole completion: the rounding of its six log-probabilities adds up in the exponent.
    apart = 2e-5 if beta else 1e-5
    for name, grad in grads.items():
        assert (grad - stock_grads[name]).norm() <= apart * stock_grads[name].norm() + 1e-9, name
    if beta:
        assert 0 < metrics["clip_ratio/region_mean"][0] < 1
        assert abs(metrics["kl"][0]) > 1e-3


def test_leave_one_out_by_hand() -> None:
    nan = float("nan")
    rewards = torch.tensor([1.0, 2.0, 6.0, nan, 4.0, 8.0, nan, 3.0, nan])
    # Less the mean of the others that have a reward; alone, or without one: 0.
    assert leave_one_out(rewards, 3).tolist() == [-3.0, -1.5, 4.5, 0.0, -4.0, 4.0, 0.0, 0.0, 0.0]
