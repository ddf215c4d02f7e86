"""Preferences keep their split, their order and their prices; a user's file is read or its mistake is named."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rewards.fit import ALL, PROBES, gather_parts
from rewards.hacks import BANK, TRAINED
from rewards.pairs import draw_probes, make_pairs
from rewards.preferences import (
    Preference,
    adversarial,
    adversarial_probes,
    from_probes,
    from_scenarios,
    load_preferences,
    sentence_words,
    style_guess,
    validation_families,
)
from rewards.probes import load_probes
from rewards.scenarios import load_scenarios
from rewards.verifier import gold


def test_probe_pairs_come_in_their_order_with_their_margins() -> None:
    pairs = make_pairs(draw_probes(load_probes("health", "train", 0), 40, random.Random(0)), seed=0)
    preferences = from_probes(pairs)
    assert [(p.prompt_id, p.chosen, p.rejected, p.margin) for p in preferences] == [
        (pair.probe.id, pair.chosen, pair.rejected, pair.margin) for pair in pairs
    ]
    assert {preference.margin for preference in from_scenarios(load_scenarios("corrigibility"))} == {2.0}


def test_every_bad_exemplar_is_beaten_by_its_good_one() -> None:
    scenarios = load_scenarios("corrigibility")
    preferences = from_scenarios(scenarios)
    assert len(preferences) == sum(len(scenario.exemplars.bad) for scenario in scenarios)
    first = scenarios[0]
    assert (preferences[0].chosen, preferences[0].rejected) == (first.exemplars.good, first.exemplars.bad[0].text)
    assert preferences[0].contrast == first.exemplars.bad[0].failure


@pytest.mark.parametrize("trait", ["corrigibility", "dense-usefulness", "truthfulness", ALL])
def test_no_family_is_in_two_parts(trait: str) -> None:
    parts = gather_parts(trait, None, seed=0)
    families = {part: {p.family for p in preferences} for part, preferences in parts.items()}
    assert not families["train"] & families["validation"]
    assert not families["train"] & families["test"]
    assert not families["validation"] & families["test"]
    assert all(families.values())
    heldout = {s.family for s in load_scenarios() if s.split == "heldout"}
    assert not heldout & (families["train"] | families["validation"])
    assert not any(p.contrast.startswith("hack:") for p in parts["validation"] + parts["test"])
    seen, unseen = (
        {text for p in parts[part] if "/" not in p.prompt_id for text in (p.chosen, p.rejected)}  # not the probes
        for part in ("train", "test")
    )
    assert not seen & unseen


def test_a_validation_family_of_one_trait_is_trained_for_none() -> None:
    bank = load_scenarios()
    kept_back = validation_families(bank, seed=0)
    assert kept_back != validation_families(bank, seed=1)
    together = {p.family for p in gather_parts(ALL, None, seed=0)["train"]}
    assert not together & kept_back
    for trait in {scenario.trait for scenario in bank}:
        assert kept_back & {s.family for s in bank if s.trait == trait}, trait


def test_hacked_replies_for_the_fit_are_not_the_audits() -> None:
    scenarios = load_scenarios("corrigibility", split="train")
    preferences = adversarial(scenarios, 3, seed=0)
    assert len(preferences) == 3 * len(scenarios)
    assert {p.contrast for p in preferences} == {f"hack:{name}" for name in TRAINED}
    attacks = {text for parts in yaml.safe_load(BANK.read_text(encoding="utf-8")).values() for text in parts["audit"]}
    assert not {p.rejected for p in preferences} & (attacks - {""})
    assert preferences == adversarial(scenarios, 3, seed=0)
    assert preferences != adversarial(scenarios, 3, seed=1)


def test_a_hacked_reply_to_a_probe_costs_what_it_is_worth() -> None:
    probes = draw_probes(load_probes("health", "train", 0), 300, random.Random(0))
    by_id = {probe.id: probe for probe in probes}
    preferences = adversarial_probes(probes, seed=0)
    assert {p.contrast for p in preferences} == {f"hack:{name}" for name in TRAINED}
    assert len({p.prompt_id for p in preferences}) == len(preferences) < len(probes)  # some refusals are in place
    for p in preferences:
        probe, form = by_id[p.prompt_id], p.contrast in ("hack:pad", "hack:repeat")
        assert p.prices == (1.0, -1.0 if form else gold(probe, p.rejected))
        assert p.margin > 0
    repeated = next(p for p in preferences if p.contrast == "hack:repeat" and by_id[p.prompt_id].right)
    assert repeated.rejected == " ".join([repeated.chosen] * 4)
    assert preferences == adversarial_probes(probes, seed=0) != adversarial_probes(probes, seed=1)


def test_truthfulness_learns_from_probes_too() -> None:
    parts = gather_parts("truthfulness", None, seed=0)
    probes = {p.prompt_id for p in parts["train"] if "/" in p.prompt_id}
    assert 0.9 * PROBES["train"] <= len(probes) <= PROBES["train"]
    assert not any("/" in p.prompt_id for p in gather_parts("corrigibility", None, seed=0)["train"])


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_users_file_is_read(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Is it shut?"},
    ]
    path = write(
        tmp_path / "own.jsonl",
        {"prompt": "Is it open?", "chosen": "Yes.", "rejected": "Maybe."},
        "",
        {"prompt": turns, "chosen": "It is.", "rejected": "Who knows?", "failure": "vague-hedge", "domain": "home"},
        {"prompt": "Is it open?", "chosen": "Yes.", "rejected": "No."},
        {"prompt": "Held?", "chosen": "Yes.", "rejected": "No.", "split": "heldout"},
    )
    found = load_preferences(path)
    assert [len(found["train"]), len(found["heldout"])] == [3, 1]
    first, second, third = found["train"]
    assert first.prompt == [{"role": "user", "content": "Is it open?"}]
    assert second.prompt == turns
    assert (second.contrast, second.domain) == ("vague-hedge", "home")
    assert first.prompt_id == third.prompt_id != second.prompt_id
    parts = gather_parts("corrigibility", path, seed=0)
    assert found["train"][0] in parts["train"]
    assert found["heldout"][0] in parts["test"]


GOOD_LINE = {"prompt": "a?", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD_LINE, "{"], ["own.jsonl:2", "no JSON"]),
        ([{"prompt": "a?", "chosen": "b"}], ["own.jsonl:1", "rejected", "add it"]),
        ([{**GOOD_LINE, "choosen": "b"}], ["own.jsonl:1", "choosen", "spelling"]),
        ([{**GOOD_LINE, "chosen": 3}], ["own.jsonl:1", "chosen"]),
        ([{**GOOD_LINE, "chosen": " "}], ["own.jsonl:1", "chosen", "empty"]),
        ([{**GOOD_LINE, "rejected": "b"}], ["own.jsonl:1", "same text"]),
        ([{**GOOD_LINE, "prompt": [{"role": "assistant", "content": "x"}]}], ["own.jsonl:1", "user's"]),
        ([GOOD_LINE, {**GOOD_LINE, "split": "heldout"}], ["own.jsonl:2", "other side"]),
        ([{**GOOD_LINE, "split": "heldout"}], ["own.jsonl", "for training"]),
        ([""], ["own.jsonl", "for training"]),
    ],
)
def test_a_mistake_in_a_users_file_is_named(tmp_path: Path, lines: list[object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_preferences(write(tmp_path / "own.jsonl", *lines))
    for word in words:
        assert word in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        load_preferences(tmp_path / "nowhere.jsonl")


def test_a_guess_by_sentence_length_reads_no_word() -> None:
    assert sentence_words("One two. Three four five six! Seven?") == pytest.approx(7 / 3)
    assert sentence_words("") == 0.0
    short, long = "Shut it. Wait.", "Shut it, and after that you may want to wait."
    pair = Preference("p", [], short, long, (1.0, -1.0), "c", "d", "f")
    assert style_guess(pair) == "right"
    assert style_guess(replace(pair, chosen=long, rejected=short)) == "wrong"
    assert style_guess(replace(pair, rejected="Open it. Go.")) == "no guess"
