"""What pays a prompt, by which weights, and what a missing score does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest

from rewards.compose import Messages, reward_functions
from rewards.config import RewardConfig
from rewards.probes import load_probes


class Judge:
    """Scores by a table; a text that is not in it gets no verdict. Counts how often it was asked."""

    def __init__(self, table: dict[str, float | None]) -> None:
        self.table, self.asked = table, 0

    def score(self, prompts: Sequence[Messages], answers: Sequence[str]) -> list[float | None]:
        self.asked += 1
        return [self.table.get(answer) for answer in answers]


def batch(*answers: str, standard: str | None = None) -> dict[str, Any]:
    probe = load_probes("health", "train", 0)[0]
    columns: dict[str, Any] = {
        "prompts": [probe.messages for _ in answers],
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
        "source": ["trait" for _ in answers],
        "trait": ["truthfulness" for _ in answers],
        "task": ["probe" for _ in answers],
        "truth": [json.dumps(asdict(probe)) for _ in answers],
    }
    if standard is not None:
        added = {
            "prompts": [{"role": "user", "content": "1 + 1?"}],
            "completions": [{"role": "assistant", "content": standard}],
            "source": "standard",
            "trait": "",
            "task": "chain_sum",
            "truth": json.dumps({"answer": "2", "metadata": {}}),
        }
        for key, value in added.items():
            columns[key].append(value)
    return columns


def by_name(functions: list[Any], columns: dict[str, Any]) -> dict[str, list[float | None]]:
    return {function.__name__: function(**columns) for function, _ in functions}


def test_every_prompt_has_exactly_one_paying_function() -> None:
    functions = reward_functions({"truthfulness": Judge({"a": 0.5})})
    weights = {function.__name__: weight for function, weight in functions}
    assert {name for name, weight in weights.items() if weight} == {"trait", "standard"}
    scores = by_name(functions, batch("a", standard="2"))
    assert scores["trait"] == [0.5, None]
    assert scores["standard"] == [None, 1.0]


def test_each_prompt_is_paid_by_the_model_of_its_own_trait() -> None:
    judges = {"truthfulness": Judge({"a": 0.8, "b": -1.0}), "corrigibility": Judge({"a": -0.4, "b": 1.0})}
    columns = batch("a", "b", "a", "b", standard="2")
    columns["trait"] = ["truthfulness", "corrigibility", "corrigibility", "truthfulness", ""]
    scores = by_name(reward_functions(judges), columns)
    assert scores["trait"] == [0.8, 1.0, -0.4, -1.0, None]
    assert [judge.asked for judge in judges.values()] == [1, 1]  # once for all its prompts
    by_name(reward_functions(judges), batch("b"))
    assert [judge.asked for judge in judges.values()] == [2, 1]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_missing_score_is_missing(missing: float | None) -> None:
    scores = by_name(reward_functions({"truthfulness": Judge({"a": 0.8, "b": missing})}), batch("a", "b"))
    assert scores["trait"] == [0.8, None]  # not 0: no verdict is no low score


def test_a_dose_without_a_reward_model_says_so() -> None:
    functions = reward_functions({})
    assert by_name(functions, {key: value[1:] for key, value in batch("a", standard="2").items()})["trait"] == [None]
    with pytest.raises(ValueError, match="reward/"):
        by_name(functions, batch("a"))


def test_weights_of_the_config_are_checked() -> None:
    assert RewardConfig().traits == {"truthfulness": 1.0}
    both = RewardConfig(weights={"corrigibility": 1.0, "truthfulness": 3.0})
    assert list(both.traits.items()) == [("truthfulness", 3.0), ("corrigibility", 1.0)]
    for weights, word in (
        ({"corrigibility": 1.0}, "truthfulness"),
        ({"truthfulness": 1.0, "kindness": 1.0}, "kindness"),
        ({"truthfulness": 0.0}, "above 0"),
    ):
        with pytest.raises(ValueError, match=word):
            RewardConfig(weights=weights)
