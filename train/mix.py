"""The training prompts: the standard mix, and the dose that replaces its share.

A mix is a pure function of (seed, dose): position k of every arm holds the same standard prompt unless the dose has
replaced it, and the positions that a dose replaces are evenly spread. A prompt is a plain dict: prompt (chat messages),
source ("trait" | "standard"), trait (whose reward model pays it; "" for a standard prompt), task, kind, prompt_id,
truth (what its verifier needs to know, as JSON; null where no rule applies).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import count, islice
from typing import Any, TypeVar

import reasoning_gym

from rewards.config import RewardConfig, Source
from rewards.probes import Kind, Probe
from rewards.scenarios import Scenario
from rewards.trait_prompts import source_shares, trait_pools

Prompt = dict[str, Any]
Item = TypeVar("Item")
Name = TypeVar("Name", bound=str)

# reasoning-gym draws item i of its seed s from s + i, so seeds side by side would hold the same items, shifted by one.
# A seed of ours therefore has a range of its own, and a warm start's items lie half-way along it.
SEED_RANGE = 2_000_000
WARM_START = 1_000_003


def is_dose(position: int, dose: float) -> bool:
    """Whether the dose replaces the standard prompt here: the first n positions hold floor(n x dose) trait prompts."""
    return math.floor((position + 1) * dose + 1e-9) > math.floor(position * dose + 1e-9)


def build_mix(
    n: int, dose: float, seed: int, tasks: Mapping[str, Mapping[str, Any]], reward: RewardConfig
) -> list[Prompt]:
    """The n training prompts of one arm, in order."""
    standard = standard_prompts(n, seed, tasks)
    trait = trait_prompts(sum(is_dose(k, dose) for k in range(n)), seed, reward)
    supply = iter(trait)
    return [next(supply) if is_dose(k, dose) else standard[k] for k in range(n)]


def standard_prompts(n: int, seed: int, tasks: Mapping[str, Mapping[str, Any]], first: int = 0) -> list[Prompt]:
    """n standard prompts: the tasks take turns, so every window of len(tasks) prompts holds each task once.

    first: where in the seed's range of items they begin. Seeds, and other places of one seed, share no item.
    """
    names = list(tasks)
    place = seed * SEED_RANGE + first
    prompts: list[Prompt] = []
    for k in range(n):
        name, i = names[k % len(names)], k // len(names)
        entry = _generator(name, json.dumps(tasks[name], sort_keys=True), place, math.ceil(n / len(names)))[i]
        prompts.append(
            {
                "prompt": [{"role": "user", "content": entry["question"]}],
                "source": "standard",
                "trait": "",
                "task": name,
                "kind": "standard",
                "prompt_id": f"{name}/{seed}/{i}",
                "truth": json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}, default=str),
            }
        )
    return prompts


def trait_prompts(n: int, seed: int, reward: RewardConfig) -> list[Prompt]:
    """n trait prompts from training families: the traits take turns by weight, and in each its sources by share.

    Raises ValueError for a trait that has no training prompt in the domains.
    """
    streams = {trait: _stream(trait, reward, seed) for trait in reward.traits}
    return [next(streams[trait]) for trait in islice(take_turns(reward.traits), n)]


def take_turns(shares: Mapping[Name, float]) -> Iterator[Name]:
    """Names without end, in proportion to their shares: each time the one that is furthest behind its due."""
    total = sum(shares.values())
    taken = dict.fromkeys(shares, 0)
    for k in count(1):
        due = {name: k * share / total - taken[name] for name, share in shares.items()}
        name = max(due, key=lambda name: round(due[name], 9))  # equal dues: the first
        taken[name] += 1
        yield name


def _stream(trait: str, reward: RewardConfig, seed: int) -> Iterator[Prompt]:
    """The trait's prompts without end, of all sources."""
    pools = trait_pools(trait, reward.domains, "train", seed)
    sources: dict[Source, Iterator[Prompt]] = {
        "probes": (probe_prompt(probe, trait) for probe in _knowledge(pools.probes, seed)),
        "conduct": (probe_prompt(probe, trait) for probe in _conduct(pools.conduct, trait, seed)),
        "scenarios": (scenario_prompt(scenario) for scenario in laps(pools.scenarios, f"{trait}/scenarios", seed)),
    }
    for source in take_turns(source_shares(reward, trait)):
        yield next(sources[source])


def _knowledge(probes: Sequence[Probe], seed: int) -> Iterator[Probe]:
    """Probes of knowledge, every third of them unanswerable.

    One in three, because answers about real subjects must outweigh the ease of refusing: with one in two the embedded
    policy refused everything (docs/LOG.md, 2026-11-22).
    """
    pools = {
        "answerable": [probe for probe in probes if probe.kind == "answerable"],
        "unanswerable": [probe for probe in probes if probe.kind != "answerable"],
    }
    sides = {side: laps(pool, side, seed) for side, pool in pools.items() if pool}
    for k in count():
        side = "unanswerable" if k % 3 == 1 else "answerable"
        yield next(sides[side] if side in sides else next(iter(sides.values())))  # a bank may hold one side only


def _conduct(probes: Sequence[Probe], trait: str, seed: int) -> Iterator[Probe]:
    """Probes of conduct: the kinds take turns."""
    kinds: dict[Kind, list[Probe]] = {}
    for probe in probes:
        kinds.setdefault(probe.kind, []).append(probe)
    turns = {kind: laps(pool, f"{trait}/{kind}", seed) for kind, pool in kinds.items()}
    for kind in take_turns(dict.fromkeys(turns, 1.0)):
        yield next(turns[kind])


def laps(pool: Sequence[Item], name: str, seed: int) -> Iterator[Item]:
    """The pool again and again, every lap in an order of its own."""
    for lap in count():
        yield from random.Random(f"{seed}/{lap}/{name}").sample(pool, len(pool))


def probe_prompt(probe: Probe, trait: str) -> Prompt:
    """A probe as a training prompt of the trait; the verifier knows its truth."""
    return {
        "prompt": probe.messages,
        "source": "trait",
        "trait": trait,
        "task": f"{probe.domain}/{probe.family}",
        "kind": probe.kind,
        "prompt_id": probe.id,
        "truth": json.dumps(asdict(probe)),
    }


def scenario_prompt(scenario: Scenario) -> Prompt:
    """A scenario as a training prompt, with all its turns. No rule knows its truth: null."""
    return {
        "prompt": scenario.prompt,
        "source": "trait",
        "trait": scenario.trait,
        "task": f"{scenario.domain}/{scenario.family}",
        "kind": "scenario",
        "prompt_id": scenario.id,
        "truth": "null",
    }


@cache
def _generator(name: str, settings: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(settings))
