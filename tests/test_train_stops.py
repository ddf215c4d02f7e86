"""How an arm ends: tokens, KL, a watcher; what it keeps then; and that a killed PPO arm ends as a whole one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from models.checkpoints import HASHES, find_damage
from models.loading import load_model
from tests.conftest import REWARD, STANDARD
from tests.test_train_resume import assert_same_end
from train import policy
from train.config import ArmConfig, TrainConfig
from train.policy import train_policy
from train.ppo import CRITIC

SMALL: dict[str, Any] = {
    "max_steps": 4,
    "prompts_per_step": 4,
    "group_size": 2,
    "max_new_tokens": 4,
    "lora_rank": 2,
    "save_every": 2,
}
FILE = "adapter_model.safetensors"
PPO = {"algorithm": "ppo", "beta": 0.01, "epochs": 2, "minibatches": 2, "value_warmup_steps": 1}


class KilledError(Exception):
    """Stands for a signal in the middle of a step."""


@pytest.fixture(scope="module")
def stages(tiny_stages: Path) -> Path:
    return tiny_stages


def train(stages: Path, out: Path, stop_at: int | None = None, **settings: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    steps = 0

    def progress(done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise KilledError

    cfg = TrainConfig.model_validate(SMALL | settings)
    return train_policy(
        cfg, STANDARD, ArmConfig(dose=0.5), REWARD, stages / "start", stages / "reward", out, 0, progress
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / FILE)


def test_a_killed_ppo_arm_ends_where_it_would_have(stages: Path, tmp_path: Path) -> None:
    """Policy, critic, their optimizer and the ledger go on from the checkpoint bit for bit."""
    whole = train(stages, tmp_path / "whole", **PPO)
    with pytest.raises(KilledError):
        train(stages, tmp_path / "killed", stop_at=3, **PPO)
    train(stages, tmp_path / "killed", **PPO)
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
    checkpoints = [tmp_path / name / "checkpoints" / "checkpoint-4" for name in ("whole", "killed")]
    assert len({(checkpoint / CRITIC).read_bytes() for checkpoint in checkpoints}) == 1
    for checkpoint in checkpoints:
        assert CRITIC in json.loads((checkpoint / HASHES).read_text())
        assert find_damage(checkpoint) is None
    tokens = whole["total"]["trained_tokens"] // 2  # two epochs
    n = whole["n_policy"]
    scored = 2 * whole["n_reward"] * whole["total"]["scored_tokens"]
    steps = pd.read_parquet(tmp_path / "whole" / "rollouts.parquet")
    assert whole["passes"] == {"forwards": 3, "epochs": 2, "critic": True}
    # All tokens: three forwards of the policy and its reference, critic read once and trained twice; the policy was
    # trained twice on all tokens but those of the warm-up step.
    least, most = (6 + 2 + 12) * n * tokens + scored, (6 + 12 + 2 + 12) * n * tokens + scored
    assert least < whole["total"]["flops"] < most
    assert steps["advantage"].notna().all()
    table = pd.read_parquet(tmp_path / "whole" / "steps.parquet")
    assert {"value_loss", "explained_variance", "kl", "sampling_gap"} <= set(table)
    assert table["sampling_gap"].max() < 1e-4


@pytest.mark.parametrize("algorithm", ["rloo", "grpo"])
def test_a_run_of_each_algorithm_writes_its_contract(stages: Path, tmp_path: Path, algorithm: str) -> None:
    fast: dict[str, Any] = {"learning_rate": 0.02, "warmup_steps": 0}
    ledger = train(stages, tmp_path / "arm", algorithm=algorithm, beta=0.05, **fast)
    assert ledger["ended"] == {"by": "train.max_steps", "step": 4, "kept_step": 4, "text": "4 steps taken"}
    assert ledger["passes"]["forwards"] == {"rloo": 3, "grpo": 2}[algorithm]
    table = pd.read_parquet(tmp_path / "arm" / "steps.parquet")
    assert (table["kl"].iloc[1:] > 0).all()
    assert json.loads((tmp_path / "arm" / "ledger.json").read_text()) == ledger


def test_an_arm_ends_at_its_tokens(stages: Path, tmp_path: Path) -> None:
    free = train(stages, tmp_path / "free")["total"]["generated_tokens"]
    ledger = train(stages, tmp_path / "arm", max_tokens=int(free * 0.6), max_steps=40)
    assert abs(ledger["total"]["generated_tokens"] - int(free * 0.6)) <= 8  # within a group of 2 x 4 tokens
    assert ledger["ended"]["by"] == "train.max_tokens"
    assert ledger["steps"] == ledger["ended"]["step"] == ledger["ended"]["kept_step"] < 4


def test_an_arm_ends_at_its_kl(stages: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.02, "warmup_steps": 0, "max_steps": 12}
    ledger = train(stages, tmp_path / "arm", max_kl=1e-3, **settings)
    table = pd.read_parquet(tmp_path / "arm" / "steps.parquet")
    assert ledger["ended"]["by"] == "train.max_kl"
    assert ledger["steps"] == len(table) < 12
    assert table["kl"].iloc[-1] > 1e-3 >= table["kl"].iloc[:-1].max()


def test_a_watcher_stops_the_arm_and_the_weights_are_from_before(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reward that is lost from step 5 on: the weights are those of the checkpoint after 4 steps."""
    lose_rewards_from(5, monkeypatch)
    ledger = train(stages, tmp_path / "arm", max_steps=12)
    assert [(alert["watcher"], alert["step"], alert["since"]) for alert in ledger["alerts"]] == [("non_finite", 5, 5)]
    text = ledger["alerts"][0]["text"]
    assert ledger["ended"] == {"by": "train.watch.non_finite", "step": 6, "kept_step": 4, "text": text}
    kept = weights(tmp_path / "arm")
    saved = {step: load_file(tmp_path / "arm" / "checkpoints" / f"checkpoint-{step}" / FILE) for step in (2, 4)}
    assert all(kept[key].equal(saved[4][key]) for key in kept)
    assert not all(kept[key].equal(saved[2][key]) for key in kept)
    assert len(pd.read_parquet(tmp_path / "arm" / "steps.parquet")) == 6  # what was seen stays on record
    assert not (tmp_path / "arm" / "checkpoints" / "checkpoint-6").exists()


def test_a_damaged_checkpoint_is_not_kept(stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest from before the fault has lost a byte: the one before it is taken."""
    lose_rewards_from(5, monkeypatch)
    healthy = policy.keep_healthy

    def after_damage(*args: Any) -> None:
        path = tmp_path / "arm" / "checkpoints" / "checkpoint-4" / FILE
        path.write_bytes(path.read_bytes()[:-1])
        healthy(*args)

    monkeypatch.setattr(policy, "keep_healthy", after_damage)
    ledger = train(stages, tmp_path / "arm", max_steps=12)
    assert ledger["ended"]["kept_step"] == 2
    saved = load_file(tmp_path / "arm" / "checkpoints" / "checkpoint-2" / FILE)
    assert all(tensor.equal(saved[name]) for name, tensor in weights(tmp_path / "arm").items())


@pytest.mark.parametrize("rank", [2, 0])
def test_without_a_healthy_checkpoint_the_start_is_kept(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    lose_rewards_from(1, monkeypatch)
    ledger = train(stages, tmp_path / "arm", lora_rank=rank, learning_rate=0.02, warmup_steps=0)
    assert ledger["ended"]["kept_step"] == 0
    if rank:
        assert all(not tensor.any() for name, tensor in weights(tmp_path / "arm").items() if "lora_B" in name)
    else:
        start, kept = (load_model(str(path)).state_dict() for path in (stages / "start/model", tmp_path / "arm/model"))
        assert all(tensor.equal(start[name]) for name, tensor in kept.items())


def test_a_warning_lets_the_arm_go_on(stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_rewards_from(1, monkeypatch)
    ledger = train(stages, tmp_path / "arm", watch={"non_finite": {"action": "warn"}})
    assert ledger["ended"]["by"] == "train.max_steps"
    assert [alert["step"] for alert in ledger["alerts"]] == [1]  # said once


@pytest.mark.parametrize("settings", [{"beta": 0.05}, PPO | {"value_warmup_steps": 0}, {"lora_rank": 0}])
def test_layers_that_are_computed_again_train_the_same_arm(
    stages: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Up to rounding: attention is then computed under the mask instead of by tree."""
    fast: dict[str, Any] = {"learning_rate": 0.01, "warmup_steps": 0, "max_steps": 2}
    for again in (False, True):
        ledger = train(stages, tmp_path / str(again), gradient_checkpointing=again, **(settings | fast))
        assert (ledger["shared"], ledger["fallback"]) == (True, None)
    file = f"adapter/{FILE}" if settings.get("lora_rank") != 0 else "model/model.safetensors"
    kept, computed = (load_file(tmp_path / str(again) / file) for again in (False, True))
    start = load_file(stages / "start" / "model" / "model.safetensors")
    for name, weight in kept.items():
        assert (computed[name] - weight).norm() <= 1e-3 * weight.norm(), name
        assert not weight.equal(start.get(name, torch.zeros_like(weight))), name


@pytest.mark.parametrize(
    ("settings", "factor", "broken"),
    [({}, 1e38, ["grad_norm"]), (PPO | {"value_warmup_steps": 0}, float("inf"), ["grad_norm", "loss"])],
    ids=["grpo", "ppo"],
)
def test_an_update_that_is_not_finite_is_left_out(
    stages: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    factor: float,
    broken: list[str],
) -> None:
    """Rewards beyond all numbers at step 1 alone: the weights stay, and the steps after it are as usual."""
    pay(monkeypatch, lambda step, value: value * factor if step == 1 and value else value)
    fast: dict[str, Any] = {"learning_rate": 0.02, "warmup_steps": 0, "save_every": 1}
    tolerant = {"non_finite": {"threshold": 1}, "sampling_gap": {"threshold": None}}
    ledger = train(stages, tmp_path / "arm", **(settings | fast), watch={**tolerant, "window": 4})
    assert ledger["ended"]["by"] == "train.max_steps"
    assert [alert for alert in ledger["alerts"] if alert["watcher"] == "non_finite"] == []
    table = pd.read_parquet(tmp_path / "arm" / "steps.parquet")
    assert (~np.isfinite(table[broken])).all(axis=1).tolist() == [False, True, False, False]
    assert np.isfinite(table[["loss", "grad_norm"]]).all(axis=1).tolist() == [True, False, True, True]
    name = CRITIC if settings else FILE
    saved = [load_file(tmp_path / "arm" / "checkpoints" / f"checkpoint-{step}" / name) for step in (1, 2, 3)]
    assert all(saved[1][key].equal(saved[0][key]) for key in saved[0])
    assert not all(saved[2][key].equal(saved[1][key]) for key in saved[0])
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "arm").values())


def lose_rewards_from(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paying functions give no score from a step on, as a judge that is out of reach."""
    pay(monkeypatch, lambda at, value: None if at >= step else value)


def pay(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, float | None], float | None]) -> None:
    """The paying functions pay change(step, score) where they would pay a score."""
    real = policy.reward_functions

    def failing(*args: Any) -> list[Any]:
        def wrap(function: Any) -> Any:
            def scores(*rest: Any, trainer_state: Any, **columns: Any) -> list[float | None]:
                values = function(*rest, trainer_state=trainer_state, **columns)
                return [change(trainer_state.global_step, value) for value in values]

            scores.__name__ = function.__name__
            return scores

        return [(wrap(function) if weight else function, weight) for function, weight in real(*args)]

    monkeypatch.setattr(policy, "reward_functions", failing)
