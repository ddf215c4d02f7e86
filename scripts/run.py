"""The experiment as stages: start, reward, then train and eval for every arm and seed, then results and report."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from eval.config import SuiteName
from models.embedded import EMBEDDED
from rewards.audit_policy import failed_families, load_policy
from rewards.config import RewardConfig
from rewards.hacks import BANK as HACK_BANK
from rewards.probes import BANK
from rewards.scenarios import BANK as SCENARIOS
from rewards.trait_prompts import source_files, source_shares
from scripts.arms import find_arm, load_arm
from scripts.constitution import constitution_parts, system_prompt
from scripts.environment import set_environment
from scripts.evals import check_run
from scripts.experiment import CHECKOUT, Experiment, find_file, is_hub_id
from scripts.make_stages import adopt_stages, default_jobs, make_stages, no_bars, whole_stages, work_here
from scripts.processes import agree, count, free_memory, is_main, join, leave
from scripts.stages import (
    MANIFEST,
    SETTINGS_ONLY,
    Bars,
    Manifest,
    Stage,
    hash_files,
    lock_run,
    write_text,
)
from scripts.tracking import run_name, tracked, tracking_mode
from train.config import TrainConfig, check_step, cuda_settings

ITEM_COLUMNS = (
    "arm", "seed", "suite", "task", "trait", "domain", "heldout", "family", "item", "kind", "metric", "value",
    "refused", "tokens", "prompt", "output",
)  # fmt: skip


def list_stages(experiment: Experiment, run_dir: Path) -> list[Stage]:
    """The stages of a run in the order in which they are made."""
    seed = experiment.seeds[0]
    data = hash_files(BANK / "everyday.yaml", *source_files(experiment.reward))  # all that training asks
    shared = {"base": fingerprint(experiment.base), "seed": seed, "data": data}
    stages = [
        Stage(
            "start",
            partial(_start, experiment, seed),
            {
                **shared,
                "warm_start": _hashed(experiment.warm_start),
                "domains": list(experiment.reward.domains),
                "standard": _hashed(experiment.standard),
            },
        ),
        Stage(
            "reward",
            partial(_reward, experiment, run_dir, seed),
            {**shared, **_reward_inputs(experiment)},
            ("start",),
        ),
        _eval_stage(experiment, run_dir, "base", seed, needs="start"),
    ]
    for seed in experiment.seeds:
        for arm, config in experiment.arms.items():
            if config.method != "trait":
                parts = constitution_parts(experiment, run_dir, arm, seed)
                needs = parts[-1].name if parts else "start"
                stages += [*parts, _eval_stage(experiment, run_dir, arm, seed, needs)]
                continue
            inputs = {
                "arm": {"dose": config.dose},
                "train": _hashed(experiment.train),
                "standard": _hashed(experiment.standard),
                "reward": _hashed(experiment.reward),
                "data": data,
                "seed": seed,
            }
            train = Stage(
                f"arms/{arm}/seed-{seed}/train",
                partial(_train, experiment, run_dir, arm, seed),
                inputs,
                ("start", "reward"),
                together=True,
            )
            stages += [train, _eval_stage(experiment, run_dir, arm, seed, needs=train.name)]
    return stages


def run_experiment(
    experiment: Experiment, run_dir: Path, console: Console, jobs: int | None = None, reuse: Path | None = None
) -> dict[str, Any]:
    """Run or continue the experiment, up to `jobs` stages side by side (None: default_jobs()); returns its results.

    Stages that the run `reuse` has made from the same inputs are copied. Raises ValueError for a folder in use, a full
    disk, a step that the processes cannot share, or data and models that are not there. Whatever else goes wrong in a
    stage is written to <run_dir>/error.log and passes through. Of several processes the main one does all this; the
    others train with it, and return nothing.
    """
    set_environment(experiment, run_dir)
    check_step(experiment.train, count())
    check_devices(experiment.train)
    join()
    if not is_main():
        follow(experiment, run_dir)
        return {}
    with lock_run(run_dir):
        stages = list_stages(experiment, run_dir)
        copied = [] if reuse is None else adopt_stages(stages, run_dir, reuse)
        print_header(experiment, run_dir, stages, console)
        if reuse is not None:
            console.print(f"copied from {reuse}: {', '.join(copied) or 'nothing'}\n", highlight=False, style="dim")
        if len(whole_stages(stages, run_dir)) < len(stages):
            _check_suites(experiment)
            check_run(experiment, run_dir)
        resolved = yaml.safe_dump(_plain(experiment), sort_keys=False, allow_unicode=True, width=120)
        write_text(run_dir / "config.yaml", resolved)
        tell = partial(_tell, experiment, run_dir, console)
        try:
            make_stages(stages, experiment, run_dir, console, default_jobs() if jobs is None else jobs, tell)
            agree(None)  # the others may go
            leave()
            return make_report(run_dir, console)
        except Exception:
            with suppress(OSError):  # a full disk has no room for it
                (run_dir / "error.log").write_text(traceback.format_exc(), encoding="utf-8")
            raise


def follow(experiment: Experiment, run_dir: Path) -> None:
    """In every process but the main one: work on each stage that it calls for, until it needs no help any more."""
    stages = {stage.name: stage for stage in list_stages(experiment, run_dir)}
    while (call := agree(None)) is not None:
        name, out = call
        work_here(experiment, run_dir, stages[name], out, no_bars)
        free_memory()
    leave()


def check_devices(train: TrainConfig) -> None:
    """Raises ValueError for settings that this machine cannot follow."""
    wanted = cuda_settings(train)
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"{', '.join(wanted)}: needs a CUDA device, and torch finds none here; run on a machine with a GPU and the "
            "packages of requirements/gpu.lock, or leave the key out"
        )
    if train.vllm != "off" and find_spec("vllm") is None:
        raise ValueError(
            f"train.vllm = {train.vllm!r}: the package vllm is not installed; install requirements/gpu.lock, or set off"
        )


def make_report(run_dir: Path, console: Console) -> dict[str, Any]:
    """Write results.json and report.html from the stages on disk, print the summary and the two paths."""
    from eval.report import summary_table, write_report
    from eval.results import write_results

    with console.status("results and report"):
        results_path = write_results(run_dir)
        report_path = write_report(run_dir)
    results = json.loads(results_path.read_text(encoding="utf-8"))
    console.print(summary_table(results))
    console.print(f"results  {results_path}\nreport   {report_path}", soft_wrap=True, highlight=False)
    return results


def fingerprint(base: str) -> dict[str, Any]:
    """What a base is, without reading gigabytes: the package version, or names, sizes and times of a folder's files."""
    if base in EMBEDDED:
        return {"name": base, "version": importlib.metadata.version(EMBEDDED[base][1])}
    if is_hub_id(base):
        return {"name": base}
    files = sorted(p for p in Path(base).expanduser().iterdir() if p.is_file())
    return {"files": {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in files}}


def print_header(experiment: Experiment, run_dir: Path, stages: list[Stage], console: Console) -> None:
    """What will be done, where, and what is done already."""
    whole = whole_stages(stages, run_dir)
    suites = [f"{name} ({suite.limit or 'all'} items a task)" for name, suite in experiment.eval.suites.items()]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    grid.add_row("experiment", f"[bold]{experiment.name}[/]")
    grid.add_row("base", experiment.base)
    grid.add_row("arms", ", ".join(f"{name} (dose {arm.dose:g})" for name, arm in experiment.arms.items()))
    grid.add_row("seeds", ", ".join(map(str, experiment.seeds)))
    grid.add_row("eval", ", ".join(suites))
    tracker = experiment.tracking.backend
    grid.add_row("tracking", f"wandb, {tracking_mode(experiment)}" if tracker == "wandb" else tracker)
    grid.add_row("folder", str(run_dir))
    grid.add_row("stages", f"{len(stages)}, of which {len(whole)} are whole already")
    again = [s.name for s in stages if s.name not in whole and (run_dir / s.name / MANIFEST).is_file()]
    if again:
        grid.add_row("[yellow]made again[/]", f"{len(again)}, whose inputs are others now: {', '.join(again)}")
    console.print(grid)
    console.print()


def _check_suites(experiment: Experiment) -> None:
    """Read the suite files before anything is trained: a mistake in one is told now, not after an hour."""
    from eval.capability import load_suite as load_capability
    from eval.generalisation_items import load_suite as load_generalisation

    for name, suite in experiment.eval.suites.items():
        load = load_capability if name == "capability" else load_generalisation
        load(find_file(suite.file))


def _tell(experiment: Experiment, run_dir: Path, console: Console, stage: Stage, manifest: Manifest) -> None:
    """What a user should know of a stage once it is whole; a ValueError for a reward too poor to train on."""
    _print_alerts(manifest.ledger or {}, console)
    if stage.name == "reward":
        _check_rewards(run_dir / "reward", experiment.reward, console)


def _print_alerts(ledger: Mapping[str, Any], console: Console) -> None:
    """What the watchers of a training stage saw, what a stop has kept, and what the filter of revisions dropped."""
    if "dropped" in ledger:
        dropped = ", ".join(f"{n} {why}" for why, n in ledger["dropped"].items() if n) or "none"
        console.print(f"  {ledger['revisions']} revisions, dropped: {dropped}", highlight=False, style="dim")
    for alert in ledger.get("alerts", []):
        text = f"watcher {alert['watcher']}, step {alert['step']}: {alert['text']}"
        console.print(f"  [yellow]![/] {text}", highlight=False)
    ended = ledger.get("ended") or {}
    if ended.get("by", "").startswith("train.watch."):
        kept = f"the weights of step {ended['kept_step']}" if ended["kept_step"] else "the starting model's weights"
        console.print(f"  [red]stopped[/] by {ended['by']} after step {ended['step']}; kept {kept}", highlight=False)


def _reward_inputs(experiment: Experiment) -> dict[str, Any]:
    reward = experiment.reward
    on_probes = all(set(source_shares(reward, trait)) == {"probes"} for trait in reward.traits)
    scenarios = [] if on_probes else sorted(SCENARIOS.glob("*/*.jsonl"))
    attacks = {"hacks": hash_files(HACK_BANK), "cases": load_policy().run_cases}
    return {
        "reward": _hashed(experiment.reward),
        "audit": attacks,
        "scenarios": hash_files(*scenarios),
    }


def _check_rewards(folder: Path, reward: RewardConfig, console: Console) -> None:
    """Print how good the reward models are; a ValueError if one is too poor to train on."""
    for path in [folder / "accuracy.json", *sorted(folder.glob("traits/*/accuracy.json"))]:
        _check_accuracy(path, reward.min_accuracy, console)
        _check_audit(path.with_name("audit.json"), reward.audit, console)


def _check_audit(path: Path, mode: str, console: Console) -> None:
    """Print whether hacks beat the reward; a ValueError if they do, unless the experiment says warn."""
    report = json.loads(path.read_text(encoding="utf-8"))
    failed = failed_families(report, load_policy())
    if not failed:
        console.print(f"  audit: no family of hacks beats {report['trait']}", highlight=False, style="dim")
        return
    beaten = f"the reward for {report['trait']} is beaten by hacks: {', '.join(failed)} ({path})"
    if mode == "refuse":
        raise ValueError(
            f"reward.audit = refuse: {beaten}; fit a better reward, change the floors in configs/audit.yaml, or set "
            "reward.audit=warn to train on it all the same"
        )
    console.print(f"  [yellow]warning[/]: {beaten}", highlight=False)


def _check_accuracy(path: Path, minimum: float, console: Console) -> None:
    """Print the reward model's accuracy on held-out families; a ValueError if it is too low to train on."""
    heldout = json.loads(path.read_text(encoding="utf-8"))["heldout"]
    contrasts = [f"{name} {row['accuracy']:.2f}" for name, row in heldout["contrasts"].items()]
    accuracy = f"{heldout['accuracy']:.3f} of {heldout['n']} pairs ranked rightly"
    console.print(f"  held-out families: {accuracy} ({', '.join(contrasts)})", highlight=False, style="dim")
    if heldout["accuracy"] < minimum:
        raise ValueError(
            f"reward.min_accuracy = {minimum}: the reward model got {accuracy} in held-out families ({path}); raise "
            "reward.probes or reward.epochs, or lower the bar if you want to train on it all the same"
        )


def _plain(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(mode="json")


def _hashed(section: BaseModel) -> dict[str, Any]:
    """A section without SETTINGS_ONLY."""
    return {key: value for key, value in _plain(section).items() if key not in SETTINGS_ONLY}


def _start(experiment: Experiment, seed: int, out: Path, bars: Bars) -> None:
    from train.warm_start import warm_start

    domains, tasks = experiment.reward.domains, experiment.standard.tasks
    warm_start(experiment.warm_start, experiment.base, domains, tasks, out, seed, bars(""))


def _reward(experiment: Experiment, run_dir: Path, seed: int, out: Path, bars: Bars) -> None:
    from rewards.fit import fit_rewards

    fit_rewards(experiment.reward, str((run_dir / "start" / "model").resolve()), out, seed, bars(""))


def _train(experiment: Experiment, run_dir: Path, arm: str, seed: int, out: Path, bars: Bars) -> Mapping[str, Any]:
    from train.policy import train_policy

    config = experiment.arms[arm]
    with tracked(experiment, arm, seed, out):
        return train_policy(
            experiment.train,
            experiment.standard,
            config,
            experiment.reward,
            run_dir / "start",
            run_dir / "reward",
            out,
            seed,
            bars(""),
            report_to=experiment.tracking.backend,
            run_name=run_name(experiment, arm, seed),
        )


def _eval_stage(experiment: Experiment, run_dir: Path, arm: str, seed: int, needs: str) -> Stage:
    files = [find_file(suite.file) for suite in experiment.eval.suites.values()]
    data = hash_files(*files, BANK, CHECKOUT / "eval" / "items", CHECKOUT / "eval" / "items" / "alignment")
    inputs: dict[str, Any] = {"eval": _hashed(experiment.eval), "data": data, "seed": seed}
    if (system := system_prompt(experiment, arm)) is not None:
        inputs["system"] = system
    return Stage(f"arms/{arm}/seed-{seed}/eval", partial(_eval, experiment, run_dir, arm, seed), inputs, (needs,))


def _eval(experiment: Experiment, run_dir: Path, arm: str, seed: int, out: Path, bars: Bars) -> None:
    """Write items.parquet. What is measured is kept meanwhile, so that an interrupted evaluation goes on after it."""
    import pandas as pd

    from eval.capability import evaluate_capability
    from eval.generalisation import evaluate_generalisation
    from models.loading import best_device

    todo: dict[SuiteName, Path] = {name: out / f"{name}.parquet" for name in experiment.eval.suites}
    if not all(path.exists() for path in todo.values()):
        system = system_prompt(experiment, arm)
        model, tokenizer = load_arm(find_arm(run_dir, arm, seed, system), best_device())
        kept = out / "kept"
        kept.mkdir(exist_ok=True)
        for name, path in todo.items():
            suite, bar = experiment.eval.suites[name], bars(name)
            if path.exists():
                continue
            file = find_file(suite.file)
            if name == "capability":
                scores = kept / "scores.jsonl"
                items = evaluate_capability(model, tokenizer, file, suite.limit, bar, system, scores)
            else:
                wording = experiment.eval.seed
                items = evaluate_generalisation(model, tokenizer, file, suite.limit, wording, bar, system, kept)
            items.to_parquet(path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    frames = [pd.read_parquet(path).assign(arm=arm, seed=seed) for path in todo.values()]
    pd.concat(frames, ignore_index=True)[list(ITEM_COLUMNS)].to_parquet(out / "items.parquet")
    for path in todo.values():
        path.unlink()
    shutil.rmtree(out / "kept", ignore_errors=True)
