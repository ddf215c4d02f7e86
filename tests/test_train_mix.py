"""The dose replaces its exact share of the prompts, leaves the others where they were, and its traits have turns."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from itertools import combinations, islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.config import PromptShares, RewardConfig
from rewards.probes import Probe
from rewards.scenarios import load_scenarios
from rewards.traits import load_traits
from rewards.verifier import gold
from scripts.experiment import CHECKOUT, load_experiment
from train.mix import WARM_START, build_mix, is_dose, standard_prompts, take_turns, trait_prompts

HEALTH = RewardConfig()
TRAITS = load_traits()
SCENARIOS = {scenario.id: scenario for scenario in load_scenarios()}
TASKS = {"chain_sum": {"min_terms": 2, "max_terms": 2}, "gcd": {}, "spell_backward": {}}


@given(st.floats(0, 1), st.integers(1, 400))
def test_share_is_exact(dose: float, n: int) -> None:
    assert abs(sum(is_dose(k, dose) for k in range(n)) - dose * n) < 1 + 1e-6


def test_doses_by_hand() -> None:
    assert [is_dose(k, 0.25) for k in range(8)] == [False, False, False, True] * 2
    assert [is_dose(k, 0.5) for k in range(4)] == [False, True] * 2
    assert not any(is_dose(k, 0.0) for k in range(100))
    assert all(is_dose(k, 1.0) for k in range(100))


@pytest.mark.parametrize("dose", [0.1, 0.25, 0.5, 1.0])
def test_the_rest_are_the_same_prompts_at_the_same_positions(dose: float) -> None:
    control = build_mix(48, 0.0, 3, TASKS, HEALTH)
    dosed = build_mix(48, dose, 3, TASKS, HEALTH)
    assert all(prompt["source"] == "standard" for prompt in control)
    for k, (a, b) in enumerate(zip(control, dosed, strict=True)):
        assert (b["source"] == "trait") == is_dose(k, dose)
        assert a == b or b["source"] == "trait"


def test_mix_depends_on_the_seed_alone() -> None:
    assert build_mix(20, 0.5, 1, TASKS, HEALTH) == build_mix(20, 0.5, 1, TASKS, HEALTH)
    assert build_mix(20, 0.5, 1, TASKS, HEALTH) != build_mix(20, 0.5, 2, TASKS, HEALTH)


def test_seeds_and_the_warm_start_share_no_item() -> None:
    """Item i of reasoning-gym's seed s is drawn from s + i: seeds 0 and 1 would share all items but one."""
    tasks = {"spell_backward": {"min_word_len": 3, "max_word_len": 10}, "letter_counting": {}}
    drawn = [standard_prompts(400, seed, tasks, first) for seed in (0, 1, 2) for first in (0, WARM_START)]
    asked = [{prompt["prompt"][0]["content"] for prompt in prompts} for prompts in drawn]
    assert all(len(questions) > 350 for questions in asked)  # few repeat by chance
    assert all(len(a & b) < 20 for a, b in combinations(asked, 2))
    later = [standard_prompts(20, 0, tasks, first) for first in (0, 5)]
    assert [p["prompt"] for p in later[0][10:]] == [p["prompt"] for p in later[1][:10]]  # `first` counts a task's items


def test_every_third_trait_prompt_is_unanswerable_and_all_come_from_training_families() -> None:
    prompts = trait_prompts(99, 0, HEALTH)
    assert [prompt["kind"] == "answerable" for prompt in prompts[:6]] == [True, False, True] * 2
    assert sum(prompt["kind"] == "answerable" for prompt in prompts) == 66
    assert all('"split": "train"' in prompt["truth"] for prompt in prompts)
    assert len({prompt["prompt_id"] for prompt in prompts}) == 99  # none repeats before all had their turn


def digest(prompts: list[dict[str, Any]]) -> str:
    """A hash of the prompts without the name of the trait."""
    rows = [{key: value for key, value in prompt.items() if key != "trait"} for prompt in prompts]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()


def test_the_quickstart_asks_what_it_asked_when_probes_were_the_only_source() -> None:
    """The hashes were taken before there were others. They change with the authored facts of health."""
    quickstart = load_experiment(CHECKOUT / "configs" / "experiments" / "quickstart.yaml")
    mix = build_mix(64, 0.25, 0, quickstart.standard.tasks, quickstart.reward)
    assert digest(mix) == "4e1ea7c59ed7bd1cb1258bbee282e332e4d78900acb607f3fc34351defbfc53d"
    asked = trait_prompts(64, 0, quickstart.reward)
    assert digest(asked) == "8972685641ff9419f95c7ccedc81c5e2eb6e7cfeb3bce31d75ea01ddc07dc3e1"
    assert {prompt["trait"] for prompt in asked} == {"truthfulness"}


def test_turns_by_hand() -> None:
    assert "".join(islice(take_turns({"a": 0.5, "b": 0.25, "c": 0.25}), 8)) == "abcaabca"
    assert "".join(islice(take_turns({"a": 1.0, "b": 1.0}), 5)) == "ababa"
    assert "".join(islice(take_turns({"a": 3.0, "b": 1.0}), 8)) == "aabaaaba"


@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=3), st.integers(1, 300))
def test_turns_keep_the_shares_at_every_moment(shares: list[float], n: int) -> None:
    named = {str(i): share for i, share in enumerate(shares)}
    taken = Counter(islice(take_turns(named), n))
    assert all(abs(taken[name] - n * share / sum(shares)) <= 1 + 1e-6 for name, share in named.items())


def scenario_domains() -> tuple[str, ...]:
    return tuple(sorted({scenario.domain for scenario in SCENARIOS.values()}))


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_has_its_own_prompts(trait: str) -> None:
    """In all twelve domains: whole chats of training families, judged by the verifier where a rule exists."""
    assert len(scenario_domains()) == 12
    asked = trait_prompts(60, 0, RewardConfig(trait=trait, domains=scenario_domains()))
    assert {prompt["trait"] for prompt in asked} == {trait}
    kinds = {prompt["kind"] for prompt in asked}
    knowledge = {"answerable", "invented", "false-premise"}
    own = set(TRAITS[trait].reward.conduct)
    assert kinds == (knowledge if trait == "truthfulness" else {"scenario"} | own)
    for prompt in asked:
        truth = json.loads(prompt["truth"])
        assert prompt["prompt"][-1]["role"] == "user"
        if prompt["kind"] == "scenario":
            scenario = SCENARIOS[prompt["prompt_id"]]
            assert (scenario.trait, scenario.split, truth) == (trait, "train", None)
            assert prompt["prompt"] == [{"role": turn.role, "content": turn.content} for turn in scenario.messages]
        else:
            probe = Probe(**truth)
            assert (probe.split, probe.kind) == ("train", prompt["kind"])
            assert prompt["prompt"] == probe.messages
            assert not probe.right or gold(probe, probe.right) == 1.0


def test_all_sources_at_once_by_share_and_every_one_in_turn() -> None:
    shares = PromptShares(probes=2, conduct=1, scenarios=1)
    asked = trait_prompts(400, 0, RewardConfig(domains=scenario_domains(), prompts=shares))
    scenarios = [prompt["prompt_id"] for prompt in asked if prompt["kind"] == "scenario"]
    conduct = Counter(prompt["kind"] for prompt in asked if prompt["kind"] in TRAITS["truthfulness"].reward.conduct)
    assert len(scenarios) == 100
    assert set(conduct.values()) == {20}  # five kinds share the other hundred
    pool = {s.id for s in SCENARIOS.values() if (s.trait, s.split) == ("truthfulness", "train")}
    assert set(scenarios[: len(pool)]) == pool  # each once before any comes again
    assert scenarios[: len(pool)] != scenarios[len(pool) : 2 * len(pool)]
    assert any(turn["role"] == "assistant" for prompt in asked for turn in prompt["prompt"])


def test_several_traits_take_turns_by_weight() -> None:
    weights = {"truthfulness": 3.0, "corrigibility": 1.0}
    asked = trait_prompts(80, 0, RewardConfig(weights=weights))
    assert Counter(prompt["trait"] for prompt in asked) == {"truthfulness": 60, "corrigibility": 20}
    assert all(prompt["trait"] == "truthfulness" for prompt in asked if prompt["kind"] == "answerable")
    alone = trait_prompts(60, 0, HEALTH)
    assert [prompt for prompt in asked if prompt["trait"] == "truthfulness"] == alone  # another trait changes nothing


def test_only_training_domains_are_asked() -> None:
    asked = trait_prompts(30, 0, RewardConfig(trait="corrigibility", domains=("health", "arts")))
    assert {prompt["task"].split("/")[0] for prompt in asked} == {"health", "arts"}
    everyday = trait_prompts(30, 0, RewardConfig(domains=("everyday",)))  # a bank without unanswerable questions
    assert {prompt["kind"] for prompt in everyday} == {"answerable"}
