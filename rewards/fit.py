"""Fit the reward model of one trait, or of all at once, on scenarios, probes and the user's own preferences.

Training families only. The good exemplar of a scenario stands over each bad one and over hacked replies; truthfulness
learns from probes as well. A fit may begin with a model that was fitted on all traits.
Choices are made on the validation families (rewards/preferences.py); the held-out ones are only measured.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.loading import best_device
from rewards.audit import audit, audit_report, probe_targets, scenario_targets
from rewards.audit_policy import load_policy
from rewards.config import PROBE_TRAIT, RewardConfig
from rewards.pairs import draw_conduct, draw_probes, make_pairs
from rewards.preferences import (
    VALIDATION_SHARE,
    Preference,
    adversarial,
    adversarial_probes,
    from_probes,
    from_scenarios,
    load_preferences,
    validation_families,
)
from rewards.probes import Probe, domains, load_probes
from rewards.reward_model import (
    Recipe,
    RewardModel,
    fit_reward_model,
    measure,
    train_reward_model,
    write_pairs,
)
from rewards.scenarios import load_scenarios
from rewards.trait_prompts import source_shares, trait_pools

Parts = dict[str, list[Preference]]  # "train", "validation" (training families kept back) and "test" (held-out)

ALL = "all"  # the name under which every trait is fitted at once
PROBES = {"train": 192, "validation": 48, "test": 160}
HACKED = 2  # hacked replies per scenario, drawn from hacks.TRAINED

# One prompt an update: a trait has about thirty, of some 700 tokens each with all their replies.
RECIPE = Recipe(epochs=1.0, learning_rate=3e-4, batch_size=1, save_every=10)
RECIPE_FROM = Recipe(epochs=1.0, learning_rate=1e-4, batch_size=1, save_every=10)  # after a fit on all traits


def gather_parts(trait: str, own: Path | None, seed: int) -> Parts:
    """The preferences of a trait, or of ALL: "train", "validation" (training families kept back) and "test" (held-out).

    Hacked replies are in "train" only. Raises ValueError for a trait without scenarios.
    """
    parts = _scenario_parts(trait, seed)
    if trait in (ALL, PROBE_TRAIT):
        for part, preferences in _probe_parts(seed).items():
            parts[part] += preferences
    if own is not None:
        mine = load_preferences(own)
        parts["train"] += mine["train"]
        parts["test"] += mine["heldout"]
    return parts


def fit_trait(
    trait: str,
    base: str,
    out: Path,
    seed: int,
    recipe: Recipe | None = None,
    own: Path | None = None,
    start: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    more: Parts | None = None,
) -> dict[str, Any]:
    """Fit, calibrate and measure, with `more` preferences if given; goes on from the last checkpoint in `out`.

    Saves model/, pairs.parquet, steps.parquet, calibration.json and accuracy.json in `out`; returns the accuracy.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = gather_parts(trait, own, seed)
    for part, preferences in (more or {}).items():
        parts[part] += preferences
    write_pairs(parts, out)
    recipe = recipe or (RECIPE if start is None else RECIPE_FROM)
    model = train_reward_model(parts["train"], base, out, seed, recipe, progress, start)
    shutil.rmtree(out / "trainer", ignore_errors=True)  # the checkpoints
    return measure(model, trait, parts, out)


def fit_rewards(
    cfg: RewardConfig, start: str, out: Path, seed: int, progress: Callable[[int, int], None] | None = None
) -> None:
    """The reward models of a run, each with its audit.json: cfg.trait's in `out`, the others' in out/traits/<trait>.

    `start` is the model that will be trained, the backbone of all. A trait that is asked probes of knowledge learns
    from those of cfg.domains, any other from its scenarios; what else it is asked in training is added (run_parts).
    """
    policy = load_policy()
    for trait in cfg.traits:
        folder = reward_folder(out, cfg.trait, trait)
        more = run_parts(cfg, trait, seed)
        if "probes" in source_shares(cfg, trait):
            folder.mkdir(parents=True, exist_ok=True)
            fit_reward_model(cfg, start, folder, seed, progress, more)
            targets = probe_targets(cfg.domains, policy.run_cases, seed)
        else:
            fit_trait(trait, start, folder, seed, progress=progress, more=more)
            targets = scenario_targets(trait, policy.run_cases, seed)
        report = audit_report(trait, audit(RewardModel.load(folder, device=best_device()), targets, policy, seed))
        (folder / "audit.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


def run_parts(cfg: RewardConfig, trait: str, seed: int) -> Parts:
    """The preferences that a run's fit adds for what the trait is asked in training besides the fit's own matter.

    Probes of conduct, and scenarios where the fit is on probes of knowledge.
    """
    shares = source_shares(cfg, trait)
    parts = _conduct_parts(trait, cfg.domains, seed) if "conduct" in shares else {part: [] for part in PROBES}
    if {"probes", "scenarios"} <= set(shares):
        for part, preferences in _scenario_parts(trait, seed).items():
            parts[part] += preferences
    return parts


def load_reward_models(cfg: RewardConfig, folder: Path, backbone: Path) -> dict[str, RewardModel]:
    """What fit_rewards saved in `folder`, by trait, on the CPU; `backbone` is the model that it was given."""
    return {trait: RewardModel.load(reward_folder(folder, cfg.trait, trait), backbone) for trait in cfg.traits}


def reward_folder(folder: Path, trained: str, trait: str) -> Path:
    """Where a run keeps the reward model of a trait."""
    return folder if trait == trained else folder / "traits" / trait


def _scenario_parts(trait: str, seed: int) -> Parts:
    bank = load_scenarios()
    kept_back = validation_families(bank, seed)
    scenarios = bank if trait == ALL else load_scenarios(trait)
    training = [s for s in scenarios if s.split == "train" and s.family not in kept_back]
    return {
        "train": from_scenarios(training) + adversarial(training, HACKED, seed),
        "validation": from_scenarios([s for s in scenarios if s.split == "train" and s.family in kept_back]),
        "test": from_scenarios([s for s in scenarios if s.split == "heldout"]),
    }


def _conduct_parts(trait: str, chosen: Sequence[str], seed: int) -> Parts:
    """Probes of conduct of the chosen domains; what is kept back is kept back in all kinds that ask about it."""
    rng = random.Random(f"conduct/{trait}/{seed}")
    training = trait_pools(trait, chosen, "train", seed).conduct
    subjects = sorted({_subject(probe) for probe in training})
    kept_back = set(rng.sample(subjects, round(VALIDATION_SHARE * len(subjects))))
    pools = {
        "train": [probe for probe in training if _subject(probe) not in kept_back],
        "validation": [probe for probe in training if _subject(probe) in kept_back],
        "test": trait_pools(trait, chosen, "heldout", seed).conduct,
    }
    drawn = {part: draw_conduct(pool, PROBES[part], rng) for part, pool in pools.items()}
    return {part: from_probes(make_pairs(probes, seed)) for part, probes in drawn.items()}


def _subject(probe: Probe) -> tuple[str, str, str]:
    """Domain, family and number of what the probe asks about: the same in every kind that is made from one fact."""
    return probe.domain, probe.family, probe.id.rsplit("-", 1)[1]


def _probe_parts(seed: int) -> Parts:
    """Probes of all domains: training families (the last seventh kept back) and held-out ones."""
    training = [probe for domain in domains() for probe in load_probes(domain, "train", seed)]
    heldout = [probe for domain in domains() for probe in load_probes(domain, "heldout", seed)]
    families = sorted({(probe.domain, probe.family) for probe in training})
    kept_back = set(families[:: max(2, round(1 / 0.15))])
    pools = {
        "train": [probe for probe in training if (probe.domain, probe.family) not in kept_back],
        "validation": [probe for probe in training if (probe.domain, probe.family) in kept_back],
        "test": heldout,
    }
    rng = random.Random(f"pairs/{seed}")
    drawn = {part: draw_probes(pool, PROBES[part], rng) for part, pool in pools.items()}
    parts = {part: from_probes(make_pairs(probes, seed)) for part, probes in drawn.items()}
    parts["train"] += adversarial_probes(drawn["train"], seed)
    return parts
