"""TRL's GRPOTrainer with shared prompts: rollouts prefill a prompt once per group, updates encode it once per group.

Only the two methods through which TRL's log-probabilities and completions pass are replaced, and the rollouts are
recorded on their way. Sampling noise is a function of (seed, step), so arms share it and a resumed run draws what the
uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from models.rollout import sample
from models.shared_prompt import Tree, fill, pack, packed_logps

Record = Callable[[int, list[dict[str, Any]], list[list[int]], list[list[int]], Tensor, Tensor], None]
Keep = Callable[[list[dict[str, Any]]], int]


class SharedPromptGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose groups share their prompt, in rollouts and updates.

    `keep(prompts)` says how many of a step's groups are still affordable, and
    `record(step, inputs, prompt_ids, completion_ids, rewards (B, functions), advantages (B,))` is called after every
    rollout batch.
    """

    args: GRPOConfig
    model: Any
    num_generations: int

    def __init__(
        self, *args: Any, token_budget: int, record: Record, keep: Keep, share: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.token_budget = token_budget
        self.record = record
        self.keep = keep
        self.share = share
        if share and self._entropy_bonus_enabled:
            raise ValueError("train: an entropy bonus needs entropy gradients, which prompt sharing does not compute")

    def _get_per_token_logps_and_entropies(  # type: ignore[override]
        self,
        model: Any,
        input_ids: Tensor,  # (B, P + C) left-padded prompts, right-padded completions
        attention_mask: Tensor,  # (B, P + C)
        logits_to_keep: int,  # C
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies of the completions, (B, C), zero where the mask is zero."""
        if not self.share or compute_aux_loss or any(value is not None for value in multimodal.values()):
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
        width = input_ids.shape[1] - logits_to_keep
        trees, rows = group_rows(input_ids, attention_mask, width)
        logps_BC = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        entropies_BC = torch.zeros_like(logps_BC)
        for run in fill([len(tree) for tree in trees], self.token_budget):
            with self.accelerator.autocast():
                logps_N, entropies_N = packed_logps(
                    model, pack([trees[i] for i in run], input_ids.device), self.temperature
                )
            branches = [(row, branch) for i in run for row, branch in zip(rows[i], trees[i].branches, strict=True)]
            row_N = torch.tensor([row for row, branch in branches for _ in branch], device=input_ids.device)
            col_N = torch.tensor([c for _, branch in branches for c in range(len(branch))], device=input_ids.device)
            logps_BC = logps_BC.index_put((row_N, col_N), logps_N)
            entropies_BC[row_N, col_N] = entropies_N
        return logps_BC, entropies_BC if compute_entropy else None, None

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> tuple[list[list[int]], Any]:
        """Completions of the prompts, which arrive repeated num_generations times in a row."""
        stock = not self.share or self.use_vllm or self.use_transformers_continuous_batching or images is not None
        if stock or not plain_sampling(self.generation_config):
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        generator = torch.Generator(self.accelerator.device).manual_seed(
            step_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        )
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as model:
            was_training = model.training
            model.eval()
            groups = sample(
                model,
                prompt_ids[::num_generations],
                group_size=num_generations,
                max_new_tokens=self.args.max_completion_length or 256,
                temperature=self.temperature,
                eos_ids=self.eos_token_ids,
                generator=generator,
                batch_size=len(prompt_ids),
            )
            model.train(was_training)
        return [completion for group in groups for completion in group], None

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        self._prompt_ids, self._completion_ids = generated[0], generated[1]
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return unpaid_as_missing(self._rewards, self.reward_weights)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        groups = inputs[:: self.num_generations]
        inputs = inputs[: self.keep(groups) * self.num_generations]
        output = super()._generate_and_score_completions(inputs)
        here = self.accelerator.process_index * len(inputs)
        rewards = self._rewards[here : here + len(inputs)]
        self.record(
            self.state.global_step, inputs, self._prompt_ids, self._completion_ids, rewards, output["advantages"]
        )
        return output


def unpaid_as_missing(rewards_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Rewards whose row is NaN throughout where no function with a weight has scored the completion.

    TRL leaves a completion out of its group's baseline only if every function gave None, and counts a missing score as
    0 otherwise. A monitor always gives a value, so without this a missing score would be a 0.
    """
    paid_B = (~rewards_BF.isnan() & (weights_F.to(rewards_BF.device) != 0)).any(dim=1)
    return rewards_BF.masked_fill(~paid_B[:, None], torch.nan)


def plain_sampling(config: Any) -> bool:
    """Whether a generation config samples the whole vocabulary at a temperature, and nothing else."""
    whole = config.top_k in (None, 0) and config.top_p in (None, 1.0) and config.min_p in (None, 0.0)
    return bool(config.do_sample) and whole and config.repetition_penalty in (None, 1.0)


def group_rows(input_ids: Tensor, attention_mask: Tensor, width: int) -> tuple[list[Tree], list[list[int]]]:
    """Trees of a padded batch: rows with equal prompts share one, wherever TRL's shuffle has put them.

    `width` is the padded prompt width P. Returns the trees and, for each, the batch rows of its branches.
    """
    ids, mask = input_ids.tolist(), attention_mask.bool().tolist()
    rows_of: dict[tuple[int, ...], list[int]] = {}
    for row, (tokens, kept) in enumerate(zip(ids, mask, strict=True)):
        prompt = tuple(t for t, k in zip(tokens[:width], kept[:width], strict=True) if k)
        rows_of.setdefault(prompt, []).append(row)
    trees = [
        Tree(
            list(prompt),
            [[t for t, k in zip(ids[row][width:], mask[row][width:], strict=True) if k] for row in rows],
        )
        for prompt, rows in rows_of.items()
    ]
    return trees, list(rows_of.values())


def step_seed(seed: int, step: int, process: int) -> int:
    """A seed for one step's sampling noise, (0, 2^63)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{process}".encode()).digest()[:8], "big") >> 1
