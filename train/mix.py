"""The training prompts: the standard mix, and the dose that replaces its share.

A mix is a pure function of (seed, dose): position k of every arm holds the same standard prompt unless the dose has
replaced it, and the positions that a dose replaces are evenly spread. A prompt is a plain dict: prompt (chat messages),
source ("trait" | "standard"), task, kind, prompt_id, truth (what its reward needs to know, as JSON).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import reasoning_gym

from rewards.probes import Probe, load_probes

Prompt = dict[str, Any]


def is_dose(position: int, dose: float) -> bool:
    """Whether the dose replaces the standard prompt here: the first n positions hold floor(n x dose) trait prompts."""
    return math.floor((position + 1) * dose + 1e-9) > math.floor(position * dose + 1e-9)


def build_mix(
    n: int, dose: float, seed: int, tasks: Mapping[str, Mapping[str, Any]], domains: Sequence[str]
) -> list[Prompt]:
    """The n training prompts of one arm, in order."""
    standard = standard_prompts(n, seed, tasks)
    trait = trait_prompts(sum(is_dose(k, dose) for k in range(n)), seed, domains)
    supply = iter(trait)
    return [next(supply) if is_dose(k, dose) else standard[k] for k in range(n)]


def standard_prompts(n: int, seed: int, tasks: Mapping[str, Mapping[str, Any]]) -> list[Prompt]:
    """n standard prompts: the tasks take turns, so every window of len(tasks) prompts holds each task once."""
    names = list(tasks)
    prompts: list[Prompt] = []
    for k in range(n):
        name, i = names[k % len(names)], k // len(names)
        entry = _generator(name, json.dumps(tasks[name], sort_keys=True), seed, math.ceil(n / len(names)))[i]
        prompts.append(
            {
                "prompt": [{"role": "user", "content": entry["question"]}],
                "source": "standard",
                "task": name,
                "kind": "standard",
                "prompt_id": f"{name}/{seed}/{i}",
                "truth": json.dumps({"answer": entry["answer"], "metadata": entry["metadata"]}, default=str),
            }
        )
    return prompts


def trait_prompts(n: int, seed: int, domains: Sequence[str]) -> list[Prompt]:
    """n trait prompts from training families, every third of them unanswerable; every pass is reshuffled.

    One in three, because answers about real subjects must outweigh the ease of refusing: with one in two the embedded
    policy refused everything (docs/LOG.md, 2026-11-22).
    """
    probes = [probe for domain in domains for probe in load_probes(domain, "train", seed)]
    answerable = [probe for probe in probes if probe.kind == "answerable"]
    unanswerable = [probe for probe in probes if probe.kind != "answerable"]
    prompts: list[Prompt] = []
    taken = {"answerable": 0, "unanswerable": 0}
    for k in range(n):
        side, pool = ("unanswerable", unanswerable) if k % 3 == 1 else ("answerable", answerable)
        lap, i = divmod(taken[side], len(pool))
        taken[side] += 1
        order = random.Random(f"{seed}/{lap}/{side}").sample(range(len(pool)), len(pool))
        prompts.append(trait_prompt(pool[order[i]]))
    return prompts


def trait_prompt(probe: Probe) -> Prompt:
    """A probe as a training prompt."""
    return {
        "prompt": probe.messages,
        "source": "trait",
        "task": f"{probe.domain}/{probe.family}",
        "kind": probe.kind,
        "prompt_id": probe.id,
        "truth": json.dumps(asdict(probe)),
    }


@cache
def _generator(name: str, settings: str, seed: int, size: int) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(settings))
