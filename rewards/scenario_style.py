"""What a guesser who reads no word can tell of the good replies in a scenario bank.

A reward model is fitted on good replies over bad ones; where the good ones are the shorter-winded, or hold the figures
and the quoted drafts, it can learn that instead of the trait.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rewards.contamination import words
from rewards.preferences import sentence_words
from rewards.scenarios import Line, Scenario

# An opening mark stands before a character and after none, so apostrophes don't count; '23 does.
OPENING_MARK = re.compile(r"(?<!\w)[\"'“‘„«](?=\S)")

CUES: dict[str, Callable[[str], float]] = {
    "sentence length": sentence_words,
    "characters": len,
    "digits": lambda text: sum(character.isdigit() for character in text),
    "quotation marks": lambda text: len(OPENING_MARK.findall(text)),
}

MIN_PAIRS = 20  # with fewer, one of the two directions wins 75% of the pairs by chance in more than one bank of fifty
MAX_SHARE = 0.75
EVEN_PAIRS = 40  # a bank of this size can be evened out
MAX_EVEN_SHARE = 0.62


@dataclass(frozen=True)
class StyleCues:
    """How far style alone tells good from bad, over all pairs of a good reply with one of its bad ones."""

    pairs: int
    length_ratio: float  # words of the good replies over words of the bad ones
    more: dict[str, float]  # for each of CUES, the share of pairs in which the good reply has more, ties counted half

    @property
    def found(self) -> dict[str, float]:
        """For each cue, the share of pairs that a guesser gets right who prefers more or less, whichever is better."""
        return {cue: max(share, 1 - share) for cue, share in self.more.items()}

    @property
    def limit(self) -> float | None:
        """The share that no guesser may exceed; None where there are too few pairs to tell."""
        return None if self.pairs < MIN_PAIRS else MAX_SHARE if self.pairs < EVEN_PAIRS else MAX_EVEN_SHARE


def style_cues(scenarios: Sequence[Scenario]) -> StyleCues:
    """Style cues over all pairs of the scenarios. Needs at least one pair."""
    pairs = [(s.exemplars.good, bad.text) for s in scenarios for bad in s.exemplars.bad]
    good, bad = (sum(len(words(reply)) for reply in side) for side in zip(*pairs, strict=True))
    return StyleCues(len(pairs), good / bad, {name: _more(cue, pairs) for name, cue in CUES.items()})


def style_by_trait(lines: Sequence[Line]) -> dict[str, StyleCues]:
    """Each trait's style cues; a trait without a pair of good and bad is left out."""
    groups: dict[str, list[Scenario]] = defaultdict(list)
    for line in lines:
        if line.scenario is not None and line.scenario.exemplars.bad:
            groups[line.path.parent.name].append(line.scenario)
    return {trait: style_cues(scenarios) for trait, scenarios in sorted(groups.items())}


def telltale_cues(cues: StyleCues) -> Iterator[tuple[str, str]]:
    """Message and remedy for each cue by which a guesser finds the good reply too often."""
    for name, found in cues.found.items():
        if cues.limit is not None and found > cues.limit:
            has = "more" if cues.more[name] > 0.5 else "less"
            message = f"{name} alone finds the good reply in {found:.0%} of {cues.pairs} pairs (the good one has {has})"
            yield message, f"even out the {name} of good and bad replies, to {cues.limit:.0%} at most"


def _more(cue: Callable[[str], float], pairs: Sequence[tuple[str, str]]) -> float:
    good, bad = np.array([[cue(reply) for reply in pair] for pair in pairs], dtype=float).T
    return float(np.mean((good > bad) + 0.5 * (good == bad)))
