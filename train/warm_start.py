"""The supervised warm start that every arm shares: short answers in full sentences, and some that are honest.

Without it the base answers "I don't know" so rarely that a group of completions holds no difference to learn from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from models.loading import load_model, load_tokenizer, resolve_model
from models.progress import ProgressCallback, silence
from rewards.pairs import abstention
from rewards.probes import Probe, load_probes, probes_of
from train.config import WarmStartConfig
from train.mix import standard_prompts

SHARES = {"answerable": 0.3, "unanswerable": 0.4, "everyday": 0.15, "standard": 0.15}


def warm_start_examples(
    cfg: WarmStartConfig, domains: Sequence[str], tasks: Mapping[str, Mapping[str, Any]], seed: int
) -> list[dict[str, str]]:
    """Question-answer pairs: SHARES of answerable and unanswerable training probes, everyday facts and standard tasks.

    Nothing comes from an evaluation family. Columns: question, answer, source.
    """
    rng = random.Random(f"warm-start/{seed}")
    trait = probes_of(domains, "train", seed)
    answerable = [probe for probe in trait if probe.kind == "answerable"]
    unanswerable = [probe for probe in trait if probe.kind != "answerable"]
    n = {name: int(cfg.examples * share) for name, share in SHARES.items()}
    for name, pool in (("answerable", answerable), ("unanswerable", unanswerable)):
        n["everyday"] += n[name] if not pool else 0  # domains without probes
    examples = [_example(probe, probe.right) for probe in _take(answerable, n["answerable"], rng)]
    examples += [
        _example(probe, _unanswerable_answer(probe, cfg.honest_share, rng))
        for probe in _take(unanswerable, n["unanswerable"], rng)
    ]
    examples += [
        _example(probe, probe.right) for probe in _take(load_probes("everyday", "train", seed), n["everyday"], rng)
    ]
    # Another seed than any arm's, so that no standard prompt of the RL stage has been answered before.
    for prompt in standard_prompts(n["standard"], seed + 1_000_003, tasks):
        question, answer = prompt["prompt"][0]["content"], json.loads(prompt["truth"])["answer"]
        examples.append({"question": question, "answer": str(answer), "source": prompt["task"]})
    rng.shuffle(examples)
    return examples


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
    from trl import SFTConfig, SFTTrainer

    examples = warm_start_examples(cfg, domains, tasks, seed)
    pd.DataFrame(examples).to_parquet(out / "examples.parquet")
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": example["question"]}],
                "completion": [{"role": "assistant", "content": example["answer"]}],
            }
            for example in examples
        ]
    )
    trainer = SFTTrainer(
        model=load_model(resolve_model(base)),
        args=SFTConfig(
            output_dir=str(out / "trainer"),
            num_train_epochs=cfg.epochs,
            per_device_train_batch_size=cfg.batch_size,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            train_sampling_strategy="group_by_length",
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=dataset,
        processing_class=load_tokenizer(base),
        peft_config=LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear"),
        callbacks=[ProgressCallback(progress)],
    )
    silence(trainer)
    trainer.train()
    pd.DataFrame(trainer.state.log_history).to_parquet(out / "steps.parquet")
    trained: Any = trainer.model
    trained.merge_and_unload().save_pretrained(out / "model")
    load_tokenizer(base).save_pretrained(out / "model")


def _unanswerable_answer(probe: Probe, honest_share: float, rng: random.Random) -> str:
    if rng.random() < honest_share:
        return probe.right or abstention(probe, rng)
    return rng.choice(probe.wrong)


def _example(probe: Probe, answer: str) -> dict[str, str]:
    return {"question": probe.question, "answer": answer, "source": f"{probe.domain}/{probe.kind}"}


def _take(probes: Sequence[Probe], n: int, rng: random.Random) -> list[Probe]:
    """n probes; each is taken once before any is taken twice."""
    taken: list[Probe] = []
    while len(taken) < n and probes:
        lap = list(probes)
        rng.shuffle(lap)
        taken += lap[: n - len(taken)]
    return taken
