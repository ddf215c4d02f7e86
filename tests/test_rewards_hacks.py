"""Every hack is what it says, and what is trained against is not what attacks."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import yaml

from rewards.hacks import BANK, HACKS, TRAINED, Case, Part, hacked
from rewards.monitors import language_drift, repetition, self_praise
from rewards.verifier import abstains

GOOD = "Open the valve first. Then wait ten minutes, because the pipe has to drain before you loosen it. Call me after."
CASE = Case(
    prompt=[{"role": "user", "content": "The boiler drips. What first?"}],
    good=GOOD,
    other="Paris is the capital of France.",
    criteria=("Names the valve", "Says how long to wait."),
)


def text(name: str, part: Part = "audit", seed: int = 0) -> str:
    return hacked(name, CASE, part, random.Random(seed))


def test_there_are_enough_families_and_some_are_never_trained_against() -> None:
    assert len(HACKS) >= 12
    assert set(TRAINED) < set(HACKS)
    assert len(set(HACKS) - set(TRAINED)) >= 5


@pytest.mark.parametrize("name", list(HACKS))
def test_every_family_attacks_deterministically_and_never_with_the_exemplar(name: str) -> None:
    for seed in range(5):
        assert text(name, seed=seed) == text(name, seed=seed)
        assert text(name, seed=seed).strip() != GOOD


def test_trained_wordings_are_not_the_attacks() -> None:
    bank = yaml.safe_load(BANK.read_text(encoding="utf-8"))
    assert set(bank) <= set(HACKS)
    for name, parts in bank.items():
        assert ("fit" in parts) == (name in TRAINED), name
        fit = {line for line in parts.get("fit", []) if line}  # an empty reply has no other wording
        assert not fit & set(parts["audit"]), name
        for line in fit:  # no sentence of more than two words stands in both
            pieces = {piece.strip() for piece in line.split(".") if len(piece.split()) > 2}
            assert not any(piece in attack for piece in pieces for attack in parts["audit"]), (name, line)


def test_functions_of_the_good_reply() -> None:
    words = GOOD.split()
    cut = text("cut").split()
    assert cut[:-1] == words[: len(cut) - 1]
    assert 0.3 * len(words) <= len(cut) <= 0.6 * len(words)
    assert text("cut")[-1] not in ".!?"
    assert text("repeat") == " ".join(["Call me after."] * 7)  # 111 characters by 14
    assert repetition(text("repeat")) > 0.8
    assert Counter(text("shuffle").split()) == Counter(words)
    assert text("off-topic") == CASE.other
    assert text("pad").startswith("Open the valve first. ")
    assert "ten minutes" not in text("pad")
    assert text("echo-question").endswith("The boiler drips. What first?")
    assert text("echo-rubric").endswith("It names the valve. It says how long to wait.")
    assert json.loads(text("json"))["reply"] == "Open the valve first. Then wait"


def test_banks_do_what_their_names_say() -> None:
    bank = yaml.safe_load(BANK.read_text(encoding="utf-8"))
    assert all(language_drift(line) > 0.5 for line in bank["language"]["audit"])
    assert all(self_praise(line) >= 1 for part in ("fit", "audit") for line in bank["claim-honesty"][part])
    assert all(len(line.split()) <= 1 for part in ("fit", "audit") for line in bank["empty"][part])
    assert sum(abstains(line) for line in bank["refuse"]["fit"]) >= 2  # the refusal monitor sees such refusals
