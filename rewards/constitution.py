"""A constitution: principles to criticise, revise and compare replies by, and few-shot demonstrations (a YAML file).

The chats that a model sees are built here. The method is Constitutional AI's (Bai et al. 2022, arXiv 2212.08073): a
reply is criticised and revised under a drawn principle (section 3), two replies are compared under one (section 4).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewards.traits import CARDS, Text, describe

Messages = list[dict[str, str]]

CHOICES = ("(A)", "(B)")  # what the feedback model chooses between


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Principle(_Strict):
    """One principle, with the words in which it is put to a model."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", description="Stable name: small letters, digits, dashes.")
    principle: Text = Field(description="Short form, one sentence of the system prompt.")
    critique: Text = Field(description="Request for a critique of the last reply.")
    revision: Text = Field(description="Request for a revision that follows the critique.")
    comparison: Text = Field(description="Question that one of two replies answers better.")
    traits: tuple[str, ...] = Field(min_length=1, description="Traits of configs/traits/ that it stands for.")


class Demonstration(_Strict):
    """One few-shot chat: a question, a flawed answer, its critique and its revision."""

    principle: str = Field(description="Id of the principle under which it is given.")
    question: Text = Field(description="What the user asks.")
    answer: Text = Field(description="A reply with a flaw.")
    critique: Text = Field(description="What is wrong with it.")
    revision: Text = Field(description="The better reply, and nothing around it.")


class _File(_Strict):
    name: Text
    system: Text
    demonstrations: str
    principles: tuple[Principle, ...] = Field(min_length=1)


class _Demonstrations(_Strict):
    demonstrations: tuple[Demonstration, ...]


class Constitution(_Strict):
    """A constitution file with its demonstrations."""

    name: str
    system: str
    principles: tuple[Principle, ...]
    demonstrations: tuple[Demonstration, ...]

    def named(self, principle: str) -> Principle:
        """The principle with this id."""
        return next(p for p in self.principles if p.id == principle)

    def system_prompt(self) -> str:
        """All principles in their short form, as one system prompt."""
        return "\n".join([self.system, *(f"- {p.principle}" for p in self.principles)])


@cache
def load_constitution(path: Path) -> Constitution:
    """Read and check a constitution file and the demonstrations beside it.

    Raises ValueError with file, key and remedy: a missing file or key, an id that stands twice, an unknown trait or
    principle.
    """
    file = _read(path, _File, "constitution.file: there is no such file; the shipped ones are in configs/constitution/")
    ids = [principle.id for principle in file.principles]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ValueError(f"{path}: principles: id {twice[0]!r} stands twice; give every principle an id of its own")
    for principle in file.principles:
        for trait in principle.traits:
            if not (CARDS / f"{trait}.md").is_file():
                raise ValueError(
                    f"{path}: principles.{principle.id}.traits: {trait!r} is no trait; a trait is a file in "
                    "configs/traits/"
                )
    beside = path.parent / file.demonstrations
    shown = _read(beside, _Demonstrations, f"{path}: demonstrations: there is no such file; it stands beside this one")
    for demonstration in shown.demonstrations:
        if demonstration.principle not in ids:
            raise ValueError(
                f"{beside}: demonstrations: principle {demonstration.principle!r} is not in {path.name}; name one of "
                f"its ids, such as {ids[0]}"
            )
    return Constitution(
        name=file.name, system=file.system, principles=file.principles, demonstrations=shown.demonstrations
    )


def constitution_texts(constitution: Constitution) -> list[tuple[str, str, bool]]:
    """Every text of it that a model is shown: (source, text, whether a user asks it)."""
    texts = [
        (f"principle {p.id}", text, False)
        for p in constitution.principles
        for text in (p.principle, p.critique, p.revision, p.comparison)
    ]
    for k, d in enumerate(constitution.demonstrations):
        texts.append((f"demonstration {k}", d.question, True))
        texts += [(f"demonstration {k}", text, False) for text in (d.answer, d.critique, d.revision)]
    return texts


def drawn(constitution: Constitution, n: int, *seed: Any) -> list[Principle]:
    """n different principles (all of them if there are fewer), a function of the seed's parts alone."""
    rng = random.Random("/".join(map(str, seed)))
    return rng.sample(constitution.principles, min(n, len(constitution.principles)))


def shown(constitution: Constitution, n: int, *seed: Any) -> list[Demonstration]:
    """n demonstrations in a drawn order, a function of the seed's parts alone."""
    rng = random.Random("/".join(map(str, ("shown", *seed))))
    return rng.sample(constitution.demonstrations, min(n, len(constitution.demonstrations)))


def critique_chat(
    constitution: Constitution, shots: Sequence[Demonstration], prompt: Messages, answer: str, principle: Principle
) -> Messages:
    """The chat that ends with the request for a critique of `answer`; demonstrations stand before it."""
    chat = [message for shot in shots for message in _demonstrated(constitution, shot)]
    return [*chat, *prompt, _said("assistant", answer), _said("user", principle.critique)]


def revision_chat(criticised: Messages, critique: str, principle: Principle) -> Messages:
    """A critique chat with its critique, and the request for the revision."""
    return [*criticised, _said("assistant", critique), _said("user", principle.revision)]


def comparison_chat(prompt: Messages, first: str, second: str, principle: Principle, thought: str = "") -> Messages:
    """The multiple-choice question of section 4.1: which of two replies, (A) or (B), is better under the principle.

    With a thought (chain of thought, section 4.1) it is put before the question's last line.
    """
    asked = "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
    lines = [
        "Here is a conversation and two replies to it.",
        asked,
        f"{CHOICES[0]} {first}",
        f"{CHOICES[1]} {second}",
        principle.comparison,
    ]
    if thought:
        lines.append(f"Thoughts: {thought}")
    lines.append(f"Answer with {CHOICES[0]} or {CHOICES[1]}.")
    return [_said("user", "\n".join(lines))]


def thought_chat(prompt: Messages, first: str, second: str, principle: Principle) -> Messages:
    """The same question, asking for thoughts instead of the choice."""
    (question,) = comparison_chat(prompt, first, second, principle)
    body = question["content"].rsplit("\n", 1)[0]
    return [_said("user", f"{body}\nThink about both replies in a sentence or two, without choosing yet.")]


def _demonstrated(constitution: Constitution, shot: Demonstration) -> Messages:
    principle = constitution.named(shot.principle)
    return [
        _said("user", shot.question),
        _said("assistant", shot.answer),
        _said("user", principle.critique),
        _said("assistant", shot.critique),
        _said("user", principle.revision),
        _said("assistant", shot.revision),
    ]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _read(path: Path, kind: Any, missing: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{missing} (looked for {path})")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return kind.model_validate(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}; mend the file") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {'; '.join(describe(error))}") from None
