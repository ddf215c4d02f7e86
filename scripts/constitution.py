"""The stages of a constitutional arm, each a part of its budget: revisions, sl, feedback, preference, train."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from eval.contamination import Text
from rewards.constitution import Constitution, constitution_texts, load_constitution
from rewards.trait_prompts import source_files
from scripts.evals import evaluation_texts, find_hits
from scripts.experiment import Experiment, find_file
from scripts.processes import is_main
from scripts.stages import SETTINGS_ONLY, Bars, Stage, hash_files
from scripts.tracking import run_name, tracked
from train.constitution_config import PARTS, allowance

Row = dict[str, Any]

# What the parts read of the sections reward: and train:, in which the RL reads everything.
ASKED = ("trait", "weights", "domains", "prompts")
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
    train = experiment.train.model_dump(mode="json", exclude=set(SETTINGS_ONLY))
    common = {
        "arm": experiment.arms[arm].model_dump(mode="json"),
        "constitution": experiment.constitution.model_dump(mode="json"),
        "reward": experiment.reward.model_dump(mode="json", include=set(ASKED)),
        "standard": experiment.standard.model_dump(mode="json"),
        "data": hash_files(*source_files(experiment.reward), *files(experiment)),
        "seed": seed,
    }
    stages: list[Stage] = []
    folder = f"arms/{arm}/seed-{seed}"
    for part in PARTS[method]:
        rl = (method, part) == RL
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


def files(experiment: Experiment) -> list[Path]:
    """The constitution's file and its demonstrations'; none without a constitutional arm."""
    if all(arm.method == "trait" for arm in experiment.arms.values()):
        return []
    file = find_file(experiment.constitution.file)
    return [file, file.parent / yaml.safe_load(file.read_text(encoding="utf-8"))["demonstrations"]]


@dataclass(frozen=True)
class Job:
    """One part of an arm with one seed: where it is made, and the FLOPs that it may spend."""

    experiment: Experiment
    run_dir: Path
    arm: str
    seed: int
    out: Path
    allowed: float
    progress: Callable[[int, int], None]

    @property
    def method(self) -> str:
        """How the arm is trained."""
        return self.experiment.arms[self.arm].method

    @property
    def folder(self) -> Path:
        """Where the arm's parts lie."""
        return self.run_dir / "arms" / self.arm / f"seed-{self.seed}"

    def accepted(self) -> list[Row]:
        """The arm's accepted revisions."""
        import pandas as pd

        from train.revisions import accepted

        return accepted(pd.read_parquet(self.folder / "revisions" / "revisions.parquet"))


def _part(experiment: Experiment, run_dir: Path, arm: str, seed: int, part: str, out: Path, bars: Bars) -> Row:
    """Make one part in `out`; returns its ledger, the last part's with those of the parts before it."""
    from train.parts import arm_ledger, finished, read_ledgers, write_ledger

    method, budget = experiment.arms[arm].method, experiment.train.budget_tflops * 1e12
    parts = read_ledgers(run_dir / "arms" / arm / f"seed-{seed}", PARTS[method][: PARTS[method].index(part)])
    spent = {name: float(ledger["total"]["flops"]) for name, ledger in parts.items()}
    allowed = allowance(experiment.constitution, method, part, budget, spent)
    job = Job(experiment, run_dir, arm, seed, out, allowed, bars(""))
    if (method, part) == RL:
        ledger = _rl(job)
    else:
        began = (time.monotonic(), time.process_time())
        ledger = finished(out) or WORK[method, part](job)
        if "wall_seconds" not in ledger:
            ledger["wall_seconds"] = time.monotonic() - began[0]
            ledger["cpu_seconds"] = time.process_time() - began[1]
    if is_main():
        ledger = write_ledger(out, arm_ledger(parts, ledger) if part == "train" else ledger)
        for scratch in ("revisions.jsonl", "pairs.jsonl"):  # the ledger is there: nothing goes on from them any more
            (out / scratch).unlink(missing_ok=True)
        for checkpoints in ("checkpoints", "trainer") if (method, part) != RL else ():
            shutil.rmtree(out / checkpoints, ignore_errors=True)
    return ledger


def _revisions(job: Job) -> Row:
    from train.revisions import sample_revisions

    experiment = job.experiment
    return sample_revisions(
        experiment.constitution,
        experiment.train,
        constitution(experiment),
        experiment.reward,
        job.run_dir / "start" / "model",
        job.out,
        job.seed,
        job.allowed,
        partial(_overlaps, experiment),
        job.progress,
    )


def _overlaps(experiment: Experiment, texts: Sequence[str]) -> list[bool]:
    """Which texts share 13 words in a row with an item that the run evaluates."""
    training = [Text(str(i), text, False) for i, text in enumerate(texts)]
    found = {hit.training.source for hit in find_hits(training, evaluation_texts(experiment, limited=True), False)}
    return [str(i) in found for i in range(len(texts))]


def _sl(job: Job) -> Row:
    """Fine-tune on all accepted revisions; before DPO on half of them, the other half gives the preferences."""
    from train.revision_tuning import fine_tune

    experiment, revisions = job.experiment, job.accepted()
    return fine_tune(
        experiment.constitution,
        experiment.train,
        experiment.standard,
        experiment.arms[job.arm].dose,
        revisions[::2] if job.method == "constitution-dpo" else revisions,
        job.run_dir / "start" / "model",
        job.out,
        job.seed,
        job.allowed,
        merge=job.method != "constitution-sl",  # the next part begins with a whole model
        progress=job.progress,
    )


def _dpo(job: Job) -> Row:
    from train.revision_tuning import prefer_revisions

    revisions, start = job.accepted()[1::2], job.folder / "sl" / "model"
    if not revisions:
        raise ValueError(
            "constitution: one revision was accepted, and DPO needs another for its preferences; raise "
            f"train.budget_tflops or constitution.shares.constitution-dpo.revisions ({job.folder})"
        )
    experiment = job.experiment
    ledger = prefer_revisions(
        experiment.constitution, experiment.train, revisions, start, job.out, job.seed, job.allowed, job.progress
    )
    link_model(start, job.out / "model")
    return ledger


def _feedback(job: Job) -> Row:
    from train.feedback import sample_feedback
    from train.parts import read_ledgers

    experiment = job.experiment
    asked = int(read_ledgers(job.folder, ["revisions"])["revisions"]["trait"]["prompts"])
    return sample_feedback(
        experiment.constitution,
        experiment.train,
        constitution(experiment),
        experiment.reward,
        job.folder / "sl" / "model",
        job.out,
        job.seed,
        asked,  # the pairs ask on from where the revisions ended
        job.allowed,
        job.progress,
    )


def _preference(job: Job) -> Row:
    import pandas as pd

    from rewards.fit import reward_folder
    from train.feedback import fit_on_feedback

    experiment, start = job.experiment, job.folder / "sl" / "model"
    pairs = pd.read_parquet(job.folder / "feedback" / "pairs.parquet")
    ledger = fit_on_feedback(
        experiment.constitution, experiment.train, pairs, start, job.out, job.seed, job.allowed, job.progress
    )
    for trait in list(experiment.reward.traits)[1:]:  # one model pays the prompts of every trait
        folder = reward_folder(job.out, experiment.reward.trait, trait)
        link_model(job.out / "model", folder / "model")
        shutil.copy2(job.out / "calibration.json", folder)
    return ledger


def _rl(job: Job) -> Row:
    """train_policy from the fine-tuned model against the preference model, with what is left of the budget."""
    from train.policy import train_policy

    experiment = job.experiment
    with tracked(experiment, job.arm, job.seed, job.out):
        ledger = train_policy(
            experiment.train.model_copy(update={"budget_tflops": job.allowed / 1e12}),
            experiment.standard,
            experiment.arms[job.arm],
            experiment.reward,
            job.folder / "sl",
            job.folder / "preference",
            job.out,
            job.seed,
            job.progress,
            report_to=experiment.tracking.backend,
            run_name=run_name(experiment, job.arm, job.seed),
        )
    if is_main() and experiment.train.lora_rank:
        link_model(job.folder / "sl" / "model", job.out / "model")
    return ledger


RL = ("constitution-rl", "train")  # by all processes of a run, and with checkpoints of its own
WORK: Mapping[tuple[str, str], Callable[[Job], Row]] = {
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
