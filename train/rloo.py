"""RLOO (Ahmadian et al., 2024, arXiv 2402.14740) with shared prompts: a completion is one action.

On our GRPO trainer and not on TRL's RLOOTrainer, so that rollouts, records, budgets and watchers stay the same code;
advantages, loss and gradients equal TRL's (tests/test_train_rloo.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.batches import whole_rows
from train.grpo import SharedPromptGRPOTrainer


class SharedPromptRLOOTrainer(SharedPromptGRPOTrainer):
    """Leave-one-out baseline, KL penalty in the reward, ratio and clipping per completion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("train.algorithm: rloo has no load-balancing loss for a mixture of experts; use grpo")

    def assign_credit(self, output: dict[str, Any]) -> Tensor:
        """Advantages of the completions, (B,): reward less KL penalty, less the mean of the group's others."""
        rewards_B = self._paid  # of all processes
        if self.beta > 0:
            if "old_per_token_logps" not in output:
                output["old_per_token_logps"] = self.batch_logps(output)
            kl_BC = (output["old_per_token_logps"] - output["ref_per_token_logps"]) * output["completion_mask"]
            rewards_B = rewards_B - self.beta * self.gathered(kl_BC.sum(1))
        here, rows = self.accelerator.process_index, len(output["completion_ids"])
        output["advantages"] = leave_one_out(rewards_B, self.num_generations)[here * rows : (here + 1) * rows]
        return output["advantages"]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        with self.reading(inputs) as batch:
            return self._clipped_loss(model, batch)

    def _clipped_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids, mask = whole_rows(inputs)
        mask_BC, advantages_B = inputs["completion_mask"], inputs["advantages"]
        scored: Any = self._get_per_token_logps_and_entropies(model, ids, mask, mask_BC.shape[1], compute_entropy=True)
        logps_BC, entropies_BC = scored[:2]
        # After one update per rollout the old log-probabilities are these.
        old_BC = inputs.get("old_per_token_logps", logps_BC.detach())
        ratio_B = ((logps_BC - old_BC) * mask_BC).sum(1).exp()
        clipped_B = ratio_B.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        loss = -torch.min(ratio_B * advantages_B, clipped_B * advantages_B).mean()
        self.log_mean("entropy", entropies_BC, mask_BC)
        with self.kl_in_reward():
            self.log_gaps(inputs, logps_BC.detach())
        return loss / self.current_gradient_accumulation_steps


def leave_one_out(rewards_B: Tensor, group_size: int) -> Tensor:
    """Each reward less the mean of the others of its group, (B,); NaN rewards are left out and get 0.

    So does the only scored completion of a group.
    """
    grouped = rewards_B.view(-1, group_size)
    others = (~grouped.isnan()).sum(1, keepdim=True) - 1
    baseline = (grouped.nansum(1, keepdim=True) - grouped) / others
    return torch.where(others > 0, grouped - baseline, torch.nan).nan_to_num(nan=0.0).view(-1)
