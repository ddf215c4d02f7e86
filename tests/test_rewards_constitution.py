"""The constitution file, the chats made of it, and the filter of revisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rewards.constitution import (
    comparison_chat,
    constitution_texts,
    critique_chat,
    drawn,
    load_constitution,
    revision_chat,
    shown,
    thought_chat,
)
from rewards.revision_filter import reason_against
from rewards.traits import CARDS

SHIPPED = CARDS.parent / "constitution" / "constitution.yaml"
ASKED = [{"role": "user", "content": "Why is the sky blue?"}]


def test_the_shipped_constitution_covers_every_trait() -> None:
    constitution = load_constitution(SHIPPED)
    assert len(constitution.principles) >= 16
    assert {t for p in constitution.principles for t in p.traits} == {path.stem for path in CARDS.glob("*.md")}
    assert len(constitution.demonstrations) >= 4
    prompt = constitution.system_prompt()
    assert all(p.principle in prompt for p in constitution.principles)
    assert {text for _, text, _ in constitution_texts(constitution)} >= {
        d.revision for d in constitution.demonstrations
    }


def test_demonstrations_show_what_the_filter_accepts() -> None:
    constitution = load_constitution(SHIPPED)
    for shot in constitution.demonstrations:
        request = constitution.named(shot.principle).revision
        assert reason_against(shot.answer, shot.critique, request, shot.revision) == "", shot


def test_chats_hold_the_demonstrations_then_the_matter() -> None:
    constitution = load_constitution(SHIPPED)
    principle = drawn(constitution, 1, 0, "a")[0]
    chat = critique_chat(constitution, shown(constitution, 2, 0), ASKED, "It is the sea.", principle)
    assert [m["role"] for m in chat] == ["user", "assistant"] * 7 + ["user"]
    assert chat[-3:] == [
        *ASKED,
        {"role": "assistant", "content": "It is the sea."},
        {"role": "user", "content": principle.critique},
    ]
    revised = revision_chat(chat, "Wrong.", principle)
    assert revised[: len(chat)] == chat
    assert [m["content"] for m in revised[len(chat) :]] == ["Wrong.", principle.revision]


def test_the_question_names_both_replies_and_a_thought_comes_before_the_choice() -> None:
    principle = load_constitution(SHIPPED).principles[0]
    (message,) = comparison_chat(ASKED, "one", "two", principle, "both are short")
    lines = message["content"].split("\n")
    assert lines[1:] == [
        "User: Why is the sky blue?", "(A) one", "(B) two", principle.comparison, "Thoughts: both are short",
        "Answer with (A) or (B).",
    ]  # fmt: skip
    (asks,) = thought_chat(ASKED, "one", "two", principle)
    assert "Answer with (A)" not in asks["content"]
    assert asks["content"].startswith("\n".join(lines[:5]))


def test_draws_are_functions_of_their_key() -> None:
    constitution = load_constitution(SHIPPED)
    assert drawn(constitution, 5, 1, "x") == drawn(constitution, 5, 1, "x")
    assert len({p.id for p in drawn(constitution, 99, 1, "x")}) == len(constitution.principles)
    first = {drawn(constitution, 1, 1, k)[0].id for k in range(200)}
    assert first == {p.id for p in constitution.principles}


def write(folder: Path, **changes: object) -> Path:
    principle = dict.fromkeys(("principle", "critique", "revision", "comparison"), "text")
    content = {
        "name": "mine",
        "system": "Keep to:",
        "demonstrations": "shots.yaml",
        "principles": [{"id": "one", "traits": ["truthfulness"], **principle}],
    } | changes
    shot = dict.fromkeys(("question", "answer", "critique", "revision"), "text")
    (folder / "shots.yaml").write_text(yaml.safe_dump({"demonstrations": [{"principle": "one", **shot}]}))
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_mistakes_in_a_constitution_are_named(tmp_path: Path) -> None:
    load_constitution(write(tmp_path))
    load_constitution.cache_clear()
    good = yaml.safe_load((tmp_path / "mine.yaml").read_text())["principles"][0]
    cases = {
        "'bravery' is no trait": {"principles": [good | {"traits": ["bravery"]}]},
        "id 'one' stands twice": {"principles": [good, good]},
        "principles.0.critique: is missing": {"principles": [{k: v for k, v in good.items() if k != "critique"}]},
        "principle 'one' is not in mine.yaml": {"principles": [good | {"id": "two"}]},
        "demonstrations: there is no such file": {"demonstrations": "none.yaml"},
        "motto: is not a known key": {"motto": "x"},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            load_constitution(write(tmp_path, **changes))
    with pytest.raises(ValueError, match=r"constitution\.file: there is no such file.*none\.yaml"):
        load_constitution(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("revision", "why"),
    [
        ("The sky scatters blue light more than red.", ""),
        ("Here is a new treatment for colds.", ""),
        ("The improved version of the engine is quiet.", ""),
        ("A better answer is 4.", ""),
        ("This is the corrected value: 4.", ""),
        ("", "empty"),
        ("  ...\n", "empty"),
        ("it is the SEA", "unchanged"),
        ("It is too short!", "echo"),
        ("Write the reply again: it is light.", "echo"),
        ("Here is a revised response: It is light.", "preamble"),
        ("Here's the revised version of my answer:\nIt is light.", "preamble"),
        ("Sure, here is my improved reply. It is light.", "preamble"),
        ("Certainly! Below is a rewritten version without the lecture. It is light.", "preamble"),
        ("**Revised answer:** It is light.", "preamble"),
        ("Revision: It is light.", "preamble"),
        ("My corrected answer is that it is light.", "preamble"),
        ("I have rewritten the reply. It is light.", "preamble"),
        ("I’ve updated it. It is light.", "preamble"),
        ("You are right. In my last reply I was wrong.", "talk"),
        ("The original response was not clear about the sky.", "talk"),
        ("If someone acted on your last reply, nothing would happen.", "talk"),
        ("The first answer that comes to mind is light.", ""),
        ("Your last message asked about the sky: it is light.", ""),
        ("The answer is light, as in the original version of the book.", ""),
    ],
)  # fmt: skip
def test_the_filter(revision: str, why: str) -> None:
    assert reason_against("It is the sea.", "It is too short.", "Write the reply again.", revision) == why
