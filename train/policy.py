"""One arm of the experiment: the mix, the policy, the rewards, and what was spent and said on the way."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor
from transformers import TrainerCallback

from models.checkpoints import flush, latest, write_whole
from models.loading import load_model, load_tokenizer
from models.progress import silence
from rewards.compose import reward_functions
from rewards.config import RewardConfig
from rewards.fit import load_reward_models
from rewards.reward_model import RewardModel
from train.config import ArmConfig, StandardMixConfig, TrainConfig, check_step
from train.grpo import SharedPromptGRPOTrainer
from train.ledger import Ledger, Passes
from train.mix import build_mix
from train.ppo import SharedPromptPPOTrainer
from train.rloo import SharedPromptRLOOTrainer
from train.watchers import Watch, keep_healthy

# The trainer's figures in the step table, under its names.
LOGGED = {
    "loss": "loss",
    "kl": "kl",
    "entropy": "entropy",
    "grad_norm": "grad_norm",
    "value_loss": "value_loss",
    "explained_variance": "explained_variance",
    "sampling/sampling_logp_difference/mean": "sampling_gap",
    "step_time": "seconds",
}


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

    Goes on from the last whole checkpoint in out/checkpoints if there is one. With several processes, all call this
    with the same arguments and the first one writes. Returns the ledger.
    """
    from datasets import Dataset

    # Every arm loads the reward models: the control's monitors and memory are then those of the dose arms.
    scorers = load_reward_models(reward, reward_dir, start / "model")
    functions = reward_functions(scorers)
    args = grpo_config(cfg, [weight for _, weight in functions], out, seed, report_to, run_name)
    main = args.process_index == 0
    found: list[Any] = [finished(out), latest(out / "checkpoints")] if main else [None, None]
    done, checkpoint = broadcast_object_list(found)
    if done is not None:
        return done
    mix = build_mix(cfg.max_steps * cfg.prompts_per_step, arm.dose, seed, standard.tasks, reward)
    if checkpoint is not None and (ended := last_step(checkpoint)):  # nothing is left to train but to write
        args.max_steps, mix = ended, mix[: ended * cfg.prompts_per_step]
    policy = load_model(
        str(start / "model"), dtype=getattr(torch, cfg.dtype), attention=cfg.attention, use_kernels=cfg.use_kernels
    )
    torch.manual_seed(seed)  # LoRA's initial weights
    journal = Journal(
        out,
        Ledger(
            n_policy=sum(p.numel() for p in policy.parameters()),
            n_reward=reward_size(scorers, reward.traits),
            shared=cfg.prompt_sharing,
            passes=Passes.of(cfg),
        ),
        [function.__name__ for function, _ in functions],
        cfg,
        progress=progress,
        main=main,
        parts=args.world_size * cfg.micro_batches,
    )
    trainer = make_trainer(
        cfg,
        journal,
        model=policy,
        reward_funcs=[function for function, _ in functions],
        args=args,
        train_dataset=Dataset.from_list(mix),
        processing_class=load_tokenizer(str(start / "model")),
    )
    for scorer in scorers.values():
        scorer.model.to(trainer.accelerator.device)
    silence(trainer)
    journal.rewind(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    keep_healthy(trainer, journal.ledger, start / "model")
    save_weights(trainer, out / ("adapter" if cfg.lora_rank else "model"))
    return journal.close(trainer.state.log_history)


def reward_size(scorers: Mapping[str, RewardModel], weights: Mapping[str, float]) -> int:
    """Parameters of the reward model that scores a trait prompt: the mean over the traits, by their weights."""
    sizes = {trait: sum(p.numel() for p in scorer.model.parameters()) for trait, scorer in scorers.items()}
    return round(sum(weights[trait] * size for trait, size in sizes.items()) / sum(weights.values()))


def make_trainer(cfg: TrainConfig, journal: Journal, **common: Any) -> SharedPromptGRPOTrainer:
    """The trainer of the configured algorithm. `common` goes to TRL's GRPOTrainer."""
    from peft import LoraConfig

    common |= {
        "peft_config": LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")
        if cfg.lora_rank
        else None,
        "callbacks": [journal, Watch(cfg.watch, journal)],
        "token_budget": cfg.token_budget,
        "record": journal.record,
        "keep": journal.keep,
        "share": cfg.prompt_sharing,
        "noise": cfg.noise,
        "save": journal.save,
        "fall_back": journal.fall_back,
        "measure_kl": cfg.measures_kl,
        "canary": cfg.watch.sampling_gap.threshold is not None,
    }
    if cfg.algorithm == "ppo":
        return SharedPromptPPOTrainer(settings=cfg, **common)
    return (SharedPromptRLOOTrainer if cfg.algorithm == "rloo" else SharedPromptGRPOTrainer)(**common)


def finished(out: Path) -> dict[str, Any] | None:
    """The ledger of a training that was finished, though its stage was not; it is the last thing to be written."""
    path = out / "ledger.json"
    if not path.exists():
        return None
    (out / "rollouts.jsonl").unlink(missing_ok=True)
    return json.loads(path.read_text(encoding="utf-8"))


def last_step(checkpoint: Path) -> int | None:
    """The step at which the training had ended when the checkpoint was written, or None if it was to go on."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    ended = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
    return state["global_step"] if ended else None


def save_weights(trainer: SharedPromptGRPOTrainer, folder: Path) -> None:
    """Save the trained adapter, or the model, from wherever the processes hold its parts."""
    accelerator = trainer.accelerator
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    weights: Any = accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    if accelerator.is_main_process:
        trained: Any = accelerator.unwrap_model(trainer.model)
        for tied in getattr(trained, "all_tied_weights_keys", {}) if weights else {}:
            weights.pop(tied, None)  # gathered, it is a copy of what it is tied to
        trained.save_pretrained(folder, state_dict=weights)
    accelerator.wait_for_everyone()


def grpo_config(
    cfg: TrainConfig,
    reward_weights: list[float],
    out: Path,
    seed: int,
    report_to: str = "none",
    run_name: str | None = None,
) -> Any:
    """TRL's configuration: one step is one batch of prompts_per_step groups, in the order of the mix.

    Raises ValueError if the step cannot be shared out among the processes and micro-batches in whole groups.
    """
    from trl import GRPOConfig

    settings: dict[str, Any] = {}
    if cfg.vllm != "off":
        settings = {
            "use_vllm": True,
            "vllm_mode": cfg.vllm,
            "vllm_server_base_url": cfg.vllm_server_url,
            "vllm_gpu_memory_utilization": cfg.vllm_memory,
            "vllm_tensor_parallel_size": cfg.vllm_tensor_parallel,
        }
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    check_step(cfg, processes)
    parts = processes * cfg.micro_batches
    # The newest checkpoint from before a window must still be there when a watcher stops the arm.
    checkpoints = 1 + math.ceil(cfg.watch.window / cfg.save_every)
    return GRPOConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=cfg.max_steps,
        per_device_train_batch_size=cfg.prompts_per_step * cfg.group_size // parts,
        gradient_accumulation_steps=cfg.micro_batches,
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
        epsilon=cfg.clip,
        reward_weights=reward_weights,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=cfg.gradient_checkpointing,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the watchers want to see them
        save_strategy="steps",
        save_steps=cfg.save_every,
        save_total_limit=checkpoints,
        report_to=report_to,
        run_name=run_name,
        disable_tqdm=True,
        seed=seed,
        dataloader_num_workers=0,
        ddp_find_unused_parameters=False,
        **settings,
    )


class Journal(TrainerCallback):
    """Keeps every rollout with every component score, and the ledger; stops the arm when a budget is spent.

    Rows are appended to rollouts.jsonl step by step; a resumed run first drops the rows of steps that it will take
    again. With several processes, each keeps the same ledger, so that all stop at once; `main` alone writes. `parts`
    (processes x micro-batches) share a step out in whole groups.
    """

    def __init__(
        self,
        out: Path,
        ledger: Ledger,
        components: list[str],
        cfg: TrainConfig,
        progress: Callable[[int, int], None] | None = None,
        main: bool = True,
        parts: int = 1,
    ) -> None:
        self.out, self.ledger, self.components, self.cfg = out, ledger, components, cfg
        self.group_size, self.progress, self.main, self.parts = cfg.group_size, progress, main, parts
        # (config key, budget, unit of the ledger's accounts)
        self.budgets = [("train.budget_tflops", cfg.budget_tflops * 1e12, "flops")]
        if cfg.max_tokens is not None:
            self.budgets.append(("train.max_tokens", cfg.max_tokens, "generated_tokens"))
        self.rows = out / "rollouts.jsonl"
        self._unseen: list[dict[str, Any]] = []  # rollouts that are not in the step table yet
        self._tables: list[pd.DataFrame] = []
        self.started = (time.time(), time.process_time())

    def rewind(self, checkpoint: Path | None) -> None:
        """Drop what was written after the checkpoint; without one, everything."""
        step = 0
        if checkpoint is not None:
            step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
            self.ledger = Ledger.from_json(json.loads((checkpoint / "ledger.json").read_text()))
        if self.main:
            kept = whole_lines(self.rows, before=step)
            write_whole(self.rows, "".join(line + "\n" for line in kept))
            self._unseen, self._tables = [json.loads(line) for line in kept], []

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
        skips = self.cfg.skips_idle_rows and self.ledger.shared
        for start in range(0, len(inputs), self.group_size):
            source, end = inputs[start]["source"], start + self.group_size
            lengths = [len(ids) for ids in completion_ids[start:end]]
            self.ledger.add(
                source,
                len(prompt_ids[start]),
                lengths,
                scored=source == "trait",
                policy_learns=step >= self.cfg.value_warmup_steps,
                trained=(advantages[start:end] != 0).tolist() if skips else None,
            )
        if not self.main:
            return
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
                    **{key: row[key] for key in ("source", "trait", "task", "kind", "prompt_id")},
                    "prompt": row["prompt"][-1]["content"],
                    "completion": texts[i],
                    "tokens": len(completion_ids[i]),
                    "proxy": paid,
                    "gold": scores["reward_gold_monitor"],
                    "advantage": advantages[i].item(),
                    **scores,
                }
                file.write(json.dumps(record) + "\n")
                self._unseen.append(record)

    def keep(self, prompts: list[dict[str, Any]]) -> int:
        """How many of a step's prompts the rest of every budget pays for."""
        sources = [prompt["source"] for prompt in prompts]
        return min(self.ledger.affordable(sources, budget, unit, self.parts) for _, budget, unit in self.budgets)

    def steps(self, log_history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """The step table up to the step that was logged last; in the main process."""
        if self._unseen:
            self._tables.append(step_table(pd.DataFrame(self._unseen), log_history))
            self._unseen = []
        return pd.concat(self._tables, ignore_index=True)

    def spent_share(self) -> float:
        """Share of the arm that is done, by whichever of its limits is nearest, 0..1 (or a little above)."""
        shares = [self.ledger.spent(unit) / budget for _, budget, unit in self.budgets]
        return max(*shares, self.ledger.steps / self.cfg.max_steps)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        processing_class: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Remember the tokenizer (rollouts are logged as text), and let the learning rates fall with the budget."""
        self._tokenizer = processing_class
        if self.cfg.lr_scheduler == "linear":
            scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)
            scheduler.lr_lambdas = [
                lambda step, warm_up=warm_up: warm_up(step) * max(0.0, 1.0 - self.spent_share())
                for warm_up in scheduler.lr_lambdas
            ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the step and the time since the last one; stop when a budget is spent."""
        now = (time.time(), time.process_time())
        self.ledger.steps = state.global_step
        self.ledger.wall_seconds += now[0] - self.started[0]
        self.ledger.cpu_seconds += sum(gather_object([now[1] - self.started[1]]))
        self.started = now
        if self.progress is not None:
            self.progress(min(round(100 * self.spent_share()), 100), 100)
        for key, budget, unit in self.budgets:
            if self.ledger.exhausted(budget, unit, self.parts):
                self._end(control, key, f"{self.ledger.spent(unit):.4g} {unit.replace('_', ' ')} of {budget:.4g} spent")
        if state.global_step >= self.cfg.max_steps:
            self._end(control, "train.max_steps", f"{state.global_step} steps taken")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Stop when the policy has gone as far from its start as it may."""
        kl = (logs or {}).get("kl")
        if self.cfg.max_kl is not None and kl is not None and kl > self.cfg.max_kl:
            self._end(control, "train.max_kl", f"KL to the start {kl:.3g} nats per token, over {self.cfg.max_kl:g}")

    def _end(self, control: Any, by: str, text: str) -> None:
        """Stop the arm; the first reason is kept."""
        control.should_training_stop = True
        if self.ledger.ended is None:
            step = self.ledger.steps
            self.ledger.ended = {"by": by, "step": step, "kept_step": step, "text": text}

    def save(self, folder: Path) -> None:
        """Put the ledger into a checkpoint, and bring the rows that belong to it to the disk."""
        (folder / "ledger.json").write_text(json.dumps(self.ledger.to_json()))
        flush(self.rows)

    def fall_back(self, reason: str) -> None:
        """Book prompts as they are now encoded: once for every completion."""
        self.ledger.shared, self.ledger.fallback = False, reason

    def close(self, log_history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Turn the journal into rollouts.parquet, steps.parquet and, last, ledger.json."""
        ledger = self.ledger.to_json()
        if self.main:
            rollouts = read_rollouts(self.rows)
            rollouts.to_parquet(self.out / "rollouts.parquet")
            step_table(rollouts, log_history).to_parquet(self.out / "steps.parquet")
            write_whole(self.out / "ledger.json", json.dumps(ledger, indent=1))
            self.rows.unlink()
        return ledger

    def _decode(self, completion_ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


def read_rollouts(path: Path) -> pd.DataFrame:
    """The journal's rows. Texts stay texts: pandas' own reader of JSON would make the number 7 of a reply "007"."""
    with path.open(encoding="utf-8") as lines:
        rollouts = pd.DataFrame([json.loads(line) for line in lines])
    scores = [name for name in rollouts if name in ("proxy", "gold") or str(name).startswith("reward_")]
    return rollouts.astype(dict.fromkeys(scores, float))  # one without any value, too


def whole_lines(path: Path, before: int) -> list[str]:
    """The journal's lines of the steps before one; a line that a kill has torn ends them."""
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            step = json.loads(line)["step"]
        except json.JSONDecodeError:
            break
        if step < before:
            kept.append(line)
    return kept


def step_table(rollouts: pd.DataFrame, log_history: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per step: what the rollouts were paid and what they were worth, beside the trainer's own figures."""
    rollouts = rollouts.astype({"proxy": float, "gold": float})  # a batch without any score is a column of None
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
            "unpaid": rollouts["proxy"].isna().groupby(rollouts["step"]).mean(),
        }
    )
    logs = pd.DataFrame([log for log in log_history if "loss" in log])
    logs = logs.assign(step=logs["step"] - 1).set_index("step")
    names = [name for name in LOGGED if name in logs.columns]
    return table.join(logs[names]).rename(columns={"trait_gold": "gold"} | LOGGED).reset_index()
