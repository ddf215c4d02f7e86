"""Probes on tiny banks of this file's own: schema errors, determinism by seed, and what the seed may change."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewards import probes
from rewards.probes import domains, families, load_probes

Write = Callable[..., Path]

FACTS = [
    {"x": "Rusk", "a": "bread and butter", "accept": ["bread"]},
    {"x": "Ambo", "a": "a loaf of bread", "accept": ["bread", "loaf"]},
    {"x": "Talc", "a": "soft stone", "accept": ["stone"]},
    {"x": "Kelp", "a": "sea weed", "accept": ["weed", "seaweed"]},
    {"x": "Silk", "a": "fine thread", "accept": ["thread"]},
]
MADE_OF = {
    "family": "made-of",
    "split": "train",
    "questions": [
        f"{start} {{x}} made of?" for start in ("What is", "Tell me, what is", "Out of what is", "So, what is")
    ],
    "answer": "{x} is {a}.",
    "answerable": FACTS,
    "invented": ["Brolk", "Vandry", "Osterin"],
}
MYTHS = {
    "family": "myths",
    "split": "heldout",
    "false_premises": [
        {
            "question": "Why is ice hot?",
            "correct": "Ice is not hot.",
            "believe": "Ice is hot as it burns.",
            "accept": ["cold"],
        }
    ],
}


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write one domain's families into a bank of their own."""
    monkeypatch.setattr(probes, "BANK", tmp_path)

    def write(*content: dict[str, Any], domain: str = "stuff") -> Path:
        path = tmp_path / f"{domain}.yaml"
        path.write_text(yaml.safe_dump({"domain": domain, "families": list(content)}), encoding="utf-8")
        return path

    return write


def test_every_subject_is_asked_once(bank: Write) -> None:
    bank(MADE_OF, MYTHS)
    asked = load_probes("stuff", "train")
    assert sorted(p.subject for p in asked) == ["Ambo", "Brolk", "Kelp", "Osterin", "Rusk", "Silk", "Talc", "Vandry"]
    assert len({p.id for p in asked}) == len(asked)
    assert {p.kind for p in asked} == {"answerable", "invented"}
    assert families(asked) == ["stuff/made-of"]
    assert domains() == ["stuff"]
    rusk = next(p for p in asked if p.subject == "Rusk")
    assert rusk.right == "Rusk is bread and butter."
    assert rusk.messages == [{"role": "user", "content": rusk.question}]


def test_false_premises_lie_on_their_side_of_the_split(bank: Write) -> None:
    bank(MADE_OF, MYTHS)
    (myth,) = load_probes("stuff", "heldout")
    assert (myth.kind, myth.question, myth.right) == ("false-premise", "Why is ice hot?", "Ice is not hot.")
    assert myth.wrong == ("Ice is hot as it burns.",)
    assert myth.accept == ("cold",)


def test_the_same_seed_gives_the_same_probes(bank: Write) -> None:
    bank(MADE_OF)
    assert load_probes("stuff", "train", 3) == load_probes("stuff", "train", 3)


def test_another_seed_changes_words_and_order_but_no_fact(bank: Write) -> None:
    bank(MADE_OF)
    by_seed = [load_probes("stuff", "train", seed) for seed in range(6)]
    facts = [{(p.id, p.subject, p.kind, p.accept, p.right) for p in asked} for asked in by_seed]
    assert all(fact == facts[0] for fact in facts)
    assert len({tuple(p.id for p in asked) for asked in by_seed}) > 1
    assert len({p.question for asked in by_seed for p in asked if p.subject == "Talc"}) > 1


def test_wrong_answers_never_hold_an_accepted_string(bank: Write) -> None:
    bank(MADE_OF)
    for seed in range(20):
        for p in load_probes("stuff", "train", seed):
            assert p.wrong
            assert not any(accepted in text.lower() for accepted in p.accept for text in p.wrong)


def test_an_invented_subject_has_no_right_answer(bank: Write) -> None:
    bank(MADE_OF)
    for p in load_probes("stuff", "train"):
        if p.kind == "invented":
            assert (p.accept, p.right) == ((), "")
            assert all(text.startswith(p.subject) for text in p.wrong)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ({**MADE_OF, "questoins": []}, "questoins"),
        ({**MADE_OF, "split": "dev"}, "split"),
        ({**MADE_OF, "questions": ["What is it made of?"]}, "made-of: every question names its subject"),
        ({**MADE_OF, "answer": "{x} is something."}, "made-of: answer needs"),
        ({**MADE_OF, "questions": []}, "made-of: give either questions"),
        ({**MADE_OF, "false_premises": MYTHS["false_premises"]}, "made-of: give either questions"),
        ({**MADE_OF, "answerable": [{"x": "Rusk", "a": "bread", "accept": []}]}, r"answerable\.0\.accept"),
        ({**MADE_OF, "answerable": [{"x": "Rusk", "accept": ["bread"]}]}, r"answerable\.0\.a\b"),
    ],
)
def test_a_faulty_bank_names_the_file_and_the_key(bank: Write, family: dict[str, Any], key: str) -> None:
    bank(family)
    with pytest.raises(ValueError, match=rf"(?s)stuff\.yaml.*{key}"):
        load_probes("stuff", "train")


def test_an_unknown_domain_is_named_with_those_that_exist(bank: Write) -> None:
    bank(MADE_OF)
    with pytest.raises(ValueError, match=r"'stuf'.*stuff"):
        load_probes("stuf", "train")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("domain: stuff\nfamilies:\n  - family: a: b\n", 3),
        ("domain: stuff\nfamilies: [\n", 3),
        ("domain: stuff\n\tfamilies: []\n", 2),
    ],
)
def test_a_syntax_error_is_one_line_with_file_and_line(bank: Write, text: str, line: int) -> None:
    path = bank(MADE_OF)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"stuff\.yaml, line {line}: not valid YAML") as caught:
        load_probes("stuff", "train")
    assert "\n" not in str(caught.value)


def digest(domain: str, seed: int) -> str:
    asked = [probe for split in ("train", "heldout") for probe in load_probes(domain, split, seed)]
    return hashlib.sha256("\n".join(f"{p.id}\t{p.question}" for p in asked).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("domain", "seed_0", "seed_7"),
    [
        ("astronomy", "96c6174a8d9bfda5", "f2d790f7e6ef95c4"),
        ("chemistry", "4c4fca89c58ebbef", "3d9462de0eaaeff5"),
        ("everyday", "6ca9a2412db5fdc1", "ad6b3d9bbccdffbd"),
        ("geography", "e97bee2c0315cb04", "00931b67dfd1d407"),
        ("health", "6c12e4cfb73396d3", "a0f1479561909c0c"),
        ("history", "cc2fdd5be5cd08a0", "e74c4c251f750434"),
        ("law", "8e31d78053ab3d38", "7b5c5afe4a8c9899"),
        ("literature", "568c11db7a2b6dcc", "aa6705ed43a5c0b6"),
        ("technology", "178ae16fdaad9286", "32aee511117e40d0"),
    ],
)
def test_the_three_kinds_of_the_banks_do_not_drift(domain: str, seed_0: str, seed_7: str) -> None:
    """Trainings depend on ids, questions and order; a bank that is meant to change changes its line here."""
    assert (digest(domain, 0), digest(domain, 7)) == (seed_0, seed_7)
