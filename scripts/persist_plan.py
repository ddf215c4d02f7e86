"""What an attack on a run will cost, before anything is loaded: stages, tokens, time, disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from eval.attacks import choose_attacks
from eval.persistence import Target
from scripts.experiment import Experiment
from scripts.plan import (
    EXAMPLE_TOKENS,
    FORWARD,
    GB,
    LEARN,
    LOAD_SECONDS,
    SAMPLE,
    duration,
    item_tokens,
    matrix_rate,
    model_size,
    text_tokens,
)
from train.persistence_config import PersistenceConfig

if TYPE_CHECKING:
    from scripts.persist import Attempt


def plan_attacks(cfg: PersistenceConfig, targets: Sequence[Target], parameters: float, peak: float) -> dict[str, float]:
    """Seconds of one stage of each attack, upper bounds; peak: FLOPs a second of this machine's matrix product."""
    items = sum(len(target.items) for target in targets)
    probes = sum(len(target.probes) for target in targets)
    read = sum(item_tokens(item) for target in targets for item in target.items)
    asked = sum(item_tokens(probe) for target in targets for probe in target.probes)
    written = sum(len(target.probes) * (target.task.max_new_tokens or 0) for target in targets)

    def seconds(reading: float, writing: float, learning: float = 0.0) -> float:
        flops = 2 * parameters * (reading / FORWARD + writing / SAMPLE) + 6 * parameters * learning / LEARN
        return LOAD_SECONDS + flops / peak

    attacks = choose_attacks(cfg.prompts)
    reading, writing = read, written
    for attack in attacks:
        said = text_tokens(" ".join(attack.turns))
        everywhere = attack.role == "harmful" and attack.channel in ("system", "user", "document")
        reading += (read if everywhere else asked) + said * (items if everywhere else probes)
        reading += (len(attack.turns) - 1) * (asked + written)  # what was said before is read again at every turn
        writing += len(attack.turns) * written
    ladder, sampled = cfg.finetune, cfg.generation
    learned = ladder.steps[-1] * ladder.batch_size * EXAMPLE_TOKENS
    rungs, again = len(ladder.steps), sampled.samples * len(sampled.temperatures)
    return {
        "prompts": seconds(reading, writing),
        "harmful": seconds(rungs * asked, rungs * written, learned),
        "recovery": seconds((rungs - 1) * asked, (rungs - 1) * written, learned),
        "generation": seconds(asked * (1 + len(sampled.temperatures)), written * (1 + again)),
    }


def print_plan(
    experiment: Experiment,
    targets: Sequence[Target],
    attempts: Sequence[Attempt],
    whole: Sequence[Attempt],
    console: Console,
) -> None:
    """A table of the attacks with their times, and the time left."""
    size, peak = model_size(experiment.base), matrix_rate()
    cost = plan_attacks(experiment.persistence, targets, size.parameters if size else 0.0, peak)
    done = {attempt.name for attempt in whole}
    table = Table(title=f"Attacks on {experiment.name}", title_justify="left", title_style="bold", box=SIMPLE)
    for head in ("attack", "stages", "whole", "about, each"):
        table.add_column(head, justify="left" if head == "attack" else "right", no_wrap=True)
    left = 0.0
    for attack in dict.fromkeys(attempt.attack for attempt in attempts):
        mine = [attempt for attempt in attempts if attempt.attack == attack]
        each = cost[attack.split("-")[0]]
        finished = sum(attempt.name in done for attempt in mine)
        left += each * (len(mine) - finished)
        table.add_row(attack, str(len(mine)), str(finished), duration(each) if size else "?")
    console.print(table)
    arms = dict.fromkeys(attempt.arm.name for attempt in attempts)
    seeds = dict.fromkeys(attempt.arm.seed for attempt in attempts)
    console.print(f"arms {', '.join(arms)}; seeds {', '.join(map(str, seeds))}", highlight=False)
    if size:
        kept = sum(attempt.attack == "harmful-full" for attempt in attempts) * 4 * size.parameters
        disk = f"; the fully tuned weights take {kept / GB:.1f} GB" if kept else ""
        console.print(
            f"time left: [bold]about {duration(left)}[/] on a CPU that multiplies at {peak / 1e9:.0f} GFLOP/s{disk}\n",
            highlight=False,
        )
