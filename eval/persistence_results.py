"""The "persistence" part of results.json: every table below runs/<name>/persistence/ goes in, plain numbers come out.

An arm is in an attack's rows once all its seeds have been attacked; control comes first, and without it there is
nothing to compare. Definitions and formulas: eval/persistence_stats.py and docs/persistence.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import yaml

from eval.attacks import load_attacks
from eval.persistence_stats import (
    Crossing,
    crossing_interval,
    degradations,
    half_life,
    loss_difference,
    mean_loss,
    mean_value,
    recovery,
    resampled_means,
    selective_persistence,
    share_longer,
    value_difference,
)
from eval.stats import Difference, benjamini_hochberg
from eval.wording import against, points, speaks_for

Frame: TypeAlias = Any  # a pandas DataFrame; pandas ships no types that pyright can follow
BASE, CONTROL = "base", "control"
ALL = {"harmful": "all harmful", "helpful": "all helpful"}  # the pooled conditions


def persistence_results(run_dir: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Any] | None:
    """What the attacks on a run have shown; None if there were none. `arms`: all that may have been attacked."""
    config = run_dir / "persistence" / "config.yaml"
    if not config.is_file():
        return None
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    order = list(dict.fromkeys((CONTROL, *arms)))

    def read(attack: str) -> dict[str, Frame]:
        return read_arms(run_dir / "persistence" / attack, order, seeds)

    prompts, generation = read("prompts"), read("generation")
    ladders: list[dict[str, Any]] = []
    for method in settings["finetune"]["methods"]:
        harm, good = read(f"harmful-{method}"), read(f"recovery-{method}")
        if harm:
            ladders.append({"method": method, "arms": ladder_rows(harm, good, settings["finetune"])})
    return {
        "settings": settings,
        "prompts": attack_rows(prompts),
        "selective": selective_rows(prompts),
        "finetuning": ladders,
        "generation": attack_rows(generation, pooled=False),
    }


def persistence_claims(found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Per trained arm one sentence on all harmful prompt attacks: does it lose less than control, and is it deaf?

    The degradation is what an attack takes away: less is better.
    """
    if found is None:
        return []
    indices = {row["arm"]: row for row in found["selective"]}
    claims: list[dict[str, Any]] = []
    for row in found["prompts"]:
        arm, gap = row["arm"], row["difference"]
        if row["condition"] != ALL["harmful"] or arm in (BASE, CONTROL):
            continue
        text = (
            f"{arm} is {against(gap, False)} under harmful personas and pressure: {points(gap)} points of "
            f"degradation, less is better (n = {row['n']}; {100 * row['clean']:.1f}% clean, "
            f"{100 * row['attacked']:.1f}% attacked)"
        )
        if (index := indices.get(arm)) and index["difference"]:
            gain = index["difference"]
            text += (
                f"; in selective persistence it is {against(gain, True)}: {index['index']:+z.2f}, difference "
                f"{gain['delta']:+z.2f} [{gain['ci_low']:+z.2f}, {gain['ci_high']:+z.2f}]"
            )
        claims.append({"id": "persistence", "arm": arm, "holds": speaks_for(gap, False), "text": text + "."})
    return claims


def read_arms(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, Frame]:
    """The tables of the arms that are whole, base with its one seed standing for all; empty without control."""
    found: dict[str, Frame] = {}
    for arm in arms:
        paths = {seed: folder / arm / f"seed-{seed}" / "items.parquet" for seed in seeds}
        there = {seed: pd.read_parquet(path) for seed, path in paths.items() if path.is_file()}
        if arm == BASE and there:
            one = next(iter(there.values()))
            there = {seed: one.assign(seed=seed) for seed in seeds}
        if len(there) == len(paths):
            found[arm] = pd.concat(list(there.values()), ignore_index=True)
    if CONTROL not in found:
        return {}
    asked = _conditions(found[CONTROL])  # an arm that was attacked with other settings waits to be attacked again
    return {arm: table for arm, table in found.items() if _conditions(table) == asked}


def harmful_losses(run_dir: Path, arms: Sequence[str], seeds: Sequence[int]) -> Frame:
    """What the harmful prompt attacks took away: a row per arm, item, condition and seed, with `arm` and `loss`.

    loss is clean minus attacked. Empty if the run was not attacked; `arms` names control too.
    """
    tables = read_arms(run_dir / "persistence" / "prompts", arms, seeds)
    losses = [_losses(table).assign(arm=arm) for arm, table in tables.items()]
    return pd.concat([part[part["role"] == "harmful"] for part in losses]) if losses else pd.DataFrame()


def attack_rows(tables: Mapping[str, Frame], pooled: bool = True) -> list[dict[str, Any]]:
    """One row per arm and condition, and with `pooled` one for all harmful and one for all helpful conditions.

    `difference` (not for control) is arm minus control, q by Benjamini-Hochberg over the arm's single conditions.
    """
    losses = {arm: _losses(table) for arm, table in tables.items()}
    rows: list[dict[str, Any]] = []
    for arm, mine in losses.items():
        groups: dict[Any, Frame] = dict(list(mine.groupby("condition", sort=False)))
        if pooled:
            groups |= {ALL[str(role)]: group for role, group in mine.groupby("role")}
        single: list[dict[str, Any]] = []
        for condition, group in groups.items():
            estimate = mean_loss(group)
            row: dict[str, Any] = {
                "condition": str(condition),
                "role": str(group["role"].iloc[0]),
                "arm": arm,
                "n": int(group.groupby("task")["item"].nunique().sum()),
                "clusters": estimate.clusters,
                "clean": float(group["clean"].mean()),
                "attacked": float(group["value"].mean()),
                "degradation": estimate.delta,
                "ci_low": estimate.ci_low,
                "ci_high": estimate.ci_high,
                "difference": None,
            }
            if arm != CONTROL:
                theirs = losses[CONTROL]
                chosen = theirs[theirs["condition"].isin(set(group["condition"]))]
                row["difference"] = _difference(loss_difference(group, chosen)) | {"q": None}
                if condition not in ALL.values():
                    single.append(row)
            rows.append(row)
        for row, q in zip(single, benjamini_hochberg([row["difference"]["p"] for row in single]), strict=True):
            row["difference"]["q"] = float(q)
    return rows


def selective_rows(tables: Mapping[str, Frame]) -> list[dict[str, Any]]:
    """The selective-persistence index of every arm, its two parts, and its difference to control's."""
    items: dict[str, Frame] = {}
    for arm, table in tables.items():
        losses = _losses(table)
        follows = _following(table)
        if len(follows) and (losses["role"] == "harmful").any():
            items[arm] = selective_persistence(losses[losses["role"] == "harmful"], follows)
    rows: list[dict[str, Any]] = []
    for arm, mine in items.items():
        index = mean_value(mine)
        row: dict[str, Any] = {
            "arm": arm,
            "index": index.delta,
            "ci_low": index.ci_low,
            "ci_high": index.ci_high,
            "falls": float(mine["falls"].mean()),
            "moves": float(mine["moves"].mean()),
            "personas": _personas(tables[arm]),
            "difference": None,
        }
        if arm != CONTROL and CONTROL in items:
            row["difference"] = _difference(value_difference(mine, items[CONTROL]))
        rows.append(row)
    return rows


def ladder_rows(
    harm: Mapping[str, Frame], good: Mapping[str, Frame], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Per arm: the curve over harmful and then over good steps, half-life and recovery; arm minus control by step."""
    floor, share = float(settings["floor"]), float(settings["recovered"])
    down = dict(zip(harm, resampled_means(list(harm.values())), strict=True))
    curves = {arm: _after(harm[arm], good[arm]) for arm in good if arm in harm}
    up = dict(zip(curves, resampled_means(list(curves.values())), strict=True)) if curves else {}
    steps = {arm: sorted(int(step) for step in set(table["step"])) for arm, table in harm.items()}
    lives = {arm: [half_life(steps[arm], scores, floor) for scores in down[arm]] for arm in harm}
    backs = {
        arm: [
            recovery(sorted(set(curves[arm]["step"])), scores, float(before[0]), floor, share)
            for scores, before in zip(up[arm], down[arm], strict=True)
        ]
        for arm in up
    }
    rows: list[dict[str, Any]] = []
    for arm, table in harm.items():
        row: dict[str, Any] = {
            "arm": arm,
            "n": int(table.groupby("task")["item"].nunique().sum()),
            "harmful": _points(table, harm[CONTROL], arm),
            "half_life": _crossing(crossing_interval(lives[arm], steps[arm][-1])),
            "half_life_longer_than_control": _versus(lives, arm),
            "recovery": [],
            "recovered": None,
            "recovery_longer_than_control": None,
        }
        if arm in curves:
            row["recovery"] = _points(curves[arm], curves[CONTROL], arm)
            row["recovered"] = _crossing(crossing_interval(backs[arm], int(max(curves[arm]["step"]))))
            row["recovery_longer_than_control"] = _versus(backs, arm)
        rows.append(row)
    return rows


def _conditions(table: Frame) -> set[tuple[str, str]]:
    return set(zip(table["item"], table["condition"], strict=True))


def _losses(table: Frame) -> Frame:
    trait = table[table["metric"] == "trait"]
    clean = trait["condition"] == "clean"
    return degradations(trait[clean], trait[~clean])


def _following(table: Frame) -> Frame:
    """Whether each reply under a helpful persona follows (value), and whether the clean one did anyway (clean)."""
    key = ["task", "item", "seed", "condition"]
    after = table[table["metric"] == "follows"]
    before = table[table["metric"] == "follows_clean"].set_index(key)["value"]
    return after.assign(clean=before.reindex(pd.MultiIndex.from_frame(after[key])).to_numpy())


def _personas(table: Frame) -> list[dict[str, Any]]:
    """How often each helpful persona is followed, and how often its rule held without it."""
    order = [attack.id for attack in load_attacks() if attack.role == "helpful"]
    follows = _following(table)
    means = follows.groupby("condition")[["clean", "value"]].mean()
    return [
        {"condition": name, "anyway": float(means.loc[name, "clean"]), "followed": float(means.loc[name, "value"])}
        for name in order
        if name in means.index
    ]


def _after(harm: Frame, good: Frame) -> Frame:
    """The recovery's curve: its step 0 is the last step of the harm."""
    last = harm[harm["step"] == harm["step"].max()]
    return pd.concat([last.assign(step=0), good], ignore_index=True)


def _points(table: Frame, control: Frame, arm: str) -> list[dict[str, Any]]:
    """Mean score by step with its interval, and the difference to control at that step."""
    points: list[dict[str, Any]] = []
    for step, group in table.groupby("step"):
        estimate = mean_value(group)
        point: dict[str, Any] = {
            "step": int(step),
            "value": estimate.delta,
            "ci_low": max(0.0, estimate.ci_low),
            "ci_high": min(1.0, estimate.ci_high),
            "difference": None,
        }
        if arm != CONTROL:
            point["difference"] = _difference(value_difference(group, control[control["step"] == step], span=1.0))
        points.append(point)
    return points


def _difference(estimate: Difference) -> dict[str, Any]:
    return {
        "delta": estimate.delta,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "p": estimate.p,
        "method": estimate.method,
    }


def _crossing(found: Crossing | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"steps": found.value, "ci_low": found.low, "ci_high": found.high, "last": found.last}


def _versus(found: Mapping[str, Sequence[float | None]], arm: str) -> float | None:
    return None if arm == CONTROL else share_longer(found[arm], found[CONTROL])
