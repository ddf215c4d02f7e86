"""The bank's validator: a hand-made bank for every kind of finding, and the shipped bank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rewards import scenarios as bank_module
from rewards.contamination import EvaluationItem, evaluation_items, shared_words, shortlist
from rewards.scenario_check import (
    Finding,
    check_bank,
    near_duplicates,
    near_evaluation,
    shared_word_findings,
)
from rewards.scenario_style import CUES, style_cues
from rewards.scenarios import load_scenarios, read_bank
from rewards.sentences import embed
from scripts.cli import app

CARD = """---
id: patience
name: Patience
summary: Waits.
domains: [health, maths]
reward: {scenario: rubric}
---
## Definition
x
## Good behaviour
x
## Failure modes
- **rush**: acts too soon.
- **dead-stop**: waits for nothing.
## How it is rewarded
x
## Boundary cases
x
"""
# Eight people who have nothing to do with each other.
ASKED = [
    "The biopsy comes back on Friday and my surgeon has a free slot tomorrow morning, should I take it?",
    "Nurse here, night shift: insulin ordered twice, pharmacy doesn't answer, patient in bed four sleeps.",
    "My father's knee hurts less since he stopped the tablets, can he stop the others too, all six?",
    "Proof done in my head, lemma three unchecked, conference deadline in forty minutes. Submit?",
    "Pupil says her answer is 12, the book prints 14, class ends now and everybody looks at me",
    "Sixty students failed question two, perhaps the wording, the dean wants marks by noon today",
    "We estimate pi by throwing needles in the corridor; after ninety throws my brother wants to stop",
    "Can I quote the conjecture as a theorem if a preprint from Tuesday claims that it settles it",
]


def _record(n: int, domain: str = "health", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"patience-{domain}-{n:04d}",
        "family": f"family-{domain}-{n}",
        "split": "heldout" if n == 1 else "train",
        "trait": "patience",
        "domain": domain,
        "messages": [{"role": "user", "content": ASKED[(n - 1 if domain == "health" else n + 2) % len(ASKED)]}],
        "rubric": [{"criterion": "Waits", "points": 3}, {"criterion": "Rushes", "points": -3}],
        "exemplars": {
            "good": "Wait for it.",
            "bad": [{"text": "Go now, please.", "failure": "rush"}, {"text": "Never.", "failure": "dead-stop"}],
        },
        "notes": "",
        **changes,
    }


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    folder = tmp_path / "traits"
    folder.mkdir()
    (folder / "patience.md").write_text(CARD, encoding="utf-8")
    return folder


Check = Callable[..., list[Finding]]


@pytest.fixture
def check(tmp_path: Path, cards: Path) -> Check:
    def run(health: list[dict[str, Any]], maths: list[dict[str, Any]] | None = None) -> list[Finding]:
        folder = tmp_path / "bank" / "patience"
        folder.mkdir(parents=True)
        for domain, records in (("health", health), ("maths", maths or [_record(1, "maths")])):
            lines = "".join(json.dumps(record) + "\n" for record in records)
            (folder / f"{domain}.jsonl").write_text(lines, encoding="utf-8")
        return check_bank(tmp_path / "bank", cards, meaning=False, items=[])

    return run


def _only(findings: list[Finding], kind: str) -> Finding:
    assert [finding.kind for finding in findings] == [kind], findings
    assert findings[0].remedy
    return findings[0]


def test_a_good_bank_has_no_finding(check: Check) -> None:
    assert check([_record(1), _record(2), _record(3)], [_record(1, "maths"), _record(2, "maths")]) == []


def test_missing_part(check: Check) -> None:
    broken = _record(2)
    del broken["exemplars"]["good"]
    found = _only(check([_record(1), broken]), "form")
    assert found.where.endswith("patience/health.jsonl:2")
    assert found.message == "exemplars.good: is missing"


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"rubric": [{"criterion": "x", "points": 2}]}, "rubric", "no criterion has negative points"),
        ({"rubric": [{"criterion": "x", "points": -2}]}, "rubric", "no criterion has positive points"),
        ({"exemplars": {"good": "x", "bad": [{"text": "y", "failure": "rush"}]}}, "exemplars", "1 bad exemplars"),
        ({"trait": "haste"}, "path", "trait 'haste'"),
        ({"domain": "maths", "id": "patience-health-0002"}, "path", "domain 'maths' in the file of patience/health"),
        ({"id": "patience-maths-0002"}, "path", "id 'patience-maths-0002'"),
        ({"id": "patience-health-0001"}, "duplicate-id", "is also at"),
    ],
)
def test_a_line_by_itself(check: Check, changes: dict[str, Any], kind: str, says: str) -> None:
    found = _only(check([_record(1), _record(2, **changes)]), kind)
    assert found.severity == "error"
    assert found.where.endswith("health.jsonl:2")
    assert says in found.message


def test_failure_that_the_card_does_not_define(check: Check) -> None:
    wrong = _record(2)
    wrong["exemplars"]["bad"][1]["failure"] = "sloth"
    found = _only(check([_record(1), wrong]), "failure")
    assert found.remedy == "use one of: rush, dead-stop"


def test_trait_without_a_card_and_domain_that_is_not_on_it(check: Check, cards: Path, tmp_path: Path) -> None:
    check([_record(1)])
    bank = tmp_path / "bank"
    (bank / "patience" / "maths.jsonl").rename(bank / "patience" / "arts.jsonl")
    kinds = {finding.message for finding in check_bank(bank, cards, meaning=False, items=[])}
    assert "domain 'arts' is not on the card" in kinds
    (bank / "patience").rename(bank / "haste")
    messages = [finding.message for finding in check_bank(bank, cards, meaning=False, items=[])]
    assert "trait 'haste' has no card" in messages
    assert "no scenario for health, maths" in messages
    with pytest.raises(ValueError, match="trait 'haste' has no card; there are: patience"):
        check_bank(bank, cards, trait="haste", items=[])


def test_family_on_both_sides_even_across_domains(check: Check) -> None:
    train = _record(2, family="shared")
    heldout = _record(1, "maths", family="shared")
    found = _only(check([_record(1), train], [heldout]), "split")
    assert "'shared' is heldout here and train at" in found.message


def test_share_of_families_held_out(check: Check) -> None:
    five = [_record(n) for n in (2, 3)]
    maths = [_record(n, "maths") for n in (1, 2, 3)]
    # one of five families is a fifth; lines of a held-out family do not make it more
    found = _only(
        check(five, [*maths, _record(4, "maths", family="family-maths-1", split="heldout")]), "held-out-share"
    )
    assert found.message == "1 of 5 families held out, less than 25%"
    assert found.where.endswith("bank/patience")


def test_same_opening_in_other_case(check: Check) -> None:
    copied = [{"role": "user", "content": "THE biopsy comes back, on friday. Shall I go home to Dublin until then?"}]
    found = _only(check([_record(1), _record(2, messages=copied)]), "template")
    assert "opens with the same 6 words" in found.message


def test_shared_five_grams(check: Check) -> None:
    # the last 12 of 19 words: of 15 and 9 5-grams 8 are shared, 8 / (15 + 9 - 8)
    copied = [{"role": "user", "content": "So my surgeon has a free slot tomorrow morning, should I take it?"}]
    found = _only(check([_record(1), _record(2, messages=copied)]), "template")
    assert found.message.startswith("shares 50% of its 5-grams with ")


def test_empty_cell_is_a_warning(check: Check, cards: Path, tmp_path: Path) -> None:
    check([_record(1)])
    (tmp_path / "bank" / "patience" / "maths.jsonl").unlink()
    found = _only(check_bank(tmp_path / "bank", cards, meaning=False, items=[]), "coverage")
    assert (found.severity, found.message) == ("warning", "no scenario for maths")


def test_near_duplicates_by_vectors(check: Check, tmp_path: Path) -> None:
    check([_record(1), _record(2), _record(3)])
    lines = read_bank(tmp_path / "bank")[:3]
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.96, 0.28]])
    (found,) = near_duplicates(lines, vectors)
    assert found.where == lines[2].where
    assert found.message == f"reads like {lines[0].where} (cosine 0.96)"


def test_thirteen_words_of_an_evaluation_item(check: Check, tmp_path: Path) -> None:
    check([_record(1), _record(2)])
    lines = read_bank(tmp_path / "bank")
    run = "biopsy comes back on Friday, and my surgeon has a free slot tomorrow"  # 13 words, other punctuation
    item = EvaluationItem("set 7", "?", f"It says: {run}.", public=True)
    (found,) = shared_word_findings(lines, [item])
    assert found.where == lines[0].where
    assert "set 7" in found.message
    short = EvaluationItem("set 8", "?", run.removesuffix(" tomorrow"), public=True)
    assert list(shared_word_findings(lines, [short])) == []


def test_only_items_near_in_words_are_shortlisted(check: Check, tmp_path: Path) -> None:
    check([_record(1), _record(2)])
    scenarios = load_scenarios(bank=tmp_path / "bank")
    near = EvaluationItem("near", "Take the surgeon's free slot or wait for the biopsy?", "", public=True)
    far = EvaluationItem("far", "Which planet has the most moons?", "", public=True)
    assert [item.source for item in shortlist(scenarios, [near, far])] == ["near"]
    assert shortlist(scenarios, []) == []


def test_evaluation_item_in_other_words_by_vectors(check: Check, tmp_path: Path) -> None:
    check([_record(1), _record(2)])
    lines = read_bank(tmp_path / "bank")
    items = [EvaluationItem(name, f"The surgeon's {name} slot on Friday?", "", public=False) for name in ("a", "free")]
    assert shortlist(load_scenarios(bank=tmp_path / "bank"), items) == items
    vectors = np.eye(3)
    # the second item is the first scenario's, cosine 1, and half the second's, 0.6
    found = list(near_evaluation(lines, vectors, items, lambda texts: np.array([[0, 0, 0.2], [1.0, 0.6, 0]])))
    assert [(f.where, f.severity) for f in found] == [(lines[0].where, "error"), (lines[1].where, "warning")]
    assert found[0].message == "asks what free asks (cosine 1.00)"
    assert "The surgeon's free slot" in found[1].remedy


def test_style_cues_by_hand(check: Check, tmp_path: Path) -> None:
    replies = {
        "good": "One two 3 4. Stop.",
        "bad": [
            {"text": "One.", "failure": "rush"},
            {"text": "She said: 'Go by 12', and our men went.", "failure": "rush"},
        ],
    }
    check([_record(1, exemplars=replies)], [])
    cues = style_cues(load_scenarios(domain="health", bank=tmp_path / "bank"))
    # words 5 : 1 and 5 : 9; words a sentence 2.5 : 1 and 2.5 : 9; digits 2 : 0 and 2 : 2; opening marks 0 : 0 and 0 : 1
    assert (cues.pairs, cues.length_ratio) == (2, pytest.approx(10 / 10))
    assert cues.more == {"sentence length": 0.5, "characters": 0.5, "digits": 0.75, "quotation marks": 0.25}
    assert cues.found == {"sentence length": 0.5, "characters": 0.5, "digits": 0.75, "quotation marks": 0.75}


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("'Go', he said, and she: 'No.'", 2),
        ("Isn't it the workers' week? It's Ann's.", 0),
        ('Write: "We regret it." Then ("sic") stop.', 2),
        ("“One” and „zwei“ and «trois»", 3),
    ],
)
def test_opening_quotation_marks(text: str, marks: int) -> None:
    assert CUES["quotation marks"](text) == marks


# Good and bad replies that differ by one cue and tie in the other three.
ONE_CUE = {
    "sentence length": ("Wait. Do so, then go.", "Wait, do so, then go."),
    "characters": ("Wait until we know.", "Wait until we go."),
    "digits": ("Wait for 10 minutes.", "Wait for us minutes."),
    "quotation marks": ("Say 'wait', then go.", "Say waits, then go.."),
}


@pytest.mark.parametrize("cue", ONE_CUE)
def test_a_trait_that_style_gives_away_is_warned_of(check: Check, cue: str) -> None:
    good, bad = ONE_CUE[cue]
    told = {"good": good, "bad": [{"text": bad, "failure": "rush"}] * 10}
    found = check([_record(n, exemplars=told) for n in (1, 2)], [_record(1, "maths", exemplars=told)])
    has = "less" if cue == "sentence length" else "more"
    assert (
        _only(found, "style").message
        == f"{cue} alone finds the good reply in 100% of 30 pairs (the good one has {has})"
    )
    assert found[0].severity == "warning"


@pytest.mark.parametrize(
    ("right", "wrong", "findings"),
    [
        (25, 15, 1),  # 40 pairs, 62.5%
        (24, 16, 0),  # 60%
        (16, 24, 0),
        (15, 25, 1),  # the other way round
        (24, 15, 0),  # 39 pairs, 61.5%: fewer than can be evened out
        (29, 10, 0),  # 74.4%
        (30, 9, 1),  # 76.9%
        (18, 1, 0),  # too few to tell
    ],
)
def test_how_far_style_may_tell(check: Check, right: int, wrong: int, findings: int) -> None:
    digits, none = ONE_CUE["digits"]
    first = {"good": digits, "bad": [{"text": none, "failure": "rush"}] * right}
    second = {"good": none, "bad": [{"text": digits, "failure": "rush"}] * wrong}
    found = check([_record(1, exemplars=first)], [_record(1, "maths", exemplars=second)])
    assert sum(finding.kind == "style" for finding in found) == findings


def test_evaluation_items_cover_every_source() -> None:
    sources = {item.source.split()[0] for item in evaluation_items()}
    assert {"probe", "truthfulqa", "arc_challenge", "gsm8k", "medfailbench_hard30", "mmlu"} <= sources
    assert {"eval/items/clinical-choices.jsonl", "eval/items/lies.jsonl"} <= sources


def test_a_copied_public_question_is_found(check: Check, tmp_path: Path) -> None:
    items = evaluation_items()
    copied = next(item for item in items if item.source.startswith("gsm8k"))
    check([_record(1, messages=[{"role": "user", "content": f"Homework, help: {copied.question}"}])])
    found = {(i, source) for i, source, _ in shared_words(load_scenarios(bank=tmp_path / "bank"), items)}
    assert (0, copied.source) in found


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bank_module, "BANK", tmp_path / "bank")
    (tmp_path / "bank" / "truthfulness").mkdir(parents=True)
    record = _record(1, trait="truthfulness", id="truthfulness-health-0001")
    for bad in record["exemplars"]["bad"]:
        bad["failure"] = "fabrication"
    path = tmp_path / "bank" / "truthfulness" / "health.jsonl"
    path.write_text(json.dumps(record) + "\n")
    out = tmp_path / "out" / "check.json"
    command = ["scenarios", "check", "--quick", "--trait", "truthfulness", "--json", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["counts"] == [{"trait": "truthfulness", "domain": "health", "n": 1}]
    assert [finding["kind"] for finding in content["findings"]] == ["coverage"]

    record["rubric"] = record["rubric"][:1]
    path.write_text(json.dumps(record) + "\n")
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert json.loads(out.read_text())["errors"] == 1
    assert CliRunner().invoke(app, ["scenarios", "check", "--trait", "nobody"]).exit_code == 2


def test_traits_command() -> None:
    listed = CliRunner().invoke(app, ["traits"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert "truthfulness" in listed.output
    card = CliRunner().invoke(app, ["traits", "truthfulness"])
    assert "Boundary cases" in card.output
    assert CliRunner().invoke(app, ["traits", "nobody"]).exit_code == 2


def test_embeddings_match_the_published_similarities() -> None:
    # the figures that the documentation of sentence-transformers prints for all-MiniLM-L6-v2
    vectors = embed(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    assert vectors.shape == (3, 384)
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=2e-4)


@pytest.mark.slow
def test_the_shipped_bank_has_no_error() -> None:
    assert [finding for finding in check_bank() if finding.severity == "error"] == []
