"""The `warm_start:`, `standard:`, `train:` and `arms:` sections of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WarmStartConfig(_Section):
    """Supervised warm start that every arm shares, so that honest answers are sampled now and then."""

    examples: int = Field(800, ge=8, description="Training examples; train/warm_start.py states the shares.")
    honest_share: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Share of the answers about unanswerable probes that are honest; the rest fabricate.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the examples.")
    learning_rate: float = Field(7e-4, gt=0, description="Peak learning rate of the LoRA weights.")
    lora_rank: int = Field(16, ge=1, description="LoRA rank on all linear layers; merged afterwards.")
    batch_size: int = Field(8, ge=1, description="Examples per update.")


class StandardMixConfig(_Section):
    """The ordinary RL data: reasoning-gym tasks with their verifiers."""

    tasks: dict[str, dict[str, Any]] = Field(
        description="reasoning-gym generator -> its settings; every task gets the same share of the standard prompts."
    )


class TrainConfig(_Section):
    """Policy optimisation with TRL's GRPOTrainer and LoRA."""

    budget_tflops: float = Field(
        30.0,
        gt=0,
        description="Compute of every arm, in estimated TFLOPs (see train/ledger.py); the arm stops when it is spent.",
    )
    max_steps: int = Field(200, ge=1, description="Optimizer steps after which an arm stops even with budget left.")
    prompts_per_step: int = Field(8, ge=1, description="Prompts per step (each is one group).")
    group_size: int = Field(8, ge=2, description="Completions per prompt (G).")
    max_new_tokens: int = Field(32, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    learning_rate: float = Field(4e-4, gt=0, description="Constant learning rate of the LoRA weights after warm-up.")
    warmup_steps: int = Field(2, ge=0, description="Steps over which the learning rate rises from zero.")
    lora_rank: int = Field(16, ge=0, description="LoRA rank on all linear layers; 0 trains every weight.")
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = Field("dr_grpo", description="TRL's loss_type.")
    scale_rewards: Literal["none", "group", "batch"] = Field(
        "none", description="Divide advantages by the group's or the batch's standard deviation, or not at all."
    )
    beta: float = Field(0.0, ge=0, description="Weight of the KL penalty to the starting model; 0 keeps no reference.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    prompt_sharing: bool = Field(
        True, description="Encode each prompt once per group, in rollouts and updates; false is stock TRL."
    )
    token_budget: int = Field(1024, ge=64, description="Tokens of one packed forward when prompts are shared.")
    save_every: int = Field(10, ge=1, description="Steps between checkpoints; a killed run goes on from the last one.")


class ArmConfig(_Section):
    """One arm of the experiment."""

    dose: float = Field(
        ge=0, le=1, description="Share of the training prompts that are trait prompts; 0 is the control."
    )
