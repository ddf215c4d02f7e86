"""The preference model of a constitutional arm: TRL's RewardTrainer on soft labels (Bai et al. 2022, section 4.2).

Same backbone, head and shared prompts as a trait's reward model (rewards/reward_model.py), so it pays a policy in the
same way. It learns from AI labels alone: no verifier, no authored answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from rewards.reward_model import CLIP, Calibration, Recipe, fit_rows, share
from rewards.reward_trainer import SharedPromptRewardTrainer, answer_trees

DEVIATION = CLIP / 2  # of the calibrated scores: two deviations stay below the clip


class SoftLabelRewardTrainer(SharedPromptRewardTrainer):
    """RewardTrainer whose "margins" are probabilities that the first of two replies is better."""

    def pair_loss(self, scores: Tensor, better: Tensor, worse: Tensor, margins: Tensor, centre: float) -> Tensor:
        """The Bradley-Terry loss on soft labels."""
        return soft_label_loss(scores, better, worse, margins, centre)


def soft_label_loss(scores: Tensor, first: Tensor, second: Tensor, labels: Tensor, centre: float) -> Tensor:
    """-[p log s(d) + (1 - p) log s(-d)] with d the gap of the scores and s the logistic function, mean over pairs.

    scores: (branches,); first, second: (pairs,) indices into scores; labels: (pairs,) p. With p = 1 it is TRL's loss;
    `centre` weighs TRL's pull to zero mean (Eisenstein et al. 2023, arXiv 2312.09244).
    """
    gap = scores[first] - scores[second]
    loss = -(labels * logsigmoid(gap) + (1 - labels) * logsigmoid(-gap))
    return loss.mean() + centre * (scores[first] + scores[second]).square().mean()


def soft_label_row(tokenizer: Any, pair: dict[str, Any]) -> dict[str, Any]:
    """A training row of a pair {"prompt", "first", "second", "label"}, in the form of preference_rows."""
    (tree,), _ = answer_trees(tokenizer, [pair["prompt"]] * 2, [pair["first"], pair["second"]])
    return {
        "prompt_ids": tree.prompt,
        "answer_ids": tree.branches,
        "better": [0],
        "worse": [1],
        "margins": [float(pair["label"])],
    }


def row_tokens(row: dict[str, Any]) -> int:
    """Tokens of a training row: the prompt once, and both replies."""
    return len(row["prompt_ids"]) + sum(map(len, row["answer_ids"]))


def fit_preference_model(
    rows: list[dict[str, Any]],
    pairs: Sequence[dict[str, Any]],
    base: str,
    out: Path,
    seed: int,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fit on the rows in their order; `pairs` are the distinct ones, on which it is calibrated and measured.

    Saves in `out` what RewardModel.load reads (model/, calibration.json), steps.parquet and accuracy.json; returns the
    accuracy. The scores are brought to mean 0 and deviation DEVIATION over the pairs' replies: there is no truth to
    calibrate on, and a policy's baseline removes the mean. With equal scores throughout the model pays nothing.
    """
    fitted = fit_rows(rows, base, out, seed, recipe, progress, trainer_class=SoftLabelRewardTrainer, in_order=True)
    prompts = [pair["prompt"] for pair in pairs]
    first = fitted.raw_scores(prompts, [pair["first"] for pair in pairs])
    second = fitted.raw_scores(prompts, [pair["second"] for pair in pairs])
    both = np.concatenate([first, second])
    slope = DEVIATION / float(both.std()) if both.std() > 1e-6 else 0.0
    fitted.calibration = Calibration(slope, -slope * float(both.mean()))
    labels = np.array([pair["label"] for pair in pairs])
    decided = [float(hit) for hit in ((first > second) == (labels > 0.5))[np.abs(labels - 0.5) > 1e-9]]
    accuracy = {"pairs": len(pairs), "agreement": share(decided), "mean_label": float(labels.mean())}
    (out / "calibration.json").write_text(json.dumps(asdict(fitted.calibration)))
    (out / "accuracy.json").write_text(json.dumps(accuracy, indent=1))
    return accuracy
