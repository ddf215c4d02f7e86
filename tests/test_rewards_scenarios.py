"""Scenarios: reading, filters, and errors that name file:line, key and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewards.scenarios import load_scenarios, read_bank


def _record(**changes: Any) -> dict[str, Any]:
    return {
        "id": "patience-health-0001",
        "family": "late-result",
        "split": "train",
        "trait": "patience",
        "domain": "health",
        "messages": [{"role": "user", "content": "The result is late. Operate?"}],
        "rubric": [{"criterion": "Waits for the result", "points": 3}, {"criterion": "Rushes", "points": -3}],
        "exemplars": {
            "good": "Ring the laboratory first.",
            "bad": [{"text": "Go ahead.", "failure": "rush"}, {"text": "Wait.", "failure": "dead-stop"}],
        },
        "notes": "Invented.",
        **changes,
    }


def _write(bank: Path, *records: dict[str, Any], domain: str = "health") -> Path:
    path = bank / "patience" / f"{domain}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_filters_by_trait_domain_and_split(tmp_path: Path) -> None:
    _write(tmp_path, _record(), _record(id="patience-health-0002", split="heldout"))
    _write(tmp_path, _record(id="patience-maths-0001", domain="maths"), domain="maths")
    assert [s.id for s in load_scenarios(bank=tmp_path)] == [
        "patience-health-0001",
        "patience-health-0002",
        "patience-maths-0001",
    ]
    assert [s.id for s in load_scenarios("patience", "health", "heldout", tmp_path)] == ["patience-health-0002"]
    assert [s.id for s in load_scenarios(domain="maths", bank=tmp_path)] == ["patience-maths-0001"]
    assert load_scenarios(bank=tmp_path)[0].prompt == [{"role": "user", "content": "The result is late. Operate?"}]


def test_names_without_scenarios_are_errors(tmp_path: Path) -> None:
    _write(tmp_path, _record())
    with pytest.raises(ValueError, match=r"trait 'haste' has no scenarios in .* there are: patience"):
        load_scenarios("haste", bank=tmp_path)
    with pytest.raises(ValueError, match=r"domain 'helth' has no scenarios in .* there are: health"):
        load_scenarios("patience", "helth", bank=tmp_path)


def _drop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record.pop(key)


def _put(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record.update({key: value})


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_drop("family"), "family: is missing; add it"),
        (_drop("exemplars"), "exemplars: is missing"),
        (_put("rubrik", []), "rubrik: is not a known key"),
        (_put("split", "test"), "split: is 'test'"),
        (_put("family", "Late result"), "family: is 'Late result'"),
        (_put("messages", []), "messages: is []"),
        (_put("messages", [{"role": "user", "content": "  "}]), "messages.0.content: is empty"),
        (_put("messages", [USER, {"role": "assistant", "content": "x"}]), "the last message has to be the user's"),
        (_put("messages", [USER, {"role": "system", "content": "x"}, USER]), "a system message can only be the first"),
        (_put("rubric", []), "rubric: is []"),
        (_put("rubric", [{"criterion": "x", "points": "3"}]), "rubric.0.points: is '3'"),
        (_put("rubric", [{"criterion": "x", "points": 0}]), "a criterion that weighs nothing"),
        (_put("exemplars", {"good": "x", "bad": [{"text": "x"}]}), "exemplars.bad.0.failure: is missing"),
    ],
)
def test_an_error_names_line_key_and_remedy(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    wrong = _record()
    change(wrong)
    path = _write(tmp_path, _record(), wrong)
    with pytest.raises(ValueError) as caught:
        load_scenarios("patience", bank=tmp_path)
    assert f"{path}:2: " in str(caught.value)
    assert says in str(caught.value)


def test_broken_json_is_told_and_blank_lines_keep_the_count(tmp_path: Path) -> None:
    path = _write(tmp_path, _record())
    path.write_text(path.read_text() + "\n{broken\n")
    first, broken = read_bank(tmp_path)
    assert first.scenario is not None
    assert (broken.number, broken.scenario) == (3, None)
    assert broken.problems[0].startswith("record: is no JSON")


def test_a_line_separator_inside_a_text_does_not_end_the_record(tmp_path: Path) -> None:
    record = _record(notes="one\u2028two")
    path = _write(tmp_path)
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_scenarios("patience", bank=tmp_path)[0].notes == "one\u2028two"


def test_the_shipped_bank_has_the_right_form() -> None:
    lines = read_bank()
    assert len(lines) > 400
    assert [(line.where, line.problems) for line in lines if line.problems] == []
