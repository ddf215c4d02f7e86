"""Stages made on this machine: side by side where that is faster, with their progress, by one process or by several."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from scripts.environment import set_environment
from scripts.experiment import Experiment
from scripts.processes import afresh, agree, alone, count, free_memory, is_main
from scripts.stages import MANIFEST, Bars, Callback, Manifest, Stage, adopt_stage, is_whole, run_stage
from scripts.workers import Workers, in_order, usable_cores

Tell = Callable[[Stage, Manifest], None]
Work = Callable[[Path, Bars], Mapping[str, Any] | None]


def stage_inputs(stage: Stage, run_dir: Path) -> dict[str, Any]:
    """The stage's inputs with the manifests of the stages that it needs ("absent" while there is none)."""
    manifests = {need: run_dir / need / MANIFEST for need in stage.needs}
    needs = {n: hashlib.sha256(p.read_bytes()).hexdigest() if p.exists() else "absent" for n, p in manifests.items()}
    return {**stage.inputs, "needs": needs}


def whole_stages(stages: list[Stage], run_dir: Path) -> set[str]:
    """Names of the stages that a run would skip: whole, from the same inputs, and so is all that they need."""
    whole: set[str] = set()
    for stage in stages:
        if whole.issuperset(stage.needs) and is_whole(run_dir / stage.name, stage_inputs(stage, run_dir)):
            whole.add(stage.name)
    return whole


def adopt_stages(stages: list[Stage], run_dir: Path, other: Path) -> list[str]:
    """Copy the stages that another run has made from the same inputs; returns their names.

    Raises ValueError for a folder that is no run, and for a full disk.
    """
    if not (other / "config.yaml").is_file():
        raise ValueError(f"--reuse {other}: no run folder (it has no config.yaml); give one that `traitdose run` made")
    return [s.name for s in stages if adopt_stage(run_dir / s.name, other / s.name, stage_inputs(s, run_dir))]


def default_jobs() -> int:
    """Stages that are made side by side: one for each core, or one if there is a GPU or processes train together."""
    import torch

    return 1 if torch.cuda.is_available() or count() > 1 else usable_cores()


def make_stages(
    stages: Sequence[Stage],
    experiment: Experiment,
    run_dir: Path,
    console: Console,
    jobs: int,
    tell: Tell | None = None,
) -> None:
    """What all arms share, one stage after the other; then the arms' own stages, up to `jobs` side by side.

    `tell` is called with each stage that is whole; its errors end the making.
    """
    own = [stage for stage in stages if "/seed-" in stage.name] if jobs > 1 else []
    width = max((len(stage.name) for stage in stages), default=0)
    with make_bars(console) as bars_of:

        def make(stage: Stage, workers: Workers | None = None) -> None:
            manifest = _make(stage, experiment, run_dir, bars_of, workers)
            took = "already whole" if manifest.skipped else _duration(manifest.wall_seconds)
            console.print(f"[green]✓[/] {stage.name:<{width}} [dim]{took}[/]", highlight=False)
            if tell is not None:
                tell(stage, manifest)

        for stage in stages:
            if stage not in own:
                make(stage)
        if own:
            workers = Workers(jobs, threads=max(1, usable_cores() // jobs))
            in_order(own, jobs, partial(make, workers=workers), workers.kill)
            workers.close()


def _make(
    stage: Stage,
    experiment: Experiment,
    run_dir: Path,
    bars_of: Callable[[str], AbstractContextManager[Bars]],
    workers: Workers | None,
) -> Manifest:
    apart = count() > 1 and not stage.together  # then its process draws its bars
    with nullcontext(no_bars) if apart or _needs_fresh(stage, experiment) else bars_of(stage.name) as bars:

        def work(out: Path) -> Mapping[str, Any] | None:
            if apart:
                return alone(_work_alone, experiment, run_dir, stage, out)
            here = partial(work_here, experiment, run_dir, stage)
            if workers is not None:
                return workers.call(stage.name, bars, _work, experiment, run_dir, here, out)
            agree((stage.name, out))
            return here(out, bars)

        clock = time.process_time if workers is None else partial(workers.cpu_seconds, stage.name)
        manifest = run_stage(run_dir / stage.name, stage_inputs(stage, run_dir), work, stage.name, clock)
    free_memory()
    return manifest


def work_here(experiment: Experiment, run_dir: Path, stage: Stage, out: Path, bars: Bars) -> Mapping[str, Any] | None:
    """This process's part of a stage; each of several processes calls it for a stage that they make together.

    A training that samples with vLLM gets a process of its own: TRL's client of a vLLM server keeps its port, and a
    colocated engine the GPU's memory, until their process ends. The next training would fail on either.
    """
    if _needs_fresh(stage, experiment):
        return afresh(_work_alone, experiment, run_dir, stage, out)
    return stage.work(out, bars)


def _needs_fresh(stage: Stage, experiment: Experiment) -> bool:
    return stage.together and experiment.train.vllm != "off"


def _work(experiment: Experiment, run_dir: Path, work: Work, out: Path, bars: Bars) -> Mapping[str, Any] | None:
    """One stage's work, in a process of its own."""
    set_environment(experiment, run_dir)
    try:
        return work(out, bars)
    finally:
        free_memory()


def _work_alone(experiment: Experiment, run_dir: Path, stage: Stage, out: Path) -> Mapping[str, Any] | None:
    """_work in a process of its own, which draws the bars; of several, the main one does."""
    if not is_main():
        return _work(experiment, run_dir, stage.work, out, no_bars)
    with make_bars(Console()) as bars_of, bars_of(stage.name) as bars:
        return _work(experiment, run_dir, stage.work, out, bars)


@contextmanager
def make_bars(console: Console) -> Iterator[Callable[[str], AbstractContextManager[Bars]]]:
    """Gives bars_of(name): a stage's progress with the time left, a bar on a terminal and a line a minute elsewhere."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        @contextmanager
        def bars_of(name: str) -> Iterator[Bars]:
            task = progress.add_task(name, total=None)

            def bars(label: str) -> Callback:
                progress.reset(task, total=None, description=f"{name} {label}".strip())
                told = time.monotonic()

                def report(done: int, total: int) -> None:
                    nonlocal told
                    progress.update(task, completed=done, total=total)
                    if not console.is_terminal and time.monotonic() - told > 60:
                        told = time.monotonic()
                        console.print(f"  {name} {label}: {done} of {total}", highlight=False)

                return report

            try:
                yield bars
            finally:
                progress.remove_task(task)

        yield bars_of


def no_bars(label: str) -> Callback:
    """Bars that nobody sees."""
    return lambda done, total: None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
