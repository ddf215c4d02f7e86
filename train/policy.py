"""One arm of the experiment: the mix, the policy, the rewards, and what was spent and said on the way."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from models.loading import load_model, load_tokenizer
from models.progress import silence
from rewards.compose import reward_functions
from rewards.config import RewardConfig
from rewards.fit import load_reward_models
from train.config import ArmConfig, StandardMixConfig, TrainConfig
from train.grpo import SharedPromptGRPOTrainer
from train.ledger import Ledger
from train.mix import build_mix


def train_policy(
    cfg: TrainConfig,
    standard: StandardMixConfig,
    arm: ArmConfig,
    reward: RewardConfig,
    start: Path,
    reward_dir: Path,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    report_to: str = "none",
    run_name: str | None = None,
) -> dict[str, Any]:
    """Train one arm from start/model; save adapter/, rollouts.parquet, steps.parquet and ledger.json in `out`.

    Goes on from the last checkpoint in out/checkpoints if there is one. Returns the ledger.
    """
    from datasets import Dataset
    from peft import LoraConfig

    mix = build_mix(cfg.max_steps * cfg.prompts_per_step, arm.dose, seed, standard.tasks, reward.domains)
    # Every arm loads the reward models: the control's monitors and memory are then those of the dose arms.
    scorers = load_reward_models(reward, reward_dir, start / "model")
    policy = load_model(str(start / "model"))
    torch.manual_seed(seed)  # LoRA's initial weights
    functions = reward_functions(scorers, reward.traits)
    journal = Journal(
        out,
        Ledger(
            n_policy=sum(p.numel() for p in policy.parameters()),
            n_reward=sum(p.numel() for scorer in scorers.values() for p in scorer.model.parameters()),
            shared=cfg.prompt_sharing,
        ),
        [function.__name__ for function, _ in functions],
        group_size=cfg.group_size,
        budget=cfg.budget_tflops * 1e12,
        progress=progress,
    )
    trainer = SharedPromptGRPOTrainer(
        model=policy,
        reward_funcs=[function for function, _ in functions],
        args=grpo_config(cfg, [weight for _, weight in functions], out, seed, report_to, run_name),
        train_dataset=Dataset.from_list(mix),
        processing_class=load_tokenizer(str(start / "model")),
        peft_config=LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")
        if cfg.lora_rank
        else None,
        callbacks=[journal],
        token_budget=cfg.token_budget,
        record=journal.record,
        keep=journal.keep,
        share=cfg.prompt_sharing,
    )
    silence(trainer)
    trainer.train(resume_from_checkpoint=journal.rewind(get_last_checkpoint(str(out / "checkpoints"))))
    trained: Any = trainer.model
    trained.save_pretrained(out / ("adapter" if cfg.lora_rank else "model"))
    return journal.close(trainer.state.log_history)


def grpo_config(
    cfg: TrainConfig,
    reward_weights: list[float],
    out: Path,
    seed: int,
    report_to: str = "none",
    run_name: str | None = None,
) -> Any:
    """TRL's configuration: one step is one batch of prompts_per_step groups, in the order of the mix."""
    from trl import GRPOConfig

    rows = cfg.prompts_per_step * cfg.group_size
    return GRPOConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=cfg.max_steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        num_generations=cfg.group_size,
        max_completion_length=cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_p=1.0,
        top_k=0,
        shuffle_dataset=False,
        learning_rate=cfg.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=cfg.warmup_steps,
        max_grad_norm=cfg.max_grad_norm,
        loss_type=cfg.loss,
        scale_rewards=cfg.scale_rewards,
        beta=cfg.beta,
        reward_weights=reward_weights,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="steps",
        save_steps=cfg.save_every,
        save_total_limit=2,
        report_to=report_to,
        run_name=run_name,
        disable_tqdm=True,
        seed=seed,
        dataloader_num_workers=0,
    )


class Journal(TrainerCallback):
    """Keeps every rollout with every component score, and the ledger; stops the arm when its budget is spent.

    Rows are appended to rollouts.jsonl step by step; a resumed run first drops the rows of steps that it will take
    again.
    """

    def __init__(
        self,
        out: Path,
        ledger: Ledger,
        components: list[str],
        group_size: int,
        budget: float,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.out, self.ledger, self.components, self.group_size = out, ledger, components, group_size
        self.budget, self.progress = budget, progress
        self.rows = out / "rollouts.jsonl"
        self.started = (time.time(), time.process_time())

    def rewind(self, checkpoint: str | None) -> str | None:
        """Drop what was written after the checkpoint; without one, everything. Returns the checkpoint."""
        step = 0
        if checkpoint is not None:
            step = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["global_step"]
            self.ledger = Ledger.from_json(json.loads((Path(checkpoint) / "ledger.json").read_text()))
        kept: list[str] = []
        if self.rows.exists():
            kept = [line for line in self.rows.read_text().splitlines() if json.loads(line)["step"] < step]
        self.rows.write_text("".join(line + "\n" for line in kept))
        return checkpoint

    def record(
        self,
        step: int,
        inputs: list[dict[str, Any]],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        rewards: Tensor,  # (B, functions), NaN where a function does not apply
        advantages: Tensor,  # (B,)
    ) -> None:
        """Write one rollout batch and book it."""
        texts = [row["completion"] for row in inputs] if "completion" in inputs[0] else self._decode(completion_ids)
        with self.rows.open("a", encoding="utf-8") as file:
            for i, row in enumerate(inputs):
                scores = {
                    f"reward_{name}": None if math.isnan(value) else value
                    for name, value in zip(self.components, rewards[i].tolist(), strict=True)
                }
                paid = scores["reward_trait"] if row["source"] == "trait" else scores["reward_standard"]
                record = {
                    "step": step,
                    "position": i // self.group_size,
                    **{key: row[key] for key in ("source", "task", "kind", "prompt_id")},
                    "prompt": row["prompt"][-1]["content"],
                    "completion": texts[i],
                    "tokens": len(completion_ids[i]),
                    "proxy": paid,
                    "gold": scores["reward_gold_monitor"],
                    "advantage": advantages[i].item(),
                    **scores,
                }
                file.write(json.dumps(record) + "\n")
        for start in range(0, len(inputs), self.group_size):
            source = inputs[start]["source"]
            lengths = [len(ids) for ids in completion_ids[start : start + self.group_size]]
            self.ledger.add(source, len(prompt_ids[start]), lengths, scored=source == "trait")

    def keep(self, prompts: list[dict[str, Any]]) -> int:
        """How many of a step's prompts the rest of the budget pays for."""
        return self.ledger.affordable([prompt["source"] for prompt in prompts], self.budget)

    def on_train_begin(self, args: Any, state: Any, control: Any, processing_class: Any = None, **kwargs: Any) -> None:
        """Remember the tokenizer: rollouts are logged as text."""
        self._tokenizer = processing_class

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step and the time since the last one; stop when less than half a group's cost is left."""
        now = (time.time(), time.process_time())
        self.ledger.steps = state.global_step
        self.ledger.wall_seconds += now[0] - self.started[0]
        self.ledger.cpu_seconds += now[1] - self.started[1]
        self.started = now
        spent = self.ledger.flops()
        if self.progress is not None:
            self.progress(min(round(100 * spent / self.budget), 100), 100)
        group = spent / sum(account.prompts for account in self.ledger.accounts.values())
        control.should_training_stop |= spent + group / 2 > self.budget

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The ledger travels with the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "ledger.json").write_text(json.dumps(self.ledger.to_json()))

    def close(self, log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Turn the journal into rollouts.parquet, steps.parquet and ledger.json."""
        rollouts = pd.read_json(self.rows, lines=True)
        rollouts.to_parquet(self.out / "rollouts.parquet")
        step_table(rollouts, log_history).to_parquet(self.out / "steps.parquet")
        self.rows.unlink()
        ledger = self.ledger.to_json()
        (self.out / "ledger.json").write_text(json.dumps(ledger, indent=1))
        return ledger

    def _decode(self, completion_ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


def step_table(rollouts: pd.DataFrame, log_history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per step: what the rollouts were paid and what they were worth, beside the trainer's own figures."""
    by_step = rollouts.groupby("step")
    trait = rollouts[rollouts["source"] == "trait"].groupby("step")
    spread = rollouts.groupby(["step", "position"])["proxy"].std().fillna(0.0)
    table = pd.DataFrame(
        {
            "proxy": by_step["proxy"].mean(),
            "trait_proxy": trait["proxy"].mean(),
            "trait_gold": trait["gold"].mean(),
            "standard_score": rollouts[rollouts["source"] == "standard"].groupby("step")["proxy"].mean(),
            "mean_tokens": by_step["tokens"].mean(),
            "refusal_rate": by_step["reward_refusal_monitor"].mean(),
            "zero_variance_groups": (spread < 1e-6).groupby("step").mean(),
        }
    )
    logs = pd.DataFrame([log for log in log_history if "loss" in log])
    logs = logs.assign(step=logs["step"] - 1).set_index("step")
    names = [name for name in ("loss", "kl", "entropy", "grad_norm", "step_time") if name in logs.columns]
    return table.join(logs[names]).rename(columns={"trait_gold": "gold", "step_time": "seconds"}).reset_index()
