"""The ledger's sums, by hand."""

from __future__ import annotations

from train.config import TrainConfig, WatchConfig
from train.ledger import Ledger, Passes


def test_a_group_with_a_shared_prompt() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=True)
    ledger.add("trait", prompt_tokens=5, completion_tokens=[3, 4], scored=True)
    ledger.add("standard", prompt_tokens=6, completion_tokens=[1, 1], scored=False)
    book = ledger.to_json()
    assert book["trait"] == {
        "prompts": 1,
        "completions": 2,
        "generated_tokens": 7,
        "scored_tokens": 12,  # the reward model, too, reads the prompt once
        "trained_tokens": 12,
        "flops": 8 * 100 * 12 + 2 * 10 * 12,
    }
    assert book["standard"]["flops"] == 8 * 100 * 8
    assert book["total"]["completions"] == 4
    assert book["total"]["flops"] == book["trait"]["flops"] + book["standard"]["flops"]


def test_without_sharing_every_completion_pays_for_its_prompt() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=False)
    ledger.add("standard", prompt_tokens=6, completion_tokens=[1, 1], scored=False)
    assert ledger.to_json()["total"]["trained_tokens"] == 14
    assert ledger.to_json()["total"]["scored_tokens"] == 0


def test_an_update_reads_what_it_learns_from() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=True)
    ledger.add("trait", 5, [3, 4], scored=True, trained=[True, False])
    ledger.add("standard", 6, [1, 1], scored=False, trained=[False, False])  # no advantage: sampled and no more
    book = ledger.to_json()
    assert (book["trait"]["trained_tokens"], book["standard"]["trained_tokens"]) == (8, 0)
    assert book["trait"]["flops"] == 2 * 100 * 12 + 6 * 100 * 8 + 2 * 10 * 12
    assert book["standard"]["flops"] == 2 * 100 * 8


def test_json_round_trip() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=True, steps=3, wall_seconds=1.5)
    ledger.add("trait", 5, [3], scored=True)
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_affordable_groups_by_hand() -> None:
    ledger = Ledger(n_policy=1, n_reward=1, shared=True)
    assert ledger.affordable(["trait", "standard"], 100) == 2  # nothing is known yet
    ledger.add("trait", 5, [5], scored=False)  # 80 FLOPs
    ledger.add("standard", 5, [0], scored=False)  # 40 FLOPs
    assert ledger.spent() == 120
    assert (
        ledger.affordable(["standard", "trait", "standard"], 120 + 125) == 2
    )  # 5 left after two: less than half of 40
    assert ledger.affordable(["standard", "trait", "standard"], 120 + 145) == 3
    assert ledger.affordable(["standard"], 120) == 1  # a step is never empty


def test_a_source_without_a_cost_counts_as_the_mean_group() -> None:
    ledger = Ledger(n_policy=1, n_reward=1, shared=True)
    ledger.add("standard", 5, [5], scored=False)  # 80 FLOPs
    ledger.add("standard", 5, [0], scored=False)  # 40: a mean of 60
    assert ledger.affordable(["trait", "trait", "trait"], 120 + 89) == 1
    assert ledger.affordable(["trait", "trait", "trait"], 120 + 91) == 2
    assert ledger.affordable(["standard", "trait"], 120 + 91) == 2


def test_groups_are_affordable_in_as_many_as_share_a_step() -> None:
    ledger = Ledger(n_policy=1, n_reward=1, shared=True)
    ledger.add("trait", 5, [5], scored=False)  # 80 FLOPs
    ledger.add("standard", 5, [0], scored=False)  # 40
    coming = ["standard", "trait"] * 3  # 120 for every two
    assert ledger.affordable(coming, 120 + 120 + 59, parts=2) == 2
    assert ledger.affordable(coming, 120 + 120 + 61, parts=2) == 4
    assert ledger.affordable(coming, 120, parts=2) == 2  # no part of a step is empty
    assert ledger.affordable(coming, 1000, parts=2) == 6
    assert not ledger.exhausted(120 + 60, parts=2)  # two mean groups take 120
    assert ledger.exhausted(120 + 59, parts=2)
    assert not ledger.exhausted(120 + 30)
    assert ledger.exhausted(120 + 29)


def test_affordable_groups_in_tokens_by_hand() -> None:
    ledger = Ledger(n_policy=1, n_reward=1, shared=True)
    ledger.add("trait", 5, [6, 4], scored=False)  # 10 sampled tokens
    ledger.add("standard", 50, [2, 2], scored=False)  # 4
    assert ledger.spent("generated_tokens") == 14
    assert ledger.affordable(["trait", "standard", "trait"], 14 + 10, "generated_tokens") == 1
    assert ledger.affordable(["trait", "standard", "trait"], 14 + 18, "generated_tokens") == 2
    assert ledger.affordable(["trait", "standard", "trait"], 14 + 19, "generated_tokens") == 3
    assert not ledger.exhausted(14 + 4, "generated_tokens")  # a group takes 7 on average
    assert ledger.exhausted(14 + 3, "generated_tokens")


def test_passes_of_the_algorithms_by_hand() -> None:
    n = 100
    assert Passes.of(TrainConfig()).token_flops(n) == 8 * n  # sampled 2N, trained 6N
    assert Passes.of(TrainConfig(beta=0.1)).token_flops(n) == 10 * n  # and read by the reference
    assert Passes.of(TrainConfig(max_kl=1.0)).token_flops(n) == 10 * n
    assert Passes.of(TrainConfig(watch=WatchConfig.model_validate({"kl": {"threshold": 1}}))).token_flops(n) == 10 * n
    assert Passes.of(TrainConfig(algorithm="rloo")).token_flops(n) == 8 * n
    assert Passes.of(TrainConfig(algorithm="rloo", beta=0.1)).token_flops(n) == 12 * n  # and by the policy, for the KL
    ppo = Passes.of(TrainConfig(algorithm="ppo"))
    assert ppo.token_flops(n) == (2 + 2 + 6) * n + (2 + 6) * n  # policy: sampled, read, trained; critic: read, trained
    assert ppo.token_flops(n, policy_learns=False) == (2 + 2) * n + (2 + 6) * n
    twice = Passes.of(TrainConfig(algorithm="ppo", beta=0.1, epochs=2))
    assert twice.token_flops(n) == (2 + 2 + 2 + 12) * n + (2 + 12) * n


def test_the_critic_is_booked() -> None:
    ledger = Ledger(n_policy=100, n_reward=10, shared=True, passes=Passes.of(TrainConfig(algorithm="ppo", epochs=3)))
    ledger.add("trait", 5, [3, 4], scored=True)
    ledger.add("standard", 5, [3, 4], scored=False, policy_learns=False)
    book = ledger.to_json()
    assert book["trait"]["flops"] == 12 * 100 * (2 + 2 + 18 + 2 + 18) + 2 * 10 * 12
    assert book["standard"]["flops"] == 12 * 100 * (2 + 2 + 2 + 18)
    assert book["trait"]["trained_tokens"] == 36
    assert Ledger.from_json(book) == ledger
