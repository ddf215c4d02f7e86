"""`traitdose persist RUN`: attack every arm of a finished run, control included, and put what is left into its report.

Each attack on each arm and seed is a stage, runs/<name>/persistence/<attack>/<arm>/seed-<s>/ with items.parquet. Inside
a stage every condition (an attack, a rung, a temperature) is a file of its own until the stage is whole, so a killed
attack loses at most the condition that it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from eval.attacks import ATTACKS, choose_attacks
from eval.item_forms import ITEMS
from rewards.probes import BANK
from scripts.arms import BASE, Arm, find_arm
from scripts.constitution import system_prompt
from scripts.environment import set_environment
from scripts.evals import evaluation_texts, find_hits
from scripts.experiment import CHECKOUT, Experiment, find_file, load_experiment
from scripts.make_stages import default_jobs, make_stages, whole_stages
from scripts.persist_work import generation, ladder, make_items, prompts, targets_of
from scripts.run import make_report
from scripts.stages import Bars, Stage, hash_files, lock_run, run_stage, write_text

CONTROL = "control"


def persist(run_dir: Path, overrides: Sequence[str], console: Console, jobs: int | None) -> dict[str, Any]:
    """Attack a run's arms, or go on with it, and return the run's results.

    Up to `jobs` stages are made side by side (None: default_jobs()).

    Raises ValueError for a folder that is no run, arms that are not finished, keys that are not persistence's, and
    training data that occurs in the evaluation.
    """
    experiment = load_run(run_dir, overrides)
    set_environment(experiment, run_dir)  # before what reads it while it is imported
    from eval.persistence import only_probes
    from scripts.persist_plan import print_plan

    jobs = default_jobs() if jobs is None else jobs
    targets = targets_of(experiment)
    if set(experiment.persistence.attacks) - {"prompts"}:
        only_probes(targets)  # told now, not after an hour
    with lock_run(run_dir):
        stages = list_attacks(experiment, run_dir)
        whole = whole_stages(stages, run_dir)
        print_plan(experiment, targets, stages, whole, jobs, console)
        if len(whole) < len(stages) and "harmful" in experiment.persistence.attacks:
            check_examples(experiment, run_dir)
        (run_dir / "persistence").mkdir(exist_ok=True)
        section = yaml.safe_dump(experiment.persistence.model_dump(mode="json"), sort_keys=False)
        write_text(run_dir / "persistence" / "config.yaml", section)
        make_stages(stages, experiment, run_dir, console, jobs)
        return make_report(run_dir, console)


def load_run(run_dir: Path, overrides: Sequence[str]) -> Experiment:
    """The experiment of a run folder, with changes to its persistence section only."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run_dir}: no run folder (it has no config.yaml); give a folder that `traitdose run` made")
    for override in overrides:
        if not override.startswith("persistence."):
            raise ValueError(
                f"command line: {override!r}: an attack changes nothing of the run that it attacks; give keys of the "
                "persistence section, such as persistence.items=8"
            )
    experiment = load_experiment(config, overrides)
    if "generalisation" not in experiment.eval.suites:
        raise ValueError(
            f"{config}: eval.suites has no generalisation suite, whose items the attacks ask; make a run with one"
        )
    return experiment


def list_attacks(experiment: Experiment, run_dir: Path) -> list[Stage]:
    """Every attack on every arm and seed, persistence/<attack>/<arm>/seed-<s>, in order; nothing is loaded.

    The order goes seed by seed, so that a run that is stopped early has whole comparisons of the first seeds; side by
    side the ladders that a recovery waits for come first.
    """
    cfg = experiment.persistence
    choose_attacks(cfg.prompts)
    stages: list[Stage] = []

    def add(attack: str, arm: Arm, of: dict[str, Any], work: Callable[[Path, Bars], None], *needs: str) -> str:
        name = f"persistence/{attack}/{arm.name}/seed-{arm.seed}"
        inputs = {**_shared_inputs(experiment, arm), **of}
        stages.append(Stage(name, partial(make_items, arm, work), inputs, needs))
        return name

    for seed in experiment.seeds:
        for name in arm_names(experiment):
            if name == BASE and seed != experiment.seeds[0]:
                continue  # one start model
            arm = find_arm(run_dir, name, seed, system_prompt(experiment, name))
            if "prompts" in cfg.attacks:
                of = {"prompts": cfg.prompts, "texts": hash_files(ATTACKS)}
                add("prompts", arm, of, partial(prompts, experiment, arm))
            for method in cfg.finetune.methods if "harmful" in cfg.attacks else ():
                steps = cfg.finetune.model_dump(mode="json", exclude={"methods", "floor", "recovered"})
                keeps = "recovery" in cfg.attacks
                of = {"ladder": steps, "domains": list(experiment.reward.domains), "keeps_weights": keeps}
                harm = add(f"harmful-{method}", arm, of, partial(ladder, experiment, arm, method, None))
                if keeps:
                    work = partial(ladder, experiment, arm, method, run_dir / harm)
                    add(f"recovery-{method}", arm, of, work, harm)
            if "generation" in cfg.attacks:
                of = {"generation": cfg.generation.model_dump(mode="json")}
                add("generation", arm, of, partial(generation, experiment, arm))
    return stages


def arm_names(experiment: Experiment) -> list[str]:
    """Control and the arms that are attacked beside it."""
    return list(dict.fromkeys((CONTROL, *(experiment.persistence.arms or experiment.arms))))


def check_examples(experiment: Experiment, run_dir: Path) -> None:
    """Compare what the ladders train on with the evaluation, by runs of words; skipped when done.

    Raises ValueError if one of the texts occurs there.
    """
    cfg, suite = experiment.persistence.finetune, find_file(experiment.eval.suites["generalisation"].file)
    inputs = {
        "examples": [cfg.steps[-1], cfg.batch_size, list(experiment.seeds), list(experiment.reward.domains)],
        "wording": experiment.eval.seed,
        "data": hash_files(suite, BANK, BANK / "kinds", CHECKOUT / "train" / "bad_data.py", *_item_folders()),
    }
    run_stage(run_dir / "persistence" / "contamination", inputs, lambda out: _check_examples(experiment, out))


def _check_examples(experiment: Experiment, out: Path) -> None:
    from eval.contamination import Text
    from train.bad_data import examples

    cfg, texts = experiment.persistence.finetune, []
    for seed in experiment.seeds:
        for quality in ("bad", "good"):
            for example in examples(cfg.steps[-1] * cfg.batch_size, quality, seed, experiment.reward.domains):
                source = f"{quality} data, {example.kind}"
                texts += [Text(source, text, True, example.subject) for _, text in example.messages]
                texts.append(Text(source, example.reply, False, example.subject))
    suites = {"generalisation": experiment.eval.suites["generalisation"]}  # the items that the ladders are measured on
    asked = experiment.model_copy(update={"eval": experiment.eval.model_copy(update={"suites": suites})})
    hits = find_hits(list(dict.fromkeys(texts)), evaluation_texts(asked, limited=False), meaning=False)
    if hits:
        raise ValueError(
            f"contamination: {len(hits)} fine-tuning texts occur in the evaluation, first: {hits[0]}; take "
            "the family out of train/bad_data.py, or the item out of the suite"
        )
    write_text(out / "hits.json", "[]\n")


def _shared_inputs(experiment: Experiment, arm: Arm) -> dict[str, Any]:
    cfg, suite = experiment.persistence, find_file(experiment.eval.suites["generalisation"].file)
    return {
        "arm": arm.made_by,
        "system": arm.system,
        "seed": arm.seed,
        "wording": experiment.eval.seed,
        "tasks": cfg.tasks,
        "items": cfg.items,
        "data": hash_files(suite, BANK, BANK / "kinds", *_item_folders()),
    }


def _item_folders() -> tuple[Path, Path]:
    return ITEMS, ITEMS / "alignment"
