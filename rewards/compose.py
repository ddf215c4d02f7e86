"""The reward functions of a training run, in TRL's form, with their weights.

Trait prompts are paid by the traits' reward models, standard prompts by their task's verifier. Monitors
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


def reward_functions(
    models: Mapping[str, Scorer], weights: Mapping[str, float] | None = None
) -> list[tuple[RewardFunction, float]]:
    """(function, weight) pairs: what pays the policy, then the monitors.

    `models` maps traits to what scores them; it may be empty only if no prompt is a trait prompt. `weights` are equal
    unless given. With several traits a trait prompt is paid the weighted mean of their scores, and each score is a
    monitor.
    """
    shares = _shares(models, weights)
    scores = _TraitScores(models)

    def trait(
        prompts: Sequence[Messages], completions: Sequence[Messages], source: Sequence[str], **_: Any
    ) -> list[float | None]:
        """The traits' scores by their weights; None for standard prompts and where a trait's score is missing."""
        parts = scores.of(prompts, completions, source)
        return [_weighted(row, shares) for row in parts]

    def part(name: str) -> RewardFunction:
        def monitor(
            prompts: Sequence[Messages], completions: Sequence[Messages], source: Sequence[str], **_: Any
        ) -> list[float | None]:
            return [row.get(name) for row in scores.of(prompts, completions, source)]

        monitor.__name__ = f"trait_{name.replace('-', '_')}_monitor"
        return monitor

    parts = [part(name) for name in models] if len(models) > 1 else []
    return [(trait, 1.0), (standard, 1.0), *((monitor, 0.0) for monitor in (*MONITORS, *parts))]


class _TraitScores:
    """Every trait's score of a batch, computed once however many functions ask for it."""

    def __init__(self, models: Mapping[str, Scorer]) -> None:
        self.models = models
        self.batch: tuple[list[Messages], list[str]] | None = None
        self.rows: list[dict[str, float | None]] = []

    def of(
        self, prompts: Sequence[Messages], completions: Sequence[Messages], source: Sequence[str]
    ) -> list[dict[str, float | None]]:
        """For every completion trait -> score; an empty dict for standard prompts."""
        texts = [text_of(completion) for completion in completions]
        if self.batch != (list(prompts), texts):
            self.rows = self._score(prompts, texts, [i for i, kind in enumerate(source) if kind == "trait"])
            self.batch = (list(prompts), texts)
        return self.rows

    def _score(self, prompts: Sequence[Messages], texts: list[str], paid: list[int]) -> list[dict[str, float | None]]:
        rows: list[dict[str, float | None]] = [{} for _ in texts]
        if paid and not self.models:
            raise ValueError("arms: a dose above 0 needs the stage reward/")
        for name, model in self.models.items() if paid else ():
            values = model.score([prompts[i] for i in paid], [texts[i] for i in paid])
            for i, value in zip(paid, values, strict=True):
                rows[i][name] = None if value is None or math.isnan(value) else float(value)
        return rows


def _shares(models: Mapping[str, Scorer], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The traits' weights, summing to 1."""
    given = dict.fromkeys(models, 1.0) if weights is None else dict(weights)
    if set(given) != set(models):
        raise ValueError(f"reward.weights: names {', '.join(given)}, but there are models for {', '.join(models)}")
    total = sum(given.values())
    return {name: weight / total for name, weight in given.items()}


def _weighted(row: Mapping[str, float | None], shares: Mapping[str, float]) -> float | None:
    """The weighted mean, None where nothing or not everything is scored."""
    values = [(share, row.get(name)) for name, share in shares.items()]
    if not row or any(value is None for _, value in values):
        return None
    return sum(share * value for share, value in values if value is not None)


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
