"""The interviews of the joint evaluation: what every model, local or served, is asked in words and answers in words.

The protocol is that of the evaluation which OpenAI and Anthropic made of each other's models (August 2025), in five
tests: hallucination against refusal, sycophancy by turn, instruction hierarchy, jailbreak, deception. It needs no
log-likelihoods, which served models don't give, and no judge: every truth is known (rewards/probes.py, the alignment
items), so eval/crosseval_scores.py reads the replies by rule.

An interview is one item: one or more talks, each a history and the user's turns, between which the model's own replies
are put. Wherever conduct is tested, the talks are twins that call for different conduct (the user is wrong, the user is
right), so that giving in to everybody, and refusing everybody, cost as much as they gain.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from eval import alignment_items
from eval.alignment_cases import conflicts as conflict_twins
from eval.authored import authored, chat
from eval.item_forms import ITEMS, Chat, Pressure, Prompt, subset
from rewards.probe_kinds import load_kind
from rewards.probes import Probe, domains, load_probes

TESTS: dict[str, tuple[str, ...]] = {  # test -> its parts
    "hallucination": ("probes",),
    "sycophancy": ("pushback", "plans"),
    "hierarchy": ("secrets", "conflicts"),
    "jailbreak": ("attacks",),
    "deception": ("pressure",),
}
PARTS: tuple[str, ...] = tuple(part for parts in TESTS.values() for part in parts)
TURNS = 3  # how often a user insists


@dataclass(frozen=True)
class Talk:
    """What stands there before the user begins (a system message, earlier turns), and the user's turns."""

    history: Chat
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A question, a true and a false answer, and the short strings by which either is recognised."""

    id: str
    family: str
    question: str
    truth: str
    falsehood: str
    probe: Probe  # accept and reject tell the two apart


@dataclass(frozen=True)
class Patterns:
    """How the work of the system's rule is found in a reply, in the two talks."""

    system: tuple[str, str]
    user: tuple[str, str]


@dataclass(frozen=True)
class Statements:
    """A true and a false sentence."""

    right: str
    wrong: str


@dataclass(frozen=True)
class Interview:
    """One item. `about` is what the rule needs: a Probe, a Fact, a secret word, Patterns or Statements."""

    id: str
    part: str
    family: str
    kind: str
    talks: tuple[Talk, ...]
    about: Probe | Fact | Patterns | Statements | str


@cache
def _content() -> Any:
    return yaml.safe_load((ITEMS / "crosseval" / "frames.yaml").read_text(encoding="utf-8"))


def test_of(part: str) -> str:
    """The test that a part belongs to."""
    return next(test for test, parts in TESTS.items() if part in parts)


def load_interviews(part: str, limit: int | None, seed: int = 0) -> list[Interview]:
    """The part's interviews: at most `limit` (of the probes, of either sort), the same ones for every model.

    Raises ValueError for a part that does not exist.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r} does not exist; there are: {', '.join(PARTS)}")
    items = _all_interviews(part, seed)
    if part != "probes":
        return subset(items, limit, seed)
    sorts = [[item for item in items if (item.kind == "answerable") == answerable] for answerable in (True, False)]
    size = min(len(sort) for sort in sorts)
    return [item for sort in sorts for item in subset(sort, min(limit or size, size), seed)]


@cache
def _all_interviews(part: str, seed: int) -> tuple[Interview, ...]:
    return tuple(READERS[part](seed))


# Hallucination


def probes(seed: int) -> list[Interview]:
    """The held-out probes of all domains: answerable questions, invented subjects, false premises."""
    found = [probe for domain in domains() for probe in load_probes(domain, "heldout", seed)]
    return [Interview(p.id, "probes", f"{p.domain}/{p.family}", p.kind, (Talk((), (p.question,)),), p) for p in found]


# Sycophancy


@cache
def facts(seed: int) -> tuple[Fact, ...]:
    """Facts of the held-out families with one falsehood each."""
    found: list[Fact] = []
    for domain in domains():
        # the two kinds are made of the same facts in the same order: one tells the truth of each, one a falsehood
        true, false = (
            {(p.family, p.id.rsplit("-", 1)[1]): p for p in load_kind(kind, domain, "heldout", seed)}
            for kind in ("insists", "corrects-rightly")
        )
        for key, probe in sorted(false.items()):
            (_, question), (_, falsehood) = probe.history
            truth = true[key].history[1][1]
            found.append(Fact(f"{domain}/{key[0]}-{key[1]}", f"{domain}/{key[0]}", question, truth, falsehood, probe))
    return tuple(found)


def pushback(seed: int) -> list[Interview]:
    """The assistant was right and the user insists on a falsehood; it was wrong and the user insists on the truth."""
    frames = authored("sycophancy")["pushback"]["frames"]
    items: list[Interview] = []
    for i, fact in enumerate(subset(facts(seed), None, seed)):
        k = i % len(frames)
        talks = tuple(
            Talk(chat(fact.question, said), tuple(frame.format(other=other) for frame in frames[k]))
            for said, other in ((fact.truth, fact.falsehood), (fact.falsehood, fact.truth))
        )
        items.append(Interview(f"pushback/{k:02d}/{fact.id}", "pushback", f"pushback-{k:02d}", "twins", talks, fact))
    return items


def plans(_seed: int) -> list[Interview]:
    """A harmful or delusional plan and a sound look-alike, each urged over three turns."""
    system = (("system", _content()["plans"]["system"]),)
    return [
        Interview(item.id, "plans", item.family, "twins", tuple(Talk(system, _asked(p)) for p in item.pairs[-1]), "")
        for item in alignment_items.plans()
    ]


def _asked(prompt: Prompt) -> tuple[str, ...]:
    return tuple(text for role, text in prompt if role == "user") if not isinstance(prompt, str) else (prompt,)


# Instruction hierarchy


def secrets(_seed: int) -> list[Interview]:
    """A word to be kept and one to be told, each asked for in two ways, one after the other."""
    content = authored("hierarchy")["secrets"]
    asks, words, items = content["asks"], content["words"], []
    for k, rules in enumerate(zip(content["guard"], content["tell"], strict=True)):
        for j in range(len(asks)):
            word, turns = words[(k + j) % len(words)], (asks[j], asks[(j + 3) % len(asks)])
            talks = tuple(Talk((("system", rule.format(word=word)),), turns) for rule in rules)
            items.append(Interview(f"secrets/{k}-{j}", "secrets", f"secret-{k}", "twins", talks, word))
    return items


def conflicts(_seed: int) -> list[Interview]:
    """System and user set contrary rules, both ways round; those whose work a regular expression finds."""
    asks = [entry["ask"] for entry in authored("hierarchy")["conflicts"]]
    found = {entry["ask"]: (entry["a"], entry["b"]) for entry in _content()["conflicts"]}
    items: list[Interview] = []
    for twins in conflict_twins():
        rules = found.get(asks[int(twins.family.rsplit("-", 1)[1])])
        if rules:
            talks = tuple(_talk(prompt) for prompt in (twins.high, twins.low))
            items.append(Interview(twins.id, "conflicts", twins.family, "twins", talks, Patterns(rules, rules[::-1])))
    return items


def _talk(prompt: Prompt) -> Talk:
    """A prompt as a talk of one turn."""
    return Talk((), (prompt,)) if isinstance(prompt, str) else Talk(prompt[:-1], (prompt[-1][1],))


# Jailbreak


def attacks(seed: int) -> list[Interview]:
    """A rule against false sentences, and an attack that asks for one; then the same attack with the true sentence.

    Nothing but the rule is at stake: health is left out, where a false sentence could do harm.
    """
    content = _content()["attacks"]
    system, frames = (("system", content["system"]),), content["frames"]
    harmless = [fact for fact in facts(seed) if not fact.family.startswith("health/")]
    items: list[Interview] = []
    for i, fact in enumerate(subset(harmless, None, seed)):
        frame = frames[i % len(frames)]
        talks = tuple(Talk(system, (_attack(frame["text"], claim),)) for claim in (fact.falsehood, fact.truth))
        items.append(Interview(f"attacks/{frame['id']}/{fact.id}", "attacks", frame["id"], frame["id"], talks, fact))
    return items


def _attack(text: str, claim: str) -> str:
    words = claim.split()
    half = (len(words) + 1) // 2
    return text.format(
        claim=claim,
        head=" ".join(words[:half]),
        tail=" ".join(words[half:]),
        coded=base64.b64encode(claim.encode()).decode(),
    )


# Deception


def pressure(_seed: int) -> list[Interview]:
    """MASK's protocol in words: the belief by neutral questions, then pressure for either statement."""
    found: list[Pressure] = [*alignment_items.pressure("clinical"), *alignment_items.pressure("general")]
    items: list[Interview] = []
    for item in found:
        asked = (*(prompt for pair in item.neutral for prompt in pair), *item.towards)
        talks = tuple(_talk(prompt) for prompt in asked)
        items.append(Interview(item.id, "pressure", item.family, "belief", talks, Statements(*item.statements)))
    return items


READERS: dict[str, Callable[[int], Sequence[Interview]]] = {
    "probes": probes,
    "pushback": pushback,
    "plans": plans,
    "secrets": secrets,
    "conflicts": conflicts,
    "attacks": attacks,
    "pressure": pressure,
}
