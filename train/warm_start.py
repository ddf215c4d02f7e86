"""The supervised warm start that every arm shares: short answers in full sentences, and some that are honest.

Without it the base answers "I don't know" so rarely that a group of completions holds no difference to learn from. It
asks about real and invented subjects as twins: in the same words, in the same update. What the two have in common
cancels there, so the model learns what tells them apart instead of how often to abstain (docs/LOG.md, 2026-11-22).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from models.loading import best_device, load_model, load_tokenizer, resolve_model
from models.progress import ProgressCallback, silence
from rewards.pairs import abstention
from rewards.probes import Probe, load_probes, probes_of, twins
from train.config import WarmStartConfig
from train.mix import WARM_START, laps, standard_prompts, take_turns

# Of the examples. All come in twos, so that with an even batch size twins share an update.
SHARES = {"twins": 0.35, "answerable": 0.4, "everyday": 0.1, "standard": 0.1, "false-premise": 0.05}

Example = dict[str, str]  # question, answer, source


def warm_start_examples(
    cfg: WarmStartConfig, domains: Sequence[str], tasks: Mapping[str, Mapping[str, Any]], seed: int
) -> list[Example]:
    """Questions with answers in the order of training: SHARES, without what the domains have no probes for.

    Nothing comes from an evaluation family. A share goes through all its probes before it asks one again; an answerable
    probe may stand in two shares, with a twin and without.
    """
    rng = random.Random(f"warm-start/{seed}")
    probes = probes_of(domains, "train", seed)
    pools: dict[str, list[tuple[Probe, ...]]] = {
        "twins": [*twins(probes, seed)],
        "answerable": [(probe,) for probe in probes if probe.kind == "answerable"],
        "false-premise": [(probe,) for probe in probes if probe.kind == "false-premise"],
        "everyday": [(probe,) for probe in load_probes("everyday", "train", seed)],
    }
    supplies: dict[str, Iterator[Example]] = {
        name: (_example(probe, cfg.honest_share, rng) for probe in chain.from_iterable(laps(pool, name, seed)))
        for name, pool in pools.items()
        if pool
    }
    # Items of their own, so that no standard prompt of the RL stage has been answered before.
    supplies["standard"] = map(_standard_example, standard_prompts(cfg.examples, seed, tasks, WARM_START))
    turns = take_turns({name: share for name, share in SHARES.items() if name in supplies})
    return list(islice((next(supplies[name]) for name in turns for _ in range(2)), cfg.examples))


def warm_start(
    cfg: WarmStartConfig,
    base: str,
    domains: Sequence[str],
    tasks: Mapping[str, Mapping[str, Any]],
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fine-tune the base with LoRA on the examples, merge, and save a Hugging Face directory in out/model."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig

    from train.sft import PackedSFTTrainer, sft_row

    examples = warm_start_examples(cfg, domains, tasks, seed)
    pd.DataFrame(examples).to_parquet(out / "examples.parquet")
    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)  # LoRA's initial weights
    trainer = PackedSFTTrainer(
        model=load_model(resolve_model(base), device=best_device()),
        args=SFTConfig(
            output_dir=str(out / "trainer"),
            num_train_epochs=cfg.epochs,
            per_device_train_batch_size=cfg.batch_size,
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(
            [sft_row(tokenizer, [{"role": "user", "content": e["question"]}], e["answer"]) for e in examples]
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear"),
        callbacks=[ProgressCallback(progress)],
    )
    silence(trainer)
    trainer.train()
    pd.DataFrame(trainer.state.log_history).to_parquet(out / "steps.parquet")
    trained: Any = trainer.model
    trained.merge_and_unload().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


def _example(probe: Probe, honest_share: float, rng: random.Random) -> Example:
    """The right answer; where there is nothing to know, an honest one in honest_share of the cases, else made up."""
    answer = probe.right or abstention(probe, rng)
    if probe.kind != "answerable" and rng.random() >= honest_share:
        answer = rng.choice(probe.wrong)
    return {"question": probe.question, "answer": answer, "source": f"{probe.domain}/{probe.kind}"}


def _standard_example(prompt: Mapping[str, Any]) -> Example:
    answer = str(json.loads(prompt["truth"])["answer"])
    return {"question": prompt["prompt"][0]["content"], "answer": answer, "source": prompt["task"]}
