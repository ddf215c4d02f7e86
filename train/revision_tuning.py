"""Fine-tuning a policy on its revisions: supervised, and by direct preference optimisation.

Supervised (Bai et al. 2022, arXiv 2212.08073, section 3.1): the accepted revisions, mixed with standard examples at the
arm's dose. DPO (Rafailov et al. 2023, arXiv 2305.18290): a revision is preferred to the first answer. Both take as many
examples as their allowance pays for: 6N FLOPs a trained token, and for DPO another 2N for the reference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig

from models.checkpoints import SealedTrainer, latest
from models.loading import best_device, load_model, load_tokenizer
from models.progress import ProgressCallback, silence
from models.replies import Messages
from train.config import StandardMixConfig, TrainConfig
from train.constitution_config import ConstitutionConfig
from train.ledger import Account
from train.mix import is_dose, standard_prompts
from train.parts import Progress, Row, part_ledger, passes, until_spent
from train.sft import PackedSFTTrainer, row_tokens, sft_row


class SealedDPOTrainer(SealedTrainer, DPOTrainer):
    """DPOTrainer whose checkpoints are sealed."""


def supervised_examples(
    revisions: Sequence[Row], tasks: Mapping[str, Mapping[str, Any]], dose: float, seed: int
) -> Iterator[Row]:
    """Endless examples {"source", "prompt", "answer"}, their positions those of the mix (train/mix.py).

    A revision where the mix of this dose has a trait prompt, else the standard prompt of that position with its right
    answer. Every pass over the revisions is reshuffled.
    """
    supply, standard = passes(revisions, f"{seed}/supervised"), standard_prompts(64, seed, tasks)
    k = 0
    while True:
        if is_dose(k, dose):
            row = next(supply)
            yield {"source": "trait", "prompt": row["prompt"], "answer": row["chosen"]}
        else:
            if k >= len(standard):
                standard = standard_prompts(2 * k, seed, tasks)
            answer = str(json.loads(standard[k]["truth"])["answer"])
            yield {"source": "standard", "prompt": standard[k]["prompt"], "answer": answer}
        k += 1


def fine_tune(
    cfg: ConstitutionConfig,
    train: TrainConfig,
    standard: StandardMixConfig,
    dose: float,
    revisions: Sequence[Row],
    start: Path,
    out: Path,
    seed: int,
    allowance: float,
    merge: bool,
    progress: Progress | None = None,
) -> Row:
    """Fine-tune the model in `start` with LoRA until the allowance (FLOPs) is spent; returns the ledger.

    Saves adapter/ or, with `merge`, a whole model/ in `out`, and steps.parquet; the caller writes the ledger. Goes on
    from the last whole checkpoint in out/checkpoints.
    """
    model, tokenizer, n = _load(start)
    examples = until_spent(
        (
            {**e, **sft_row(tokenizer, e["prompt"], e["answer"])}
            for e in supervised_examples(revisions, standard.tasks, dose, seed)
        ),
        lambda row: 6.0 * n * row_tokens(row),
        allowance,
    )
    columns = ("prompt_ids", "answer_ids")
    trainer = PackedSFTTrainer(
        model=model,
        args=SFTConfig(remove_unused_columns=False, **_settings(cfg, train, out, seed, cfg.learning_rate)),
        train_dataset=Dataset.from_list([{key: example[key] for key in columns} for example in examples]),
        processing_class=tokenizer,
        peft_config=_lora(cfg),
        callbacks=[ProgressCallback(progress)],
    )
    steps = _run(trainer, out)
    trained: Any = trainer.model
    if merge:
        trained.merge_and_unload().save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
    else:
        trained.save_pretrained(out / "adapter")
    accounts = {"trait": Account(), "standard": Account()}
    for example in examples:
        _book(accounts[example["source"]], row_tokens(example), 6.0 * n)
    return part_ledger(accounts, n, **_ended(steps), epochs=accounts["trait"].prompts / len(revisions))


def prefer_revisions(
    cfg: ConstitutionConfig,
    train: TrainConfig,
    revisions: Sequence[Row],
    start: Path,
    out: Path,
    seed: int,
    allowance: float,
    progress: Progress | None = None,
) -> Row:
    """DPO on {"prompt", "chosen", "rejected"} rows until the allowance (FLOPs) is spent; returns the ledger.

    Saves adapter/ (on the model in `start`, which is the reference) and steps.parquet in `out`, as fine_tune does.
    """
    model, tokenizer, n = _load(start)

    def tokens(row: Row) -> int:
        return sum(_tokens(tokenizer, row["prompt"], _assistant(row[side])) for side in ("chosen", "rejected"))

    rows = until_spent(passes(revisions, f"{seed}/preferences"), lambda row: 8.0 * n * tokens(row), allowance)
    records = [
        {"prompt": row["prompt"], "chosen": _assistant(row["chosen"]), "rejected": _assistant(row["rejected"])}
        for row in rows
    ]
    trainer = SealedDPOTrainer(
        model=model,
        args=DPOConfig(beta=cfg.dpo_beta, **_settings(cfg, train, out, seed, cfg.dpo_learning_rate)),
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer,
        peft_config=_lora(cfg),
        callbacks=[ProgressCallback(progress)],
    )
    steps = _run(trainer, out)
    trained: Any = trainer.model
    trained.save_pretrained(out / "adapter")
    account = Account()
    for row in rows:
        _book(account, tokens(row), 8.0 * n)
    return part_ledger({"trait": account}, n, **_ended(steps), epochs=len(rows) / len(revisions))


def _load(start: Path) -> tuple[Any, Any, int]:
    """Model, tokenizer and number of parameters."""
    model = load_model(str(start), device=best_device())
    return model, load_tokenizer(str(start)), sum(p.numel() for p in model.parameters())


def _tokens(tokenizer: Any, prompt: Messages, completion: Messages) -> int:
    text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _book(account: Account, tokens: int, flops_per_token: float) -> None:
    account.prompts += 1
    account.trained_tokens += tokens
    account.flops += flops_per_token * tokens


def _lora(cfg: ConstitutionConfig) -> LoraConfig:
    return LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")


def _settings(
    cfg: ConstitutionConfig, train: TrainConfig, out: Path, seed: int, learning_rate: float
) -> dict[str, Any]:
    """What SFT and DPO have in common: one pass over their examples in the given order, with checkpoints."""
    torch.manual_seed(seed)  # LoRA's initial weights
    return {
        "output_dir": str(out / "checkpoints"),
        "num_train_epochs": 1,
        "max_length": None,
        "per_device_train_batch_size": cfg.batch_size,
        "train_sampling_strategy": "sequential",
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": train.warmup_steps,
        "max_grad_norm": train.max_grad_norm,
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "steps",
        "save_steps": train.save_every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }


def _run(trainer: Any, out: Path) -> int:
    """Train, from the last whole checkpoint if there is one; write steps.parquet. Returns the number of steps."""
    silence(trainer)
    checkpoint = latest(out / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    pd.DataFrame([log for log in trainer.state.log_history if "loss" in log]).to_parquet(out / "steps.parquet")
    return int(trainer.state.global_step)


def _ended(steps: int) -> Row:
    """How it ended, in the words of train/ledger.py."""
    text = f"{steps} updates, as many as the allowance pays for"
    ended = {"by": "train.budget_tflops", "step": steps, "kept_step": steps, "text": text}
    return {"steps": steps, "ended": ended, "alerts": []}


def _assistant(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]
