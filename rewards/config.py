"""The `reward:` section of an experiment."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class RewardConfig(BaseModel):
    """What the dose rewards, and how the trait's reward model is fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trait: str = Field("truthfulness", description="Trait that the dose trains; a file configs/traits/<trait>.md.")
    domains: tuple[str, ...] = Field(
        ("health",), min_length=1, description="Domains whose training families supply the trait prompts."
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
