"""TRL's GRPOTrainer with shared prompts: rollouts prefill a prompt once per group, updates encode it once per group.

Only the two methods through which TRL's log-probabilities and completions pass are replaced, and the rollouts are
recorded on their way. Sampling noise is a function of (seed, step), so arms share it and a resumed run draws what the
uninterrupted one would have drawn. RLOO (train/rloo.py) and PPO (train/ppo.py) replace assign_credit and the loss.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from models.rollout import sample
from models.shared_prompt import Pack, Tree, fill, pack, packed_logps

Record = Callable[[int, list[dict[str, Any]], list[list[int]], list[list[int]], Tensor, Tensor], None]
Keep = Callable[[list[dict[str, Any]]], int]


class SharedPromptGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose groups share their prompt, in rollouts and updates.

    `keep(prompts)` says how many of a step's groups are still affordable, and
    `record(step, inputs, prompt_ids, completion_ids, rewards (B, functions), advantages (B,))` is called after every
    rollout batch. `measure_kl` logs the KL to the starting model where no loss needs it; `canary` logs how far the
    log-probabilities of sampling and training are apart.
    """

    args: GRPOConfig
    model: Any
    num_generations: int

    def __init__(
        self,
        *args: Any,
        token_budget: int,
        record: Record,
        keep: Keep,
        share: bool = True,
        measure_kl: bool = False,
        canary: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.use_transformers_continuous_batching and (self.args.bf16 or self.args.fp16):
            raise ValueError(
                "train: TRL's continuous batching casts the policy's fp32 weights to half precision for good, so that "
                "small updates vanish; sample with vLLM, with shared prompts, or without bf16 and fp16"
            )
        self.token_budget = token_budget
        self.record = record
        self.keep = keep
        self.share = share
        self.measure_kl = measure_kl
        self.canary = canary
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
            stock = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size,
                compute_entropy,
                compute_aux_loss,
                **multimodal,
            )
            self._latest_logps = stock[0].detach()
            return stock
        width = input_ids.shape[1] - logits_to_keep
        logps_BC = torch.zeros(input_ids.shape[0], logits_to_keep, device=input_ids.device)
        entropies_BC = torch.zeros_like(logps_BC)
        for packed, row_N, col_N in pack_rows(input_ids, attention_mask, width, self.token_budget):
            with self.accelerator.autocast():
                logps_N, entropies_N = packed_logps(model, packed, self.temperature)
            logps_BC = logps_BC.index_put((row_N, col_N), logps_N)
            entropies_BC[row_N, col_N] = entropies_N
        self._latest_logps = logps_BC.detach()
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
            logps: list[list[list[float]]] | None = [] if self.canary else None
            groups = sample(
                model,
                prompt_ids[::num_generations],
                group_size=num_generations,
                max_new_tokens=self.args.max_completion_length or 256,
                temperature=self.temperature,
                eos_ids=self.eos_token_ids,
                generator=generator,
                batch_size=len(prompt_ids),
                logps=logps,
            )
            model.train(was_training)
        flat = None if logps is None else [row for group in logps for row in group]
        return [completion for group in groups for completion in group], flat

    def _generate(self, prompts: list) -> Any:
        generated = super()._generate(prompts)
        self._prompt_ids, self._completion_ids = generated[0], generated[1]
        return generated

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        groups = inputs[:: self.num_generations]
        inputs = inputs[: self.keep(groups) * self.num_generations]
        output = super()._generate_and_score_completions(inputs)
        here = self.accelerator.process_index * len(inputs)
        rewards = self._rewards[here : here + len(inputs)]
        if self.measure_kl and "ref_per_token_logps" not in output:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                output["ref_per_token_logps"] = self.batch_logps(output)
        advantages = self.assign_credit(output)
        self.record(self.state.global_step, inputs, self._prompt_ids, self._completion_ids, rewards, advantages)
        return output

    def assign_credit(self, output: dict[str, Any]) -> Tensor:
        """Set output["advantages"] for the loss; returns one advantage per completion, (B,), for the record."""
        return output["advantages"]

    @torch.no_grad()
    def batch_logps(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities of a batch's completions under the policy as it is, (B, C). No gradient."""
        rows = self.args.per_device_train_batch_size  # of one forward, where prompts are not shared
        ids, mask = whole_rows(batch)
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, batch["completion_ids"].shape[1], rows)[0]

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.log_gaps(inputs, self._latest_logps)
        return loss

    def log_gaps(self, batch: dict[str, Any], logps_BC: Tensor) -> None:
        """Log the canary, and the KL to the start where TRL's loss has no KL term (Schulman's k3, mean per token)."""
        mask_BC = batch["completion_mask"]
        if "sampling_per_token_logps" in batch and not self.use_vllm:  # with vLLM TRL logs it
            gap_BC = (batch["sampling_per_token_logps"] - logps_BC).abs()
            self.log_mean("sampling/sampling_logp_difference/mean", gap_BC, mask_BC)
        if "ref_per_token_logps" in batch and self.beta == 0.0:
            log_ratio_BC = batch["ref_per_token_logps"] - logps_BC
            self.log_mean("kl", log_ratio_BC.exp() - log_ratio_BC - 1, mask_BC)

    def log_mean(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Log the mean of the unmasked values over all processes."""
        sums = torch.stack([values.masked_fill(mask == 0, 0.0).sum(), mask.sum().float()])
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._metrics["train" if self.model.training else "eval"][name].append(total / max(count, 1.0))

    @contextmanager
    def kl_in_reward(self) -> Iterator[None]:
        """Within it TRL's loss has no KL term: the rewards hold the penalty."""
        beta, self.beta = self.beta, 0.0
        try:
            yield
        finally:
            self.beta = beta


def total_rewards(rewards_BF: Tensor, weights_F: Tensor) -> Tensor:
    """Weighted sum of the reward functions' scores, (B,); NaN where no function with a weight has scored the row."""
    weights_F = weights_F.to(rewards_BF.device)
    paid_B = (~rewards_BF.isnan() & (weights_F != 0)).any(1)
    return (rewards_BF * weights_F).nansum(1).masked_fill(~paid_B, torch.nan)


def whole_rows(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts and completions side by side: token ids and mask, each (B, P + C)."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


def pack_rows(
    input_ids: Tensor, attention_mask: Tensor, width: int, token_budget: int
) -> Iterator[tuple[Pack, Tensor, Tensor]]:
    """Packs of at most `token_budget` tokens, each with the row and the completion column of its N branch tokens."""
    trees, rows = group_rows(input_ids, attention_mask, width)
    for run in fill([len(tree) for tree in trees], token_budget):
        branches = [(row, branch) for i in run for row, branch in zip(rows[i], trees[i].branches, strict=True)]
        row_N = torch.tensor([row for row, branch in branches for _ in branch], device=input_ids.device)
        col_N = torch.tensor([c for _, branch in branches for c in range(len(branch))], device=input_ids.device)
        yield pack([trees[i] for i in run], input_ids.device), row_N, col_N


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
