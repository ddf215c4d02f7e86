"""What an attack on a run will cost, before anything is loaded: stages, tokens, time, disk."""

from __future__ import annotations

from collections.abc import Sequence

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
    SIDE_BY_SIDE,
    duration,
    item_tokens,
    matrix_rate,
    model_size,
    text_tokens,
)
from scripts.stages import Stage
from train.persistence_config import PersistenceConfig


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
    stages: Sequence[Stage],
    whole: set[str],
    jobs: int,
    console: Console,
) -> None:
    """A table of the attacks with their times, and the time left."""
    size, peak = model_size(experiment.base), matrix_rate()
    cost = plan_attacks(experiment.persistence, targets, size.parameters if size else 0.0, peak)
    made = [stage.name.split("/") for stage in stages]  # persistence/<attack>/<arm>/seed-<s>
    table = Table(title=f"Attacks on {experiment.name}", title_justify="left", title_style="bold", box=SIMPLE)
    for head in ("attack", "stages", "whole", "about, each"):
        table.add_column(head, justify="left" if head == "attack" else "right", no_wrap=True)
    left = 0.0
    for attack in dict.fromkeys(name[1] for name in made):
        mine = ["/".join(name) for name in made if name[1] == attack]
        each = cost[attack.split("-")[0]]
        finished = len(whole.intersection(mine))
        left += each * (len(mine) - finished)
        table.add_row(attack, str(len(mine)), str(finished), duration(each) if size else "?")
    console.print(table)
    arms, seeds = dict.fromkeys(name[2] for name in made), dict.fromkeys(name[3] for name in made)
    told = ", ".join(seed.removeprefix("seed-") for seed in seeds)
    console.print(f"arms {', '.join(arms)}; seeds {told}", highlight=False)
    if size:
        left /= SIDE_BY_SIDE if jobs > 1 else 1
        kept = sum(name[1] == "harmful-full" for name in made) * 4 * size.parameters
        disk = f"; the fully tuned weights take {kept / GB:.1f} GB" if kept else ""
        console.print(
            f"time left: [bold]about {duration(left)}[/], {jobs} side by side, on a CPU that multiplies at "
            f"{peak / 1e9:.0f} GFLOP/s{disk}\n",
            highlight=False,
        )
