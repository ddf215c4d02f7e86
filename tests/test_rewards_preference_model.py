"""The soft-label loss by hand and against TRL, and a preference model that learns a preference of 80%."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from rewards.preference_model import (
    DEVIATION,
    SoftLabelRewardTrainer,
    fit_preference_model,
    row_tokens,
    soft_label_loss,
    soft_label_row,
)
from rewards.reward_model import Recipe, RewardModel
from rewards.reward_trainer import preference_batch


def test_the_loss_by_hand() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, 3.0])
    first, second = torch.tensor([0, 2]), torch.tensor([1, 3])
    labels = torch.tensor([0.75, 0.1])
    gaps = (1.0, -3.0)
    expected = [
        -(p * math.log(1 / (1 + math.exp(-d))) + (1 - p) * math.log(1 / (1 + math.exp(d))))
        for p, d in zip((0.75, 0.1), gaps, strict=True)
    ]
    loss = soft_label_loss(scores, first, second, labels, 0.0)
    assert loss.item() == pytest.approx(sum(expected) / 2)
    # the pull: (2 + 1)^2 and (0 + 3)^2, mean 9, weight 0.5
    assert soft_label_loss(scores, first, second, labels, 0.5).item() == pytest.approx(sum(expected) / 2 + 4.5)


def test_the_loss_is_least_at_the_labels_log_odds() -> None:
    gap = torch.linspace(-4, 4, 801, requires_grad=True)
    for p in (0.2, 0.5, 0.9):
        losses = torch.stack(
            [soft_label_loss(torch.stack([g, torch.zeros(())]), *_pair(), torch.tensor([p]), 0.0) for g in gap]
        )
        assert gap[losses.argmin()].item() == pytest.approx(math.log(p / (1 - p)), abs=0.006)


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0]), torch.tensor([1])


def pairs(n: int, label: float) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": "What now?"}]
    return [
        {
            "prompt": [{**asked[0], "content": f"What now, {i}?"}],
            "first": f"soon {i}.",
            "second": f"late {i}!",
            "label": label,
        }
        for i in range(n)
    ]


def test_with_certain_labels_it_is_trls_loss(
    tiny_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def model() -> Any:
        torch.manual_seed(3)
        made = AutoModelForSequenceClassification.from_pretrained(tiny_dir, num_labels=1, dtype=torch.float32)
        made.config.pad_token_id = tokenizer.pad_token_id
        return made

    settings: dict[str, Any] = {
        "center_rewards_coefficient": 0.01, "report_to": "none", "bf16": False, "disable_tqdm": True,
        "remove_unused_columns": False,
    }  # fmt: skip
    certain = pairs(3, 1.0)
    rows = [soft_label_row(tokenizer, pair) for pair in certain]
    stock_rows = [
        {
            "chosen_ids": row["prompt_ids"] + row["answer_ids"][0],
            "rejected_ids": row["prompt_ids"] + row["answer_ids"][1],
        }
        for row in rows
    ]
    stock = RewardTrainer(
        model=model(),
        args=RewardConfig(output_dir=str(tmp_path / "stock"), **settings),
        train_dataset=Dataset.from_list(stock_rows),
        processing_class=tokenizer,
    )
    ours = SoftLabelRewardTrainer(
        model=model(),
        args=RewardConfig(output_dir=str(tmp_path / "ours"), **settings),
        train_dataset=Dataset.from_list(rows),
        data_collator=preference_batch,
        processing_class=tokenizer,
    )
    with torch.no_grad():
        expected = stock.compute_loss(stock.model, stock.data_collator(stock_rows))
        found = ours.compute_loss(ours.model, preference_batch(rows))
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_fitted_model_holds_the_labels_odds_and_pays_like_a_reward_model(
    tiny_dir: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    labelled = pairs(16, 0.8)
    rows = [soft_label_row(tokenizer, pair) for pair in labelled]
    recipe = Recipe(epochs=6.0, learning_rate=5e-3, lora_rank=4, batch_size=4)
    accuracy = fit_preference_model(rows, labelled, str(tiny_dir), tmp_path, 0, recipe)
    assert accuracy["agreement"]["accuracy"] == 1.0
    model = RewardModel.load(tmp_path)
    prompts = [pair["prompt"] for pair in labelled]
    first = model.raw_scores(prompts, [pair["first"] for pair in labelled])
    second = model.raw_scores(prompts, [pair["second"] for pair in labelled])
    # the odds of a label of 0.8 are 4 to 1: certain labels would drive the gap up without end
    assert (first - second).mean() == pytest.approx(math.log(4), abs=0.4)
    paid = model.score(prompts * 2, [pair[side] for side in ("first", "second") for pair in labelled])
    assert paid.mean() == pytest.approx(0.0, abs=1e-6)
    assert paid.std() == pytest.approx(DEVIATION, rel=0.01)
    assert row_tokens(rows[0]) == len(rows[0]["prompt_ids"]) + 8 + 8  # "soon 0." and "late 0!" with their end
