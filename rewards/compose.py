"""The reward functions of a training run, in TRL's form, with their weights.

A trait prompt is paid by its own trait's reward model, a standard prompt by its task's verifier. Monitors
(rewards/monitors.py) have weight 0. Each prompt has exactly one paying function, so a score that is missing (None)
never stands in for a low one: a completion whose score is missing has no reward at all, and the trainer leaves it out
of its group's baseline.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import reasoning_gym

from rewards.monitors import MONITORS, Messages, RewardFunction, text_of


class Scorer(Protocol):
    """What scores replies for one trait, on the price scale -1..1: a RewardModel, or anything alike."""

    def score(self, prompts: Sequence[Messages], answers: Sequence[str]) -> Iterable[float | None]:
        """One score for every prompt with its answer, None or NaN where there is none."""
        ...


def reward_functions(models: Mapping[str, Scorer]) -> list[tuple[RewardFunction, float]]:
    """(function, weight) pairs: what pays the policy, then the monitors.

    `models` maps traits to what scores their prompts; it may be empty only if no prompt is a trait prompt.
    """

    def trait(
        prompts: Sequence[Messages],
        completions: Sequence[Messages],
        source: Sequence[str],
        trait: Sequence[str],
        **_: Any,
    ) -> list[float | None]:
        """The score by the model of the prompt's own trait; None for standard prompts and where it is missing."""
        scores: list[float | None] = [None] * len(prompts)
        paid = [i for i, kind in enumerate(source) if kind == "trait"]
        for name in dict.fromkeys(trait[i] for i in paid):
            if name not in models:
                raise ValueError(f"arms: a dose above 0 needs the stage reward/, which has no reward model for {name}")
            mine = [i for i in paid if trait[i] == name]
            values = models[name].score([prompts[i] for i in mine], [text_of(completions[i]) for i in mine])
            for i, value in zip(mine, values, strict=True):
                scores[i] = None if value is None or math.isnan(value) else float(value)
        return scores

    return [(trait, 1.0), (standard, 1.0), *((monitor, 0.0) for monitor in MONITORS)]


def standard(
    completions: Sequence[Messages], source: Sequence[str], task: Sequence[str], truth: Sequence[str], **_: Any
) -> list[float | None]:
    """The standard task's own verifier, 0..1; None for trait prompts."""
    return [
        standard_score(name, text_of(completion), json.loads(known)) if kind == "standard" else None
        for completion, kind, name, known in zip(completions, source, task, truth, strict=True)
    ]


def standard_score(task: str, answer: str, entry: dict[str, Any]) -> float:
    """reasoning-gym's score of an answer; the first line counts, without a closing full stop."""
    line = (answer.strip().splitlines() or [""])[0].strip().rstrip(".")
    score: Any = reasoning_gym.get_score_answer_fn(task)
    return float(score(line, entry))
