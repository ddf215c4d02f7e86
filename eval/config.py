"""What is evaluated, and in what portions: the `eval:` section of an experiment."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SuiteName = Literal["capability", "generalisation"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteConfig(_Strict):
    """One suite file and how much of it is used."""

    file: str = Field(description="suite file, relative to the present folder or to the checkout")
    limit: int | None = Field(
        default=None, ge=1, description="items per task, the same items for every arm; null takes all of them"
    )


class EvalConfig(_Strict):
    """The evaluation that base and every arm go through."""

    suites: dict[SuiteName, SuiteConfig] = Field(
        min_length=1, description="the suites to run: capability, generalisation, or both"
    )
    seed: int = Field(default=0, ge=0, description="draws the wording of the probes; the same for every arm and seed")
