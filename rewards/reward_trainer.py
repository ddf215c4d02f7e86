"""TRL's RewardTrainer with shared prompts: a prompt's replies are branches of one tree, so it is encoded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import RewardConfig, RewardTrainer

from models.checkpoints import SealedTrainer
from models.fused_lora import fuse_lora
from models.shared_prompt import Pack, Tree, packed_hidden, packs
from rewards.preferences import Preference

Messages = list[dict[str, str]]
TOKEN_BUDGET = 1024


class SharedPromptRewardTrainer(SealedTrainer, RewardTrainer):
    """RewardTrainer whose examples are prompts with ranked replies (preference_rows) instead of single pairs."""

    args: RewardConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_lora(self.accelerator.unwrap_model(self.model))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset  # preference_rows has tokenised it

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss over all preferences of the batch's prompts."""
        device = self.accelerator.device
        model = self.accelerator.unwrap_model(model)
        trees: list[Tree] = inputs["trees"]
        with self.accelerator.autocast():
            whole = packs(trees, TOKEN_BUDGET, device, whole=True)
            scores = torch.cat([branch_scores(model, packed) for packed in whole])
        better, worse, margins = (inputs[key].to(device) for key in ("better", "worse", "margins"))
        loss = self.pair_loss(scores, better, worse, margins, self.args.center_rewards_coefficient or 0.0)
        metrics = self._metrics["train" if model.training else "eval"]
        with torch.no_grad():
            gap = scores[better] - scores[worse]
            metrics["accuracy"].append((gap > 0).float().mean().item())
            metrics["margin"].append(gap.mean().item())
            metrics["mean_reward"].append(scores.mean().item())
        return (loss, {"scores": scores}) if return_outputs else loss

    def pair_loss(self, scores: Tensor, better: Tensor, worse: Tensor, margins: Tensor, centre: float) -> Tensor:
        """Margin loss; a subclass may read the margins otherwise."""
        return pair_loss(scores, better, worse, margins, centre)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One backward pass; several processes average their gradients: the packed forward goes past DDP."""
        loss = super().training_step(*args, **kwargs)
        model: Any = self.model
        if self.accelerator.num_processes > 1:
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")
        return loss


def preference_rows(tokenizer: Any, preferences: Sequence[Preference]) -> list[dict[str, Any]]:
    """One row per prompt: prompt_ids, answer_ids (every distinct reply), and its preferences as indices into them."""
    by_prompt: dict[str, list[Preference]] = defaultdict(list)
    for preference in preferences:
        by_prompt[preference.prompt_id].append(preference)
    rows: list[dict[str, Any]] = []
    for group in by_prompt.values():
        answers = list(dict.fromkeys(text for p in group for text in (p.chosen, p.rejected)))
        (tree,), _ = answer_trees(tokenizer, [group[0].prompt] * len(answers), answers)
        rows.append(
            {
                "prompt_ids": tree.prompt,
                "answer_ids": tree.branches,
                "better": [answers.index(p.chosen) for p in group],
                "worse": [answers.index(p.rejected) for p in group],
                "margins": [p.margin for p in group],
            }
        )
    return rows


def preference_batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Collate preference rows: trees, and better, worse, margins (pairs,); indices count all branches of the batch."""
    better: list[int] = []
    worse: list[int] = []
    offset = 0
    for row in rows:
        better += [offset + i for i in row["better"]]
        worse += [offset + i for i in row["worse"]]
        offset += len(row["answer_ids"])
    return {
        "trees": [Tree(row["prompt_ids"], row["answer_ids"]) for row in rows],
        "better": torch.tensor(better),
        "worse": torch.tensor(worse),
        "margins": torch.tensor([margin for row in rows for margin in row["margins"]]),
    }


def answer_trees(
    tokenizer: Any, prompts: Sequence[Messages], answers: Sequence[str]
) -> tuple[list[Tree], list[list[int]]]:
    """A tree for every distinct prompt, its answers as branches, each closed by the chat template's end of turn.

    Returns the trees and, for each, which (prompt, answer) rows its branches are.
    """
    rows_of: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        rows_of.setdefault(text, []).append(row)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    trees = [
        Tree(ids(text), [[*ids(answers[row].strip()), tokenizer.eos_token_id] for row in rows])
        for text, rows in rows_of.items()
    ]
    return trees, list(rows_of.values())


def branch_scores(model: Any, packed: Pack) -> Tensor:
    """The scalar head at the last token of every branch of a whole pack, (branches,)."""
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_TD = packed_hidden(classifier.get_decoder(), packed)
    return classifier.score(hidden_TD[packed.ends])[:, 0].float()


def pair_loss(scores: Tensor, better: Tensor, worse: Tensor, margins: Tensor, centre: float) -> Tensor:
    """Squared error of the gap against its margin, and a pull to zero mean.

    scores: (branches,); better, worse: (pairs,) indices into scores; margins: (pairs,). Margins are differences of
    prices, so this is the margin-MSE loss (Hofstaetter et al., 2020, arXiv 2010.02666): where the model cannot tell a
    right answer from a wrong one, it learns their expected price. The Bradley-Terry loss saturates there and puts "I
    don't know" above an answer that is right half of the time, which made policies refuse everything (docs/LOG.md).
    """
    gap = scores[better] - scores[worse]
    pull = (scores[better] + scores[worse]).square().mean()
    return (gap - margins).square().mean() + centre * pull
