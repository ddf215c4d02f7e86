"""The stages of a constitutional arm, each a part of its budget: revisions, sl, feedback, preference, train."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eval.contamination import Text
from rewards.constitution import Constitution, constitution_texts, load_constitution
from rewards.probes import BANK
from scripts.evals import evaluation_texts, find_hits
from scripts.experiment import TRAITS, Experiment, find_file
from scripts.processes import is_main
from scripts.run import SETTINGS_ONLY, Bars, Stage
from scripts.stages import hash_files
from scripts.tracking import run_name, tracked
from train.constitution_config import PARTS, allowance

Row = dict[str, Any]

# What the parts before the RL read of train:; the RL reads all of it.
READ = {"budget_tflops", "max_new_tokens", "temperature", "warmup_steps", "max_grad_norm"}


def constitution(experiment: Experiment) -> Constitution:
    """The experiment's constitution."""
    return load_constitution(find_file(experiment.constitution.file))


def system_prompt(experiment: Experiment, arm: str) -> str | None:
    """What an arm is told before every evaluated chat: the principles, for constitution-prompt alone."""
    told = arm in experiment.arms and experiment.arms[arm].method == "constitution-prompt"
    return constitution(experiment).system_prompt() if told else None


def training_texts(experiment: Experiment) -> list[Text]:
    """The constitution's texts, for the contamination check; none without a constitutional arm."""
    if all(arm.method == "trait" for arm in experiment.arms.values()):
        return []
    return [Text(*text) for text in constitution_texts(constitution(experiment))]


def run_texts(run_dir: Path) -> list[Text]:
    """What the constitutional arms of a run have really trained on: answers, accepted revisions, compared replies."""
    import pandas as pd

    texts: list[Text] = []
    for path in sorted(run_dir.glob("arms/*/seed-*/revisions/revisions.parquet")):
        rows: Any = pd.read_parquet(path)
        for row in rows[rows["kept"]].to_dict("records"):
            source = f"revision {path.parents[2].name} {row['prompt_id']}"
            texts += [Text(source, row[key], False) for key in ("first", "revision")]
    for path in sorted(run_dir.glob("arms/*/seed-*/feedback/pairs.parquet")):
        for row in pd.read_parquet(path).to_dict("records"):
            source = f"compared {path.parents[2].name} {row['prompt_id']}"
            texts += [Text(source, row[key], False) for key in ("first", "second")]
    return texts


def constitution_parts(experiment: Experiment, run_dir: Path, arm: str, seed: int) -> list[Stage]:
    """The training stages of one constitutional arm with one seed, in their order; none for constitution-prompt."""
    method = experiment.arms[arm].method
    file = find_file(experiment.constitution.file)
    beside = file.parent / constitution_demonstrations(file)
    banks = [BANK / f"{domain}.yaml" for domain in ("everyday", *experiment.reward.domains)]
    train = experiment.train.model_dump(mode="json", exclude=set(SETTINGS_ONLY))
    common = {
        "arm": experiment.arms[arm].model_dump(mode="json"),
        "constitution": experiment.constitution.model_dump(mode="json"),
        "reward": {"trait": experiment.reward.trait, "domains": list(experiment.reward.domains)},
        "standard": experiment.standard.model_dump(mode="json"),
        "data": hash_files(*banks, TRAITS / f"{experiment.reward.trait}.md", file, beside),
        "seed": seed,
    }
    stages: list[Stage] = []
    folder = f"arms/{arm}/seed-{seed}"
    for part in PARTS[method]:
        rl = method == "constitution-rl" and part == "train"
        stages.append(
            Stage(
                f"{folder}/{part}",
                partial(_part, experiment, run_dir, arm, seed, part),
                {**common, "train": train if rl else {key: train[key] for key in sorted(READ)}},
                ("start", *(stage.name for stage in stages)),
                together=rl,
            )
        )
    return stages


def constitution_demonstrations(file: Path) -> str:
    """The name of the demonstrations' file, beside the constitution's."""
    import yaml

    return str(yaml.safe_load(file.read_text(encoding="utf-8"))["demonstrations"])


def _part(experiment: Experiment, run_dir: Path, arm: str, seed: int, part: str, out: Path, bars: Bars) -> Row:
    """Make one part in `out`; returns its ledger, the last part's with those of the parts before it."""
    from train.parts import arm_ledger, finished, read_ledgers, write_ledger

    method, folder = experiment.arms[arm].method, run_dir / "arms" / arm / f"seed-{seed}"
    before = PARTS[method][: PARTS[method].index(part)]
    parts = read_ledgers(folder, before)
    spent = {name: float(ledger["total"]["flops"]) for name, ledger in parts.items()}
    budget = experiment.train.budget_tflops * 1e12
    allowed = allowance(experiment.constitution, method, part, budget, spent)
    if method == "constitution-rl" and part == "train":
        ledger = _rl(experiment, arm, seed, folder, out, allowed, bars)
    else:
        began = (time.monotonic(), time.process_time())
        ledger = finished(out) or _WORK[method, part](experiment, arm, seed, run_dir, out, allowed, bars(""))
        if "wall_seconds" not in ledger:
            ledger["wall_seconds"] = time.monotonic() - began[0]
            ledger["cpu_seconds"] = time.process_time() - began[1]
    if is_main():
        ledger = write_ledger(out, arm_ledger(parts, ledger) if part == "train" else ledger)
        if method != "constitution-rl" or part != "train":  # nothing goes on from these any more
            for journal in out.glob("*.jsonl"):
                journal.unlink()
            for checkpoints in ("checkpoints", "trainer"):
                shutil.rmtree(out / checkpoints, ignore_errors=True)
    return ledger


Work = Callable[[Experiment, str, int, Path, Path, float, Callable[[int, int], None]], Row]


def _revisions(
    experiment: Experiment, arm: str, seed: int, run_dir: Path, out: Path, allowed: float, progress: Any
) -> Row:
    from train.revisions import sample_revisions

    return sample_revisions(
        experiment.constitution,
        experiment.train,
        constitution(experiment),
        experiment.reward.domains,
        run_dir / "start" / "model",
        out,
        seed,
        allowed,
        partial(_overlaps, experiment),
        progress,
    )


def _overlaps(experiment: Experiment, texts: Sequence[str]) -> list[bool]:
    """Which texts share 13 words in a row with an item that the run evaluates."""
    training = [Text(str(i), text, False) for i, text in enumerate(texts)]
    found = {hit.training.source for hit in find_hits(training, evaluation_texts(experiment, limited=True), False)}
    return [str(i) in found for i in range(len(texts))]


def _sl(experiment: Experiment, arm: str, seed: int, run_dir: Path, out: Path, allowed: float, progress: Any) -> Row:
    """Fine-tune on all accepted revisions; before DPO on half of them, the other half gives the preferences."""
    from train.fine_tune import fine_tune

    method = experiment.arms[arm].method
    revisions = _accepted(run_dir / "arms" / arm / f"seed-{seed}")
    whole = method == "constitution-sl"  # and nothing follows
    return fine_tune(
        experiment.constitution,
        experiment.train,
        experiment.standard,
        experiment.arms[arm].dose,
        revisions[::2] if method == "constitution-dpo" else revisions,
        run_dir / "start" / "model",
        out,
        seed,
        allowed,
        merge=not whole,
        progress=progress,
    )


def _dpo(experiment: Experiment, arm: str, seed: int, run_dir: Path, out: Path, allowed: float, progress: Any) -> Row:
    from train.fine_tune import prefer_revisions

    folder = run_dir / "arms" / arm / f"seed-{seed}"
    revisions = _accepted(folder)[1::2]
    if not revisions:
        raise ValueError(
            "constitution: one revision was accepted, and DPO needs another for its preferences; raise "
            f"train.budget_tflops or constitution.shares.constitution-dpo.revisions ({folder})"
        )
    start = folder / "sl" / "model"
    ledger = prefer_revisions(experiment.constitution, experiment.train, revisions, start, out, seed, allowed, progress)
    link_model(start, out / "model")
    return ledger


def _feedback(
    experiment: Experiment, arm: str, seed: int, run_dir: Path, out: Path, allowed: float, progress: Any
) -> Row:
    from train.feedback import sample_feedback
    from train.parts import read_ledgers

    folder = run_dir / "arms" / arm / f"seed-{seed}"
    asked = int(read_ledgers(folder, ["revisions"])["revisions"]["trait"]["prompts"])  # the pairs ask on from there
    return sample_feedback(
        experiment.constitution,
        experiment.train,
        constitution(experiment),
        experiment.reward.domains,
        folder / "sl" / "model",
        out,
        seed,
        asked,
        allowed,
        progress,
    )


def _preference(
    experiment: Experiment, arm: str, seed: int, run_dir: Path, out: Path, allowed: float, progress: Any
) -> Row:
    import pandas as pd

    from train.feedback import fit_on_feedback

    folder = run_dir / "arms" / arm / f"seed-{seed}"
    pairs = pd.read_parquet(folder / "feedback" / "pairs.parquet")
    start = folder / "sl" / "model"
    return fit_on_feedback(experiment.constitution, experiment.train, pairs, start, out, seed, allowed, progress)


def _rl(experiment: Experiment, arm: str, seed: int, folder: Path, out: Path, allowed: float, bars: Bars) -> Row:
    """train_policy from the fine-tuned model against the preference model, with what is left of the budget."""
    from train.policy import train_policy

    with tracked(experiment, arm, seed, out):
        ledger = train_policy(
            experiment.train.model_copy(update={"budget_tflops": allowed / 1e12}),
            experiment.standard,
            experiment.arms[arm],
            experiment.reward.model_copy(update={"weights": {}}),  # one model pays, whatever pays the trait arm
            folder / "sl",
            folder / "preference",
            out,
            seed,
            bars(""),
            report_to=experiment.tracking.backend,
            run_name=run_name(experiment, arm, seed),
        )
    if is_main() and experiment.train.lora_rank:
        link_model(folder / "sl" / "model", out / "model")
    return ledger


_WORK: Mapping[tuple[str, str], Work] = {
    ("constitution-sl", "revisions"): _revisions,
    ("constitution-sl", "train"): _sl,
    ("constitution-dpo", "revisions"): _revisions,
    ("constitution-dpo", "sl"): _sl,
    ("constitution-dpo", "train"): _dpo,
    ("constitution-rl", "revisions"): _revisions,
    ("constitution-rl", "sl"): _sl,
    ("constitution-rl", "feedback"): _feedback,
    ("constitution-rl", "preference"): _preference,
}


def link_model(source: Path, target: Path) -> None:
    """Put the model directory `source` at `target`, too: the adapter beside it stands on this one, not on start/model.

    Hard links, so that it takes no room; copies where the file system has none.
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


def _accepted(folder: Path) -> list[Row]:
    import pandas as pd

    from train.revisions import accepted

    return accepted(pd.read_parquet(folder / "revisions" / "revisions.parquet"))
