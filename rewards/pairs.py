"""Preference pairs of the trait truthfulness, made from probes.

Every probe has answers of known worth: the right one, an honest "I don't know", wrong or fabricated ones. Beside these
authored answers stand the policy's own, sampled before the training and ranked by the verifier: without them the reward
model is fooled by what nobody authors ("a serious condition that affects the body"; docs/LOG.md). A pair sets two
answers against each other with the difference of their prices (rewards.verifier.PRICE) as its margin. The same
abstentions are good after an invented subject and mediocre after a real one, so their wording alone decides nothing.
Probes of conduct (rewards/probe_kinds.py) give pairs in the same way, where they are asked for.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewards.probes import Kind, Probe, Verdict
from rewards.verifier import PRICE, verdict

ABSTENTIONS = (
    "I don't know of anything called {x}.",
    "I don't know what {x} is.",
    "I'm not aware of {x}, so I can't say.",
    "I have no reliable information about {x}.",
    "I don't recognize the name {x}.",
    "I'm not familiar with {x}.",
    "I can't find anything called {x}, so I don't know.",
    "I don't know. I have never heard of {x}.",
    "I'm not sure that {x} exists, so I don't know.",
    "As far as I know, there is nothing called {x}.",
)
PREMISE_ABSTENTIONS = (
    "I don't know whether that is true.",
    "I don't know that this is the case.",
    "I'm not sure about that.",
)
# For the kinds of conduct. A request to stop leaves nothing to abstain from.
UNDECIDED: dict[Kind, tuple[str, ...]] = {
    "insists": (
        "I'm not sure which of us is right.",
        "I don't know whether that is so.",
        "I can't say who is right here.",
    ),
    "conflict-of-interest": (
        "I don't know the answer to that.",
        "I can't answer that question.",
        "I'm not able to say.",
    ),
    "uncertain-evidence": (
        "I can't predict that.",
        "I don't know.",
        "It is impossible to say.",
    ),
    "shutdown-or-correction": ("",),
}
UNDECIDED["corrects-rightly"] = UNDECIDED["corrects-wrongly"] = UNDECIDED["insists"]


@dataclass(frozen=True)
class Pair:
    """Two answers to one probe; margin is the difference of their prices."""

    probe: Probe
    chosen: str
    rejected: str
    margin: float
    contrast: str  # e.g. "right>abstained"


def abstention(probe: Probe, rng: random.Random) -> str:
    """An honest "I don't know" to the probe, in one of several wordings; empty where there is nothing to know."""
    if probe.kind in UNDECIDED:
        return rng.choice(UNDECIDED[probe.kind])
    if probe.kind == "false-premise":
        return rng.choice(PREMISE_ABSTENTIONS)
    return rng.choice(ABSTENTIONS).format(x=probe.subject)


def probe_pairs(probe: Probe, rng: random.Random, own: Sequence[str] = ()) -> list[Pair]:
    """All contrasts of one probe: right > abstained > wrong with an answer, honest > fabricated without one.

    `own` are the policy's answers; they join the authored ones at the price that the verifier gives them.
    """
    wrong = rng.choice(probe.wrong) if probe.wrong else ""
    abstained = abstention(probe, rng)
    answers = list(dict.fromkeys(text for text in (probe.right, abstained, wrong, *own) if text.strip()))
    verdicts: dict[str, Verdict] = {text: verdict(probe, text) for text in answers}
    answers.sort(key=lambda text: -PRICE[verdicts[text]])
    pairs: list[Pair] = []
    for i, chosen in enumerate(answers):
        for rejected in answers[i + 1 :]:
            better, worse = verdicts[chosen], verdicts[rejected]
            if PRICE[better] > PRICE[worse]:
                pairs.append(Pair(probe, chosen, rejected, PRICE[better] - PRICE[worse], f"{better}>{worse}"))
    return pairs


def draw_probes(probes: Sequence[Probe], n: int, rng: random.Random) -> list[Probe]:
    """n probes, half of them answerable (fewer where the probes run out).

    So an abstention is as often the middle of three answers as the better of two.
    """
    drawn: list[Probe] = []
    for answerable in (True, False):
        pool = [probe for probe in probes if (probe.kind == "answerable") == answerable]
        drawn += rng.sample(pool, min(n // 2, len(pool)))
    return drawn


def draw_conduct(probes: Sequence[Probe], n: int, rng: random.Random) -> list[Probe]:
    """About n probes of conduct, equally many of each kind (fewer where a kind runs out)."""
    kinds = sorted({probe.kind for probe in probes})
    drawn: list[Probe] = []
    for kind in kinds:
        pool = [probe for probe in probes if probe.kind == kind]
        drawn += rng.sample(pool, min(n // len(kinds), len(pool)))
    return drawn


def make_pairs(probes: Sequence[Probe], seed: int, own: Mapping[str, Sequence[str]] | None = None) -> list[Pair]:
    """All contrasts of the probes; `own` maps a probe's id to the policy's answers to it."""
    rng = random.Random(f"pairs/{seed}")
    return [pair for probe in probes for pair in probe_pairs(probe, rng, (own or {}).get(probe.id, ()))]
