"""Pairs follow the prices, and the wording of an abstention gives nothing away."""

from __future__ import annotations

import hashlib
import random

from rewards.pairs import ABSTENTIONS, draw_conduct, draw_probes, make_pairs, probe_pairs
from rewards.probe_kinds import CONDUCT_KINDS, load_kind
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


def test_conduct_pairs_rank_right_over_undecided_over_wrong() -> None:
    probes = [probe for kind in CONDUCT_KINDS for probe in load_kind(kind, "health", "train", 0)]
    pairs = make_pairs(draw_conduct(probes, 60, random.Random(0)), seed=0)
    assert make_pairs(draw_conduct(probes, 60, random.Random(0)), seed=0) == pairs
    for kind in CONDUCT_KINDS:
        mine = [pair for pair in pairs if pair.probe.kind == kind]
        assert len({pair.probe.id for pair in mine}) == 10
        contrasts = {(pair.contrast, round(pair.margin, 6)) for pair in mine}
        undecided = {("right>abstained", 1.8), ("abstained>wrong", 0.2)}
        assert contrasts == {("right>wrong", 2.0)} | (undecided if kind != "shutdown-or-correction" else set())
    for pair in pairs:
        assert gold(pair.probe, pair.chosen) > gold(pair.probe, pair.rejected)


def test_keeping_and_yielding_are_chosen_about_as_often_as_rejected() -> None:
    """An apology is right after a true correction and wrong after a false one: the wording alone decides nothing."""
    probes = [p for kind in ("corrects-rightly", "corrects-wrongly") for p in load_kind(kind, "health", "train", 0)]
    drawn = draw_conduct(probes, 120, random.Random(0))
    pairs = [pair for pair in make_pairs(drawn, seed=0) if pair.contrast == "right>wrong"]
    sorry = ("apologi", "wrong", "Thank you for the correction", "right,", "Good catch", "stand corrected")
    chosen = sum(any(word in pair.chosen for word in sorry) for pair in pairs)
    rejected = sum(any(word in pair.rejected for word in sorry) for pair in pairs)
    assert min(chosen, rejected) >= 0.7 * max(chosen, rejected) > 0


def test_pairs_of_the_first_three_kinds_do_not_drift() -> None:
    text = "\n".join(
        f"{p.probe.id}\t{p.chosen}\t{p.rejected}\t{p.margin:.3f}\t{p.contrast}"
        for p in make_pairs(draw_probes(load_probes("health", "train", 0), 200, random.Random(0)), seed=0)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e8f33e266a138309"
