"""The ledger: what an arm spent, split into trait and standard prompts.

FLOPs are the usual estimates from the parameter count N (Kaplan et al., 2020, arXiv 2001.08361, section 2.1): a forward
pass costs 2N per token, forward and backward 6N. Counted per processed token: rollouts encode each prompt once per
group when prompts are shared (else once per completion) and decode every generated token; the reward model scores
prompt and completion of trait prompts; the update trains on the same tokens as the rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SOURCES = ("trait", "standard")


@dataclass
class Account:
    """Spending on one source of prompts."""

    prompts: int = 0
    completions: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    trained_tokens: int = 0
    flops: float = 0.0


@dataclass
class Ledger:
    """Spending of one arm. wall_seconds and cpu_seconds are those of the training stage, resumptions included.

    fallback: why the arm's prompts were not shared although the config asked for it.
    """

    n_policy: int
    n_reward: int
    shared: bool
    steps: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    fallback: str | None = None
    accounts: dict[str, Account] = field(default_factory=lambda: {source: Account() for source in SOURCES})

    def add(self, source: str, prompt_tokens: int, completion_tokens: Sequence[int], scored: bool) -> None:
        """Book one group: a prompt of `prompt_tokens` and its completions."""
        account = self.accounts[source]
        generated = sum(completion_tokens)
        encoded = prompt_tokens if self.shared else prompt_tokens * len(completion_tokens)
        scored_tokens = prompt_tokens * len(completion_tokens) + generated if scored else 0
        account.prompts += 1
        account.completions += len(completion_tokens)
        account.generated_tokens += generated
        account.scored_tokens += scored_tokens
        account.trained_tokens += encoded + generated
        account.flops += 8.0 * self.n_policy * (encoded + generated) + 2.0 * self.n_reward * scored_tokens

    def flops(self) -> float:
        """Spent so far."""
        return sum(account.flops for account in self.accounts.values())

    def affordable(self, sources: Sequence[str], budget: float) -> int:
        """How many of the coming groups the rest of the budget pays for, at the mean cost of their source; at least 1.

        All of them while a source has no cost yet. So an arm ends within half a group of its budget, not half a step.
        """
        left = budget - self.flops()
        for k, source in enumerate(sources):
            account = self.accounts[source]
            if account.prompts == 0:
                return len(sources)
            cost = account.flops / account.prompts
            if left < cost / 2:
                return max(1, k)
            left -= cost
        return len(sources)

    def to_json(self) -> dict[str, Any]:
        """The contract of ledger.json."""
        total = Account()
        for account in self.accounts.values():
            for key, value in asdict(account).items():
                setattr(total, key, getattr(total, key) + value)
        return (
            {source: asdict(account) for source, account in self.accounts.items()}
            | {"total": asdict(total)}
            | {
                key: getattr(self, key)
                for key in ("steps", "n_policy", "n_reward", "shared", "wall_seconds", "cpu_seconds", "fallback")
            }
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger that to_json wrote."""
        keys = ("steps", "n_policy", "n_reward", "shared", "wall_seconds", "cpu_seconds", "fallback")
        return cls(accounts={source: Account(**data[source]) for source in SOURCES}, **{key: data[key] for key in keys})
