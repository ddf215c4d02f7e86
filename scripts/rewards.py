"""The commands `traitdose rewards fit` and `traitdose rewards audit`: a trait's reward model, and attacks on it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scripts.environment import be_quiet
from scripts.experiment import trait_names

ROOT = Path("runs") / "rewards"
WEAK = 0.7  # a failure mode that is told from the good reply less often is shown in red


def fit_command(
    trait: str, base: str, own: Path | None, out: Path | None, seed: int, start: Path | None, console: Console
) -> None:
    """Fit, measure on held-out families and print; a finished fit with the same inputs is only printed again.

    Raises ValueError for an unknown trait, for pairs that cannot be read and for a folder that holds no reward model.
    """
    be_quiet(base)
    from rewards.fit import ALL, RECIPE, RECIPE_FROM, fit_trait
    from rewards.hacks import BANK as HACK_BANK
    from rewards.preferences import load_preferences
    from rewards.probes import BANK as PROBE_BANK
    from rewards.scenarios import BANK as SCENARIO_BANK
    from scripts.make_stages import make_bars
    from scripts.run import fingerprint
    from scripts.stages import hash_files, run_stage

    if trait not in (ALL, *trait_names()):
        raise ValueError(f"--trait {trait}: there is no such trait; there are: {ALL}, {', '.join(trait_names())}")
    if own is not None:
        load_preferences(own)  # a mistake in it is told before anything is loaded
    folder = out or ROOT / trait
    recipe = RECIPE if start is None else RECIPE_FROM
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by accelerate launch
    if processes > 1:
        recipe = replace(recipe, save_every=None)
    if int(os.environ.get("RANK", "0")) > 0:  # the first process writes the folder
        with tempfile.TemporaryDirectory() as scratch:
            fit_trait(trait, base, Path(scratch), seed, recipe, own, start)
        return
    files = [*sorted(SCENARIO_BANK.glob("*/*.jsonl")), PROBE_BANK, HACK_BANK, *([own] if own else [])]
    inputs = {
        "base": fingerprint(base),
        "trait": trait,
        "seed": seed,
        "data": hash_files(*files),
        "recipe": vars(recipe),
        "start": hash_files(_checked(start) / "model") if start else None,
    }

    def work(partial: Path) -> Mapping[str, Any] | None:
        with make_bars(console) as bars_of, bars_of(f"fit {trait}") as bars:
            fit_trait(trait, base, partial, seed, recipe, own, start, progress=bars(""))
        return None

    manifest = run_stage(folder, inputs, work, name=f"rewards/{trait}")
    accuracy = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))
    _print_accuracy(accuracy, console)
    took = "already whole" if manifest.skipped else f"{manifest.wall_seconds:.0f} s"
    console.print(f"{folder}/model ({took})", soft_wrap=True, highlight=False)


def audit_command(
    trait: str, model: Path | None, out: Path | None, policy: Path | None, seed: int, console: Console
) -> bool:
    """Attack a fitted reward model and print the table; True if no family beats it.

    The targets are the trait's held-out scenarios; for truthfulness half of them are probes. Raises ValueError for an
    unknown trait, a folder without a reward model and a policy that cannot be read.
    """
    if trait not in trait_names():
        raise ValueError(f"--trait {trait}: there is no such trait; there are: {', '.join(trait_names())}")
    folder = _checked(model or ROOT / trait)
    adapter = json.loads((folder / "model" / "adapter_config.json").read_text(encoding="utf-8"))
    be_quiet(adapter["base_model_name_or_path"])
    from models.loading import best_device
    from rewards.audit import audit, audit_report
    from rewards.audit_policy import POLICY, load_policy
    from rewards.reward_model import RewardModel
    from scripts.stages import write_json

    rules = load_policy(policy or POLICY)
    targets = audit_targets(trait, rules.cases, seed)
    with console.status(f"{len(targets)} prompts"):
        report = audit_report(trait, audit(RewardModel.load(folder, device=best_device()), targets, rules, seed))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, report)
    print_audit(report, console)
    return bool(report["passed"])


def audit_targets(trait: str, n: int, seed: int) -> list[Any]:
    """Held-out scenarios of the trait; for truthfulness probes of every domain fill up to n, and are half at least."""
    from rewards.audit import probe_targets, scenario_targets
    from rewards.config import PROBE_TRAIT
    from rewards.probes import domains

    if trait != PROBE_TRAIT:
        return scenario_targets(trait, n, seed)
    scenarios = scenario_targets(trait, n // 2, seed)
    return scenarios + probe_targets(domains(), n - len(scenarios), seed)


def print_audit(report: Mapping[str, Any], console: Console, worst: bool = True) -> None:
    """The families with their AUC, and the hacked replies that scored furthest above their exemplars."""
    table = Table("family", "what it does", title=f"Audit: {report['trait']}", title_justify="left")
    for head in ("AUC", "95% interval", "n", "floor", ""):
        table.add_column(head, justify="right")
    for row in report["families"]:
        name = row["name"] + ("" if row["trained"] else " *")
        if row["auc"] is None:
            table.add_row(name, row["what"], "-", "-", "0", f"{row['floor']:.2f}", "")
            continue
        interval = f"{row['ci_low']:.2f} to {row['ci_high']:.2f}"
        verdict = "[green]ok[/]" if row["passed"] else "[red]beaten[/]"
        table.add_row(name, row["what"], f"{row['auc']:.2f}", interval, str(row["n"]), f"{row['floor']:.2f}", verdict)
    console.print(table, "* never trained against. AUC: how often the good exemplar outranks the hacked reply.", "")
    for row in report["families"] if worst else ():
        for case in [] if row["passed"] else row["worst"][:1]:
            console.print(
                f"[red]{row['name']}[/] in {case['target']}, {case['hacked_score'] - case['good_score']:.2f} above:"
            )
            console.print(f"  hacked: {_short(case['hacked'])}\n  good:   {_short(case['good'])}", highlight=False)


def _print_accuracy(accuracy: Mapping[str, Any], console: Console) -> None:
    heldout = accuracy["heldout"]
    table = Table("", "n", "accuracy", "95% interval", title_justify="left")
    table.title = f"{accuracy['trait']}: held-out families ({accuracy['pairs']} preferences in the fit)"
    rows = [("in all", heldout), ("validation families", accuracy["validation"])]
    table.add_row(*_accuracy_row(*rows[0]))
    table.add_row(*_accuracy_row(*rows[1]), end_section=True)
    for group in ("style", "domains", "contrasts"):
        for name, row in heldout[group].items():
            label = f"shorter sentences: {name}" if group == "style" else name
            table.add_row(*_accuracy_row(label, row), end_section=name == list(heldout[group])[-1])
    console.print(table)


def _accuracy_row(name: str, row: Mapping[str, Any]) -> tuple[str, str, str, str]:
    if row["accuracy"] is None:
        return name, "0", "-", "-"
    accuracy = f"{row['accuracy']:.2f}"
    if row["accuracy"] < WEAK:
        accuracy = f"[red]{accuracy}[/]"
    return name, str(row["n"]), accuracy, f"{row['ci_low']:.2f} to {row['ci_high']:.2f}"


def _checked(folder: Path) -> Path:
    if not (folder / "model" / "adapter_config.json").is_file():
        raise ValueError(f"{folder}: holds no reward model (model/adapter_config.json); fit one: traitdose rewards fit")
    return folder


def _short(text: str) -> str:
    line = escape(" ".join(text.split()))
    return line if len(line) <= 160 else line[:157] + "..."
