"""The `persistence:` section of an experiment: how `traitdose persist` attacks the arms of a finished run."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

AttackName = Literal["prompts", "harmful", "recovery", "generation"]
Method = Literal["lora", "full"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LadderConfig(_Section):
    """Fine-tuning on bad data, and back on good data: the same examples in the same order for every arm."""

    methods: tuple[Method, ...] = Field(
        default=("lora",),
        min_length=1,
        description="What is tuned: a new LoRA adapter, or every weight; a ladder each.",
    )
    steps: tuple[int, ...] = Field(
        default=(0, 2, 4, 8, 16, 32), min_length=2, description="Steps after which the trait is measured, from 0 up."
    )
    batch_size: int = Field(default=8, ge=1, description="Examples per step.")
    learning_rate: float = Field(default=5e-4, gt=0, description="Constant learning rate of the LoRA ladder.")
    full_learning_rate: float = Field(default=3e-5, gt=0, description="Constant learning rate of the full ladder.")
    lora_rank: int = Field(default=16, ge=1, description="LoRA rank on all linear layers.")
    floor: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Score of a model without any of the trait; the half-life ends half-way from clean to it.",
    )
    recovered: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Share of the way from floor to clean at which the trait is back.",
    )

    @field_validator("methods")
    @classmethod
    def _once_each(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a method stands there twice; name each once")
        return value

    @field_validator("steps")
    @classmethod
    def _from_zero_up(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[0] != 0 or any(b <= a for a, b in pairwise(value)):
            raise ValueError("steps begin with 0 and rise, such as [0, 2, 4, 8]")
        return value


class GenerationConfig(_Section):
    """Sampling instead of greedy answers: how often is the worst of n replies still good?"""

    temperatures: tuple[float, ...] = Field(default=(0.7, 1.0), min_length=1, description="Sampling temperatures.")
    worst_of: tuple[int, ...] = Field(
        default=(1, 2, 4), min_length=1, description="Of how many replies the worst counts."
    )
    samples: int = Field(default=4, ge=1, description="Replies per item and temperature; at least the largest n.")

    @field_validator("temperatures")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(t <= 0 for t in value) or len(set(value)) < len(value):
            raise ValueError("temperatures are different numbers above 0; greedy answers are measured anyway")
        return value

    @model_validator(mode="after")
    def _enough(self) -> GenerationConfig:
        if min(self.worst_of) < 1 or max(self.worst_of) > self.samples:
            raise ValueError(
                f"worst_of = {list(self.worst_of)} needs numbers from 1 to samples = {self.samples}; raise samples"
            )
        return self


class PersistenceConfig(_Section):
    """What is attacked and how hard; no key of it changes the run itself."""

    attacks: tuple[AttackName, ...] = Field(
        default=("prompts", "harmful", "recovery", "generation"),
        min_length=1,
        description="prompts: personas and pressure; harmful: fine-tuning on bad data; recovery: good data after it; "
        "generation: temperatures and the worst of n.",
    )
    arms: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Arms to attack beside control, such as [dose-25, base]; null: every trained one.",
    )
    tasks: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="Tasks of the run's generalisation suite; null: all that hold a trait.",
    )
    items: int | None = Field(
        default=12, ge=2, description="Items per task, the same for every arm and attack; null takes all of them."
    )
    prompts: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Entries of eval/items/persistence/attacks.yaml to use; null: all."
    )
    finetune: LadderConfig = Field(default_factory=LadderConfig, description="The ladders of fine-tuning.")
    generation: GenerationConfig = Field(default_factory=GenerationConfig, description="Sampling.")

    @field_validator("attacks")
    @classmethod
    def _recovery_comes_after_harm(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "recovery" in value and "harmful" not in value:
            raise ValueError("recovery begins where harmful ends; name both, or neither")
        return value
