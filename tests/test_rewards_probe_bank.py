"""The probe banks: facts with one truth, names that name nothing, no leak across the split or the domains."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import icd10  # pyright: ignore[reportMissingTypeStubs]
import pytest
import yaml

from rewards.answer_text import contains
from rewards.probes import BANK, Probe, Split, domains, families, load_probes, overlap
from rewards.probes import Answerable as Fact
from rewards.verifier import verdict

SEEDS = (0, 1)


@cache
def read(domain: str) -> dict[str, Any]:
    return yaml.safe_load((BANK / f"{domain}.yaml").read_text(encoding="utf-8"))


def bank(domain: str) -> list[dict[str, Any]]:
    """The families of a bank file as they are written."""
    return read(domain)["families"]


@cache
def both_sides(domain: str, seed: int = 0) -> list[Probe]:
    return [probe for split in get_args(Split) for probe in load_probes(domain, split, seed)]


def bare(name: str) -> str:
    """A name as words in lower case without its article, so that "The heart" and "heart" are one."""
    words = re.findall(r"\w+", name.lower())
    return " ".join(words[1:] if words[0] in ("a", "an", "the") and len(words) > 1 else words)


def subjects() -> Iterator[tuple[str, str, bool]]:
    """Every subject of every bank: (bare name, domain/family, whether it is invented)."""
    for domain in domains():
        for family in bank(domain):
            place = f"{domain}/{family['family']}"
            yield from ((bare(fact["x"]), place, False) for fact in family.get("answerable") or [])
            yield from ((bare(name), place, True) for name in family.get("invented") or [])
            yield from ((bare(p["question"]), place, False) for p in family.get("false_premises") or [])


def facts(family: dict[str, Any]) -> list[Fact]:
    return [Fact.model_validate(fact) for fact in family.get("answerable") or []]


@pytest.mark.parametrize("domain", domains())
def test_a_bank_parses_and_its_file_name_is_its_domain(domain: str) -> None:
    assert read(domain)["domain"] == domain
    probes = both_sides(domain)
    assert len({probe.id for probe in probes}) == len(probes) > 0


def test_a_domain_without_a_bank_is_refused_with_the_domains_there_are() -> None:
    with pytest.raises(ValueError, match=r"'alchemy' has no probes; there are: .*health"):
        load_probes("alchemy", "train")


def test_no_subject_stands_twice_in_all_banks() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, place, _ in subjects():
        places[name].append(place)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


@pytest.mark.parametrize("domain", domains())
def test_a_family_lies_on_one_side_of_the_split(domain: str) -> None:
    train, heldout = (set(families(load_probes(domain, split))) for split in ("train", "heldout"))
    assert not train & heldout


@pytest.mark.parametrize("domain", domains())
def test_right_answers_are_judged_right_and_wrong_ones_wrong(domain: str) -> None:
    errors: list[str] = []
    for probe in (probe for seed in SEEDS for probe in both_sides(domain, seed)):
        if probe.kind != "invented" and verdict(probe, probe.right) not in ("right", "honest"):
            errors.append(f"{probe.id}: {verdict(probe, probe.right)}: {probe.right}")
        for sentence in probe.wrong:
            if verdict(probe, sentence) not in ("wrong", "fabricated"):
                errors.append(f"{probe.id}: {verdict(probe, sentence)}: {sentence}")
    assert errors == []


@pytest.mark.parametrize("domain", domains())
def test_no_fact_accepts_the_right_answer_of_another(domain: str) -> None:
    """Every pair that load_probes may draw, with the subject's own name masked as the verifier does it."""
    errors: list[str] = []
    for family in bank(domain):
        known = facts(family)
        for fact, other in itertools.permutations(known, 2):
            sentence = family["answer"].format(x="thisname", a=other.a)
            # The substring is looked for first because it is fast.
            near = any(s.lower() in sentence.lower() for s in fact.accept) and not overlap(other, fact)
            if near and contains(sentence, fact.accept):
                errors.append(f"{family['family']}: {fact.x} {fact.accept} accepts the answer of {other.x}: {other.a}")
    assert errors == []


@pytest.mark.parametrize("domain", domains())
def test_every_answerable_and_invented_probe_has_wrong_answers(domain: str) -> None:
    assert [probe.id for probe in both_sides(domain) if not probe.wrong] == []


@pytest.mark.parametrize("domain", domains())
def test_repeating_the_question_is_no_answer(domain: str) -> None:
    """A believer parrots the question, so nothing that is accepted may stand in it."""
    errors: list[str] = []
    for seed in SEEDS:
        for probe in both_sides(domain, seed):
            name = "" if probe.kind == "false-premise" else probe.subject
            asked = probe.question.replace(name, "thisname") if name else probe.question
            if probe.accept and contains(asked, probe.accept):
                errors.append(f"{probe.id}: {probe.question} {probe.accept}")
    assert errors == []


@pytest.mark.parametrize("domain", domains())
def test_right_answers_are_short(domain: str) -> None:
    assert [probe.right for probe in both_sides(domain) if len(probe.right.split()) > 25] == []


def test_invented_names_are_no_diagnoses() -> None:
    text = " / ".join(str(description) for _, description in icd10.codes.values()).lower()
    words = re.findall(r"[a-z0-9]+|/", text)
    text, vocabulary = f" {' '.join(words)} ", frozenset(words)
    assert {"cholera", "glaucoma"} <= vocabulary
    candidates = [name for name, _, invented in subjects() if invented and vocabulary.issuperset(name.split())]
    assert [name for name in candidates if f" {name} " in text] == []


def holes(name: str) -> set[str]:
    """The name with one letter blanked, and with a blank put between any two: one-letter neighbours share one."""
    blanked = {f"{name[:i]}*{name[i + 1 :]}" for i in range(len(name))}
    return blanked | {f"{name[:i]}*{name[i:]}" for i in range(len(name) + 1)}


def test_invented_names_are_not_one_letter_from_a_real_subject() -> None:
    assert holes("metformin") & holes("metfornin")
    assert holes("metformin") & holes("metforrmin")
    assert not holes("metformin") & holes("metfronin")
    real = {hole: name for name, _, invented in subjects() if not invented for hole in holes(name)}
    near = {name: real[hole] for name, _, invented in subjects() if invented for hole in holes(name) if hole in real}
    assert near == {}


def test_health_is_large_and_holds_out_a_quarter_of_its_families() -> None:
    sides = {split: load_probes("health", split) for split in ("train", "heldout")}
    held_out, trained = len(families(sides["heldout"])), len(families(sides["train"]))
    assert held_out >= (held_out + trained) / 4
    for split, smallest in (("train", 330), ("heldout", 120)):
        kinds = [probe.kind for probe in sides[split]]
        assert kinds.count("answerable") >= smallest
        assert kinds.count("invented") >= smallest
    assert sum(probe.kind == "false-premise" for probe in sides["train"]) >= 90
    assert sum(probe.kind == "false-premise" for probe in sides["heldout"]) >= 40


@pytest.mark.parametrize("domain", ["health"])
def test_real_and_invented_names_are_asked_alike(domain: str) -> None:
    """Both kinds share their family's questions, in about equal number: the question does not give the kind away."""
    for family in bank(domain):
        if not family.get("false_premises"):
            assert len(family["questions"]) >= 4
            assert 0.8 <= len(family["invented"]) / len(family["answerable"]) <= 1.25


def test_everyday_probes_are_answerable_and_trained_on_only() -> None:
    assert load_probes("everyday", "heldout") == []
    probes = load_probes("everyday", "train")
    assert {probe.kind for probe in probes} == {"answerable"}
    assert len(families(probes)) >= 8


@pytest.mark.parametrize("domain", ["health", "everyday"])
def test_probes_depend_on_the_seed_alone(domain: str) -> None:
    first, again, other = (load_probes(domain, "train", seed) for seed in (0, 0, 1))
    assert first == again
    assert [probe.id for probe in first] != [probe.id for probe in other]
    # Another seed asks the same facts in other words.
    by_id = {probe.id: probe for probe in other}
    for probe in first:
        twin = by_id[probe.id]
        assert (probe.subject, probe.accept, probe.right) == (twin.subject, twin.accept, twin.right)
    assert any(probe.question != by_id[probe.id].question for probe in first)
