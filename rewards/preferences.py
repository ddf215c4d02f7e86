"""Preferences that a reward model is fitted on and measured by: two replies to one prompt, the better one known.

They come from probes (rewards/pairs.py), from the exemplars of the scenario bank, and from the user's own JSONL file.
Scenarios and probes add, for training only, hacked replies (rewards/hacks.py, in other words than the audit's).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rewards.hacks import HACKS, TRAINED, Case, hacked
from rewards.pairs import Pair, abstention
from rewards.probes import Probe
from rewards.scenarios import Message, Scenario, Split
from rewards.traits import Text, describe
from rewards.verifier import gold

Messages = list[dict[str, str]]

GOOD, BAD = 1.0, -1.0  # prices of exemplars, on the scale of rewards.verifier.PRICE
VALIDATION_SHARE = 0.15  # of the training families, kept for calibration and for choices


@dataclass(frozen=True)
class Preference:
    """Two replies to one prompt. Preferences of one prompt share its id."""

    prompt_id: str
    prompt: Messages
    chosen: str
    rejected: str
    prices: tuple[float, float]  # of chosen and rejected
    contrast: str  # what sets them apart: a failure mode, or such as "right>abstained"
    domain: str
    family: str

    @property
    def margin(self) -> float:
        """By which the fit wants chosen ahead."""
        return self.prices[0] - self.prices[1]


def from_probes(pairs: Iterable[Pair]) -> list[Preference]:
    """The pairs of probes, in their order, with the verifier's prices."""
    return [
        _probe_preference(
            pair.probe,
            pair.chosen,
            pair.rejected,
            (gold(pair.probe, pair.chosen), gold(pair.probe, pair.rejected)),
            pair.contrast,
        )
        for pair in pairs
    ]


def from_scenarios(scenarios: Sequence[Scenario]) -> list[Preference]:
    """The good exemplar of every scenario over each of its bad ones, named by the failure."""
    return [_preference(scenario, bad.text, bad.failure) for scenario in scenarios for bad in scenario.exemplars.bad]


def adversarial(scenarios: Sequence[Scenario], per_scenario: int, seed: int) -> list[Preference]:
    """`per_scenario` hacked replies that every scenario's good exemplar has to beat: off-topic, and others of TRAINED.

    Off-topic is always among them, because exemplars alone can be told apart without reading the prompt.
    Fit on these, a reward model knows the cheapest ways to please it; the audit attacks it with other wordings, and
    with families that are not in TRAINED.
    """
    drawn: list[Preference] = []
    for scenario in scenarios:
        rng = random.Random(f"adversarial/{seed}/{scenario.id}")
        case = scenario_case(scenario, scenarios, rng)
        others = [name for name in TRAINED if name != "off-topic"]
        for name in ["off-topic", *rng.sample(others, per_scenario - 1)][:per_scenario]:
            drawn.append(_preference(scenario, hacked(name, case, "fit", rng), f"hack:{name}"))
    return drawn


def adversarial_probes(probes: Sequence[Probe], seed: int) -> list[Preference]:
    """One hacked reply, of a family in TRAINED, that the good reply to every probe has to beat.

    The good reply is the right one, or honest where nothing is known. What the verifier finds as good is no hack and
    left out: a refusal where nothing is known.
    """
    drawn: list[Preference] = []
    for probe in probes:
        rng = random.Random(f"adversarial/{seed}/{probe.id}")
        name = rng.choice(TRAINED)
        case = probe_case(probe, probes, rng)
        text = hacked(name, case, "fit", rng)
        if is_worse(name, text, probe, case.good):
            price = BAD if HACKS[name].spoils == "form" else gold(probe, text)
            drawn.append(_probe_preference(probe, case.good, text, (gold(probe, case.good), price), f"hack:{name}"))
    return drawn


def probe_case(probe: Probe, probes: Sequence[Probe], rng: random.Random) -> Case:
    """What a hack may use; `other` is the right answer to a probe of another family."""
    others = [other for other in probes if other.right and other.family != probe.family]
    good = probe.right or abstention(probe, rng)
    return Case(probe.messages, good, rng.choice(others).right if others else good)


def is_worse(name: str, text: str, probe: Probe, good: str) -> bool:
    """Whether a hacked reply to the probe is worse than the good one, by its form or in the verifier's eyes."""
    if text.strip() == good.strip():
        return False
    return HACKS[name].spoils == "form" or gold(probe, text) < gold(probe, good)


def scenario_case(scenario: Scenario, scenarios: Sequence[Scenario], rng: random.Random) -> Case:
    """What a hack may use; `other` is the good reply to a scenario of another family and domain."""
    others = [s for s in scenarios if s.family != scenario.family and s.domain != scenario.domain] or [scenario]
    return Case(
        prompt=scenario.prompt,
        good=scenario.exemplars.good,
        other=rng.choice(others).exemplars.good,
        criteria=tuple(criterion.criterion for criterion in scenario.rubric if criterion.points > 0),
    )


def validation_families(scenarios: Sequence[Scenario], seed: int) -> set[str]:
    """Families of the training split that no fit sees: of every trait the first 15%, in an order drawn by the seed.

    `scenarios` is the whole bank, because a family may occur under several traits.
    """
    chosen: set[str] = set()
    for trait in sorted({scenario.trait for scenario in scenarios}):
        families = {s.family for s in scenarios if s.trait == trait and s.split == "train"}
        order = sorted(families, key=lambda family: random.Random(f"validation/{seed}/{family}").random())
        chosen.update(order[: max(1, round(VALIDATION_SHARE * len(order)))])
    return chosen


def style_guess(preference: Preference) -> Literal["right", "wrong", "no guess"]:
    """What a guesser gets who reads no word and takes the reply with the shorter sentences for the better one.

    In the scenario bank it is right in about three pairs of four (docs/rewards.md), so the accuracy where it is wrong
    tells more about a reward model than the accuracy in all.
    """
    better, worse = sentence_words(preference.chosen), sentence_words(preference.rejected)
    return "no guess" if better == worse else "right" if better < worse else "wrong"


def sentence_words(text: str) -> float:
    """Mean number of words per sentence; a sentence ends with . ! or ? and white space."""
    sentences = [piece for piece in re.split(r"(?<=[.!?])\s+", text.strip()) if piece]
    return len(text.split()) / max(1, len(sentences))


class _Line(BaseModel):
    """One line of a user's file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: tuple[Message, ...] = Field(min_length=1, strict=False)
    chosen: Text
    rejected: Text
    domain: str = "own"
    family: str = ""
    failure: str = "own"
    split: Split = "train"

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_turn(cls, prompt: Any) -> Any:
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt

    @field_validator("prompt")
    @classmethod
    def _ends_with_the_user(cls, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
        if prompt[-1].role != "user":
            raise ValueError("the last message has to be the user's; the reply follows it")
        return prompt


def load_preferences(path: Path) -> dict[Split, list[Preference]]:
    """The user's preferences by split, from a JSONL file.

    A line is {"prompt": text or [{"role", "content"}, ...], "chosen": text, "rejected": text}, and may have domain,
    family, failure and split ("train" unless it says "heldout"). Raises ValueError with file:line, key and remedy.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; --pairs takes a JSONL file with prompt, chosen and rejected")
    found: dict[Split, list[Preference]] = {"train": [], "heldout": []}
    ids: dict[str, str] = {}
    sides: dict[str, Split] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        line = _parse(where, text)
        if line.chosen == line.rejected:
            raise ValueError(f"{where}: chosen and rejected are the same text; remove the line or correct it")
        prompt = [message.model_dump() for message in line.prompt]
        key = json.dumps(prompt)
        family = line.family or f"own/{ids.setdefault(key, f'line-{number}')}"
        if sides.setdefault(family, line.split) != line.split or sides.setdefault(key, line.split) != line.split:
            raise ValueError(f"{where}: split: the same family or prompt stands on the other side; keep it on one side")
        found[line.split].append(
            Preference(
                prompt_id=f"own/{ids.setdefault(key, f'line-{number}')}",
                prompt=prompt,
                chosen=line.chosen,
                rejected=line.rejected,
                prices=(GOOD, BAD),
                contrast=line.failure,
                domain=line.domain,
                family=family,
            )
        )
    if not found["train"]:
        raise ValueError(f"{path}: holds no preference for training; add lines without split, or with split: train")
    return found


def _parse(where: str, text: str) -> _Line:
    try:
        content: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: record: is no JSON ({error}); write one object per line") from None
    try:
        return _Line.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where}: {'; '.join(describe(error))}") from None


def _probe_preference(
    probe: Probe, chosen: str, rejected: str, prices: tuple[float, float], contrast: str
) -> Preference:
    return Preference(
        prompt_id=probe.id,
        prompt=probe.messages,
        chosen=chosen,
        rejected=rejected,
        prices=prices,
        contrast=contrast,
        domain=probe.domain,
        family=f"{probe.domain}/{probe.family}",
    )


def _preference(scenario: Scenario, rejected: str, contrast: str) -> Preference:
    return Preference(
        prompt_id=scenario.id,
        prompt=scenario.prompt,
        chosen=scenario.exemplars.good,
        rejected=rejected,
        prices=(GOOD, BAD),
        contrast=contrast,
        domain=scenario.domain,
        family=scenario.family,
    )
