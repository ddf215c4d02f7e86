"""Persistence by hand: degradation, the index, half-lives; and the conditions on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eval.attacks import load_attacks
from eval.item_forms import Request
from eval.persistence import (
    COLUMNS,
    Target,
    load_targets,
    measure_attack,
    measure_clean,
    measure_samples,
    only_probes,
    worst_of,
)
from eval.persistence_results import attack_rows, ladder_rows, persistence_claims, selective_rows
from eval.persistence_stats import (
    crossing_interval,
    degradations,
    first_crossing,
    half_life,
    loss_difference,
    mean_loss,
    recovery,
    resampled_means,
    selective_persistence,
    share_longer,
    value_difference,
)
from eval.report_persistence import crossing_text
from eval.stats import paired_difference

SUITE = Path(__file__).parent.parent / "configs" / "suites" / "alignment-offline.yaml"
ATTACKS = {attack.id: attack for attack in load_attacks()}
LADDER = {"floor": 0.0, "recovered": 0.9}


def table(values: dict[str, list[float]], metric: str = "trait", role: str = "harmful", **more: Any) -> pd.DataFrame:
    """Items 0, 1, ... with a family each, by condition."""
    rows = [
        {
            "task": "t", "domain": "d", "family": f"f{k}", "item": f"i{k}", "kind": "invented", "seed": 0,
            "condition": condition, "role": "clean" if condition == "clean" else role, "metric": metric, "value": value,
            **more,
        }
        for condition, column in values.items()
        for k, value in enumerate(column)
    ]  # fmt: skip
    return pd.DataFrame(rows)


# Degradation


def test_degradation_by_hand() -> None:
    losses = degradations(table({"clean": [1, 1, 0, 1]}), table({"a": [0, 1, 0, 0], "b": [1, 1, 1, 1]}))
    assert list(losses[losses["condition"] == "a"]["loss"]) == [1, 0, 0, 1]
    assert list(losses[losses["condition"] == "b"]["loss"]) == [0, 0, -1, 0]
    assert mean_loss(losses[losses["condition"] == "a"]).delta == 0.5
    assert mean_loss(losses).delta == pytest.approx(1 / 8)


def test_the_difference_is_paired_by_item_and_condition() -> None:
    arm = degradations(table({"clean": [1, 1, 1, 1]}), table({"a": [1, 1, 0, 1], "b": [1, 0, 1, 1]}))
    control = degradations(table({"clean": [1, 1, 1, 0]}), table({"a": [0, 0, 0, 0], "b": [0, 1, 1, 0]}))
    # arm loses 2 of 8, control 3 of 4 and 1 of 4
    difference = loss_difference(arm, control)
    assert difference.delta == pytest.approx(2 / 8 - 4 / 8)
    shuffled = control.sample(frac=1, random_state=1)
    assert loss_difference(arm, shuffled) == difference
    by_hand = paired_difference([-1, -1, 0, 0, -1, 1, 0, 0], ["f0", "f1", "f2", "f3"] * 2, strata=["x"] * 8, span=2.0)
    assert (difference.ci_low, difference.ci_high) == pytest.approx((by_hand.ci_low, by_hand.ci_high))


def test_an_item_without_a_clean_row_is_an_error_and_one_without_a_value_is_left_out() -> None:
    with pytest.raises(ValueError, match="i2"):
        degradations(table({"clean": [1, 1]}), table({"a": [1, 1, 1]}))
    assert len(degradations(table({"clean": [1, math.nan]}), table({"a": [1, 1]}))) == 1


def test_rows_of_an_attack_by_hand() -> None:
    control = table({"clean": [1, 1, 1, 0], "a": [0, 0, 1, 0], "b": [1, 1, 1, 0]})
    arm = table({"clean": [1, 1, 1, 1], "a": [1, 1, 1, 0], "b": [1, 1, 1, 1]})
    rows = {(row["arm"], row["condition"]): row for row in attack_rows({"control": control, "dose": arm})}
    assert rows["control", "a"]["degradation"] == 0.5
    assert rows["control", "a"]["difference"] is None
    row = rows["dose", "a"]
    assert (row["clean"], row["attacked"], row["degradation"], row["n"]) == (1.0, 0.75, 0.25, 4)
    assert row["difference"]["delta"] == pytest.approx(-0.25)
    assert row["difference"]["q"] >= row["difference"]["p"]
    assert rows["dose", "all harmful"]["degradation"] == pytest.approx(1 / 8)
    assert rows["dose", "all harmful"]["difference"]["delta"] == pytest.approx(1 / 8 - 2 / 8)
    assert rows["dose", "all harmful"]["difference"]["q"] is None
    (claim,) = persistence_claims({"prompts": list(rows.values()), "selective": []})
    assert claim["arm"] == "dose"
    assert "-12.5 [" in claim["text"]


@pytest.mark.parametrize(
    ("low", "high", "words", "holds"),
    [
        (-0.2, -0.05, "better than control", True),  # loses less
        (0.05, 0.2, "worse than control", False),
        (-0.05, 0.1, "not told apart from control", None),
    ],
)
def test_a_claim_on_persistence_follows_its_intervals(low: float, high: float, words: str, holds: bool | None) -> None:
    gap = {"delta": (low + high) / 2, "ci_low": low, "ci_high": high}
    row = {"condition": "all harmful", "arm": "dose", "difference": gap, "n": 8, "clean": 0.75, "attacked": 0.5}
    index = {"arm": "dose", "index": 0.1, "difference": {"delta": -0.3, "ci_low": -0.5, "ci_high": -0.1}}
    (claim,) = persistence_claims({"prompts": [row], "selective": [index]})
    assert claim["text"].startswith(f"dose is {words} under harmful personas and pressure: ")
    assert "in selective persistence it is worse than control: +0.10, difference -0.30" in claim["text"]
    assert claim["holds"] is holds


# Selective persistence


def index(clean: list[float], attacked: list[float], before: list[float], after: list[float]) -> Any:
    falls = degradations(table({"clean": clean}), table({"a": attacked}))
    helpful = table({"h": after}, metric="follows", role="helpful").assign(clean=before)
    return selective_persistence(falls, helpful)


def test_the_index_by_hand() -> None:
    # of 4 good answers 1 falls; of 4 replies that did not follow 3 are moved
    items = index([1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0])
    assert items["falls"].mean() == pytest.approx(1 / 4)
    assert items["moves"].mean() == pytest.approx(3 / 4)
    assert items["value"].mean() == pytest.approx(1 / 2)


@pytest.mark.parametrize(("moved", "expected"), [(0.0, 0.0), (1.0, 0.0)])
def test_neither_the_deaf_nor_the_obedient_have_an_index(moved: float, expected: float) -> None:
    n = 6
    items = index([1.0] * n, [1 - moved] * n, [0.0] * n, [moved] * n)
    assert items["value"].mean() == pytest.approx(expected)
    assert index([1.0] * n, [1.0] * n, [0.0] * n, [1.0] * n)["value"].mean() == pytest.approx(1.0)
    assert index([1.0] * n, [0.0] * n, [0.0] * n, [0.0] * n)["value"].mean() == pytest.approx(-1.0)


def test_the_linearised_interval_is_the_ratios_own() -> None:
    """Against the standard error of the ratio under resampling, many items."""
    rng = np.random.default_rng(0)
    n = 400
    clean, attacked = (rng.random(n) < 0.6).astype(float), (rng.random(n) < 0.5).astype(float)
    items = index(list(clean), list(attacked), [0.0] * n, [0.0] * n)
    draws = rng.integers(0, n, (4000, n))
    falls = (clean * (1 - attacked))[draws].sum(1) / clean[draws].sum(1)
    se = items["falls"].std() / math.sqrt(n)
    assert se == pytest.approx(falls.std(), rel=0.05)
    assert items["falls"].mean() == pytest.approx((clean * (1 - attacked)).sum() / clean.sum())


def test_rows_of_the_index() -> None:
    def arm(attacked: list[float], after: list[float]) -> pd.DataFrame:
        return pd.concat(
            [
                table({"clean": [1, 1, 1, 1], "salesman": attacked}),
                table({"librarian": after}, metric="follows", role="helpful"),
                table({"librarian": [0, 0, 0, 1]}, metric="follows_clean", role="helpful"),
            ]
        )

    rows = selective_rows({"control": arm([0, 0, 1, 1], [1, 0, 0, 1]), "dose": arm([0, 1, 1, 1], [1, 1, 0, 1])})
    control, dose = rows
    assert (control["falls"], control["moves"]) == pytest.approx((0.5, 1 / 3))
    assert dose["index"] == pytest.approx(2 / 3 - 1 / 4)
    assert control["difference"] is None
    assert dose["difference"]["delta"] == pytest.approx(dose["index"] - control["index"])
    assert dose["personas"] == [{"condition": "librarian", "anyway": 0.25, "followed": 0.75}]


# Curves


def test_half_life_by_hand() -> None:
    # from 0.8 to the floor 0.2 half is lost at 0.5: half-way between steps 1 (0.6) and 3 (0.4) in log(1 + step)
    assert half_life([0, 1, 3], [0.8, 0.6, 0.4], 0.2) == pytest.approx(math.sqrt(2 * 4) - 1)
    assert half_life([0, 1, 3], [0.8, 0.5, 0.4], 0.2) == pytest.approx(1.0)
    assert half_life([0, 1, 3], [0.8, 0.7, 0.6], 0.2) is None
    assert math.isnan(half_life([0, 1], [0.2, 0.1], 0.2) or 0.0)


def test_the_first_crossing_counts_though_the_curve_rises_again() -> None:
    steps, scores = [0, 1, 3, 7, 15], [1.0, 0.4, 0.9, 0.3, 0.1]
    first = half_life(steps, scores, 0.0)
    assert first == pytest.approx(2 ** (0.5 / 0.6) - 1)
    assert half_life(steps[:2], scores[:2], 0.0) == first
    assert half_life(steps, [1.0, 0.9, 0.95, 0.6, 0.9], 0.0) is None


def test_recovery_by_hand() -> None:
    assert recovery([0, 1, 3], [0.1, 0.5, 0.9], clean=1.0, floor=0.0, share=0.9) == pytest.approx(3.0)
    assert recovery([0, 1, 3], [0.1, 0.5, 0.8], clean=1.0, floor=0.0, share=0.9) is None
    assert recovery([0, 1], [0.95, 0.2], clean=1.0, floor=0.0, share=0.9) == 0.0
    # floor 0.2: back at 0.2 + 0.5 * 0.6 = 0.5
    assert recovery([0, 1], [0.4, 0.6], clean=0.8, floor=0.2, share=0.5) == pytest.approx(math.sqrt(2) - 1)
    assert first_crossing([0, 4], [0.0, 0.0], 0.1, rising=True) is None


def test_a_bound_beyond_the_last_step_is_censored() -> None:
    found = [3.0, *[2.0] * 50, *[None] * 50]
    crossing = crossing_interval(found, last=32)
    assert crossing is not None
    assert (crossing.value, crossing.low, crossing.high, crossing.last) == (3.0, 2.0, None, 32)
    censored = crossing_interval([None] * 101, last=32)
    assert censored is not None
    assert (censored.value, censored.low, censored.high) == (None, None, None)
    assert crossing_interval([math.nan, 1.0], last=32) is None
    assert share_longer([None, None, 4.0, 2.0, None], [None, 3.0, 3.0, 3.0, None]) == pytest.approx(
        (1 + 1 + 0 + 0.5) / 4
    )


def test_steps_in_words() -> None:
    assert crossing_text({"steps": 5.25, "ci_low": 3.1, "ci_high": None, "last": 32}, "x") == "5.2 [3.1, > 32]"
    assert crossing_text({"steps": None, "ci_low": 3.1, "ci_high": None, "last": 8}, "x") == "> 8 [3.1, > 8]"
    assert crossing_text(None, "score above the floor") == "no score above the floor"


def curve(scores: dict[int, list[float]], seed: int = 0) -> pd.DataFrame:
    tables = [table({f"step-{step}": values}, role="step", step=step) for step, values in scores.items()]
    return pd.concat(tables).assign(seed=seed)


def test_resampled_means_pair_arms_steps_and_weigh_families() -> None:
    arm = curve({0: [1, 1, 0, 1], 2: [0, 0, 0, 1]})
    means, again, other = resampled_means([arm, arm, arm.assign(value=1 - arm["value"])], resamples=300)
    assert means[0] == pytest.approx([0.75, 0.25])
    assert (means == again).all()
    assert other == pytest.approx(1 - means)
    # families are drawn, so a mean of 4 families has the binomial's spread
    assert means[1:, 0].std() == pytest.approx(math.sqrt(0.75 * 0.25 / 4), rel=0.15)
    two = pd.concat([curve({0: [1, 1, 1, 1]}, 0), curve({0: [0, 0, 0, 0]}, 1)])
    (seeds,) = resampled_means([two], resamples=2000)
    # no family differs, so all spread is the two seeds'
    assert seeds[1:, 0].std() == pytest.approx(math.sqrt(0.25 / 2), rel=0.1)


def test_rows_of_a_ladder() -> None:
    n = 8
    half = [1.0] * (n // 2) + [0.0] * (n // 2)
    control = curve({0: [1.0] * n, 1: half, 3: [0.0] * n})
    dose = curve({0: [1.0] * n, 1: [1.0] * n, 3: [1.0] * (n - 1) + [0.0]})
    back = curve({1: [1.0] * n, 3: [1.0] * n})
    rows = ladder_rows({"control": control, "dose": dose}, {"control": back, "dose": back}, LADDER)
    first, second = rows
    assert [point["step"] for point in first["harmful"]] == [0, 1, 3]
    assert first["half_life"]["steps"] == pytest.approx(1.0)
    assert second["half_life"] == {"steps": None, "ci_low": None, "ci_high": None, "last": 3}
    assert second["half_life_longer_than_control"] == 1.0
    assert second["harmful"][1]["difference"]["delta"] == pytest.approx(0.5)
    assert [point["value"] for point in first["recovery"]] == [0.0, 1.0, 1.0]
    # 0.9 of the way from 0 (step 0) to 1 (step 1)
    assert first["recovered"]["steps"] == pytest.approx(2**0.9 - 1)
    assert second["recovered"]["steps"] == pytest.approx(2 ** ((0.9 - 7 / 8) / (1 / 8)) - 1)


def slow(*values: int) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def null_table(rng: np.random.Generator, families: int, seeds: int) -> pd.DataFrame:
    """An arm whose items fall with a chance that its family and its seed move: no arm differs from another."""
    rows = []
    for family, shift in enumerate(family_shifts(families)):
        for item in range(3):
            for seed in range(seeds):
                clean, attacked = rng.random(2) < np.array([0.7, 0.4]) + shift
                about = {"task": "t", "domain": "d", "family": f"f{family}", "item": f"i{family}-{item}", "seed": seed}
                about |= {"kind": "invented", "metric": "trait", "role": "harmful"}
                rows += [{**about, "condition": "clean", "value": float(clean)}]
                rows += [{**about, "condition": "a", "value": float(attacked)}]
    return pd.DataFrame(rows)


def family_shifts(families: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(-0.25, 0.25, families)


@pytest.mark.parametrize(("seeds", "runs"), [(1, 12), slow(1, 400), slow(3, 400)])
def test_identical_arms_are_told_apart_in_one_of_twenty(seeds: int, runs: int) -> None:
    rng = np.random.default_rng(1)
    covered = index_covered = 0
    for _ in range(runs):
        arms = [null_table(rng, 16, seeds) for _ in range(2)]
        losses = [degradations(arm[arm["condition"] == "clean"], arm[arm["condition"] == "a"]) for arm in arms]
        difference = loss_difference(*losses)
        covered += difference.ci_low <= 0 <= difference.ci_high
        helpful = [arm[arm["condition"] == "a"].assign(clean=0.0) for arm in arms]
        items = [selective_persistence(loss, follow) for loss, follow in zip(losses, helpful, strict=True)]
        both = value_difference(*items)
        index_covered += both.ci_low <= 0 <= both.ci_high
    slack = 3 * math.sqrt(0.95 * 0.05 / runs)
    assert covered / runs > 0.95 - slack
    assert index_covered / runs > 0.95 - slack
    if runs >= 400:  # intervals that always cover would say nothing
        assert covered / runs < 0.99
        assert index_covered / runs < 0.995


# Conditions on a model


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    names = ("truthfulness-law", "lie-detection", "pressure-general", "sycophancy-pushback")
    found = load_targets(SUITE, names, 2, 0)
    short = [target.task.model_copy(update={"max_new_tokens": 6}) if target.probes else target.task for target in found]
    return [Target(task, target.items) for task, target in zip(short, found, strict=True)]


def test_targets_are_chosen_by_name_and_hold_no_compliance_task() -> None:
    found = load_targets(SUITE, None, 2, 0)
    assert not [item for target in found for item in target.items if isinstance(item, Request)]
    with pytest.raises(ValueError, match=r"persistence\.tasks = 'over-refusal-xstest'"):
        load_targets(SUITE, ("over-refusal-xstest",), 2, 0)
    with pytest.raises(ValueError, match="source: probes"):
        only_probes(load_targets(SUITE, ("lie-detection",), 2, 0))


def test_every_condition_asks_the_same_items(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, targets: list[Target]
) -> None:
    clean = measure_clean(tiny_model, tokenizer, targets)
    assert tuple(clean.columns) == COLUMNS
    assert clean["item"].is_unique
    assert set(clean["task"]) == {target.task.name for target in targets}
    probes = {probe.id for target in targets for probe in target.probes}
    for name in ("salesman", "document", "prefill", "planted-answer", "sign-painter"):
        attack = ATTACKS[name]
        rows = measure_attack(tiny_model, tokenizer, targets, attack, clean)
        trait = rows[rows["metric"] == "trait"]
        expected = (
            set(clean["item"]) if attack.channel in ("system", "document") and attack.role == "harmful" else probes
        )
        assert set(trait["item"]) == expected
        assert set(rows["condition"]) == {name}
        assert (set(rows["metric"]) == {"trait"}) == (attack.role == "harmful")
    opened = measure_attack(tiny_model, tokenizer, targets, ATTACKS["prefill"], clean)
    assert opened["output"].str.startswith("The answer is").all()


def test_an_attack_that_says_nothing_changes_nothing(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, targets: list[Target]
) -> None:
    """The attacked path is the clean path: with the same prompts come the same values."""
    system = ATTACKS["comedian"].turns[0]
    clean = measure_clean(tiny_model, tokenizer, targets, system)
    told = measure_attack(tiny_model, tokenizer, targets, ATTACKS["comedian"], clean)
    same = told.merge(clean, on="item", suffixes=("", "_clean"))
    probes = same[same["task"] == "truthfulness-law"]
    assert (probes["output"] == probes["output_clean"]).all()
    scored = same[same["task"].isin(["lie-detection", "sycophancy-pushback"])]
    assert len(scored) == 4
    assert (scored["output"] == scored["output_clean"]).all()
    assert (same["value"] == same["value_clean"])[same["task"] != "pressure-general"].all()


def test_insistence_goes_on_from_the_models_own_replies(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, targets: list[Target]
) -> None:
    clean = measure_clean(tiny_model, tokenizer, targets)
    rows = measure_attack(tiny_model, tokenizer, targets, ATTACKS["insistence"], clean)
    assert sorted(set(rows["metric"])) == ["trait", "trait_turn_1", "trait_turn_2", "trait_turn_3"]
    said = dict(zip(clean["item"], clean["output"], strict=True))
    first = rows[rows["metric"] == "trait_turn_1"].set_index("item")
    last = rows[rows["metric"] == "trait"].set_index("item")
    for item in last.index:
        assert f"[assistant] {said[item]}" in first.loc[item, "prompt"]
        assert f"[assistant] {first.loc[item, 'output']}" in last.loc[item, "prompt"]


def test_worst_of_n_is_the_mean_over_all_subsets() -> None:
    assert worst_of(1, 3, 4) == 0.75
    assert worst_of(2, 3, 4) == pytest.approx(3 / 6)
    assert worst_of(4, 3, 4) == 0.0
    assert worst_of(4, 4, 4) == 1.0


def test_samples_depend_on_item_and_seed_alone(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, targets: list[Target]
) -> None:
    probes = only_probes(targets)
    torch.manual_seed(3)
    rows = measure_samples(tiny_model, tokenizer, probes, 1.0, (1, 2), 3, seed=0)
    fewer = [Target(probes[0].task, probes[0].items[:2])]
    torch.manual_seed(4)
    again = measure_samples(tiny_model, tokenizer, fewer, 1.0, (1, 2), 3, seed=0)
    both = rows.merge(again, on=["item", "condition"], suffixes=("", "_again"))
    assert len(both) == 4
    assert (both["output"] == both["output_again"]).all()
    assert set(rows["condition"]) == {"temperature-1-worst-of-1", "temperature-1-worst-of-2"}
    wide = rows.pivot_table(index="item", columns="condition", values="value")
    assert (wide["temperature-1-worst-of-2"] <= wide["temperature-1-worst-of-1"]).all()
    other = measure_samples(tiny_model, tokenizer, fewer, 1.0, (1,), 3, seed=1)
    assert set(other["output"]) != set(again["output"])
