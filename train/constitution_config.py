"""The `constitution:` section of an experiment, and how a constitutional arm divides its budget."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, Field, field_validator

from rewards.endpoint import EndpointConfig

# The parts of each kind of arm, in the order in which they are made; the last takes all that is left of the budget.
PARTS: dict[str, tuple[str, ...]] = {
    "constitution-prompt": (),
    "constitution-sl": ("revisions", "train"),
    "constitution-rl": ("revisions", "sl", "feedback", "preference", "train"),
    "constitution-dpo": ("revisions", "sl", "train"),
}
SHARES: dict[str, dict[str, float]] = {
    "constitution-sl": {"revisions": 0.6},
    "constitution-rl": {"revisions": 0.2, "sl": 0.15, "feedback": 0.2, "preference": 0.1},
    "constitution-dpo": {"revisions": 0.6, "sl": 0.2},
}


class ConstitutionConfig(BaseModel):
    """How the arms with a constitutional method are trained (docs/constitution.md)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(
        "configs/constitution/constitution.yaml",
        description="Constitution file, relative to the present folder or to the checkout.",
    )
    shares: dict[str, dict[str, float]] = Field(
        default=SHARES,
        validate_default=True,
        description="Method -> part -> share of the arm's budget that the part spends; the method's last part takes "
        "the rest. A method that is not named keeps its default.",
    )
    rounds: int = Field(1, ge=1, le=8, description="Critiques and revisions of every answer, one after the other.")
    demonstrations: int = Field(
        2, ge=0, description="Few-shot chats before every critique and revision; each costs its tokens."
    )
    critique_tokens: int = Field(
        48, ge=1, description="Longest critique, in tokens; replies have train.max_new_tokens."
    )
    temperature: float = Field(0.7, gt=0, description="Sampling temperature of critiques, revisions and thoughts.")
    principles: int = Field(4, ge=1, description="Principles under which every pair of replies is compared.")
    chain_of_thought: bool = Field(
        False, description="Let the feedback model think before it compares; its votes are then held within clamp."
    )
    clamp: tuple[float, float] = Field(
        (0.4, 0.6), description="Least and greatest vote after a chain of thought; read with chain_of_thought only."
    )
    thought_tokens: int = Field(48, ge=1, description="Longest chain of thought, in tokens.")
    feedback: EndpointConfig | None = Field(
        None, description="Served model that compares the replies; null: the policy itself."
    )
    lora_rank: int = Field(16, ge=1, description="LoRA rank of the fine-tunings and of the preference model.")
    batch_size: int = Field(8, ge=1, description="Examples or pairs per update.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate of the fine-tuning on revisions.")
    preference_learning_rate: float = Field(3e-4, gt=0, description="Peak learning rate of the preference model.")
    dpo_learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate of DPO.")
    dpo_beta: float = Field(0.1, gt=0, description="DPO: weight of the KL to the fine-tuned model.")

    @field_validator("shares")
    @classmethod
    def _leave_something(cls, shares: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        for method, parts in shares.items():
            if method not in SHARES:
                raise ValueError(f"{method!r} has no shares; there are: {', '.join(SHARES)}")
            if set(parts) != set(SHARES[method]):
                raise ValueError(f"{method} has the parts {', '.join(SHARES[method])}; give each of them a share")
            if min(parts.values()) <= 0 or sum(parts.values()) >= 1:
                raise ValueError(f"{method}: shares are above 0 and leave something for the last part, so sum below 1")
        return SHARES | shares

    @field_validator("clamp")
    @classmethod
    def _around_a_half(cls, clamp: tuple[float, float]) -> tuple[float, float]:
        if not 0 < clamp[0] < 0.5 < clamp[1] < 1:
            raise ValueError("the least vote is between 0 and 0.5, the greatest between 0.5 and 1")
        return clamp


def allowance(cfg: ConstitutionConfig, method: str, part: str, budget: float, spent: Mapping[str, float]) -> float:
    """FLOPs that a part may spend of the arm's budget, given what each part before it has spent.

    Raises ValueError if nothing is left for the last part.
    """
    if part != PARTS[method][-1]:
        return cfg.shares[method][part] * budget
    left = budget - sum(spent.values())
    if left <= 0:
        parts = ", ".join(f"{name} {flops / 1e12:.3g}" for name, flops in spent.items())
        raise ValueError(
            f"constitution.shares.{method}: nothing of train.budget_tflops = {budget / 1e12:.4g} is left for the last "
            f"part (spent: {parts} TFLOPs); lower the shares, or raise the budget"
        )
    return left
