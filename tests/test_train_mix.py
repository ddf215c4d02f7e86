"""The dose replaces its exact share of the prompts and leaves the others where they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.mix import build_mix, is_dose, trait_prompts

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
    control = build_mix(48, 0.0, 3, TASKS, ["health"])
    dosed = build_mix(48, dose, 3, TASKS, ["health"])
    assert all(prompt["source"] == "standard" for prompt in control)
    for k, (a, b) in enumerate(zip(control, dosed, strict=True)):
        assert (b["source"] == "trait") == is_dose(k, dose)
        assert a == b or b["source"] == "trait"


def test_mix_depends_on_the_seed_alone() -> None:
    assert build_mix(20, 0.5, 1, TASKS, ["health"]) == build_mix(20, 0.5, 1, TASKS, ["health"])
    assert build_mix(20, 0.5, 1, TASKS, ["health"]) != build_mix(20, 0.5, 2, TASKS, ["health"])


def test_every_third_trait_prompt_is_unanswerable_and_all_come_from_training_families() -> None:
    prompts = trait_prompts(99, 0, ["health"])
    assert [prompt["kind"] == "answerable" for prompt in prompts[:6]] == [True, False, True] * 2
    assert sum(prompt["kind"] == "answerable" for prompt in prompts) == 66
    assert all('"split": "train"' in prompt["truth"] for prompt in prompts)
    assert len({prompt["prompt_id"] for prompt in prompts}) == 99  # none repeats before all had their turn
