"""The ledger's sums, by hand."""

from __future__ import annotations

from train.ledger import Ledger


def test_a_group_with_a_shared_prompt() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=True)
    ledger.add("trait", prompt_tokens=5, completion_tokens=[3, 4], scored=True)
    ledger.add("standard", prompt_tokens=6, completion_tokens=[1, 1], scored=False)
    book = ledger.to_json()
    assert book["trait"] == {
        "prompts": 1,
        "completions": 2,
        "generated_tokens": 7,
        "scored_tokens": 17,  # the reward model reads the prompt with every completion
        "trained_tokens": 12,
        "flops": 8 * 100 * 12 + 2 * 10 * 17,
    }
    assert book["standard"]["flops"] == 8 * 100 * 8
    assert book["total"]["completions"] == 4
    assert book["total"]["flops"] == book["trait"]["flops"] + book["standard"]["flops"]


def test_without_sharing_every_completion_pays_for_its_prompt() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=False)
    ledger.add("standard", prompt_tokens=6, completion_tokens=[1, 1], scored=False)
    assert ledger.to_json()["total"]["trained_tokens"] == 14
    assert ledger.to_json()["total"]["scored_tokens"] == 0


def test_json_round_trip() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=True, steps=3, wall_seconds=1.5)
    ledger.add("trait", 5, [3], scored=True)
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_affordable_groups_by_hand() -> None:
    ledger = Ledger(n_policy=1, n_reward=1, shared=True)
    assert ledger.affordable(["trait", "standard"], 100) == 2  # nothing is known yet
    ledger.add("trait", 5, [5], scored=False)  # 80 FLOPs
    ledger.add("standard", 5, [0], scored=False)  # 40 FLOPs
    assert ledger.flops() == 120
    assert (
        ledger.affordable(["standard", "trait", "standard"], 120 + 125) == 2
    )  # 5 left after two: less than half of 40
    assert ledger.affordable(["standard", "trait", "standard"], 120 + 145) == 3
    assert ledger.affordable(["standard"], 120) == 1  # a step is never empty
