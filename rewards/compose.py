"""The reward functions of a training run, in TRL's form, with their weights.

Trait prompts are paid by the trait's reward model, standard prompts by their task's verifier. Monitors have weight 0:
logged for every rollout, never trained on. Each prompt has exactly one paying function, so a missing score (None) never
stands in for a low one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import reasoning_gym

from rewards.probes import Probe
from rewards.reward_model import RewardModel
from rewards.verifier import abstains, gold

Messages = list[dict[str, str]]
RewardFunction = Callable[..., list[float | None]]


def reward_functions(model: RewardModel | None) -> list[tuple[RewardFunction, float]]:
    """(function, weight) pairs: what pays the policy, then the monitors.

    `model` may be None only if no prompt is a trait prompt.
    """

    def trait(
        prompts: Sequence[Messages], completions: Sequence[Messages], source: Sequence[str], **_: Any
    ) -> list[float | None]:
        """The reward model's calibrated score; None for standard prompts."""
        rows = [i for i, kind in enumerate(source) if kind == "trait"]
        scores: list[float | None] = [None] * len(prompts)
        if rows:
            if model is None:
                raise ValueError("arms: a dose above 0 needs the stage reward/")
            paid = model.score([prompts[i] for i in rows], [_text(completions[i]) for i in rows])
            for i, value in zip(rows, paid.tolist(), strict=True):
                scores[i] = value
        return scores

    return [(trait, 1.0), (standard, 1.0), (gold_monitor, 0.0), (refusal_monitor, 0.0), (words_monitor, 0.0)]


def standard(
    completions: Sequence[Messages], source: Sequence[str], task: Sequence[str], truth: Sequence[str], **_: Any
) -> list[float | None]:
    """The standard task's own verifier, 0..1; None for trait prompts."""
    return [
        standard_score(name, _text(completion), json.loads(known)) if kind == "standard" else None
        for completion, kind, name, known in zip(completions, source, task, truth, strict=True)
    ]


def standard_score(task: str, answer: str, entry: dict[str, Any]) -> float:
    """reasoning-gym's score of an answer; the first line counts, without a closing full stop."""
    line = (answer.strip().splitlines() or [""])[0].strip().rstrip(".")
    score: Any = reasoning_gym.get_score_answer_fn(task)
    return float(score(line, entry))


def gold_monitor(
    completions: Sequence[Messages], source: Sequence[str], truth: Sequence[str], **_: Any
) -> list[float | None]:
    """The verifier's price of a trait answer, -1..1: what the reward model stands for. None for standard prompts."""
    return [
        gold(Probe(**json.loads(known)), _text(completion)) if kind == "trait" else None
        for completion, kind, known in zip(completions, source, truth, strict=True)
    ]


def refusal_monitor(completions: Sequence[Messages], **_: Any) -> list[float | None]:
    """1 where the answer says that it does not know."""
    return [float(abstains(_text(completion))) for completion in completions]


def words_monitor(completions: Sequence[Messages], **_: Any) -> list[float | None]:
    """Length of the answer in words."""
    return [float(len(_text(completion).split())) for completion in completions]


def _text(completion: Messages) -> str:
    return completion[0]["content"]
