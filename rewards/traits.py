"""Trait cards: one Markdown file per trait in configs/traits/, named by its id.

---
id: truthfulness
name: Truthfulness
summary: One sentence, as `traitdose traits` lists it.
domains: [health, science]           # cells of the scenario bank that the trait fills
reward: {scenario: rubric, conduct: [insists], monitors: [length, refusal]}
---
## Definition
## Good behaviour
## Failure modes                     # bullets: - **slug**: what it does; exemplars name their failure by the slug
## How it is rewarded
## Boundary cases
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

CARDS = Path(__file__).parents[1] / "configs" / "traits"
SECTIONS = {
    "Definition": "definition",
    "Good behaviour": "good_behaviour",
    "Failure modes": "failure_modes",
    "How it is rewarded": "how_rewarded",
    "Boundary cases": "boundary_cases",
}

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Reward(BaseModel):
    """How the trait is paid, and what is only watched."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenario: Literal["rubric"]
    conduct: tuple[
        Literal[
            "insists",
            "corrects-rightly",
            "corrects-wrongly",
            "conflict-of-interest",
            "shutdown-or-correction",
            "uncertain-evidence",
        ],
        ...,
    ] = ()  # kinds of rewards/probe_kinds.py whose right answer shows the trait
    monitors: tuple[Literal["gold", "refusal", "length", "repetition", "self-praise", "language"], ...] = ()


class TraitCard(BaseModel):
    """One trait. `failure_modes` maps each slug to its description; the other sections are Markdown as written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Slug
    name: Text
    summary: Text
    domains: tuple[Slug, ...] = Field(min_length=1)
    reward: Reward
    definition: Text
    good_behaviour: Text
    failure_modes: dict[Slug, Text] = Field(min_length=2)
    how_rewarded: Text
    boundary_cases: Text


def load_traits(folder: Path | None = None) -> dict[str, TraitCard]:
    """All cards by id, sorted. Raises ValueError that names the file and the key for a card that is not right."""
    return {path.stem: load_trait(path) for path in sorted((folder or CARDS).glob("*.md"))}


def load_trait(path: Path) -> TraitCard:
    """One card from its file. Raises ValueError with the file, the key and the remedy."""
    front, body = _split(path)
    sections = _sections(path, body)
    clash = sorted(set(front) & set(SECTIONS.values()))
    if clash:
        raise ValueError(f"{path}: {clash[0]}: belongs in the text as a section, not in the front matter; move it")
    content = front | {key: sections[title] for title, key in SECTIONS.items()}
    content["failure_modes"] = _failure_modes(path, sections["Failure modes"])
    try:
        card = TraitCard.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(describe(error))}") from None
    if card.id != path.stem:
        raise ValueError(f"{path}: id: is {card.id!r}; a card's file is named by its id, so rename one of the two")
    repeated = [domain for domain in card.domains if card.domains.count(domain) > 1]
    if repeated:
        raise ValueError(f"{path}: domains: {repeated[0]!r} stands there twice; remove one")
    return card


def describe(error: ValidationError) -> list[str]:
    """A pydantic error as lines of the form `key: what is wrong, and the remedy`."""
    lines: list[str] = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"]) or "record"
        if problem["type"] == "missing":
            lines.append(f"{key}: is missing; add it")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{key}: is not a known key; remove it or mend its spelling")
        elif problem["type"] == "string_too_short":
            lines.append(f"{key}: is empty; write it")
        else:
            lines.append(f"{key}: is {_short(problem['input'])}; {problem['msg'].removeprefix('Value error, ')}")
    return lines


def _split(path: Path) -> tuple[dict[str, Any], str]:
    match = re.match(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
    if match is None:
        raise ValueError(f"{path}: front matter: not found; begin the file with YAML between two lines of ---")
    try:
        front = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: front matter: is no YAML ({error}); put texts with a colon in quotes") from None
    if not isinstance(front, dict):
        raise ValueError(f"{path}: front matter: is {_short(front)}; write keys and values such as id: {path.stem}")
    return front, match[2]


def _sections(path: Path, body: str) -> dict[str, str]:
    """Each section's text by its title; every title exactly once, and no other."""
    parts = re.split(r"^## +(.+?) *$", body, flags=re.MULTILINE)
    titles = parts[1::2]
    if parts[0].strip():
        raise ValueError(f"{path}: text before the first section; put it under one of: {', '.join(SECTIONS)}")
    for title in SECTIONS:
        if titles.count(title) != 1:
            raise ValueError(f"{path}: section '## {title}': is there {titles.count(title)} times; it is needed once")
    unknown = [title for title in titles if title not in SECTIONS]
    if unknown:
        raise ValueError(f"{path}: section '## {unknown[0]}': is not known; there are: {', '.join(SECTIONS)}")
    return dict(zip(titles, parts[2::2], strict=True))


def _failure_modes(path: Path, text: str) -> dict[str, str]:
    """Slug to description, in the order of the card, from bullets such as `- **caving**: gives up a right answer.`"""
    modes: dict[str, str] = {}
    for bullet in re.split(r"^- +", text.strip(), flags=re.MULTILINE):
        if not bullet.strip():
            continue
        match = re.fullmatch(r"\*\*(.+?)\*\*: *(.+)", " ".join(bullet.split()))
        if match is None:
            raise ValueError(f"{path}: Failure modes: {_short(bullet)}; write each as - **slug**: what it does")
        if match[1] in modes:
            raise ValueError(f"{path}: Failure modes: {match[1]!r} stands there twice; rename or remove one")
        modes[match[1]] = match[2]
    return modes


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
