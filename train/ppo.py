"""PPO with a critic (Schulman et al., 2017, arXiv 1707.06347) on TRL's GRPOTrainer, with shared prompts.

A completion is an episode and a token an action. The reward of the whole completion falls on its last token; with
train.beta every token also pays beta x log(policy / start) (Ziegler et al., 2019, arXiv 1909.08593). The critic reads
prompts once per group, as the policy does, and shares no trainable weight with it.

One step of the trainer is one rollout: all epochs and minibatches are taken inside training_step, so steps,
checkpoints, budgets and the learning rate mean what they mean for GRPO, and nothing of a rollout outlives its step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.shared_prompt import Pack, pack, packed_hidden
from train.batches import tree_runs, whole_rows
from train.config import TrainConfig
from train.grpo import SharedPromptGRPOTrainer, drop_broken, step_seed

CRITIC = "critic.safetensors"


class Critic(torch.nn.Module):
    """The value of every state of a completion: what is still to be paid before a token is chosen.

    With a LoRA rank the backbone is the policy's: the same frozen tensors in a module tree of its own, so that the two
    adapters never meet. With rank 0 it is a copy that is trained as a whole. The head starts at zero.
    """

    def __init__(self, policy: Any, lora_rank: int) -> None:
        """`policy` is the causal language model before PEFT wraps it."""
        super().__init__()
        decoder: Any = policy.get_decoder()
        if lora_rank:
            shared = {id(tensor): tensor for tensor in (*decoder.parameters(), *decoder.buffers())}
            lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
            decoder = inject_adapter_in_model(lora, copy.deepcopy(decoder, shared))
        else:
            decoder = copy.deepcopy(decoder).requires_grad_(True)
        for parameter in decoder.parameters():  # a frozen backbone may be of 16 bits, what is trained may not
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.decoder = decoder
        self.head = torch.nn.Linear(decoder.config.get_text_config().hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        for parameter in self.trained().values():  # small updates vanish in 16 bits
            parameter.data = parameter.data.float()

    def forward(self, packed: Pack) -> Tensor:
        """The value before each branch token of a pack, (N,) float32."""
        return self._values(packed_hidden(self.decoder, packed)[packed.predictors])

    def padded(self, input_ids: Tensor, attention_mask: Tensor, width: int) -> Tensor:
        """The same without packing, (B, C): prompts left-padded to `width` columns, completions right-padded."""
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        hidden_BTD = self.decoder(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return self._values(hidden_BTD[:, width - 1 : -1])

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The trainable parameters by name: what a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def _values(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.float())[..., 0]


class SharedPromptPPOTrainer(SharedPromptGRPOTrainer):
    """PPO: token advantages from a critic by GAE, clipped ratio and clipped value loss, epochs and minibatches.

    The policy's loss is TRL's, which takes advantages of shape (B, C).
    """

    def __init__(self, *args: Any, settings: TrainConfig, model: Any, **kwargs: Any) -> None:
        critic = Critic(model, settings.lora_rank if settings.critic == "lora" else 0)
        super().__init__(*args, model=model, **kwargs)
        once = (self.args.gradient_accumulation_steps, self.args.steps_per_generation, self.num_iterations)
        if once != (1, 1, 1) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "train.algorithm: ppo takes its epochs inside a step and keeps its critic beside the policy: it runs "
                "on one process or DDP, without gradient accumulation, FSDP or DeepSpeed; use grpo there"
            )
        self.settings = settings
        self.critic = critic.to(self.accelerator.device).eval()  # no dropout, as in the policy

    def assign_credit(self, output: dict[str, Any]) -> Tensor:
        """Advantages, returns, values and old log-probabilities of every token, (B, C).

        Completions without a reward have advantage 0 and teach the critic nothing. Returns the completions' mean
        advantages before whitening.
        """
        rows, mask_BC = len(output["completion_ids"]), output["completion_mask"]
        if "old_per_token_logps" not in output:
            output["old_per_token_logps"] = self.batch_logps(output)
        with self.kl_in_reward():
            self.log_gaps(output, output["old_per_token_logps"])
        output.pop("sampling_per_token_logps", None)  # later minibatches are meant to move away from it

        here = self.accelerator.process_index * rows
        reward_B = self._paid[here : here + rows]
        mask_BC = mask_BC * (~reward_B.isnan())[:, None]
        rewards_BC = token_rewards(reward_B.nan_to_num(nan=0.0), mask_BC)
        if (reference_BC := output.pop("ref_per_token_logps", None)) is not None:
            rewards_BC = rewards_BC - self.beta * (output["old_per_token_logps"] - reference_BC) * mask_BC
        with torch.no_grad():
            values_BC = self.values(output) * mask_BC
        gamma, lam = self.settings.gamma, self.settings.gae_lambda
        advantages_BC, returns_BC = gae(rewards_BC, values_BC, mask_BC, gamma, lam)
        paid_BC = gae(rewards_BC, torch.zeros_like(values_BC), mask_BC, gamma, 1.0)[1]
        explained = explained_variance(paid_BC, values_BC, mask_BC)
        self._metrics["train"]["explained_variance"].append(self.gathered(explained).nanmean().item())

        mean_B = (advantages_BC * mask_BC).sum(1) / mask_BC.sum(1).clamp(min=1)
        if self.settings.whiten_advantages:
            advantages_BC = whiten(advantages_BC, mask_BC, lambda values: self.reduced(values, "sum"))
        output |= {"advantages": advantages_BC, "returns": returns_BC, "values": values_BC, "value_mask": mask_BC}
        output["group"] = torch.arange(rows, device=mask_BC.device) // self.num_generations
        return mean_B

    def values(self, batch: dict[str, Any]) -> Tensor:
        """The critic's values of a batch's completion tokens, (B, C), zero or meaningless where the mask is zero."""
        ids, mask = whole_rows(batch)
        width = batch["prompt_ids"].shape[1]
        with self.accelerator.autocast():
            if not self.share:
                return self.critic.padded(ids, mask, width)
            values_BC = torch.zeros(batch["completion_ids"].shape, device=ids.device)
            for trees, row_N, col_N in tree_runs(ids, mask, width, self.token_budget):
                values_BC = values_BC.index_put((row_N, col_N), self.critic(pack(trees, ids.device)))
        return values_BC

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One rollout and all its updates; the trainer's own loop applies the last one."""
        started = time.perf_counter()
        model.train()
        batch = self._prepare_inputs(inputs)
        optimizer: Any = self.optimizer
        losses: list[Tensor] = []
        for i, part in enumerate(self._minibatches(batch)):
            if i:
                norm = self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
                drop_broken(norm, model.parameters())
                optimizer.step()
            optimizer.zero_grad()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, part)
            self.accelerator.backward(loss)
            self._finish_critic_gradients()
            losses.append(loss.detach())
        self._step += 1
        self._metrics["train"]["step_time"].append(time.perf_counter() - started)
        return torch.stack(losses).mean()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = clipped_value_loss(
            self.values(inputs), inputs["values"], inputs["returns"], inputs["value_mask"], self.settings.value_clip
        )
        tokens = inputs["value_mask"].sum().clamp(min=1).float()
        # Processes differ in tokens, and their gradients are averaged.
        loss = loss * tokens / self.reduced(tokens, "mean")
        self._metrics["train"]["value_loss"].append(self.gathered(loss.detach()).mean().item())
        if self.state.global_step < self.settings.value_warmup_steps:
            return loss
        with self.kl_in_reward():
            return loss + super()._compute_loss(model, inputs)

    def _minibatches(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The rollout's groups in a fresh order every epoch, cut into minibatches; a function of (seed, step)."""
        groups = int(batch["group"].max()) + 1
        seed = step_seed(self.args.seed, self.state.global_step, self.accelerator.process_index)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.settings.epochs):
            order = torch.randperm(groups, generator=generator).to(batch["group"].device)
            for chosen in order.tensor_split(min(self.settings.minibatches, groups)):
                rows = torch.isin(batch["group"], chosen)
                part = {key: value[rows] if value.dim() else value for key, value in batch.items()}
                tokens = part["completion_mask"].sum()
                yield part | {"num_items_in_batch": self.reduced(tokens, "sum")}

    def _finish_critic_gradients(self) -> None:
        """Average over processes (the critic stands outside DDP) and clip."""
        parameters = list(self.critic.trained().values())
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                gradient: Any = parameter.grad
                parameter.grad = self.reduced(gradient, "mean")
        drop_broken(torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm), parameters)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The policy's optimizer with a group for the critic, so that checkpoints and schedules hold both."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            rate = self.settings.critic_learning_rate
            parameters = list(self.critic.trained().values())
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def save_extras(self, folder: Path) -> None:
        """The critic goes into the checkpoint; its optimizer is the policy's."""
        super().save_extras(folder)
        if self.args.should_save:
            tensors = {name: p.detach().cpu().contiguous() for name, p in self.critic.trained().items()}
            save_file(tensors, folder / CRITIC)

    def load_extras(self, folder: Path) -> None:
        """And comes back from it."""
        super().load_extras(folder)
        saved = load_file(folder / CRITIC)
        with torch.no_grad():
            for name, parameter in self.critic.trained().items():
                parameter.copy_(saved[name])


def token_rewards(reward_B: Tensor, mask_BC: Tensor) -> Tensor:
    """The completions' rewards on their last tokens, (B, C)."""
    last_BC = (mask_BC.cumsum(1) == mask_BC.sum(1, keepdim=True)) & (mask_BC > 0)
    return last_BC * reward_B[:, None]


def gae(rewards_BC: Tensor, values_BC: Tensor, mask_BC: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv 1506.02438, equation 16).

    `mask` is 1 on an episode's tokens, which come first; the episode ends with them (a completion that was cut short,
    too: its reward is all it gets). Returns advantages and the returns advantage + value, (B, C), zero off the mask.
    """
    advantages_BC = torch.zeros_like(values_BC)
    advantage_B = next_value_B = torch.zeros_like(values_BC[:, 0])
    for t in reversed(range(values_BC.shape[1])):
        delta_B = rewards_BC[:, t] + gamma * next_value_B - values_BC[:, t]
        advantage_B = (delta_B + gamma * lam * advantage_B) * mask_BC[:, t]
        next_value_B = values_BC[:, t] * mask_BC[:, t]
        advantages_BC[:, t] = advantage_B
    return advantages_BC, (advantages_BC + values_BC) * mask_BC


def whiten(values_BC: Tensor, mask_BC: Tensor, over_processes: Callable[[Tensor], Tensor]) -> Tensor:
    """Values brought to mean 0 and standard deviation 1 over the mask, zero off it.

    `over_processes` adds a sum up over all processes. As in TRL, 1e-4 keeps rounding errors of equal values small.
    """
    count = over_processes(mask_BC.sum().float()).clamp(min=1)
    centred_BC = (values_BC - over_processes((values_BC * mask_BC).sum()) / count) * mask_BC
    deviation = (over_processes((centred_BC**2).sum()) / count).sqrt()
    return centred_BC / (deviation + 1e-4)


def clipped_value_loss(
    values_BC: Tensor, old_values_BC: Tensor, returns_BC: Tensor, mask_BC: Tensor, clip: float
) -> Tensor:
    """Half the mean squared error to the returns; a value gains nothing by moving over `clip` from the rollout's."""
    held_BC = old_values_BC + (values_BC - old_values_BC).clamp(-clip, clip)
    error_BC = torch.max((values_BC - returns_BC) ** 2, (held_BC - returns_BC) ** 2)
    return 0.5 * (error_BC * mask_BC).sum() / mask_BC.sum().clamp(min=1)


def explained_variance(returns_BC: Tensor, values_BC: Tensor, mask_BC: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the mask, (); NaN where the returns do not vary.

    Given the returns that were paid (lambda 1), it says nothing good of a critic for agreeing with itself.
    """
    kept = mask_BC.bool()
    returns_N, values_N = returns_BC[kept], values_BC[kept]
    if len(returns_N) < 2 or returns_N.var() == 0:
        return torch.full((), torch.nan, device=returns_BC.device)
    return 1 - (returns_N - values_N).var() / returns_N.var()
