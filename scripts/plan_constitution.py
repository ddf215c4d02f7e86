"""What the parts of a constitutional arm will cost: each its share of the arm's budget."""

from __future__ import annotations

from scripts.experiment import Experiment
from train.constitution_config import PARTS

READING = ("revisions", "feedback")  # parts that read far more than they write; the others learn


def part_flops(experiment: Experiment, arm: str) -> dict[str, float]:
    """Part -> FLOPs of one seed; empty for an arm that trains nothing."""
    method, budget = experiment.arms[arm].method, experiment.train.budget_tflops * 1e12
    parts = PARTS[method]
    shares = experiment.constitution.shares.get(method, {})
    flops = {part: shares[part] * budget for part in parts[:-1]}
    return flops | ({parts[-1]: budget - sum(flops.values())} if parts else {})


def fine_tuned_models(experiment: Experiment) -> int:
    """How many arms keep a whole model between two of their parts."""
    return sum("sl" in PARTS.get(arm.method, ()) for arm in experiment.arms.values())


def part_rows(experiment: Experiment, arm: str) -> list[tuple[str, str]]:
    """(part, its share of the budget in words), for the plan's table."""
    budget = experiment.train.budget_tflops * 1e12
    return [(part, f"{100 * flops / budget:.0f}%") for part, flops in part_flops(experiment, arm).items()]
