"""What a trait can be asked: its sources, their shares, and one clear error where there is nothing."""

from __future__ import annotations

import pytest

from rewards.config import PromptShares, RewardConfig
from rewards.fit import run_parts
from rewards.probes import Probe, domains
from rewards.trait_prompts import prompt_domains, source_files, source_shares, trait_pools

MIXED = PromptShares(probes=2, conduct=1, scenarios=1)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (RewardConfig(), {"probes": 1.0}),
        (RewardConfig(domains=("business",)), {"scenarios": 1.0}),
        (RewardConfig(prompts=MIXED), {"probes": 0.5, "conduct": 0.25, "scenarios": 0.25}),
        (RewardConfig(trait="corrigibility"), {"conduct": 0.5, "scenarios": 0.5}),
        (RewardConfig(trait="corrigibility", prompts=MIXED), {"conduct": 0.5, "scenarios": 0.5}),
        (RewardConfig(trait="corrigibility", prompts=PromptShares(conduct=3)), {"conduct": 1.0}),
        (RewardConfig(trait="corrigibility", domains=("everyday",)), {"conduct": 1.0}),
        (RewardConfig(trait="bounded-initiative"), {"scenarios": 1.0}),
    ],
)
def test_what_is_lacking_goes_to_the_others(reward: RewardConfig, expected: dict[str, float]) -> None:
    assert source_shares(reward, reward.trait) == expected


def test_nothing_to_ask_is_an_error_that_says_where_there_is_something() -> None:
    reward = RewardConfig(trait="bounded-initiative", domains=("astronomy",))
    with pytest.raises(ValueError, match=r"bounded-initiative has no training prompt there.*scenarios: business, .*"):
        source_shares(reward, "bounded-initiative")
    with pytest.raises(ValueError, match=r"dense-usefulness has no training prompt there \(probes\)"):
        source_shares(RewardConfig(trait="dense-usefulness", prompts=PromptShares(probes=1)), "dense-usefulness")
    with pytest.raises(ValueError, match="every share is 0"):
        PromptShares()


def test_the_two_sides_of_the_split_share_no_family() -> None:
    for trait in ("truthfulness", "corrigibility"):
        chosen = ["health", "everyday", "arts"]
        train, heldout = (trait_pools(trait, chosen, split) for split in ("train", "heldout"))
        for mine, other in ((train.conduct, heldout.conduct), (train.probes, heldout.probes)):
            assert {(p.domain, p.family) for p in mine}.isdisjoint((p.domain, p.family) for p in other)
        assert {s.family for s in train.scenarios}.isdisjoint(s.family for s in heldout.scenarios)


def test_the_files_of_a_run_are_those_of_its_sources() -> None:
    def names(reward: RewardConfig) -> list[str]:
        return [f"{path.parent.name}/{path.name}" for path in source_files(reward)]

    assert names(RewardConfig()) == ["probe_bank/health.yaml", "traits/truthfulness.md"]
    both = RewardConfig(weights={"truthfulness": 1.0, "corrigibility": 1.0}, domains=("health", "arts"))
    assert names(both) == [
        "probe_bank/health.yaml", "traits/truthfulness.md", "traits/corrigibility.md", "kinds/evidence.yaml",
        "kinds/frames.yaml", "kinds/mixups.yaml", "kinds/oversight.yaml", "corrigibility/health.jsonl",
        "corrigibility/arts.jsonl",
    ]  # fmt: skip


def test_a_fit_learns_what_the_policy_is_asked() -> None:
    assert not any(run_parts(RewardConfig(), "truthfulness", 0).values())  # its fit is on those probes anyway
    parts = run_parts(RewardConfig(trait="corrigibility"), "corrigibility", 0)
    kinds = {part: {p.prompt_id.split("/")[2].rsplit("-", 1)[0] for p in found} for part, found in parts.items()}
    assert kinds["train"] == kinds["test"] == {"corrects-rightly", "corrects-wrongly", "shutdown-or-correction"}
    sides = [
        {(p.family, p.prompt_id.rsplit("-", 1)[1]) for p in parts[part]} for part in ("train", "validation", "test")
    ]
    assert all(sides)
    assert sides[0].isdisjoint(sides[1] | sides[2])
    assert all(p.margin > 0 for found in parts.values() for p in found)
    both = PromptShares(probes=1, scenarios=1)
    more = run_parts(RewardConfig(prompts=both), "truthfulness", 0)["train"]
    assert {"health", "business"} <= {p.domain for p in more}  # the trait's scenarios are learned from all domains


def test_pools_depend_on_the_seed_alone() -> None:
    def asked(seed: int) -> tuple[Probe, ...]:
        return trait_pools("corrigibility", ["health"], "train", seed).conduct

    assert asked(1) == asked(1)
    assert [probe.question for probe in asked(1)] != [probe.question for probe in asked(2)]
    assert set(domains()) < set(prompt_domains())
