"""Two processes on one CPU (gloo) end where one process ends: DDP through a whole arm, DDP and FSDP2 on the trainer."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from scripts import processes
from tests.children import finish, finish_all, fork, fork_group, kill
from tests.conftest import REWARD, STANDARD
from tests.test_train_grpo import build
from tests.test_train_stops import lose_rewards_from
from train.config import ArmConfig, TrainConfig
from train.grpo import SharedPromptGRPOTrainer
from train.policy import grpo_config, save_weights, train_policy
from train.ppo import CRITIC

TRAIN = TrainConfig(
    max_steps=4, prompts_per_step=4, group_size=2, max_new_tokens=6, lora_rank=2, save_every=2, noise="row"
)


class ShardedTrainer(SharedPromptGRPOTrainer):
    """FSDP2 on CPU: accelerate sets it up on accelerators only, but everything after that is the same."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
        PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def train_arm(stages: Path, out: Path, config: TrainConfig = TRAIN) -> None:
    """The whole of an arm, with checkpoints; goes on where it was."""
    out.mkdir(exist_ok=True)
    train_policy(config, STANDARD, ArmConfig(dose=0.5), REWARD, stages / "start", stages / "reward", out, 0)


def train_trainer(
    model: Path, out: Path, kind: type[SharedPromptGRPOTrainer], lora: bool, processes: int, resume: Path | None = None
) -> None:
    """Three steps of the bare trainer on a global batch of 8 rows, packed tightly so that processes differ in packs.

    Leaves weights/ and a checkpoint after the second step.
    """
    trainer = build(
        model, out / "trainer", True, lora, kind=kind, noise="row", max_steps=3, beta=0.04, max_completion_length=8,
        per_device_train_batch_size=8 // processes, num_generations=2, learning_rate=1e-3, token_budget=32,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.share, "prompt sharing fell back"
    save_weights(trainer, out / "weights")


def assert_close(one: Path, two: Path, atol: float = 1e-5) -> None:
    ours, theirs = load_file(one), load_file(two)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=atol, rtol=0)


def test_an_arm_of_two_processes_is_that_of_one_also_after_a_kill(tiny_stages: Path, tmp_path: Path) -> None:
    """Weights within 1e-5, the same rollouts in the same order, the same ledger; both processes are killed once."""
    assert finish(fork(lambda: train_arm(tiny_stages, tmp_path / "one"))) is None
    finish_all(fork_group(lambda: train_arm(tiny_stages, tmp_path / "two")))
    pids = fork_group(lambda: train_arm(tiny_stages, tmp_path / "killed"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(pids)
    assert not (tmp_path / "killed" / "ledger.json").exists()
    finish_all(fork_group(lambda: train_arm(tiny_stages, tmp_path / "killed")))

    weights = "adapter/adapter_model.safetensors"
    assert_close(tmp_path / "one" / weights, tmp_path / "two" / weights)
    assert (tmp_path / "two" / weights).read_bytes() == (tmp_path / "killed" / weights).read_bytes()
    one, two, killed = (pd.read_parquet(tmp_path / name / "rollouts.parquet") for name in ("one", "two", "killed"))
    pd.testing.assert_frame_equal(two, killed)
    exact = ["step", "position", "source", "prompt_id", "prompt", "completion", "tokens"]
    pd.testing.assert_frame_equal(one[exact], two[exact])
    pd.testing.assert_frame_equal(one.drop(columns=exact), two.drop(columns=exact), atol=1e-5)


def test_an_arm_of_two_fresh_processes_is_that_of_one(tiny_stages: Path, tmp_path: Path) -> None:
    """Those that call them have met already, as those of a run have."""
    config = TRAIN.model_copy(update={"max_steps": 2})

    def member() -> None:
        PartialState._reset_state()  # of the process that was forked
        processes.join()
        processes.afresh(train_arm, tiny_stages, tmp_path / "two", config)

    assert finish(fork(lambda: train_arm(tiny_stages, tmp_path / "one", config))) is None
    finish_all(fork_group(member), seconds=120)
    file = Path("adapter") / "adapter_model.safetensors"
    assert_close(tmp_path / "one" / file, tmp_path / "two" / file)


def test_ppo_in_two_processes_ends_as_in_one(tiny_stages: Path, tmp_path: Path) -> None:
    """Policy and critic: advantages are whitened over both, and tokens weigh alike wherever they are."""
    # With this noise some completions end early at this temperature.
    settings = {
        "algorithm": "ppo", "beta": 0.01, "epochs": 2, "max_new_tokens": 24, "max_steps": 2, "temperature": 0.7,
    }  # fmt: skip
    config = TrainConfig.model_validate(TRAIN.model_dump() | settings)
    assert finish(fork(lambda: train_arm(tiny_stages, tmp_path / "one", config))) is None
    finish_all(fork_group(lambda: train_arm(tiny_stages, tmp_path / "two", config)))
    assert len(set(pd.read_parquet(tmp_path / "one" / "rollouts.parquet")["tokens"])) > 1
    for file in ("adapter/adapter_model.safetensors", f"checkpoints/checkpoint-2/{CRITIC}"):
        assert_close(tmp_path / "one" / file, tmp_path / "two" / file, atol=1e-4)


def test_a_watcher_stops_both_processes(tiny_stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And both put back the checkpoint from before what it saw."""
    lose_rewards_from(3, monkeypatch)
    config = TRAIN.model_copy(update={"max_steps": 8})
    finish_all(fork_group(lambda: train_arm(tiny_stages, tmp_path / "arm", config)))
    ended = json.loads((tmp_path / "arm" / "ledger.json").read_text())["ended"]
    assert (ended["by"], ended["step"], ended["kept_step"]) == ("train.watch.non_finite", 4, 2)
    kept = tmp_path / "arm" / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors"
    assert_close(tmp_path / "arm" / "adapter" / "adapter_model.safetensors", kept, atol=0)


@pytest.mark.parametrize("mode", ["ddp", "fsdp", pytest.param("ddp-full", marks=pytest.mark.slow), "fsdp-full"])
def test_two_processes_end_as_one(tiny_dir: Path, tmp_path: Path, mode: str) -> None:
    """And, resumed from their checkpoint after two of three steps, as the uninterrupted two."""
    kind = ShardedTrainer if mode.startswith("fsdp") else SharedPromptGRPOTrainer
    lora = not mode.endswith("full")
    one, two, resumed = (tmp_path / name for name in ("one", "two", "resumed"))
    checkpoint = two / "trainer" / "checkpoint-2"
    assert finish(fork(lambda: train_trainer(tiny_dir, one, SharedPromptGRPOTrainer, lora, 1))) is None
    finish_all(fork_group(lambda: train_trainer(tiny_dir, two, kind, lora, 2)))
    finish_all(fork_group(lambda: train_trainer(tiny_dir, resumed, kind, lora, 2, checkpoint)))
    weights = Path("weights") / ("adapter_model.safetensors" if lora else "model.safetensors")
    assert_close(one / weights, two / weights)
    assert (two / weights).read_bytes() == (resumed / weights).read_bytes()


def test_a_step_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"prompts_per_step = 4: does not divide among 3 processes.*multiple of 3"):
        grpo_config(TRAIN, [1.0], tmp_path, 0)
