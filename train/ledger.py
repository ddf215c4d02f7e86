"""The ledger: what an arm spent, split into trait and standard prompts, how it ended, and what its watchers saw.

FLOPs are the usual estimates from the parameter count N (Kaplan et al., 2020, arXiv 2001.08361, section 2.1): a forward
pass costs 2N per token, forward and backward 6N. Counted per processed token: rollouts encode each prompt once per
group when prompts are shared (else once per completion) and decode every generated token; the reward model reads a
trait prompt once, with all its completions (rewards/reward_model.py); the update trains on the same tokens as the
rollout, once per epoch, but for completions that it leaves out because their advantage is zero (train/grpo.py; the one
row that an update without any advantage still reads is not booked). PPO and a KL term add forwards of the policy; PPO's
critic reads every rollout once and is trained like the policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import compress
from typing import Any

from train.config import TrainConfig

SOURCES = ("trait", "standard")


@dataclass
class Account:
    """Spending on one source of prompts. Trained tokens count once per epoch."""

    prompts: int = 0
    completions: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    trained_tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Passes:
    """How often the models read a rollout token, the reward model's reading apart."""

    forwards: int = 1  # of the policy or the reference without a gradient; sampling is the first
    epochs: int = 1  # of training
    critic: bool = False

    @classmethod
    def of(cls, cfg: TrainConfig) -> Passes:
        """What the configured algorithm needs: log-probabilities before the update, the reference's, the epochs."""
        before_update = cfg.algorithm == "ppo" or (cfg.algorithm == "rloo" and cfg.beta > 0)
        before_update |= cfg.vllm != "off"  # TRL compares vLLM's log-probabilities with the policy's own
        return cls(1 + before_update + cfg.measures_kl, cfg.epochs, cfg.algorithm == "ppo")

    def token_flops(self, n: int | float, policy_learns: bool = True) -> float:
        """FLOPs of one rollout token with models of n parameters each."""
        train = self.update_flops(n)
        return 2.0 * n * self.forwards + train * policy_learns + (2.0 * n + train) * self.critic

    def update_flops(self, n: int | float) -> float:
        """FLOPs of one token in the policy's update, all epochs together."""
        return 6.0 * n * self.epochs


@dataclass
class Ledger:
    """Spending of one arm. wall_seconds and cpu_seconds are those of the training stage, resumptions included.

    `fallback` says why prompts were not shared although the config asked for it, `ended` why the arm ended and after
    which step's update its weights are; `alerts` is what the watchers saw.
    """

    n_policy: int
    n_reward: int
    shared: bool
    passes: Passes = Passes()
    steps: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    fallback: str | None = None
    ended: dict[str, Any] | None = None
    alerts: list[dict[str, Any]] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=lambda: {source: Account() for source in SOURCES})

    def add(
        self,
        source: str,
        prompt_tokens: int,
        completion_tokens: Sequence[int],
        scored: bool,
        policy_learns: bool = True,
        trained: Sequence[bool] | None = None,
    ) -> None:
        """Book one group: a prompt of `prompt_tokens` and its completions, of which the update reads the `trained`."""
        account = self.accounts[source]
        trained = [True] * len(completion_tokens) if trained is None else trained
        generated, updated = sum(completion_tokens), sum(compress(completion_tokens, trained))
        encoded = prompt_tokens * (1 if self.shared else len(completion_tokens))
        updated += prompt_tokens * (any(trained) if self.shared else sum(trained))
        scored_tokens = prompt_tokens + generated if scored else 0
        account.prompts += 1
        account.completions += len(completion_tokens)
        account.generated_tokens += generated
        account.scored_tokens += scored_tokens
        account.trained_tokens += updated * self.passes.epochs
        account.flops += self.passes.token_flops(self.n_policy, policy_learns=False) * (encoded + generated)
        account.flops += self.passes.update_flops(self.n_policy) * updated * policy_learns
        account.flops += 2.0 * self.n_reward * scored_tokens

    def spent(self, unit: str = "flops") -> float:
        """Spent so far, in a unit of an account."""
        return sum(getattr(account, unit) for account in self.accounts.values())

    def affordable(self, sources: Sequence[str], budget: float, unit: str = "flops", parts: int = 1) -> int:
        """How many of the coming groups the rest of the budget pays for: a multiple of `parts`, and at least that.

        A group counts at its source's mean cost, or at that of all groups while its source has none. Before the first
        step nothing has a cost, and all are taken. A step is trained in `parts` (processes x micro-batches) of as many
        groups each; so an arm that is not over after its first step ends within about half of `parts` groups of its
        budget, where costs vary as they did.
        """
        prompts = sum(account.prompts for account in self.accounts.values())
        if prompts == 0:
            return len(sources)
        left, mean = budget - self.spent(unit), self.spent(unit) / prompts
        seen = {name: account for name, account in self.accounts.items() if account.prompts}
        costs = {name: getattr(account, unit) / account.prompts for name, account in seen.items()}
        for k in range(0, len(sources), parts):
            cost = sum(costs.get(source, mean) for source in sources[k : k + parts])
            if left < cost / 2:
                return max(parts, k)
            left -= cost
        return len(sources)

    def exhausted(self, budget: float, unit: str = "flops", parts: int = 1) -> bool:
        """Whether less is left than half of the mean cost of `parts` groups, the fewest that a step can have."""
        spent = self.spent(unit)
        group = spent / sum(account.prompts for account in self.accounts.values())
        return spent + parts * group / 2 > budget

    def to_json(self) -> dict[str, Any]:
        """The contract of ledger.json."""
        total = Account()
        for account in self.accounts.values():
            for key, value in asdict(account).items():
                setattr(total, key, getattr(total, key) + value)
        return (
            {source: asdict(account) for source, account in self.accounts.items()}
            | {"total": asdict(total), "passes": asdict(self.passes)}
            | {key: getattr(self, key) for key in _PLAIN}
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger that to_json wrote."""
        return cls(
            accounts={source: Account(**data[source]) for source in SOURCES},
            passes=Passes(**data["passes"]),
            **{key: data[key] for key in _PLAIN},
        )


_PLAIN = ("steps", "n_policy", "n_reward", "shared", "wall_seconds", "cpu_seconds", "fallback", "ended", "alerts")
