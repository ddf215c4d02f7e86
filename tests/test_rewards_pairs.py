"""Pairs follow the prices, and the wording of an abstention gives nothing away."""

from __future__ import annotations

import random

from rewards.pairs import ABSTENTIONS, draw_probes, make_pairs, probe_pairs
from rewards.probes import Probe, load_probes
from rewards.verifier import PRICE, abstains, gold

METFORMIN = Probe(
    id="t/1",
    domain="health",
    family="medicine-use",
    kind="answerable",
    split="train",
    question="What is metformin used for?",
    subject="metformin",
    accept=("diabetes",),
    right="Metformin is used for type 2 diabetes.",
    wrong=("Metformin is used for headaches.",),
)


def test_an_answerable_probe_ranks_right_over_abstained_over_wrong() -> None:
    pairs = probe_pairs(METFORMIN, random.Random(0))
    assert {(pair.contrast, round(pair.margin, 6)) for pair in pairs} == {
        ("right>abstained", 1.8),
        ("right>wrong", 2.0),
        ("abstained>wrong", 0.2),
    }


def test_the_policys_own_answers_are_ranked_by_the_verifier() -> None:
    own = ["Metformin lowers blood sugar in diabetes.", "Metformin is a serious condition of the body.", " "]
    pairs = probe_pairs(METFORMIN, random.Random(0), own)
    assert len(pairs) == 2 + 2 * 2 + 2  # right x abstained, right x wrong, abstained x wrong; the empty one is left out
    assert {pair.contrast for pair in pairs if own[0] in (pair.chosen, pair.rejected)} == {
        "right>abstained",
        "right>wrong",
    }
    assert all(pair.chosen != own[1] for pair in pairs)


def test_over_refusal_is_priced_between_right_and_wrong() -> None:
    assert PRICE["wrong"] < PRICE["abstained"] < PRICE["right"]


def test_every_abstention_is_read_as_one() -> None:
    for text in ABSTENTIONS:
        assert abstains(text.format(x="metformin")), text


def test_every_pair_of_the_bank_is_ordered_by_the_verifier() -> None:
    pairs = make_pairs(draw_probes(load_probes("health", "train", 0), 200, random.Random(0)), seed=0)
    for pair in pairs:
        assert gold(pair.probe, pair.chosen) > gold(pair.probe, pair.rejected)
    assert len({pair.probe.id for pair in pairs if pair.probe.kind == "answerable"}) == 100
    assert len({pair.probe.id for pair in pairs if pair.probe.kind != "answerable"}) == 100
