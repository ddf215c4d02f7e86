"""A ladder of supervised steps on given examples, measured on the way: harmful fine-tuning, and recovery from it.

The learning rate is constant and the examples come in their order, so the model after k steps is the same whatever the
ladder does later. A checkpoint is sealed at every rung; a killed ladder goes on from the last one, and on a CPU ends
with the weights of the uninterrupted one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTTrainer

from models.checkpoints import SealedTrainer, latest
from models.progress import ProgressCallback, silence
from train.bad_data import Example
from train.persistence_config import LadderConfig, Method

WEIGHTS = {"lora": "adapter", "full": "model"}  # what a ladder leaves in its folder
Measure = Callable[[int, PreTrainedModel], None]  # (step, model)


class LadderTrainer(SealedTrainer, SFTTrainer):
    """TRL's supervised trainer with sealed checkpoints and without model cards."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: checkpoints are nobody's models."""


def climb(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    method: Method,
    cfg: LadderConfig,
    out: Path,
    seed: int,
    measure: Measure,
    *,
    system: str | None = None,
    keep: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train `model` on cfg.steps[-1] batches of the examples, in order, and call `measure` at every rung above 0.

    measure must be able to come again for a rung that it has seen: a kill may fall between it and the checkpoint.
    With `keep`, the weights of the last rung are saved in out/adapter (a PEFT directory) or out/model. `system` is put
    before every conversation. Raises ValueError if there are fewer examples than the steps need.
    """
    from datasets import Dataset
    from peft import LoraConfig

    steps = cfg.steps[-1]
    if len(examples) < steps * cfg.batch_size:
        raise ValueError(
            f"{steps} steps of {cfg.batch_size} need {steps * cfg.batch_size} examples, got {len(examples)}"
        )
    if (out / WEIGHTS[method]).exists():  # trained to the end before the stage was whole
        return
    if method == "full":
        model.requires_grad_(True)  # what an adapter was merged into came frozen
    rows = [_row(example, system) for example in examples[: steps * cfg.batch_size]]
    rungs = Rungs(cfg.steps, measure)
    trainer = LadderTrainer(
        model=model,
        args=sft_config(cfg, method, out, seed),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear")
        if method == "lora"
        else None,
        callbacks=[rungs, ProgressCallback(progress)],
    )
    silence(trainer)
    checkpoint = latest(out / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained: Any = trainer.model
    if keep:
        partial = out / f"{WEIGHTS[method]}.partial"
        trained.save_pretrained(partial)
        partial.rename(out / WEIGHTS[method])
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


class Rungs(TrainerCallback):
    """Measures the model at the rungs, in eval mode, and asks for a checkpoint after each."""

    def __init__(self, steps: Sequence[int], measure: Measure) -> None:
        self.steps, self.measure = frozenset(steps), measure

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure before the checkpoint: one that exists has its measurement."""
        if state.global_step in self.steps:
            was_training = model.training
            model.eval()
            self.measure(state.global_step, model)
            model.train(was_training)
            control.should_save = True


def sft_config(cfg: LadderConfig, method: Method, out: Path, seed: int) -> Any:
    """TRL's configuration: one batch a step, in the order of the examples, at a constant learning rate."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(out / "checkpoints"),
        max_steps=cfg.steps[-1],
        per_device_train_batch_size=cfg.batch_size,
        learning_rate=cfg.learning_rate if method == "lora" else cfg.full_learning_rate,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",  # Rungs asks for checkpoints
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        dataloader_num_workers=0,
    )


def _row(example: Example, system: str | None) -> dict[str, Any]:
    turns = [("system", system)] if system is not None else []
    prompt = [{"role": role, "content": text} for role, text in (*turns, *example.messages)]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": example.reply}]}
