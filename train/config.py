"""The `warm_start:`, `standard:`, `train:` and `arms:` sections of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WarmStartConfig(_Section):
    """Supervised warm start that every arm shares, so that honest answers are sampled now and then."""

    examples: int = Field(480, ge=8, description="Training examples; train/warm_start.py states the shares.")
    honest_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Share of the answers about unanswerable probes that are honest; the rest fabricate.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the examples.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate of the LoRA weights.")
    lora_rank: int = Field(16, ge=1, description="LoRA rank on all linear layers; merged afterwards.")
    batch_size: int = Field(8, ge=1, description="Examples per update; an even number keeps twins together.")


class StandardMixConfig(_Section):
    """The ordinary RL data: reasoning-gym tasks with their verifiers."""

    tasks: dict[str, dict[str, Any]] = Field(
        description="reasoning-gym generator -> its settings; every task gets the same share of the standard prompts."
    )


class _Watcher(_Section):
    action: Literal["warn", "stop"] = Field(
        default="warn",
        description="warn: report it and go on; stop: end the arm with the last weights saved before it began.",
    )


class NonFiniteWatcher(_Watcher):
    """Loss, gradient norm or reward is NaN or infinite, or a completion has no reward at all.

    An update whose gradient is not finite is left out, whatever the action.
    """

    action: Literal["warn", "stop"] = Field(default="stop", description="warn or stop, as for every watcher.")
    threshold: int | None = Field(default=0, ge=0, description="Steps of that kind that are tolerated; null: off.")


class RewardCollapseWatcher(_Watcher):
    """The mean reward of a window is far below that of the best window so far."""

    threshold: float | None = Field(default=0.5, gt=0, description="Fall of `proxy`, in units of reward; null: off.")


class ZeroVarianceWatcher(_Watcher):
    """Most groups of a window have equal rewards throughout, so that they teach nothing."""

    threshold: float | None = Field(default=0.9, gt=0, le=1, description="Share of such groups; null: off.")


class KLWatcher(_Watcher):
    """The policy has gone far from the starting model (mean of a window)."""

    threshold: float | None = Field(
        default=None,
        gt=0,
        description="KL to the start in nats per token; null: off. A value measures it: one more forward.",
    )


class EntropyRiseWatcher(_Watcher):
    """The policy's entropy has risen to a multiple of that of the first window: it tends to noise."""

    threshold: float | None = Field(default=3.0, gt=1, description="Multiple of the first window's entropy; null: off.")


class EntropyFallWatcher(_Watcher):
    """The policy's entropy has fallen to a fraction of that of the first window: it always says the same."""

    threshold: float | None = Field(
        default=0.05, gt=0, lt=1, description="Fraction of the first window's entropy; null: off."
    )


class ProxyGoldGapWatcher(_Watcher):
    """On trait prompts the reward model's score rises while the verifiable truth falls: the reward is being gamed."""

    threshold: float | None = Field(
        default=0.1,
        gt=0,
        description="Rise of the proxy and fall of gold from one window to the next, each in units of reward and each "
        "beyond two standard errors; null: off.",
    )


class LengthDriftWatcher(_Watcher):
    """Completions have become several times as long, or as short, as in the first window."""

    threshold: float | None = Field(default=3.0, gt=1, description="Ratio of the mean lengths; null: off.")


class SamplingGapWatcher(_Watcher):
    """Sampling and training disagree about the same tokens: the sampler's weights or numbers are not the policy's.

    Sees nothing where neither prompts are shared nor vLLM samples: TRL's own sampling gives no log-probabilities. The
    training warns of it then, and where sharing has fallen back, `ledger.json: fallback` says it too.
    """

    action: Literal["warn", "stop"] = Field(default="stop", description="warn or stop, as for every watcher.")
    threshold: float | None = Field(
        default=0.1,
        gt=0,
        description="Mean absolute difference of a step's log-probabilities, nats per token; null: off.",
    )


class WatchConfig(_Section):
    """Watchers over the step table (train/watchers.py): each has a threshold and an action."""

    window: int = Field(
        default=8, ge=2, description="Steps over which the watchers average; none speaks before it is full."
    )
    non_finite: NonFiniteWatcher = Field(default_factory=NonFiniteWatcher, description="NaN or infinity.")
    reward_collapse: RewardCollapseWatcher = Field(
        default_factory=RewardCollapseWatcher, description="Fall of the reward."
    )
    zero_variance: ZeroVarianceWatcher = Field(
        default_factory=ZeroVarianceWatcher, description="Groups without a difference."
    )
    kl: KLWatcher = Field(default_factory=KLWatcher, description="Distance from the starting model.")
    entropy_rise: EntropyRiseWatcher = Field(default_factory=EntropyRiseWatcher, description="Rise of the entropy.")
    entropy_fall: EntropyFallWatcher = Field(default_factory=EntropyFallWatcher, description="Fall of the entropy.")
    proxy_gold_gap: ProxyGoldGapWatcher = Field(default_factory=ProxyGoldGapWatcher, description="Proxy up, gold down.")
    length_drift: LengthDriftWatcher = Field(default_factory=LengthDriftWatcher, description="Drift of the length.")
    sampling_gap: SamplingGapWatcher = Field(
        default_factory=SamplingGapWatcher, description="Sampling against training."
    )


class TrainConfig(_Section):
    """Policy optimisation on top of TRL's GRPOTrainer, with LoRA or on every weight."""

    algorithm: Literal["grpo", "rloo", "ppo"] = Field(
        "grpo",
        description="grpo: group baseline, KL in the loss; rloo: leave-one-out baseline, one action per completion, KL "
        "in the reward; ppo: a critic, GAE, KL in the reward.",
    )
    budget_tflops: float = Field(
        30.0,
        gt=0,
        allow_inf_nan=False,
        description="Compute of every arm, in estimated TFLOPs (see train/ledger.py); the arm stops when it is spent.",
    )
    max_steps: int = Field(200, ge=1, description="Rollout steps after which an arm stops even with budget left.")
    max_tokens: int | None = Field(
        None, ge=1, description="Sampled tokens after which an arm stops even with budget left; null: no such limit."
    )
    prompts_per_step: int = Field(8, ge=1, description="Prompts per step (each is one group).")
    group_size: int = Field(8, ge=2, description="Completions per prompt (G).")
    max_new_tokens: int = Field(32, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the rollouts.")
    learning_rate: float = Field(4e-4, gt=0, description="Peak learning rate of the policy.")
    lr_scheduler: Literal["linear", "constant"] = Field(
        "linear",
        description="Learning rates after warm-up: falling to 0 as the arm's budget is spent, or constant. With a "
        "constant one the last steps decide where a small model ends.",
    )
    warmup_steps: int = Field(2, ge=0, description="Steps over which the learning rates rise from zero.")
    lora_rank: int = Field(16, ge=0, description="LoRA rank on all linear layers; 0 trains every weight.")
    loss: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = Field(
        "dr_grpo", description="TRL's loss_type: how the tokens' losses are averaged (grpo and ppo)."
    )
    scale_rewards: Literal["none", "group", "batch"] = Field(
        "none", description="Divide advantages by the group's or the batch's standard deviation, or not at all (grpo)."
    )
    beta: float = Field(0.0, ge=0, description="Weight of the KL penalty to the starting model; 0 keeps no reference.")
    max_kl: float | None = Field(
        None, gt=0, description="KL to the start, nats per token, above which an arm stops after its step; null: none."
    )
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping, of policy and critic each.")
    critic: Literal["lora", "model"] = Field(
        "lora",
        validate_default=True,
        description="ppo: the critic is a LoRA adapter of its own on the policy's frozen backbone, or a whole copy.",
    )
    critic_learning_rate: float = Field(1e-3, gt=0, description="ppo: peak learning rate of the critic.")
    value_warmup_steps: int = Field(0, ge=0, description="ppo: first steps in which only the critic learns.")
    value_clip: float = Field(
        0.2,
        gt=0,
        description="ppo: how far a value may move from the rollout's in the value loss, in reward units.",
    )
    gamma: float = Field(1.0, gt=0, le=1, description="ppo: discount per token.")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="ppo: lambda of generalised advantage estimation.")
    whiten_advantages: bool = Field(True, description="ppo: bring a rollout's advantages to mean 0 and deviation 1.")
    epochs: int = Field(1, ge=1, description="ppo: passes over every rollout.")
    minibatches: int = Field(
        1, ge=1, validate_default=True, description="ppo: updates per pass, each with its share of the groups."
    )
    clip: float = Field(0.2, gt=0, lt=1, description="ppo: the policy's ratio is clipped to 1 - clip .. 1 + clip.")
    prompt_sharing: bool = Field(
        True,
        description="Encode each prompt once per group, in rollouts and updates; false is stock TRL, "
        "in which watch.sampling_gap sees nothing without vLLM.",
    )
    token_budget: int = Field(1024, ge=64, description="Tokens of one packed forward when prompts are shared.")
    save_every: int = Field(10, ge=1, description="Steps between checkpoints; a killed run goes on from the last one.")
    noise: Literal["step", "row"] = Field(
        "step",
        description="Sampling noise: one stream a step, or one for every completion, so that rollouts do not depend on "
        "the number of processes; several processes always draw by row.",
    )
    micro_batches: int = Field(
        1, ge=1, description="Parts in which a step is trained, one after the other, to save memory; groups stay whole."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the layers' inputs for the policy's backward pass and compute the rest again: a "
        "fraction of the memory of activations, for about a third more time in the update.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen weights under LoRA; bfloat16 halves their memory and needs CUDA."
    )
    attention: str = Field(
        "sdpa",
        description="transformers' attention implementation: sdpa, eager, or with CUDA flex_attention (shared prompts "
        "under a block mask) or a kernel such as kernels-community/vllm-flash-attn3, which cannot share prompts.",
    )
    use_kernels: bool = Field(False, description="Layers from Hugging Face's kernels hub (Liger); needs CUDA.")
    vllm: Literal["off", "colocate", "server"] = Field(
        "off",
        description="Who samples: this process, vLLM on the same GPUs, or a vLLM server on others; needs CUDA.",
    )
    vllm_server_url: str | None = Field(None, description="Address of the server, such as http://host:8000.")
    vllm_memory: float = Field(0.3, gt=0, le=1, description="Share of a GPU's memory that a colocated vLLM takes.")
    vllm_tensor_parallel: int = Field(1, ge=1, description="GPUs over which a colocated vLLM splits the model.")
    watch: WatchConfig = Field(default_factory=WatchConfig, description="What is watched, and what follows.")

    @property
    def measures_kl(self) -> bool:
        """Whether the reference reads the rollouts."""
        return self.beta > 0 or self.max_kl is not None or self.watch.kl.threshold is not None

    @property
    def skips_idle_rows(self) -> bool:
        """Whether the update leaves out completions without an advantage: no other term of the loss needs them.

        What the ledger books by; SharedPromptGRPOTrainer.reading is where it is done.
        """
        return self.prompt_sharing and self.algorithm != "ppo" and not self.measures_kl

    @field_validator("vllm", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # as YAML 1.1 reads it

    @field_validator(
        "critic", "critic_learning_rate", "value_warmup_steps", "value_clip", "gamma", "gae_lambda", "epochs",
        "minibatches", "clip", "whiten_advantages",
    )  # fmt: skip
    @classmethod
    def _read_by_ppo_only(cls, value: Any, info: ValidationInfo) -> Any:
        default = cls.model_fields[str(info.field_name)].default
        if info.data.get("algorithm") in ("grpo", "rloo") and value != default:
            raise ValueError(f"{info.data['algorithm']} does not read this; remove it, or set train.algorithm: ppo")
        return value

    @field_validator("loss", "scale_rewards")
    @classmethod
    def _read_by_the_algorithm(cls, value: str, info: ValidationInfo) -> str:
        algorithm, default = info.data.get("algorithm"), cls.model_fields[str(info.field_name)].default
        unread = algorithm == "rloo" or (algorithm == "ppo" and info.field_name == "scale_rewards")
        if unread and value != default:
            raise ValueError(f"{algorithm} does not read this; remove it, or set train.algorithm: grpo")
        return value

    @field_validator("critic")
    @classmethod
    def _a_frozen_backbone(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("algorithm") == "ppo" and value == "lora" and info.data.get("lora_rank") == 0:
            raise ValueError(
                "with train.lora_rank: 0 no backbone stays frozen that a critic's adapter could share; set "
                "train.critic: model, or a rank"
            )
        return value

    @field_validator("minibatches")
    @classmethod
    def _a_group_each(cls, value: int, info: ValidationInfo) -> int:
        if value > (prompts := info.data.get("prompts_per_step", value)):
            raise ValueError(f"a minibatch holds whole groups, and a step has {prompts}; lower it to that")
        return value

    @field_validator("micro_batches")
    @classmethod
    def _ppo_has_minibatches(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("algorithm") == "ppo" and value != 1:
            raise ValueError("ppo trains a step in train.minibatches, an update each; remove this and set that")
        return value

    @field_validator("max_kl", "watch")
    @classmethod
    def _a_reference(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = value.kl.threshold is not None if isinstance(value, WatchConfig) else value is not None
        if wanted and info.data.get("lora_rank") == 0 and info.data.get("beta") == 0:
            raise ValueError(
                "a KL is measured against the starting model, which training every weight keeps only with train.beta "
                "above 0; set that, or a train.lora_rank"
            )
        return value


class ArmConfig(_Section):
    """One arm of the experiment."""

    method: Literal["trait", "constitution-prompt", "constitution-sl", "constitution-rl", "constitution-dpo"] = Field(
        "trait",
        description="trait: RL on the trait's reward; constitution-*: a baseline of docs/constitution.md, in which the "
        "dose is the share of constitutional examples or prompts (0 with constitution-prompt, which trains nothing).",
    )
    dose: float = Field(
        ge=0, le=1, description="Share of the training prompts that are trait prompts; 0 is the control."
    )


def check_step(train: TrainConfig, processes: int) -> None:
    """Raises ValueError if a step cannot be shared out among the processes and micro-batches in whole groups."""
    parts = processes * train.micro_batches
    if train.prompts_per_step % parts:
        raise ValueError(
            f"train.prompts_per_step = {train.prompts_per_step}: does not divide among {processes} processes x "
            f"{train.micro_batches} micro-batches in whole groups; use a multiple of {parts}, or fewer "
            "train.micro_batches"
        )


def cuda_settings(train: TrainConfig) -> list[str]:
    """The settings, as key = value, that only a CUDA device can follow."""
    wanted = {
        "dtype": train.dtype == "bfloat16",
        "attention": train.attention not in ("sdpa", "eager"),
        "use_kernels": train.use_kernels,
        "vllm": train.vllm != "off",
    }
    return [f"train.{key} = {getattr(train, key)!r}" for key, on in wanted.items() if on]


def uses_hub_kernels(train: TrainConfig) -> bool:
    """Whether a training may fetch kernels from the hub, wherever its base comes from.

    transformers takes flash attention from there, too, where its package is not installed.
    """
    return train.use_kernels or train.attention not in ("sdpa", "eager", "flex_attention")
