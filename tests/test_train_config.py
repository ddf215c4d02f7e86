"""Combinations of training settings: what is read by no one, or needs what is not there, is an error with its key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from train.config import TrainConfig


@pytest.mark.parametrize(
    ("settings", "key", "remedy"),
    [
        ({"gae_lambda": 0.9}, "gae_lambda", "set train.algorithm: ppo"),
        ({"algorithm": "rloo", "epochs": 2}, "epochs", "rloo does not read this"),
        ({"algorithm": "rloo", "loss": "grpo"}, "loss", "set train.algorithm: grpo"),
        ({"algorithm": "rloo", "scale_rewards": "group"}, "scale_rewards", "set train.algorithm: grpo"),
        ({"algorithm": "ppo", "scale_rewards": "batch"}, "scale_rewards", "set train.algorithm: grpo"),
        ({"algorithm": "ppo", "lora_rank": 0}, "critic", "train.critic: model"),
        ({"algorithm": "ppo", "minibatches": 9}, "minibatches", "a step has 8"),
        ({"algorithm": "ppo", "micro_batches": 2}, "micro_batches", "train.minibatches"),
        ({"algorithm": "ppo", "critic": "head"}, "critic", "'lora' or 'model'"),
        ({"algorithm": "reinforce"}, "algorithm", "'grpo', 'rloo' or 'ppo'"),
        ({"lora_rank": 0, "max_kl": 0.5}, "max_kl", "set that, or a train.lora_rank"),
        ({"lora_rank": 0, "watch": {"kl": {"threshold": 0.5}}}, "watch", "set that, or a train.lora_rank"),
        ({"watch": {"kl": {"action": "halt"}}}, "watch.kl.action", "'warn' or 'stop'"),
        ({"watch": {"entropy_rise": {"threshold": 0.5}}}, "watch.entropy_rise.threshold", "greater than 1"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_the_way_out(settings: dict[str, Any], key: str, remedy: str) -> None:
    with pytest.raises(ValidationError) as error:
        TrainConfig.model_validate(settings)
    problems = error.value.errors()
    assert [".".join(map(str, problem["loc"])) for problem in problems] == [key]
    assert remedy in problems[0]["msg"]


def test_what_is_allowed() -> None:
    TrainConfig.model_validate({"algorithm": "ppo", "loss": "bnpo", "lora_rank": 0, "critic": "model", "epochs": 4})
    TrainConfig.model_validate({"algorithm": "rloo", "beta": 0.1, "lora_rank": 0, "max_kl": 1.0})
    plain = TrainConfig()
    assert TrainConfig.model_validate(plain.model_dump()) == plain  # a resolved config can be given again
    assert not plain.measures_kl
    assert TrainConfig(max_kl=1.0).measures_kl


def test_a_watcher_keeps_its_own_action_unless_told() -> None:
    watch = TrainConfig.model_validate({"watch": {"non_finite": {"threshold": 3}, "kl": {"threshold": 1.0}}}).watch
    assert (watch.non_finite.action, watch.non_finite.threshold) == ("stop", 3)
    assert (watch.kl.action, watch.kl.threshold) == ("warn", 1.0)
    assert watch.sampling_gap.action == "stop"
