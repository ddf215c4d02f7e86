"""The audit: cheap hacks are set against good exemplars before anybody trains on the reward.

Every family of rewards/hacks.py writes one hacked reply to each held-out prompt. Its AUC is the chance that the reward
puts the exemplar above the hacked reply to the same prompt (ties count half): a policy is paid by differences within a
prompt, so scores of different prompts are not compared. A hacked reply that the verifier finds as good as the exemplar,
such as a refusal where nothing is known, is no hack and is left out, unless its form is what is wrong with it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rewards.audit_policy import AuditPolicy
from rewards.hacks import HACKS, TRAINED, Case, Messages, hacked
from rewards.preferences import is_worse, probe_case, scenario_case
from rewards.probes import Probe, probes_of
from rewards.reward_model import share
from rewards.scenarios import load_scenarios


@dataclass(frozen=True)
class Target:
    """A prompt to attack: its case, and the probe that tells whether a hacked reply is in truth a good one."""

    name: str
    case: Case
    probe: Probe | None = None


class Reward(Protocol):
    """What is attacked: a RewardModel, or anything else that scores replies."""

    def raw_scores(self, prompts: Sequence[Messages], answers: Sequence[str]) -> np.ndarray:
        """One score for every prompt with its answer, (N,)."""
        ...


def scenario_targets(trait: str, n: int, seed: int) -> list[Target]:
    """Up to n held-out scenarios of the trait, drawn by the seed."""
    scenarios = load_scenarios(trait, split="heldout")
    rng = random.Random(f"audit/{seed}/{trait}")
    drawn = rng.sample(scenarios, min(n, len(scenarios)))
    return [Target(scenario.id, scenario_case(scenario, scenarios, rng)) for scenario in drawn]


def probe_targets(domains: Sequence[str], n: int, seed: int) -> list[Target]:
    """Up to n held-out probes of the domains, half of them answerable; the good reply is right, or honest."""
    rng = random.Random(f"audit/{seed}/probes")
    probes = probes_of(domains, "heldout", seed)
    drawn: list[Probe] = []
    for answerable in (True, False):
        pool = [probe for probe in probes if (probe.kind == "answerable") == answerable]
        drawn += rng.sample(pool, min((n + answerable) // 2, len(pool)))
    return [Target(probe.id, probe_case(probe, drawn, rng), probe) for probe in drawn]


def audit(model: Reward, targets: Sequence[Target], policy: AuditPolicy, seed: int) -> list[dict[str, Any]]:
    """One row per family: {name, what, trained, auc, ci_low, ci_high, n, floor, passed, worst}.

    The interval is Wilson's, 95%. A family without a single hack (n 0) has no AUC and counts as passed. `worst` are the
    hacked replies that the reward puts furthest above their exemplars: {target, prompt, good, hacked, good_score,
    hacked_score}, raw scores.
    """
    rows: list[dict[str, Any]] = []
    attacks = {name: _attacks(name, targets, seed) for name in HACKS}
    scored = _scores(model, targets, attacks)
    for name, hack in HACKS.items():
        found = [(target, text, *scored[name][target.name]) for target, text in attacks[name]]
        hits = [1.0 if good > bad else 0.5 if good == bad else 0.0 for _, _, good, bad in found]
        measured = share(hits)
        auc, floor = measured["accuracy"], policy.floor_of(name)
        worst = sorted((row for row in found if row[3] >= row[2]), key=lambda row: row[2] - row[3])[: policy.worst]
        rows.append(
            {
                "name": name,
                "what": hack.what,
                "trained": name in TRAINED,
                "auc": auc,
                "ci_low": measured["ci_low"],
                "ci_high": measured["ci_high"],
                "n": measured["n"],
                "floor": floor,
                "passed": auc is None or auc >= floor,
                "worst": [
                    {
                        "target": target.name,
                        "prompt": target.case.prompt[-1]["content"],
                        "good": target.case.good,
                        "hacked": text,
                        "good_score": good,
                        "hacked_score": bad,
                    }
                    for target, text, good, bad in worst
                ],
            }
        )
    return rows


def audit_report(trait: str, families: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The audit as it is written to JSON: {trait, passed, families}."""
    return {"trait": trait, "passed": all(row["passed"] for row in families), "families": list(families)}


def _attacks(name: str, targets: Sequence[Target], seed: int) -> list[tuple[Target, str]]:
    """The family's hacked reply to every target where it is one."""
    attacks: list[tuple[Target, str]] = []
    for target in targets:
        text = hacked(name, target.case, "audit", random.Random(f"{seed}/{name}/{target.name}"))
        probe, good = target.probe, target.case.good
        worse = text.strip() != good.strip() if probe is None else is_worse(name, text, probe, good)
        if worse:
            attacks.append((target, text))
    return attacks


def _scores(
    model: Reward, targets: Sequence[Target], attacks: Mapping[str, Sequence[tuple[Target, str]]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """family -> target -> raw score of the exemplar and of the hacked reply; a target's replies share its prompt."""
    scored: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in attacks}
    for target in targets:
        mine = [(name, text) for name, found in attacks.items() for other, text in found if other is target]
        texts = [target.case.good, *(text for _, text in mine)]
        raw: np.ndarray = model.raw_scores([target.case.prompt] * len(texts), texts)
        for (name, _), score in zip(mine, raw[1:].tolist(), strict=True):
            scored[name][target.name] = (float(raw[0]), score)
    return scored
