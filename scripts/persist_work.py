"""The work inside the stages of `traitdose persist`: every condition is a file of its own until the stage is whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eval.attacks import choose_attacks
from scripts.arms import Arm, load_arm
from scripts.experiment import Experiment, find_file
from scripts.stages import Bars


def make_items(arm: Arm, work: Callable[[Path, Bars], None], out: Path, bars: Bars) -> None:
    """Make the conditions, then join their files; a kill in between leaves one or the other."""
    import pandas as pd

    items = out / "items.parquet"
    if not items.exists():
        work(out, bars)
        frames = [pd.read_parquet(path) for path in sorted(out.glob("condition-*.parquet"))]
        joined = pd.concat(frames, ignore_index=True).assign(arm=arm.name, seed=arm.seed)
        joined.to_parquet(items.with_suffix(".tmp"))
        items.with_suffix(".tmp").replace(items)
    for path in out.glob("condition-*"):
        path.unlink()


def prompts(experiment: Experiment, arm: Arm, out: Path, bars: Bars) -> None:
    """The clean items, then every prompt attack."""
    from eval.persistence import CLEAN, measure_attack, measure_clean

    targets = targets_of(experiment)
    model, tokenizer = load_arm(arm, _device())
    system = arm.system
    clean = _keep(out, CLEAN, lambda: measure_clean(model, tokenizer, targets, system, bars(CLEAN)))
    for attack in choose_attacks(experiment.persistence.prompts):
        make = partial(measure_attack, model, tokenizer, targets, attack, clean, system)
        _keep(out, attack.id, lambda make=make, name=attack.id: make(bars(name)))


def ladder(experiment: Experiment, arm: Arm, method: Any, harm: Path | None, out: Path, bars: Bars) -> None:
    """Steps on bad data from the arm, or on good data from what the bad data has left in `harm`."""
    from eval.persistence import measure_clean, only_probes
    from train.bad_data import examples
    from train.ladder import WEIGHTS, climb

    cfg, targets = experiment.persistence.finetune, only_probes(targets_of(experiment))
    model, tokenizer = load_arm(arm, _device(), None if harm is None else harm / WEIGHTS[method])

    def measure(step: int, tuned: Any) -> None:
        made = {"step": step, "condition": f"step-{step}", "role": "step"}
        _keep(out, f"step-{step:05d}", lambda: measure_clean(tuned, tokenizer, targets, arm.system).assign(**made))

    if harm is None:  # a recovery begins with what the harm ended with
        measure(0, model)
    quality = "bad" if harm is None else "good"
    climb(
        model,
        tokenizer,
        examples(cfg.steps[-1] * cfg.batch_size, quality, arm.seed, experiment.reward.domains),
        method,
        cfg,
        out,
        arm.seed,
        measure,
        system=arm.system,
        keep=harm is None and "recovery" in experiment.persistence.attacks,
        progress=bars(f"{quality} data"),
    )


def generation(experiment: Experiment, arm: Arm, out: Path, bars: Bars) -> None:
    """The greedy answers, then samples at every temperature."""
    from eval.persistence import CLEAN, measure_clean, measure_samples, only_probes

    cfg, targets = experiment.persistence.generation, only_probes(targets_of(experiment))
    model, tokenizer = load_arm(arm, _device())
    system = arm.system
    _keep(out, CLEAN, lambda: measure_clean(model, tokenizer, targets, system, bars(CLEAN)))
    for temperature in cfg.temperatures:
        name = f"temperature-{temperature:g}"
        make = partial(measure_samples, model, tokenizer, targets, temperature, cfg.worst_of, cfg.samples, arm.seed)
        _keep(out, name, lambda make=make, name=name: make(system, bars(name)))


def targets_of(experiment: Experiment) -> list[Any]:
    """The tasks and items that are asked."""
    from eval.persistence import load_targets

    cfg, suite = experiment.persistence, find_file(experiment.eval.suites["generalisation"].file)
    return load_targets(suite, cfg.tasks, cfg.items, experiment.eval.seed)


def _keep(out: Path, name: str, work: Callable[[], Any]) -> Any:
    """The table of a condition: from its file if an earlier attempt has left it, else made and put there whole."""
    import pandas as pd

    path = out / f"condition-{name}.parquet"
    if not path.exists():
        scratch = path.with_suffix(".tmp")
        work().to_parquet(scratch)
        scratch.replace(path)
    return pd.read_parquet(path)


def _device() -> str:
    from models.loading import best_device

    return best_device()
