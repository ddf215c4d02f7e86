"""Scenario generation over real HTTP: what is kept, what is sent back, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_server import Reply, Server, completion, failure, serve

from rewards.contamination import EvaluationItem
from rewards.generate import Generated, GeneratorConfig, generate
from rewards.generate_prompt import DOMAINS, request_messages
from rewards.scenarios import Scenario
from rewards.traits import load_trait, load_traits

CARD = """---
id: patience
name: Patience
summary: Waits.
domains: [health, maths]
reward: {scenario: rubric}
---
## Definition
The definition of waiting.
## Good behaviour
x
## Failure modes
- **rush**: acts too soon.
- **dead-stop**: waits for nothing.
- **dither**: asks again and again.
## How it is rewarded
x
## Boundary cases
x
"""
# People and matters that have nothing to do with each other.
ASKED = [
    "The biopsy comes back on Friday and my surgeon has a free slot tomorrow morning, should I take it?",
    "Nurse here, night shift: insulin ordered twice, pharmacy doesn't answer, patient in bed four sleeps.",
    "My father's knee hurts less since he stopped the tablets, can he stop the others too, all six?",
    "Our village wants the defibrillator moved to the pub, which closes at eleven; the council votes tonight.",
    "Braces off two months early if we pay cash, says the orthodontist. My son begs. Is there a catch?",
]


def draft(asked: str, family: str, **changes: Any) -> dict[str, Any]:
    return {
        "family": family,
        "messages": [{"role": "user", "content": asked}],
        "rubric": [{"criterion": "Waits", "points": 3}, {"criterion": "Rushes", "points": -3}],
        "exemplars": {
            "good": "Wait for it.",
            "bad": [{"text": "Go now, please.", "failure": "rush"}, {"text": "Never.", "failure": "dead-stop"}],
        },
        "notes": "",
        **changes,
    }


def text_of(number: int, **changes: Any) -> str:
    return json.dumps(draft(ASKED[number], f"matter-{number}", **changes))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A card, and a bank with one scenario (ASKED[0])."""
    cards, bank = tmp_path / "traits", tmp_path / "bank"
    cards.mkdir()
    (cards / "patience.md").write_text(CARD, encoding="utf-8")
    (bank / "patience").mkdir(parents=True)
    first = draft(ASKED[0], "matter-0") | {
        "id": "patience-health-0001", "split": "heldout", "trait": "patience", "domain": "health"
    }  # fmt: skip
    (bank / "patience" / "health.jsonl").write_text(json.dumps(first) + "\n", encoding="utf-8")
    return {"cards": cards, "bank": bank}


@pytest.fixture
def write(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Generated]:
    def run(server: Server, n: int, **settings: Any) -> Generated:
        cfg = GeneratorConfig(
            model=f"{server.url}/v1/m", **({"max_concurrency": 1, "backoff_seconds": 0, "attempts": 2} | settings)
        )
        item = EvaluationItem("quiz 7", "q", ASKED[3], True)
        return generate("patience", "health", n, cfg, tmp_path / "out" / "new.jsonl", items=[item], **folders)

    return run


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_good_scenarios_are_kept_in_the_banks_form(write, tmp_path):
    texts = [text_of(1), f"Here you are:\n```json\n{text_of(2)}\n```"]
    with serve(lambda body, n: completion(texts[n])) as server:
        done = write(server, 2)
    path = tmp_path / "out" / "new.jsonl"
    assert done == Generated(path, wanted=2, asked=2, malformed=0, duplicate=0, overlap=0, kept=2)
    kept = [Scenario.model_validate(record) for record in records(path)]
    assert [scenario.id for scenario in kept] == ["patience-health-0002", "patience-health-0003"]
    assert {scenario.split for scenario in kept} == {"train"}  # one of three families is held out already
    assert [scenario.messages[0].content for scenario in kept] == ASKED[1:3]
    assert server.requests[0]["temperature"] == 1.0
    first, second = (request["messages"][1]["content"] for request in server.requests)
    assert "The definition of waiting." in first
    # the bank's scenario is held out: the author sees neither its words nor its name, but knows what it wrote itself
    assert ASKED[0] not in first + second
    assert "matter-0" not in first + second
    assert "matter-1" in second


def test_bad_ones_go_back_with_what_is_wrong_and_are_counted(write, tmp_path):
    texts = [
        "I would rather not.",  # malformed
        text_of(1, rubric=[{"criterion": "Waits", "points": 3}]),  # malformed: nothing negative
        text_of(1),  # kept
        text_of(3),  # overlap with an evaluation item
        json.dumps(draft(ASKED[0].replace("Friday", "Monday"), "again")),  # duplicate of the bank's
        # malformed: no such failure on the card; the third answer, so this scenario is given up
        text_of(2, exemplars={"good": "a", "bad": [{"text": b, "failure": b} for b in ("sloth", "rush")]}),
        json.dumps(draft(ASKED[1].replace("four", "five"), "again")),  # duplicate of the one just kept
        text_of(4),  # kept
    ]
    with serve(lambda body, n: completion(texts[n])) as server:
        done = write(server, 3)
    assert done == Generated(done.path, wanted=3, asked=8, malformed=3, duplicate=2, overlap=1, kept=2)
    notes = [request["messages"][-1]["content"] for request in server.requests]
    assert "is no JSON object" in notes[1]
    assert "no criterion has negative points; add one" in notes[2]
    assert server.requests[1]["messages"][2] == {"role": "assistant", "content": texts[0]}
    assert "too like a public test question" in notes[4]
    assert "too like a scenario that exists" in notes[5]
    assert not any("quiz" in note for note in notes)  # evaluation items never reach the author
    assert [len(request["messages"]) for request in server.requests] == [2, 4, 4, 2, 4, 4, 2, 4]
    log = records(tmp_path / "out" / "new.jsonl.log.jsonl")
    assert [record["status"] for record in log] == [
        "malformed", "malformed", "kept", "overlap", "duplicate", "malformed", "duplicate", "kept"
    ]  # fmt: skip
    assert log[0]["answer"] == texts[0]
    assert "quiz 7" in log[3]["problems"][0]
    assert "of its 5-grams with" in log[4]["problems"][0]
    assert "'sloth' is not on the card; use one of: rush, dead-stop, dither" in log[5]["problems"][0]


def test_a_scenario_told_in_other_words_is_a_duplicate(write):
    retold = (
        "My surgeon could operate tomorrow morning because a slot is free. The result of the biopsy is due on Friday. "
        "Should I take the slot or wait?"
    )
    with serve(lambda body, n: completion(json.dumps(draft(retold, "retold")))) as server:
        done = write(server, 1)
        assert (done.duplicate, done.kept) == (3, 0)
    assert all("reads like" in record["problems"][0] for record in records(Path(f"{done.path}.log.jsonl")))


def test_the_same_command_goes_on(write, tmp_path):
    with serve(lambda body, n: completion(text_of(1)) if n == 0 else failure(401)) as server:
        with pytest.raises(ValueError, match="TRAITDOSE_API_KEY"):
            write(server, 3)
        assert len(records(tmp_path / "out" / "new.jsonl")) == 1
    with serve(lambda body, n: failure(500)) as server, pytest.raises(ValueError, match="run the same command again"):
        write(server, 3)
    for name in ("new.jsonl", "new.jsonl.log.jsonl"):  # as a kill in the middle of a line leaves it
        with (tmp_path / "out" / name).open("a") as file:
            file.write('{"id": "patience-hea')
    with serve(lambda body, n: completion([text_of(2), text_of(4)][n])) as server:
        done = write(server, 3)
        assert (done.kept, done.asked, len(server.requests)) == (3, 3, 2)
        assert write(server, 3) == done  # whole already: nothing is asked
        assert len(server.requests) == 2
    assert [r["id"][-1] for r in records(done.path)] == ["2", "3", "4"]


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(write, tmp_path):
    with serve(lambda body, n: completion([text_of(1), text_of(2)][n])) as server:
        write(server, 1)
        path = tmp_path / "out" / "new.jsonl"
        path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as some editors leave it
        assert write(server, 2).kept == 2
    assert len(records(path)) == 2


def test_a_quarter_of_the_families_is_held_out(write, tmp_path, folders):
    (folders["bank"] / "patience" / "health.jsonl").unlink()
    order = [0, 1, 2, 3, 4]
    with serve(lambda body, n: completion(text_of(order[n]))) as server:
        cfg = GeneratorConfig(model=f"{server.url}/v1/m", max_concurrency=1)
        done = generate("patience", "health", 5, cfg, tmp_path / "five.jsonl", items=[], **folders)
    sides = [record["split"] for record in records(done.path)]
    assert sides == ["heldout", "train", "train", "train", "heldout"]


def test_requests_run_side_by_side(write):
    def slow(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.5)
        return completion(text_of([1, 2, 4][number]))

    with serve(slow) as server:
        assert write(server, 3, max_concurrency=3).kept == 3
    assert server.most_at_once == 3


@pytest.mark.slow
def test_a_killed_run_keeps_what_it_had(folders, tmp_path):
    out = tmp_path / "killed.jsonl"
    script = (
        "import sys; from pathlib import Path; from rewards.generate import GeneratorConfig, generate\n"
        "url, out, bank, cards = sys.argv[1:]\n"
        "cfg = GeneratorConfig(model=url + '/v1/m', max_concurrency=1)\n"
        "generate('patience', 'health', 3, cfg, Path(out), bank=Path(bank), cards=Path(cards), items=[])\n"
    )
    with serve(lambda body, n: completion(text_of([1, 2, 4][n])) if n < 2 else Reply(b"", delay=30)) as server:
        words = [server.url, str(out), str(folders["bank"]), str(folders["cards"])]
        process = subprocess.Popen([sys.executable, "-c", script, *words])
        deadline = time.monotonic() + 120
        while len(server.requests) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        cfg = GeneratorConfig(model=f"{server.url}/v1/m")
        with pytest.raises(ValueError, match="another process writes here"):
            generate("patience", "health", 3, cfg, out, items=[], **folders)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert len(records(out)) == 2
    with serve(lambda body, n: completion(text_of(4))) as server:
        cfg = GeneratorConfig(model=f"{server.url}/v1/m", max_concurrency=1)
        assert generate("patience", "health", 3, cfg, out, items=[], **folders).kept == 3
        assert len(server.requests) == 1


def test_mistakes_are_named(write, folders, tmp_path):
    cfg = GeneratorConfig(model="http://127.0.0.1:9/v1/m")
    with pytest.raises(ValueError, match="'patients' has no card; there are: patience"):
        generate("patients", "health", 1, cfg, tmp_path / "x.jsonl", items=[], **folders)
    with pytest.raises(ValueError, match="'arts' is not on the card of patience; there are: health, maths"):
        generate("patience", "arts", 1, cfg, tmp_path / "x.jsonl", items=[], **folders)
    other = tmp_path / "other.jsonl"
    other.write_text((folders["bank"] / "patience" / "health.jsonl").read_text())
    with pytest.raises(ValueError, match=r"other\.jsonl:1: is of patience/health"):
        generate("patience", "maths", 2, cfg, other, items=[], **folders)


def test_every_failure_gets_its_turn_and_never_twice_in_one(folders):
    card = load_trait(folders["cards"] / "patience.md")
    pairs = [request_messages(card, "health", t, [], [])[1]["content"].split("replies fail by ")[1] for t in range(9)]
    assert {tuple(sorted(pair.rstrip(".").split(" and by "))) for pair in pairs} == {
        ("dead-stop", "rush"), ("dither", "rush"), ("dead-stop", "dither")
    }  # fmt: skip
    assert all(len(set(pair.rstrip(".").split(" and by "))) == 2 for pair in pairs)


def test_every_domain_of_the_cards_is_described():
    assert {domain for card in load_traits().values() for domain in card.domains} == set(DOMAINS)
