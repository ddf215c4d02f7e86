"""One process of a launched training, for tests/test_train_distributed.py: worker.py (arm|fsdp) FOLDER OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from tests.conftest import REWARD, STANDARD
from tests.test_train_grpo import build
from train.config import ArmConfig, TrainConfig
from train.grpo import SharedPromptGRPOTrainer
from train.policy import save_weights, train_policy

TRAIN = TrainConfig(
    max_steps=4, prompts_per_step=4, group_size=2, max_new_tokens=6, lora_rank=2, save_every=2, noise="row"
)


class ShardedTrainer(SharedPromptGRPOTrainer):
    """FSDP2 on CPU: accelerate would only set it up on accelerators, everything after that is the same."""

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
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


def train_arm(stages: Path, out: Path) -> None:
    """The whole of an arm, with checkpoints; goes on where it was."""
    out.mkdir(exist_ok=True)
    train_policy(TRAIN, STANDARD, ArmConfig(dose=0.5), REWARD, stages / "start", stages / "reward", out, 0)


def train_trainer(
    model: Path, out: Path, kind: type[SharedPromptGRPOTrainer], lora: bool, processes: int, resume: Path | None = None
) -> Path:
    """Three steps of the bare trainer on a global batch of 8 rows, packed tightly so that processes differ in packs.

    Returns the weights' folder. A checkpoint is left after the second step.
    """
    trainer = build(
        model, out / "trainer", True, lora, kind=kind, noise="row", max_steps=3, beta=0.04, max_completion_length=8,
        per_device_train_batch_size=8 // processes, num_generations=2, learning_rate=1e-3, token_budget=32,
        save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.share, "prompt sharing fell back"
    save_weights(trainer, out / "weights")
    return out / "weights"


if __name__ == "__main__":
    mode, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    if mode == "arm":
        train_arm(folder, out)
    else:
        kind = ShardedTrainer if mode.startswith("fsdp") else SharedPromptGRPOTrainer
        lora = not mode.endswith("full")
        train_trainer(folder, out, kind, lora, processes=2)
        torch.distributed.barrier()
        train_trainer(folder, out / "resumed", kind, lora, processes=2, resume=out / "trainer" / "checkpoint-2")
    torch.distributed.destroy_process_group()
