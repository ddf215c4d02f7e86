"""Trait cards: the shipped ones, and every way in which one can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.traits import load_trait, load_traits

CARD = """---
id: patience
name: Patience
summary: "Waits: where waiting is cheap."
domains: [health, maths]
reward:
  scenario: rubric
  monitors: [length]
---

## Definition

Waits for a reason.

## Good behaviour

- Says what it waits for.

## Failure modes

- **rush**: acts before
  the answer is there.
- **dead-stop**: waits for nothing.

## How it is rewarded

By the rubric.

## Boundary cases

- **Fire.** No waiting.
"""


def _write(folder: Path, text: str, name: str = "patience") -> Path:
    path = folder / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_card_is_read_section_by_section(tmp_path: Path) -> None:
    card = load_trait(_write(tmp_path, CARD))
    assert (card.id, card.domains, card.reward.monitors) == ("patience", ("health", "maths"), ("length",))
    assert card.definition == "Waits for a reason."
    assert card.failure_modes == {"rush": "acts before the answer is there.", "dead-stop": "waits for nothing."}
    assert card.boundary_cases == "- **Fire.** No waiting."
    assert list(load_traits(tmp_path)) == ["patience"]


def test_every_shipped_card_is_right() -> None:
    cards = load_traits()
    assert "truthfulness" in cards
    for card in cards.values():
        assert len(card.domains) == 12
        assert len(card.failure_modes) >= 6
    assert "gold" in cards["truthfulness"].reward.monitors
    assert "fabrication" in cards["truthfulness"].failure_modes


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("id: patience\n", "id: calm\n", "id: is 'calm'"),
        ("name: Patience\n", "", "name: is missing"),
        ("name: Patience", "naam: Patience\nname: P", "naam: is not a known key"),
        ("domains: [health, maths]", "domains: []", "domains"),
        ("domains: [health, maths]", "domains: [health, health]", "stands there twice"),
        ("domains: [health, maths]", "domains: [Health Care]", "domains.0: is 'Health Care'"),
        ("monitors: [length]", "monitors: [lenght]", "reward.monitors.0: is 'lenght'"),
        ("scenario: rubric", "scenario: vibes", "reward.scenario: is 'vibes'"),
        ('"Waits: where waiting is cheap."', "Waits: where", "is no YAML"),
        ("---\nid", "id", "front matter: not found"),
        ("## Boundary cases", "## Borders", "'## Boundary cases': is there 0 times"),
        ("## Boundary cases", "## Boundary cases\n\nx\n\n## Definition", "'## Definition': is there 2 times"),
        ("## Boundary cases", "## Extra\n\nx\n\n## Boundary cases", "'## Extra': is not known"),
        ("Waits for a reason.", "", "definition"),
        ("- **dead-stop**: waits", "- **rush**: waits", "'rush' stands there twice"),
        ("- **dead-stop**: waits", "- dead-stop: waits", "write each as - **slug**"),
        ("- **dead-stop**: waits for nothing.", "", "failure_modes"),
        ("- **dead-stop**", "- **Dead stop**", "failure_modes"),
        ("\n## Definition", "\nStray.\n\n## Definition", "text before the first section"),
        ("domains:", "definition: x\ndomains:", "belongs in the text"),
    ],
)
def test_an_error_names_file_key_and_remedy(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in CARD
    path = _write(tmp_path, CARD.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        load_trait(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
