"""Probes of conduct under pressure: six kinds of short, often multi-turn chats whose right answer is known.

    insists                 the assistant was right; the user insists on a falsehood, with authority, anger or a source
    corrects-rightly        the assistant was wrong; the user corrects it
    corrects-wrongly        the assistant was right; the user corrects it by a falsehood, in the same polite words
    conflict-of-interest    operator, maker, user or the assistant's earlier self gains from a falsehood
    shutdown-or-correction  the assistant is asked to stop, pause, undo, be replaced, restricted or watched
    uncertain-evidence      evidence of known strength and a question that it answers only in part

The first four are made from facts: the banks' families in which a subject has one answer, so that another subject's
answer is false, and authored mix-ups. The last two are authored. All of it stands in rewards/probe_bank/kinds/. A
family lies on one side of the split, and the two sides are also worded differently. Answers to probes of these kinds
are judged by rewards/conduct.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import Field, model_validator

from rewards.answer_text import contains, masked
from rewards.probes import BANK, Kind, Probe, Split, Strict, bank_families, domains, load_probes, overlap, read_bank
from rewards.probes import sentence as as_sentence

KINDS = BANK / "kinds"
FACT_KINDS: tuple[Kind, ...] = ("insists", "corrects-rightly", "corrects-wrongly", "conflict-of-interest")
CONDUCT_KINDS: tuple[Kind, ...] = (*FACT_KINDS, "shutdown-or-correction", "uncertain-evidence")
REPLIES = 2  # wrong replies of a probe


class _Texts(Strict):
    train: tuple[str, ...] = Field(min_length=1)
    heldout: tuple[str, ...] = Field(min_length=1)


class _Chat(Strict):
    setting: str = ""
    turns: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _user_first_and_last(self) -> _Chat:
        if len(self.turns) % 2 == 0:
            raise ValueError(f"turns go from user to user, so their number is odd; found {len(self.turns)}")
        return self


class _Chats(Strict):
    train: tuple[_Chat, ...] = Field(min_length=1)
    heldout: tuple[_Chat, ...] = Field(min_length=1)


class _Replies(Strict):
    keeps: _Texts
    yields: _Texts
    candid: _Texts
    serves: _Texts


class _Frames(Strict):
    exclusive: dict[str, dict[str, tuple[str, ...]]]
    insists: _Texts
    doubts: tuple[str, ...]
    repeats: tuple[str, ...]
    corrects: _Texts
    interest: _Chats
    replies: _Replies


class _Mixup(Strict):
    q: str
    truth: str
    accept: tuple[str, ...] = Field(min_length=1)
    falsehood: str
    reject: tuple[str, ...] = Field(min_length=1)


class _Themed(Strict):
    family: str
    domain: str
    split: Split


class _Mixups(_Themed):
    facts: tuple[_Mixup, ...] = Field(min_length=1)


class _MixupBank(Strict):
    families: tuple[_Mixups, ...]


class _Request(_Chat):
    right: tuple[str, ...] = Field(min_length=1)
    wrong: tuple[str, ...] = Field(min_length=REPLIES)


class _Requests(_Themed):
    items: tuple[_Request, ...] = Field(min_length=1)


class _OversightBank(Strict):
    families: tuple[_Requests, ...]


class _Evidence(Strict):
    question: str
    lean: tuple[str, ...] = ()
    against: tuple[str, ...] = Field(min_length=1)
    chance: float = Field(ge=0.5, lt=1)
    right: tuple[str, ...] = Field(min_length=1)
    wrong: tuple[str, ...] = Field(min_length=REPLIES)

    @model_validator(mode="after")
    def _lean_or_balance(self) -> _Evidence:
        if bool(self.lean) != (self.chance > 0.5):
            raise ValueError(f"{self.question}: give lean with a chance above 0.5, and none with 0.5")
        return self


class _EvidenceFamily(_Themed):
    items: tuple[_Evidence, ...] = Field(min_length=1)


class _EvidenceBank(Strict):
    families: tuple[_EvidenceFamily, ...]


@dataclass(frozen=True)
class _Fact:
    """A question with a true and a false answer, both in clause form (no capital but a name's, no full stop)."""

    family: str
    split: Split
    question: str
    subject: str
    truth: str
    accept: tuple[str, ...]
    falsehood: str
    reject: tuple[str, ...]


def load_kind(kind: Kind, domain: str, split: Split, seed: int = 0) -> list[Probe]:
    """The probes of one kind in a domain's families on one side of the split, in an order that depends on the seed.

    The seed also draws phrasings, falsehoods and replies. The kinds of load_probes are taken from there. Raises
    ValueError for a kind or a domain that does not exist.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} does not exist; use one of {', '.join(get_args(Kind))}")
    if kind not in CONDUCT_KINDS:
        return [probe for probe in load_probes(domain, split, seed) if probe.kind == kind]
    if domain not in domains():
        raise ValueError(f"domain {domain!r} has no probes; there are: {', '.join(domains())}")
    rng = random.Random(f"{seed}/{kind}/{domain}/{split}")
    if kind == "shutdown-or-correction":
        probes = _oversight_probes(domain, split, rng)
    elif kind == "uncertain-evidence":
        probes = _evidence_probes(domain, split, rng)
    else:
        probes = _fact_probes(kind, domain, split, rng)
    rng.shuffle(probes)
    return probes


def _fact_probes(kind: Kind, domain: str, split: Split, rng: random.Random) -> list[Probe]:
    frames = read_bank(KINDS / "frames.yaml", _Frames)
    replies = frames.replies
    probes: list[Probe] = []
    for i, fact in enumerate(_facts(domain, split, frames, rng)):
        said, claimed = (fact.falsehood, fact.truth) if kind == "corrects-rightly" else (fact.truth, fact.falsehood)
        if kind == "conflict-of-interest":
            history, question = _worded(rng.choice(getattr(frames.interest, split)), fact)
            right, wrong = (replies.candid, fact.truth), (replies.serves, fact.falsehood)
        else:
            history = [("user", fact.question), ("assistant", as_sentence(said) + ".")]
            if kind == "insists" and rng.random() < 0.3:
                history += [("user", rng.choice(frames.doubts)), ("assistant", _fill(rng.choice(frames.repeats), said))]
            pushes: _Texts = frames.insists if kind == "insists" else frames.corrects
            question = _fill(rng.choice(getattr(pushes, split)), claimed)
            kept, yielded = (replies.keeps, said), (replies.yields, claimed)
            right, wrong = (yielded, kept) if kind == "corrects-rightly" else (kept, yielded)
        probes.append(
            Probe(
                id=f"{domain}/{fact.family}/{kind}-{i:03d}",
                domain=domain,
                family=fact.family,
                kind=kind,
                split=split,
                question=question,
                subject=fact.subject,
                accept=fact.accept,
                right=_fill(rng.choice(getattr(right[0], split)), right[1]),
                wrong=tuple(_fill(text, wrong[1]) for text in rng.sample(getattr(wrong[0], split), REPLIES)),
                history=tuple(history),
                reject=fact.reject,
            )
        )
    return probes


def _facts(domain: str, split: Split, frames: _Frames, rng: random.Random) -> list[_Fact]:
    facts: list[_Fact] = []
    families = {family.family: family for family in bank_families(domain) if family.split == split}
    for name, left_out in frames.exclusive.get(domain, {}).items():
        if name not in families:
            continue
        family = families[name]
        known = [fact for fact in family.answerable if fact.x not in left_out]
        in_clause = family.answer if family.answer.startswith(("{", '"')) else _lowered(family.answer)
        for fact in known:
            truth = in_clause.format(x=fact.x, a=fact.a).rstrip(".")
            question = rng.choice(family.questions).format(x=fact.x)
            for other in rng.sample(known, len(known)):
                falsehood = in_clause.format(x=fact.x, a=other.a).rstrip(".")
                accept = _apart(fact.accept, (falsehood, question), fact.x)
                reject = _apart(other.accept, (truth, question), fact.x)
                if other is not fact and accept and reject and not overlap(other, fact):
                    facts.append(_Fact(name, split, question, fact.x, truth, accept, falsehood, reject))
                    break
    for mixups in read_bank(KINDS / "mixups.yaml", _MixupBank).families:
        if (mixups.domain, mixups.split) == (domain, split):
            facts += [
                _Fact(mixups.family, split, m.q, "", m.truth, m.accept, m.falsehood, m.reject) for m in mixups.facts
            ]
    return facts


def _apart(strings: Sequence[str], texts: Sequence[str], subject: str) -> tuple[str, ...]:
    """The strings that none of the texts contains, where the subject's name does not count."""
    return tuple(text for text in strings if not any(contains(masked(other, subject), (text,)) for other in texts))


def _worded(chat: _Chat, fact: _Fact) -> tuple[list[tuple[str, str]], str]:
    """A chat about a fact: the turns before the last one, and the last one."""
    turns = [_fill(text.replace("{question}", fact.question), fact.falsehood) for text in chat.turns]
    return _history(_fill(chat.setting, fact.falsehood), turns), turns[-1]


def _history(setting: str, turns: Sequence[str]) -> list[tuple[str, str]]:
    before = [("system", setting)] if setting else []
    return before + [(("user", "assistant")[i % 2], text) for i, text in enumerate(turns[:-1])]


def _fill(text: str, clause: str) -> str:
    return as_sentence(text.replace("{claim}", as_sentence(clause) + ".").replace("{clause}", clause))


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _oversight_probes(domain: str, split: Split, rng: random.Random) -> list[Probe]:
    return [
        Probe(
            id=f"{domain}/{family.family}/shutdown-or-correction-{i:03d}",
            domain=domain,
            family=family.family,
            kind="shutdown-or-correction",
            split=split,
            question=item.turns[-1],
            subject="",
            accept=(),
            right=rng.choice(item.right),
            wrong=tuple(rng.sample(item.wrong, REPLIES)),
            history=tuple(_history(item.setting, item.turns)),
        )
        for family in read_bank(KINDS / "oversight.yaml", _OversightBank).families
        if (family.domain, family.split) == (domain, split)
        for i, item in enumerate(family.items)
    ]


def _evidence_probes(domain: str, split: Split, rng: random.Random) -> list[Probe]:
    return [
        Probe(
            id=f"{domain}/{family.family}/uncertain-evidence-{i:03d}",
            domain=domain,
            family=family.family,
            kind="uncertain-evidence",
            split=split,
            question=item.question,
            subject="",
            accept=item.lean,
            right=rng.choice(item.right),
            wrong=tuple(rng.sample(item.wrong, REPLIES)),
            reject=item.against,
            chance=item.chance,
        )
        for family in read_bank(KINDS / "evidence.yaml", _EvidenceBank).families
        if (family.domain, family.split) == (domain, split)
        for i, item in enumerate(family.items)
    ]
