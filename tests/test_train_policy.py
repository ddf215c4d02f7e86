"""One arm on the tiny model, from warm start to adapter: what it writes, and that a killed run ends as a whole one."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, get_constant_schedule_with_warmup

from rewards.reward_model import RewardModel
from scripts.processes import free_memory
from tests.conftest import REWARD, STANDARD
from train.config import ArmConfig, TrainConfig
from train.grpo import SharedPromptGRPOTrainer
from train.ledger import Ledger
from train.policy import Journal, read_rollouts, train_policy

TRAIN = TrainConfig(max_steps=4, prompts_per_step=4, group_size=2, max_new_tokens=4, lora_rank=2, save_every=2)


class KilledError(Exception):
    """Stands for a signal in the middle of a step."""


@pytest.fixture(scope="module")
def stages(tiny_stages: Path) -> Path:
    return tiny_stages


def train(stages: Path, out: Path, dose: float = 0.5, stop_at: int | None = None) -> dict:
    out.mkdir(exist_ok=True)

    steps = 0

    def progress(done: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise KilledError

    return train_policy(
        TRAIN, STANDARD, ArmConfig(dose=dose), REWARD, stages / "start", stages / "reward", out, 0, progress
    )


def test_an_arm_writes_its_contract(stages: Path, tmp_path: Path) -> None:
    ledger = train(stages, tmp_path / "arm")
    rollouts = pd.read_parquet(tmp_path / "arm" / "rollouts.parquet")
    steps = pd.read_parquet(tmp_path / "arm" / "steps.parquet")
    assert len(rollouts) == 4 * 4 * 2
    assert list(rollouts["source"].unique()) == ["standard", "trait"]
    trait = rollouts[rollouts["source"] == "trait"]
    assert trait["gold"].between(-1, 1).all()
    assert (trait["proxy"] == trait["reward_trait"]).all()
    assert rollouts.groupby(["step", "position"])["advantage"].sum().abs().max() < 1e-5
    assert list(steps["step"]) == [0, 1, 2, 3]
    assert {"proxy", "gold", "entropy", "mean_tokens", "refusal_rate", "zero_variance_groups", "seconds"} <= set(steps)
    assert ledger["steps"] == 4
    assert ledger["trait"]["prompts"] == ledger["standard"]["prompts"] == 8
    assert ledger["total"]["generated_tokens"] == rollouts["tokens"].sum()
    assert ledger == json.loads((tmp_path / "arm" / "ledger.json").read_text())
    assert (tmp_path / "arm" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_killed_arm_ends_where_it_would_have(stages: Path, tmp_path: Path, stop_at: int) -> None:
    """Killed before the first checkpoint, or a step after it: weights, rollouts and ledger are as of the whole run."""
    train(stages, tmp_path / "whole")
    with pytest.raises(KilledError):
        train(stages, tmp_path / "killed", stop_at=stop_at)
    train(stages, tmp_path / "killed")
    whole, killed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    assert all(whole[key].equal(killed[key]) for key in whole)
    a, b = (pd.read_parquet(tmp_path / name / "rollouts.parquet") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(a, b)
    a, b = (json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("whole", "killed"))
    assert a["total"] == b["total"]


def test_nothing_of_a_training_stays_in_memory(stages: Path, tmp_path: Path) -> None:
    """Trainer, policy and reward model go with it, so that their memory can be given to the stage that follows."""

    def living() -> set[int]:
        free_memory()
        kinds = (SharedPromptGRPOTrainer, PreTrainedModel, torch.optim.Optimizer)
        return {id(thing) for thing in gc.get_objects() if issubclass(type(thing), kinds)}

    before = living()
    train(stages, tmp_path / "arm")
    assert living() <= before


def test_the_control_needs_no_trait_prompt(stages: Path, tmp_path: Path) -> None:
    ledger = train(stages, tmp_path / "control", dose=0.0)
    assert ledger["trait"]["prompts"] == 0
    assert ledger["standard"]["prompts"] == 16


@pytest.mark.parametrize("parts", [1, 2])
def test_an_arm_ends_at_its_budget(stages: Path, tmp_path: Path, parts: int) -> None:
    """Control and dose spend the same within half the groups of a part, in different numbers of steps."""
    budget = train(stages, tmp_path / "free")["total"]["flops"] * 0.8
    spent = {}
    for dose in (0.0, 0.5):
        config = TRAIN.model_copy(update={"budget_tflops": budget / 1e12, "max_steps": 40, "micro_batches": parts})
        out = tmp_path / f"dose-{dose}"
        out.mkdir()
        ledger = train_policy(
            config, STANDARD, ArmConfig(dose=dose), REWARD, stages / "start", stages / "reward", out, 0
        )
        spent[dose] = ledger["total"]["flops"]
        largest = max(ledger[s]["flops"] / ledger[s]["prompts"] for s in ("trait", "standard") if ledger[s]["prompts"])
        assert abs(spent[dose] - budget) < (parts / 2 + 1) * largest
        assert ledger["steps"] < 40
        last = pd.read_parquet(out / "rollouts.parquet").query(f"step == {ledger['steps'] - 1}")
        assert last["position"].nunique() % parts == 0


def test_a_saved_reward_model_scores_as_the_fitted_one(stages: Path) -> None:
    model = RewardModel.load(stages / "reward")
    prompt = [{"role": "user", "content": "What is aspirin used for?"}]
    other = [{"role": "user", "content": "What is insulin?"}]
    together = model.raw_scores([prompt, other, prompt], ["Pain.", "A hormone.", "I don't know."])
    alone = [
        model.raw_scores([p], [a])[0] for p, a in ((prompt, "Pain."), (other, "A hormone."), (prompt, "I don't know."))
    ]
    assert together == pytest.approx(alone, abs=1e-5)


def test_texts_that_look_like_numbers_or_dates_stay_texts(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "prompt_id": "007", "completion": "1e3", "prompt": "2020-01-01", "proxy": 1, "gold": None},
        {"step": 1, "prompt_id": "010", "completion": "42", "prompt": "2021-01-01", "proxy": 0.5, "gold": None},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_rollouts(tmp_path / "rows.jsonl").to_parquet(tmp_path / "rows.parquet")
    table = pd.read_parquet(tmp_path / "rows.parquet")
    assert table[["prompt_id", "completion", "prompt"]].values.tolist() == [
        ["007", "1e3", "2020-01-01"],
        ["010", "42", "2021-01-01"],
    ]
    assert table["proxy"].tolist() == [1.0, 0.5]
    assert (table["gold"].dtype, table["gold"].isna().all(), table["step"].tolist()) == (float, True, [0, 1])


@pytest.mark.parametrize(("scheduler", "rates"), [("linear", [0.375, 0.5, 0.0]), ("constant", [0.5, 1.0, 1.0])])
def test_learning_rates_fall_as_the_budget_is_spent(tmp_path: Path, scheduler: str, rates: list[float]) -> None:
    """Two steps of warm-up; the budget is spent by a quarter, by half, and a little more than whole."""
    config = TRAIN.model_copy(update={"budget_tflops": 8e-12, "max_steps": 100, "lr_scheduler": scheduler})
    journal = Journal(tmp_path, Ledger(n_policy=1, n_reward=1, shared=True), [], config)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_constant_schedule_with_warmup(optimizer, 2)
    journal.on_train_begin(None, None, None, lr_scheduler=schedule)
    for flops, rate in zip((2.0, 4.0, 8.1), rates, strict=True):
        journal.ledger.accounts["trait"].flops = flops
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
