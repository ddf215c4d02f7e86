"""The `reward:` section of an experiment."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rewards.traits import CARDS

PROBE_TRAIT = "truthfulness"  # the trait whose truth the probes know

Source = Literal["probes", "conduct", "scenarios"]
SOURCES: tuple[Source, ...] = get_args(Source)


class PromptShares(BaseModel):
    """Where the trait prompts of a run come from (rewards/trait_prompts.py); shares need not sum to 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probes: float = Field(0.0, ge=0, description="Short questions with a verifiable truth; for truthfulness only.")
    conduct: float = Field(
        0.0,
        ge=0,
        description="Probes under pressure, of the kinds in the trait's card (reward.conduct), in equal parts.",
    )
    scenarios: float = Field(0.0, ge=0, description="The trait's scenarios of the training families, whole chats.")

    @model_validator(mode="after")
    def _some(self) -> PromptShares:
        if not self.positive:
            raise ValueError("every share is 0; give one of probes, conduct, scenarios a share above 0")
        return self

    @property
    def positive(self) -> dict[Source, float]:
        """The shares above 0."""
        shares: dict[Source, float] = {source: getattr(self, source) for source in SOURCES}
        return {source: share for source, share in shares.items() if share > 0}


class RewardConfig(BaseModel):
    """What the dose rewards, and how the trait's reward model is fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trait: str = Field(PROBE_TRAIT, description="Trait that the dose trains; a file configs/traits/<trait>.md.")
    weights: dict[str, float] = Field(
        {},
        description="Several traits, `trait` among them: trait prompts take turns in proportion to these weights, and "
        "each is paid by the reward model of its own trait. Empty: `trait` alone.",
    )
    domains: tuple[str, ...] = Field(
        ("health",), min_length=1, description="Domains whose training families supply the trait prompts."
    )
    prompts: PromptShares | None = Field(
        None,
        description="Sources of the trait prompts and their shares; what a trait lacks in the domains goes to the "
        "others. null: probes where the trait has them, else conduct and scenarios, half each.",
    )
    probes: int = Field(
        640, ge=16, description="Probes to fit on, half of them answerable; each gives one to three preference pairs."
    )
    own_answers: int = Field(
        2,
        ge=0,
        description="Answers of the start model to each probe, ranked by the verifier beside the authored ones.",
    )
    epochs: float = Field(1.0, gt=0, description="Passes over the probes.")
    learning_rate: float = Field(5e-4, gt=0, description="Peak learning rate of the LoRA weights and the scalar head.")
    lora_rank: int = Field(16, ge=1, description="LoRA rank on all linear layers of the backbone.")
    batch_size: int = Field(4, ge=1, description="Probes per update, each with all its pairs.")
    min_accuracy: float = Field(
        0.7, ge=0, le=1, description="Held-out pair accuracy below which the run refuses to train on this reward."
    )
    audit: Literal["refuse", "warn"] = Field(
        "refuse",
        description="What a run does with a reward that a family of hacks beats (configs/audit.yaml): refuse to train, "
        "or warn and train.",
    )

    @model_validator(mode="after")
    def _weights_name_traits(self) -> RewardConfig:
        unknown = [name for name in self.weights if not (CARDS / f"{name}.md").is_file()]
        if unknown:
            raise ValueError(f"weights: {unknown[0]!r} is no trait; a trait is a file in configs/traits/")
        if self.weights and self.trait not in self.weights:
            raise ValueError(f"weights: {self.trait!r}, the trait that is trained, has none; add it, or change trait")
        low = [name for name, weight in self.weights.items() if weight <= 0]
        if low:
            raise ValueError(f"weights: {low[0]} has {self.weights[low[0]]}; a weight is above 0, so remove the trait")
        return self

    @property
    def traits(self) -> dict[str, float]:
        """Every trait that pays, with its weight; the trait that is trained comes first."""
        weights = self.weights or {self.trait: 1.0}
        return {self.trait: weights[self.trait]} | weights
