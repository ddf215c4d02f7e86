"""The command `traitdose scenarios generate`: new scenarios from a served model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console


def print_generated(
    trait: str, domain: str, n: int, model: str, changes: list[str], out: Path | None, console: Console
) -> bool:
    """Generate and print the counts. True if the file holds n scenarios."""
    from rewards.endpoint import endpoint_config
    from rewards.generate import GeneratorConfig, generate

    cfg = endpoint_config(GeneratorConfig, model, changes)
    path = out or Path("runs") / "scenarios" / trait / f"{domain}.jsonl"
    done = generate(trait, domain, n, cfg, path)
    console.print(
        f"{done.path}: {done.kept} of {done.wanted} scenarios. {done.asked} answers asked for: {done.malformed} "
        f"malformed, {done.duplicate} like another scenario, {done.overlap} like an evaluation item, "
        f"{done.asked - done.malformed - done.duplicate - done.overlap} kept.",
        soft_wrap=True,
    )
    if done.kept < done.wanted:
        console.print(f"What was wrong stands in {done.path}.log.jsonl; run the same command again to go on.")
    return done.kept >= done.wanted
