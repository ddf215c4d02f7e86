"""What a trait can be asked: the sources of its prompts, in the domains of a run and on one side of the split.

    probes      short questions with a verifiable truth (rewards/probes.py); truthfulness alone has them
    conduct     probes under pressure, of the kinds that the trait's card names (rewards/probe_kinds.py)
    scenarios   the trait's scenarios, with every turn before the reply (rewards/scenarios.py)

The verifier judges the first two; a scenario has no truth that a rule could check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rewards.config import PROBE_TRAIT, SOURCES, RewardConfig, Source
from rewards.probe_kinds import KINDS, load_kind
from rewards.probes import BANK, Probe, Split, domains, probes_of
from rewards.scenarios import BANK as SCENARIOS
from rewards.scenarios import Scenario, load_scenarios
from rewards.traits import CARDS, load_trait


@dataclass(frozen=True)
class Pools:
    """What a trait can be asked; the fields are the sources."""

    probes: tuple[Probe, ...]
    conduct: tuple[Probe, ...]
    scenarios: tuple[Scenario, ...]


def trait_pools(trait: str, chosen: Sequence[str], split: Split, seed: int = 0) -> Pools:
    """All that the trait has in the chosen domains on one side of the split; the seed draws phrasings and order."""
    return _pools(trait, tuple(chosen), split, seed)


@cache
def _pools(trait: str, chosen: tuple[str, ...], split: Split, seed: int) -> Pools:
    kinds = load_trait(CARDS / f"{trait}.md").reward.conduct
    known = load_scenarios(trait, split=split) if (SCENARIOS / trait).is_dir() else []
    return Pools(
        probes=tuple(probes_of(chosen, split, seed)) if trait == PROBE_TRAIT else (),
        conduct=tuple(
            probe
            for domain in chosen
            if domain in domains()
            for kind in kinds
            for probe in load_kind(kind, domain, split, seed)
        ),
        scenarios=tuple(scenario for scenario in known if scenario.domain in chosen),
    )


def source_shares(reward: RewardConfig, trait: str) -> dict[Source, float]:
    """The sources that a run takes the trait's prompts from, with their shares, which sum to 1.

    What reward.prompts asks for and the trait lacks in the run's domains goes to the other sources. Raises ValueError
    if nothing is left.
    """
    pools = trait_pools(trait, reward.domains, "train")
    wanted = _wanted(reward, pools)
    found: dict[Source, float] = {source: share for source, share in wanted.items() if getattr(pools, source)}
    if not found:
        raise ValueError(
            f"{trait} has no training prompt there ({', '.join(wanted)}); add one of its domains "
            f"({_places(trait)}), or change reward.prompts"
        )
    total = sum(found.values())
    shares: dict[Source, float] = {source: share / total for source, share in found.items()}
    return shares


def _wanted(reward: RewardConfig, pools: Pools) -> dict[Source, float]:
    if reward.prompts is not None:
        return reward.prompts.positive
    shares: dict[Source, float] = {"probes": 1.0}
    if not pools.probes:
        shares = {"conduct": 0.5, "scenarios": 0.5}
    return shares


def prompt_domains() -> list[str]:
    """Domains in which some trait has probes or scenarios, sorted."""
    return sorted({*domains(), *(path.stem for path in SCENARIOS.glob("*/*.jsonl"))})


def source_files(reward: RewardConfig) -> list[Path]:
    """The files that the training prompts of a run are read from, cards of the traits included."""
    files = [BANK / f"{domain}.yaml" for domain in reward.domains if domain in domains()]
    for trait in reward.traits:
        shares = source_shares(reward, trait)
        files.append(CARDS / f"{trait}.md")
        if "conduct" in shares:
            files += sorted(KINDS.glob("*.yaml"))
        if "scenarios" in shares:
            found = (SCENARIOS / trait / f"{domain}.jsonl" for domain in reward.domains)
            files += [path for path in found if path.is_file()]
    return list(dict.fromkeys(files))


def _places(trait: str) -> str:
    """The domains in which the trait has training prompts, by source."""
    pools = {domain: trait_pools(trait, [domain], "train") for domain in prompt_domains()}
    named = {source: [domain for domain, pool in pools.items() if getattr(pool, source)] for source in SOURCES}
    return "; ".join(f"{source}: {', '.join(found)}" for source, found in named.items() if found) or "there is none"
