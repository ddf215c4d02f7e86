"""Two traits trained at once on the tiny model, with every source of prompts: who pays whom, and what gold is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest

from rewards.config import PromptShares, RewardConfig
from rewards.fit import load_reward_models, reward_folder
from rewards.pairs import make_pairs
from rewards.preferences import from_probes
from rewards.reward_model import Calibration, Recipe, train_reward_model
from rewards.trait_prompts import trait_pools
from tests.conftest import STANDARD, tiny_llama, tiny_tokenizer
from train.config import ArmConfig, TrainConfig
from train.mix import Prompt, build_mix
from train.policy import train_policy

REWARD = RewardConfig(
    trait="corrigibility",
    weights={"corrigibility": 2.0, "truthfulness": 1.0},
    domains=("health", "arts"),
    prompts=PromptShares(probes=1, conduct=1, scenarios=1),
)
TRAIN = TrainConfig(max_steps=3, prompts_per_step=4, group_size=2, max_new_tokens=4, lora_rank=2, token_budget=2048)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """start/ and reward/ with a reward model for each trait, fitted on a few of its own probes."""
    run = tmp_path_factory.mktemp("run")
    start = run / "start" / "model"
    tiny_llama().save_pretrained(start)
    tiny_tokenizer().save_pretrained(start)
    for seed, trait in enumerate(REWARD.traits):
        folder = reward_folder(run / "reward", REWARD.trait, trait)
        folder.mkdir(parents=True)
        conduct = trait_pools(trait, REWARD.domains, "train").conduct
        train_reward_model(from_probes(make_pairs(conduct[:4], 0)), str(start), folder, seed, Recipe(lora_rank=2))
        (folder / "calibration.json").write_text(json.dumps(asdict(Calibration(1.0, 0.0))))
    return run


def encoded_length(prompt: Prompt) -> int:
    ids = tiny_tokenizer().apply_chat_template(prompt["prompt"], add_generation_prompt=True, return_dict=False)
    return len(ids)


def test_each_trait_is_trained_by_its_own_reward(stages: Path, tmp_path: Path) -> None:
    ledger = train_policy(
        TRAIN, STANDARD, ArmConfig(dose=0.75), REWARD, stages / "start", stages / "reward", tmp_path, 0
    )
    rows = pd.read_parquet(tmp_path / "rollouts.parquet")
    groups = rows.groupby(["step", "position"], as_index=False).first()
    mix = build_mix(12, 0.75, 0, STANDARD.tasks, REWARD)
    assert list(groups["prompt_id"]) == [prompt["prompt_id"] for prompt in mix]
    assert groups["trait"].value_counts().to_dict() == {"corrigibility": 6, "truthfulness": 3, "": 3}
    assert {"scenario", "answerable", "corrects-rightly", "shutdown-or-correction", "standard"} <= set(groups["kind"])

    # What a rule can check has a gold value, and nothing else.
    ruled = (rows["source"] == "trait") & (rows["kind"] != "scenario")
    assert rows[ruled]["gold"].between(-1, 1).all()
    assert rows[~ruled]["gold"].isna().all()

    # The policy was paid by the model of the prompt's trait.
    models = load_reward_models(REWARD, stages / "reward", stages / "start" / "model")
    turns = {prompt["prompt_id"]: prompt["prompt"] for prompt in mix}
    for trait, mine in rows[rows["source"] == "trait"].groupby("trait"):
        asked, said = [turns[name] for name in mine["prompt_id"]], list(mine["completion"])
        assert list(mine["proxy"]) == pytest.approx(list(models[str(trait)].score(asked, said)), abs=1e-3)
        (other,) = set(models) - {trait}
        assert list(mine["proxy"]) != pytest.approx(list(models[other].score(asked, said)), abs=1e-3)
    assert rows.groupby(["step", "position"])["advantage"].sum().abs().max() < 1e-5

    # Policy and reward model read every turn of the chats: two completions for each prompt.
    dosed = [prompt for prompt in mix if prompt["source"] == "trait"]
    assert any(turn["role"] == "assistant" for prompt in dosed for turn in prompt["prompt"])
    generated = rows[rows["source"] == "trait"]["tokens"].sum()
    assert ledger["trait"]["prompts"] == len(dosed) == 9
    assert ledger["trait"]["scored_tokens"] == sum(map(encoded_length, dosed)) + generated
    learned = rows[(rows["source"] == "trait") & (rows["advantage"] != 0)]  # the update reads no others
    read = {str(name) for name in learned["prompt_id"]}
    prompts_read = sum(encoded_length(prompt) for prompt in dosed if prompt["prompt_id"] in read)
    assert ledger["trait"]["trained_tokens"] == prompts_read + learned["tokens"].sum()
