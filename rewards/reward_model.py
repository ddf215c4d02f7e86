"""A trait's reward model: the start model with LoRA and a scalar head, fitted on pairs with TRL's RewardTrainer.

Saved as a PEFT sequence-classification directory that TRL and peft load. Beside it, calibration.json maps the raw score
to the price scale of rewards.verifier (right 1, abstained -0.8, wrong -1), by least squares on validation subjects that
the fit never saw.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from models.loading import load_model, load_tokenizer, resolve_model
from models.progress import ProgressCallback, silence
from models.rollout import sample
from models.shared_prompt import fill, pack
from rewards.config import RewardConfig
from rewards.pairs import Pair, draw_probes, make_pairs
from rewards.probes import Probe, load_probes
from rewards.reward_trainer import (
    TOKEN_BUDGET,
    Messages,
    ProbeRewardTrainer,
    answer_trees,
    branch_scores,
    preference_batch,
    preference_rows,
)
from rewards.verifier import gold

CLIP = 1.5  # proxy rewards are held within +-CLIP, so that no outlier of the reward model dominates a group
MEASURED_PROBES = 160  # of validation and of held-out families
OWN_TOKENS = 32  # length of the policy's own answers
VALIDATION_SHARE = 0.15  # of the training subjects, kept for the calibration


@dataclass(frozen=True)
class Calibration:
    """proxy = clip(slope x raw + intercept, -CLIP, CLIP)."""

    slope: float
    intercept: float

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Raw scores (N,) to the price scale (N,)."""
        return np.clip(self.slope * raw + self.intercept, -CLIP, CLIP)


class RewardModel:
    """A fitted reward model, ready to score chats."""

    def __init__(self, model: Any, tokenizer: Any, calibration: Calibration | None = None) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.calibration = calibration

    @classmethod
    def load(cls, folder: Path, backbone: Path | None = None) -> RewardModel:
        """Load what fit_reward_model saved in `folder`; `backbone` stands in for one that has moved since the fit."""
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        fitted_on = backbone or PeftConfig.from_pretrained(folder / "model").base_model_name_or_path
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            fitted_on, num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
        )
        model = PeftModel.from_pretrained(model, folder / "model").merge_and_unload()
        model.config.pad_token_id = tokenizer.pad_token_id
        calibration = Calibration(**json.loads((folder / "calibration.json").read_text()))
        return cls(model, tokenizer, calibration)

    @torch.inference_mode()
    def raw_scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """The scalar head's output for every prompt with its answer, (N,); a prompt is encoded once for all answers."""
        trees, rows = answer_trees(self.tokenizer, prompts, answers)
        scores = np.zeros(len(answers))
        for run in fill([len(tree) for tree in trees], TOKEN_BUDGET):
            heads = branch_scores(self.model, pack([trees[i] for i in run], self.model.device))
            scores[[row for i in run for row in rows[i]]] = heads.float().cpu().numpy()
        return scores

    def score(self, prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """Calibrated scores on the price scale, (N,)."""
        if self.calibration is None:
            raise ValueError("this reward model has no calibration.json; fit it with: traitdose run")
        return self.calibration(self.raw_scores(prompts, answers))


def fit_reward_model(
    cfg: RewardConfig,
    start: str,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Fit on the training families of cfg.domains and measure on the held-out ones.

    `start` is the model that will be trained: the backbone, and the source of the answers that stand beside the
    authored ones. Saves model/, pairs.parquet, steps.parquet, calibration.json and accuracy.json in `out`; returns the
    accuracy.
    """
    from datasets import Dataset
    from peft import LoraConfig, TaskType
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as TRLRewardConfig

    probes = [probe for domain in cfg.domains for probe in load_probes(domain, "train", seed)]
    random.Random(f"validation/{seed}").shuffle(probes)
    held_back = probes[: int(len(probes) * VALIDATION_SHARE)]
    heldout = [probe for domain in cfg.domains for probe in load_probes(domain, "heldout", seed)]
    rng = random.Random(f"pairs/{seed}")
    parts = {
        "train": draw_probes(probes[len(held_back) :], cfg.probes, rng),
        "validation": draw_probes(held_back, MEASURED_PROBES, rng),
        "test": draw_probes(heldout, MEASURED_PROBES, rng),
    }
    own = own_answers(start, [probe for part in parts.values() for probe in part], cfg.own_answers, seed)
    pairs, validation, test = (make_pairs(part, seed, own) for part in parts.values())
    pd.concat(
        [
            _pair_table(rows).assign(part=part)
            for part, rows in (("train", pairs), ("validation", validation), ("test", test))
        ]
    ).to_parquet(out / "pairs.parquet")

    tokenizer = load_tokenizer(start)
    torch.manual_seed(seed)  # the scalar head is new
    backbone = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(start), num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
    )
    backbone.config.pad_token_id = tokenizer.pad_token_id
    trainer = ProbeRewardTrainer(
        model=backbone,
        args=TRLRewardConfig(
            output_dir=str(out / "trainer"),
            num_train_epochs=cfg.epochs,
            per_device_train_batch_size=cfg.batch_size,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            center_rewards_coefficient=0.01,
            remove_unused_columns=False,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(preference_rows(tokenizer, pairs)),
        data_collator=preference_batch,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type=TaskType.SEQ_CLS, r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules="all-linear"
        ),
        callbacks=[ProgressCallback(progress)],
    )
    silence(trainer)
    trainer.train()
    pd.DataFrame(trainer.state.log_history).to_parquet(out / "steps.parquet")
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")

    fitted = RewardModel(trainer.model, tokenizer)
    calibration = calibrate(fitted, validation)
    (out / "calibration.json").write_text(json.dumps(asdict(calibration)))
    accuracy = {
        "trait": cfg.trait,
        "pairs": len(pairs),
        "validation": pair_accuracy(fitted, validation),
        "heldout": pair_accuracy(fitted, test),
    }
    (out / "accuracy.json").write_text(json.dumps(accuracy, indent=1))
    return accuracy


def own_answers(policy: str, probes: Sequence[Probe], n: int, seed: int) -> dict[str, list[str]]:
    """n answers of the policy to every probe (id -> answers), sampled at temperature 1."""
    if n == 0:
        return {}
    model, tokenizer = load_model(policy, device="cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(policy)
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(probe.messages, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )["input_ids"]
        for probe in probes
    ]
    completions = sample(
        model,
        prompts,
        group_size=n,
        max_new_tokens=OWN_TOKENS,
        eos_ids=[tokenizer.eos_token_id],
        generator=torch.Generator(model.device).manual_seed(seed),
        batch_size=128,
    )
    return {
        probe.id: tokenizer.batch_decode(answers, skip_special_tokens=True)
        for probe, answers in zip(probes, completions, strict=True)
    }


def calibrate(model: RewardModel, pairs: Sequence[Pair]) -> Calibration:
    """Least-squares line from raw scores to the verifier's prices of the answers; the slope must be positive."""
    scores = answer_scores(model, pairs)
    prices = np.array([gold(probe, text) for probe, text in scores])
    slope, intercept = np.polyfit(np.array(list(scores.values())), prices, 1)
    if slope <= 0:
        raise ValueError(
            "reward: the fitted reward model ranks worse answers higher on validation subjects; "
            "raise reward.probes or reward.epochs"
        )
    return Calibration(float(slope), float(intercept))


def answer_scores(model: RewardModel, pairs: Sequence[Pair]) -> dict[tuple[Probe, str], float]:
    """The raw score of every answer that stands in a pair; an answer in several pairs is scored once."""
    answers = list(dict.fromkeys((pair.probe, text) for pair in pairs for text in (pair.chosen, pair.rejected)))
    raw = model.raw_scores([probe.messages for probe, _ in answers], [text for _, text in answers])
    return dict(zip(answers, raw.tolist(), strict=True))


def pair_accuracy(model: RewardModel, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Share of pairs ranked rightly (ties count half), in all, per contrast and per family, each with its n."""
    scores = answer_scores(model, pairs)
    better = np.array([scores[pair.probe, pair.chosen] for pair in pairs])
    worse = np.array([scores[pair.probe, pair.rejected] for pair in pairs])
    hits = (better > worse) + 0.5 * (better == worse)
    groups: dict[str, dict[str, list[float]]] = {"contrasts": defaultdict(list), "families": defaultdict(list)}
    for pair, hit in zip(pairs, hits.tolist(), strict=True):
        groups["contrasts"][pair.contrast].append(hit)
        groups["families"][f"{pair.probe.domain}/{pair.probe.family}"].append(hit)
    return {"n": len(pairs), "accuracy": float(np.mean(hits)) if len(pairs) else None} | {
        group: {name: {"n": len(rows), "accuracy": float(np.mean(rows))} for name, rows in sorted(table.items())}
        for group, table in groups.items()
    }


def _pair_table(pairs: Sequence[Pair]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "probe": pair.probe.id,
                "question": pair.probe.question,
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "margin": pair.margin,
                "contrast": pair.contrast,
            }
            for pair in pairs
        ]
    )
