"""The commands `traitdose traits` and `traitdose scenarios check`: cards, and the bank that belongs to them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rewards.scenario_check import Finding
    from rewards.scenario_style import StyleCues
    from rewards.traits import TraitCard


def print_traits(trait: str | None, console: Console) -> None:
    """The traits with their scenarios, or one card. Raises ValueError for a trait without a card."""
    from rewards.traits import load_traits

    cards = load_traits()
    if trait is None:
        _list_traits(cards, console)
    elif trait in cards:
        console.print(Markdown(_card_text(cards[trait])))
    else:
        raise ValueError(f"trait {trait!r} has no card; there are: {', '.join(cards)}")


def print_check(trait: str | None, out: Path | None, quick: bool, console: Console) -> bool:
    """Check the bank, or one trait's part of it, and print (and write) what was found. True if there is no error."""
    from rewards.scenario_check import check_bank
    from rewards.scenario_style import style_by_trait
    from rewards.scenarios import read_bank

    findings = check_bank(trait=trait, meaning=not quick)
    lines = read_bank(trait=trait)
    counts = Counter((line.path.parent.name, line.path.stem) for line in lines)
    cues = style_by_trait(lines)
    _print_counts(console, counts, cues)
    _print_findings(console, findings)
    errors = sum(finding.severity == "error" for finding in findings)
    console.print(f"{len(lines)} scenarios, errors: {errors}, warnings: {len(findings) - errors}.")
    if out is not None:
        content = {
            "scenarios": len(lines),
            "errors": errors,
            "warnings": len(findings) - errors,
            "meaning": not quick,
            "counts": [{"trait": name, "domain": d, "n": n} for (name, d), n in sorted(counts.items())],
            "style": {name: asdict(cue) for name, cue in cues.items()},
            "findings": [asdict(finding) for finding in findings],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return errors == 0


def _card_text(card: TraitCard) -> str:
    """The card as Markdown."""
    sections = {
        "Definition": card.definition,
        "Good behaviour": card.good_behaviour,
        "Failure modes": "\n".join(f"- **{slug}**: {text}" for slug, text in card.failure_modes.items()),
        "How it is rewarded": f"{card.how_rewarded}\n\nMonitors: {', '.join(card.reward.monitors) or 'none'}.",
        "Boundary cases": card.boundary_cases,
    }
    head = f"# {card.name} ({card.id})\n\n{card.summary}\n\nDomains: {', '.join(card.domains)}."
    return "\n\n".join([head, *(f"## {title}\n\n{body}" for title, body in sections.items())])


def _list_traits(cards: dict[str, TraitCard], console: Console) -> None:
    from rewards.scenarios import read_bank

    found = [line.scenario for line in read_bank() if line.scenario is not None]
    table = Table(title="Traits", title_justify="left")
    table.add_column("id", no_wrap=True)  # what --trait takes
    table.add_column("name")
    table.add_column("summary")
    for title in ("train", "held out", "domains"):
        table.add_column(title, justify="right")
    for card in cards.values():
        mine = [scenario for scenario in found if scenario.trait == card.id]
        held = sum(scenario.split == "heldout" for scenario in mine)
        covered = len({scenario.domain for scenario in mine} & set(card.domains))
        row = (card.name, escape(card.summary), f"{len(mine) - held}", f"{held}", f"{covered} of {len(card.domains)}")
        table.add_row(card.id, *row)
    console.print(table)


def _print_counts(console: Console, counts: Counter[tuple[str, str]], cues: dict[str, StyleCues]) -> None:
    """Scenarios per trait and domain, and what style alone tells."""
    from rewards.scenario_style import CUES

    names = sorted({name for name, _ in counts})
    domains = sorted({domain for _, domain in counts})
    table = Table(title="Scenarios", title_justify="left")
    table.add_column("trait", no_wrap=True)
    for title in (*map(_short, domains), "all"):
        table.add_column(title)
    for name in names:
        row = [counts[name, domain] for domain in domains]
        table.add_row(name, *(str(n) if n else "[red]-[/red]" for n in row), str(sum(row)))
    console.print(table, ", ".join(f"{_short(domain)} {domain}" for domain in domains), "")
    style = Table("trait", "pairs", "words good/bad", *CUES)
    style.title, style.title_justify = "Style: in how many pairs a cue alone finds the good reply", "left"
    for name, cue in cues.items():
        shares = (f"{share:.0%}" for share in cue.found.values())
        style.add_row(name, str(cue.pairs), f"{cue.length_ratio:.2f}", *shares)
    console.print(style, "")


def _print_findings(console: Console, findings: list[Finding]) -> None:
    for severity, colour in (("error", "red"), ("warning", "yellow")):
        mine = [finding for finding in findings if finding.severity == severity]
        if not mine:
            continue
        table = Table("kind", title=f"{severity.capitalize()}s", title_justify="left")
        table.add_column("where", overflow="fold")  # never cut: the line number stands at its end
        table.add_column("what")
        table.add_column("remedy")
        for finding in sorted(mine, key=lambda finding: finding.kind):  # sorting is stable: the bank's order inside
            texts = (escape(text) for text in (finding.where, finding.message, finding.remedy))
            table.add_row(f"[{colour}]{finding.kind}[/{colour}]", *texts)
        console.print(table, "")


def _short(domain: str) -> str:
    return domain.replace("-", "")[:4]
