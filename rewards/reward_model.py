"""A trait's reward model: a backbone with LoRA and a scalar head, fitted on preferences with TRL's RewardTrainer.

Saved as a PEFT sequence-classification directory that TRL and peft load. Beside it, calibration.json maps the raw score
to the price scale of rewards.verifier (right or good 1, abstained -0.8, wrong or bad -1), by least squares on
validation subjects that the fit never saw.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from statsmodels.stats.proportion import proportion_confint

from models.checkpoints import latest
from models.linear import use_fastest
from models.loading import best_device, load_model, load_tokenizer, resolve_model
from models.progress import ProgressCallback, silence
from models.replies import encode
from models.rollout import sample
from models.shared_prompt import Tree, fill, pack
from rewards.config import PROBE_TRAIT, RewardConfig
from rewards.pairs import draw_probes, make_pairs
from rewards.preferences import Preference, adversarial_probes, from_probes, style_guess
from rewards.probes import Probe, probes_of
from rewards.reward_trainer import (
    TOKEN_BUDGET,
    Messages,
    SharedPromptRewardTrainer,
    answer_trees,
    branch_scores,
    preference_batch,
    preference_rows,
)

CLIP = 1.5  # proxy rewards are held within +-CLIP, so that no outlier of the reward model dominates a group
MEASURED_SHARE = 0.4  # probes of validation, and as many of held-out families, for each that is learned from
MEASURED_PROBES = (64, 160)  # but at least and at most so many: enough to judge by, in less time than the fit takes
OWN_TOKENS = 32  # length of the policy's own answers
VALIDATION_SHARE = 0.15  # of the training subjects, kept for the calibration

AnswerScores = dict[tuple[str, str], float]  # raw scores by prompt id and answer


@dataclass(frozen=True)
class Recipe:
    """How a reward model is trained."""

    epochs: float = 1.0
    learning_rate: float = 3e-4  # peak, of the LoRA weights and the scalar head
    lora_rank: int = 16
    batch_size: int = 8  # prompts per update, each with all its preferences
    save_every: int | None = None  # updates between checkpoints; None keeps none


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
    def load(cls, folder: Path, backbone: Path | None = None, device: str = "cpu") -> RewardModel:
        """Load what was fitted into `folder`; `backbone` stands in for one that has moved since the fit.

        Raises ValueError for a folder that holds no reward model.
        """
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        for name in ("model/adapter_config.json", "calibration.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder}: holds no reward model ({name} is missing); fit one: traitdose rewards fit")
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        fitted_on: Any = backbone or PeftConfig.from_pretrained(str(folder / "model")).base_model_name_or_path
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            fitted_on, num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
        )
        model = PeftModel.from_pretrained(model, folder / "model").merge_and_unload()
        model.config.pad_token_id = tokenizer.pad_token_id
        calibration = Calibration(**json.loads((folder / "calibration.json").read_text()))
        return cls(use_fastest(model.to(torch.device(device))), tokenizer, calibration)

    @torch.inference_mode()
    def raw_scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """The scalar head's output for every prompt with its answer, (N,); a prompt is encoded once for all answers."""
        parts = [
            part
            for tree, rows in zip(*answer_trees(self.tokenizer, prompts, answers), strict=True)
            for part in _split(tree, rows)
        ]
        scores = np.zeros(len(answers))
        for run in fill([len(tree) for tree, _ in parts], TOKEN_BUDGET):
            heads = branch_scores(self.model, pack([parts[i][0] for i in run], self.model.device, whole=True))
            scores[[row for i in run for row in parts[i][1]]] = heads.float().cpu().numpy()
        return scores

    def score(self, prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """Calibrated scores on the price scale, (N,)."""
        if self.calibration is None:
            raise ValueError("this reward model has no calibration.json; fit it with: traitdose rewards fit")
        return self.calibration(self.raw_scores(prompts, answers))


def fit_reward_model(
    cfg: RewardConfig,
    start: str,
    out: Path,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    more: Mapping[str, Sequence[Preference]] | None = None,
) -> dict[str, Any]:
    """Fit truthfulness on the probes of cfg.domains' training families, and measure on the held-out ones.

    `start` is the model that will be trained: the backbone, and the source of the answers that stand beside the
    authored ones. `more` preferences join the parts "train", "validation" and "test". Saves model/, pairs.parquet,
    steps.parquet, calibration.json and accuracy.json in `out`; returns the accuracy.
    """
    probes = probes_of(cfg.domains, "train", seed)
    random.Random(f"validation/{seed}").shuffle(probes)
    held_back = probes[: int(len(probes) * VALIDATION_SHARE)]
    heldout = probes_of(cfg.domains, "heldout", seed)
    rng = random.Random(f"pairs/{seed}")
    least, most = MEASURED_PROBES
    measured = min(max(round(MEASURED_SHARE * cfg.probes), least), most)
    drawn = {
        "train": draw_probes(probes[len(held_back) :], cfg.probes, rng),
        "validation": draw_probes(held_back, measured, rng),
        "test": draw_probes(heldout, measured, rng),
    }
    own = own_answers(start, [probe for part in drawn.values() for probe in part], cfg.own_answers, seed)
    parts = {
        name: [*from_probes(make_pairs(part, seed, own)), *(more or {}).get(name, ())] for name, part in drawn.items()
    }
    parts["train"] += adversarial_probes(drawn["train"], seed)
    write_pairs(parts, out)
    recipe = Recipe(cfg.epochs, cfg.learning_rate, cfg.lora_rank, cfg.batch_size)
    fitted = train_reward_model(parts["train"], start, out, seed, recipe, progress)
    return measure(fitted, PROBE_TRAIT, parts, out)


def own_answers(policy: str, probes: Sequence[Probe], n: int, seed: int) -> dict[str, list[str]]:
    """n answers of the policy to every probe (id -> answers), sampled at temperature 1."""
    if n == 0:
        return {}
    model: Any = load_model(policy, device=best_device())
    tokenizer: Any = load_tokenizer(policy)
    completions = sample(
        model,
        [encode(tokenizer, probe.messages) for probe in probes],
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


def train_reward_model(
    preferences: Sequence[Preference],
    base: str,
    out: Path,
    seed: int,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
    start: Path | None = None,
) -> RewardModel:
    """Fit LoRA and a scalar head on the preferences; saves model/ and steps.parquet in `out`.

    With `start`, the folder of a fitted reward model of the same base, its weights are where the fit begins. With
    recipe.save_every it goes on from the last checkpoint in `out`. On a GPU it computes in bf16, and under `accelerate
    launch` every process takes its share of the prompts.
    """
    rows = preference_rows(load_tokenizer(base), preferences)
    return fit_rows(rows, base, out, seed, recipe, progress, start)


def fit_rows(
    rows: list[dict[str, Any]],
    base: str,
    out: Path,
    seed: int,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None = None,
    start: Path | None = None,
    trainer_class: type[SharedPromptRewardTrainer] = SharedPromptRewardTrainer,
    in_order: bool = False,
) -> RewardModel:
    """train_reward_model on rows that preference_rows or its like has made; `in_order` leaves them as they stand."""
    from datasets import Dataset
    from peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as TRLRewardConfig

    tokenizer = load_tokenizer(base)
    torch.manual_seed(seed)  # the scalar head is new
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear"
    )
    if start is None:
        backbone = AutoModelForSequenceClassification.from_pretrained(
            resolve_model(base), num_labels=1, dtype=torch.float32, attn_implementation="sdpa"
        )
    else:
        _check_start(start, base)
        backbone = AutoPeftModelForSequenceClassification.from_pretrained(
            start / "model", num_labels=1, is_trainable=True, dtype=torch.float32, attn_implementation="sdpa"
        )
    backbone.config.pad_token_id = tokenizer.pad_token_id
    trainer = trainer_class(
        model=use_fastest(backbone),
        args=TRLRewardConfig(
            output_dir=str(out / "trainer"),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            train_sampling_strategy="sequential" if in_order else "random",
            center_rewards_coefficient=0.01,
            remove_unused_columns=False,
            bf16=torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no" if recipe.save_every is None else "steps",
            save_steps=recipe.save_every or 500,
            save_total_limit=2,
            logging_steps=5,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(rows),
        data_collator=preference_batch,
        processing_class=tokenizer,
        peft_config=lora if start is None else None,
        callbacks=[ProgressCallback(progress)],
    )
    silence(trainer)
    checkpoint = latest(out / "trainer") if recipe.save_every else None
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    pd.DataFrame(trainer.state.log_history).to_parquet(out / "steps.parquet")
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    return RewardModel(trainer.model, tokenizer)


def _check_start(start: Path, base: str) -> None:
    config = start / "model" / "adapter_config.json"
    if not config.is_file():
        raise ValueError(f"{start}: holds no reward model (model/adapter_config.json); fit one: traitdose rewards fit")
    fitted_on = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    if fitted_on != resolve_model(base):
        raise ValueError(f"{config}: was fitted on {fitted_on}, not on {base}; begin with a model of the same base")


def measure(model: RewardModel, trait: str, parts: dict[str, list[Preference]], out: Path) -> dict[str, Any]:
    """Calibrate a fitted model, measure it, and write calibration.json and accuracy.json; returns the accuracy.

    `parts` holds "train", "validation" and "test".
    """
    validation, test = (answer_scores(model, parts[part]) for part in ("validation", "test"))
    model.calibration = calibrate(validation, parts["validation"])
    (out / "calibration.json").write_text(json.dumps(asdict(model.calibration)))
    accuracy = {
        "trait": trait,
        "pairs": len(parts["train"]),
        "validation": pair_accuracy(validation, parts["validation"]),
        "heldout": pair_accuracy(test, parts["test"]),
    }
    (out / "accuracy.json").write_text(json.dumps(accuracy, indent=1))
    return accuracy


def answer_scores(model: RewardModel, preferences: Sequence[Preference]) -> AnswerScores:
    """The raw score of every answer; an answer in several preferences is scored once."""
    answers = {(p.prompt_id, text): p.prompt for p in preferences for text in (p.chosen, p.rejected)}
    raw = model.raw_scores(list(answers.values()), [text for _, text in answers])
    return dict(zip(answers, raw.tolist(), strict=True))


def calibrate(scores: AnswerScores, preferences: Sequence[Preference]) -> Calibration:
    """Least-squares line from the answers' raw scores to their prices; its slope must be positive."""
    prices = {
        (preference.prompt_id, text): price
        for preference in preferences
        for text, price in zip((preference.chosen, preference.rejected), preference.prices, strict=True)
    }
    slope, intercept = np.polyfit(np.array(list(scores.values())), np.array([prices[key] for key in scores]), 1)
    if slope <= 0:
        raise ValueError(
            "reward: the fitted reward model ranks worse answers higher on validation subjects; "
            "raise reward.probes or reward.epochs"
        )
    return Calibration(float(slope), float(intercept))


def pair_accuracy(scores: AnswerScores, preferences: Sequence[Preference]) -> dict[str, Any]:
    """Share of preferences ranked rightly (ties count half) with its 95% Wilson interval and n.

    In all, and each by itself under "contrasts" (failure modes), "domains", "families" and "style" (where a guess by
    sentence length alone is right, and where it is wrong).
    """
    groups: dict[str, dict[str, list[float]]] = {
        name: defaultdict(list) for name in ("contrasts", "domains", "families", "style")
    }
    hits: list[float] = []
    for p in preferences:
        better, worse = scores[p.prompt_id, p.chosen], scores[p.prompt_id, p.rejected]
        hits.append(1.0 if better > worse else 0.5 if better == worse else 0.0)
        names = {"contrasts": p.contrast, "domains": p.domain, "families": p.family, "style": style_guess(p)}
        for group, name in names.items():
            groups[group][name].append(hits[-1])
    return share(hits) | {
        group: {name: share(rows) for name, rows in sorted(table.items())} for group, table in groups.items()
    }


def share(hits: Sequence[float]) -> dict[str, Any]:
    """n, the share of hits (a half for a tie) and its 95% Wilson interval; None where n is 0."""
    if not hits:
        return {"n": 0, "accuracy": None, "ci_low": None, "ci_high": None}
    interval: Any = proportion_confint(sum(hits), len(hits), method="wilson")
    low, high = map(float, interval)
    return {"n": len(hits), "accuracy": float(np.mean(hits)), "ci_low": low, "ci_high": high}


def _split(tree: Tree, rows: Sequence[int]) -> Iterator[tuple[Tree, list[int]]]:
    """A tree whose branches are too many for one pack, cut into trees of the same prompt, with the rows of each."""
    for run in fill([len(branch) for branch in tree.branches], max(1, TOKEN_BUDGET - len(tree.prompt))):
        yield Tree(tree.prompt, [tree.branches[i] for i in run]), [rows[i] for i in run]


def write_pairs(parts: dict[str, list[Preference]], out: Path) -> None:
    """Write all preferences with their part to pairs.parquet."""
    rows = [
        {
            "part": part,
            "prompt_id": preference.prompt_id,
            "prompt": preference.prompt[-1]["content"],
            **{
                key: getattr(preference, key)
                for key in ("chosen", "rejected", "margin", "contrast", "domain", "family")
            },
        }
        for part, preferences in parts.items()
        for preference in preferences
    ]
    pd.DataFrame(rows).to_parquet(out / "pairs.parquet")
