"""The scenario bank: rewards/scenarios/<trait>/<domain>.jsonl, one scenario per line.

    {"id": "truthfulness-health-0007", "family": "invented-trial", "split": "train", "trait": "truthfulness",
     "domain": "health", "messages": [{"role": "user", "content": "..."}],
     "rubric": [{"criterion": "Says that the trial cannot be vouched for", "points": 4}, ...],
     "exemplars": {"good": "...", "bad": [{"text": "...", "failure": "fabrication"}, ...]}, "notes": "..."}

A family (scenarios of one theme, whatever their trait and domain) lies wholly on one side of the split. Here a line is
read and its form checked; rewards/scenario_check.py judges what makes a bank fit for use.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rewards.traits import Slug, Text, describe

BANK = Path(__file__).parent / "scenarios"

Split = Literal["train", "heldout"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Message(_Strict):
    """One turn of the conversation that the policy answers."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Criterion(_Strict):
    """One observable thing in a reply. Negative points name a failure."""

    criterion: Text
    points: int

    @field_validator("points")
    @classmethod
    def _counts(cls, points: int) -> int:
        if points == 0:
            raise ValueError("a criterion that weighs nothing; give it points or remove it")
        return points


class BadExemplar(_Strict):
    """A reply that fails in one way; `failure` is a slug of the trait's card."""

    text: Text
    failure: Slug


class Exemplars(_Strict):
    """One good reply and the bad ones it is set against."""

    good: Text
    bad: tuple[BadExemplar, ...] = Field(strict=False)


class Scenario(_Strict):
    """One line of the bank."""

    id: Slug
    family: Slug
    split: Split
    trait: Slug
    domain: Slug
    messages: tuple[Message, ...] = Field(min_length=1, strict=False)
    rubric: tuple[Criterion, ...] = Field(min_length=1, strict=False)
    exemplars: Exemplars
    notes: str = ""  # what is invented, which facts were checked; never shown to a model

    @field_validator("messages")
    @classmethod
    def _ends_with_the_user(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if messages[-1].role != "user":
            raise ValueError("the last message has to be the user's; add the turn that the policy answers")
        if any(message.role == "system" for message in messages[1:]):
            raise ValueError("a system message can only be the first; move it there")
        return messages

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation as a chat prompt."""
        return [message.model_dump() for message in self.messages]


@dataclass(frozen=True)
class Line:
    """One line of a bank file: its scenario, or what is wrong with its form (`key: what, and the remedy`)."""

    path: Path
    number: int  # from 1
    scenario: Scenario | None
    problems: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """file:line"""
        return f"{shown(self.path)}:{self.number}"


def shown(path: Path) -> str:
    """The path as seen from the working directory if it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def load_scenarios(
    trait: str | None = None, domain: str | None = None, split: Split | None = None, bank: Path | None = None
) -> list[Scenario]:
    """The scenarios of the bank, sorted by file and line, filtered by trait, domain and split.

    Raises ValueError with file:line, key and remedy for the first line that is not a scenario, and for a trait or a
    domain without scenarios.
    """
    bank = bank or BANK
    _known("trait", trait, {path.parent.name for path in bank.glob("*/*.jsonl")}, bank)
    _known("domain", domain, {path.stem for path in bank.glob(f"{trait or '*'}/*.jsonl")}, bank)
    found: list[Scenario] = []
    for line in read_bank(bank, trait):
        if domain is not None and line.path.stem != domain:
            continue
        if line.scenario is None:
            raise ValueError(f"{line.where}: {'; '.join(line.problems)}")
        if split is None or line.scenario.split == split:
            found.append(line.scenario)
    return found


def read_bank(bank: Path | None = None, trait: str | None = None) -> list[Line]:
    """Every line of the bank or of one trait's folder, whole or with its problems. Raises nothing for a bad line."""
    paths = sorted((bank or BANK).glob(f"{trait or '*'}/*.jsonl"))
    return [
        _read_line(path, number, text)
        for path in paths
        for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
        if text.strip()
    ]


def _read_line(path: Path, number: int, text: str) -> Line:
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        return Line(path, number, None, (f"record: is no JSON ({error}); write one object per line",))
    try:
        return Line(path, number, Scenario.model_validate(content))
    except ValidationError as error:
        return Line(path, number, None, tuple(describe(error)))


def _known(key: str, value: str | None, names: set[str], bank: Path) -> None:
    if value is not None and value not in names:
        raise ValueError(f"{key} {value!r} has no scenarios in {bank}; there are: {', '.join(sorted(names)) or 'none'}")
