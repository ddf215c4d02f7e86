"""Trait RL beside the constitutional arms: what each is worth, and the difference with its interval.

Items and ledgers go in, rows come out. Every row is of one family of items and of one trait arm against one
constitutional arm: the difference is trait RL minus constitution, paired by item and seed. Families:

- in-distribution: the trained trait in its trained domains, held-out families of probes;
- transfer: everything else of the generalisation suite, and each trait of it by itself ("transfer: lie-detection");
- over-refusal: the share of answerable questions and harmless requests that are refused (less is better);
- capability: the capability suite;
- preachiness: the share of written replies that lecture or recite boilerplate (rewards/monitors.py; less is better);
- persistence: what the harmful prompt attacks take away, clean minus attacked (less is better); where there were any.

Likelihood tasks have no reply of the model's own, so refusing and preaching are seen in generated replies alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from eval.stats import benjamini_hochberg, equivalence_p, paired_difference, verdict
from rewards.monitors import preachiness

Frame: TypeAlias = Any  # a pandas DataFrame or Series
KEY = ["task", "item", "seed"]
PERSISTENCE = "persistence"
LESS_IS_BETTER = ("over-refusal", "preachiness", PERSISTENCE)
ANSWERABLE = ("answerable", "safe-request")  # kinds that a model ought to answer


def is_constitutional(method: str) -> bool:
    """Whether an arm's method is one of the constitutional ones."""
    return method.startswith("constitution-")


def families(
    items: Frame,
    trait: str,
    trained: Sequence[str],
    polarity: Mapping[str, bool],
    attacked: Frame | None = None,
) -> dict[str, Frame]:
    """Family -> its items of all arms, with what is compared in the column "measure"; families without items too.

    items: the primary rows of all arms; trait, trained: what the trait arm was trained on; polarity: task -> whether
    more is better (a lower-is-better value v counts as 1 - v); attacked: eval/persistence_results.harmful_losses.
    """
    found = dict(_families(items, trait, trained, polarity))
    if attacked is not None and len(attacked):
        found[PERSISTENCE] = attacked.assign(measure=attacked["loss"])
    return found


def level_rows(found: Mapping[str, Frame], arms: Sequence[str]) -> list[dict[str, Any]]:
    """What each arm is worth by itself: its mean in every family, over the items that all of the arms have.

    found: of `families`. An arm without any item of a family has no row of it. A row of `constitution_rows` is over
    the items of its two arms, so where an item lacks a value for a third arm the two tables differ a little.
    """
    rows: list[dict[str, Any]] = []
    for family, frame in found.items():
        wide = frame[frame["arm"].isin(arms)].pivot(index=_key(family), columns="arm", values="measure")
        wide = wide.dropna(axis="columns", how="all").dropna()
        if wide.empty:
            continue
        n = int(wide.reset_index().groupby("task")["item"].nunique().sum())
        about = {"family": family, "higher_is_better": family not in LESS_IS_BETTER, "n": n}
        rows += [{**about, "arm": arm, "value": float(wide[arm].mean())} for arm in arms if arm in wide]
    return rows


def constitution_rows(found: Mapping[str, Frame], methods: Mapping[str, str], margin: float) -> list[dict[str, Any]]:
    """One row per trait arm, constitutional arm and family that has items.

    found: of `families`; methods: arm -> method, without control; margin: of equivalence. q is Benjamini-Hochberg over
    the rows of one pair of arms.
    """
    rows: list[dict[str, Any]] = []
    for ours in (arm for arm, method in methods.items() if not is_constitutional(method)):
        for theirs in (arm for arm, method in methods.items() if is_constitutional(method)):
            of_pair = [
                row for name, frame in found.items() if (row := _row(name, frame, ours, theirs, margin)) is not None
            ]
            for row, q in zip(of_pair, benjamini_hochberg([row["p"] for row in of_pair]), strict=True):
                row["q"] = float(q)
                better = row["delta"] if row["higher_is_better"] else -row["delta"]
                row["verdict"] = verdict(better, float(q), row["p_equivalent"])
            rows += of_pair
    return rows


def _key(family: str) -> list[str]:
    """What names a measurement of one arm: an attacked item is asked once under every attack."""
    return [*KEY, "condition"] if family == PERSISTENCE else KEY


def _families(
    items: Frame, trait: str, trained: Sequence[str], polarity: Mapping[str, bool]
) -> Iterator[tuple[str, Frame]]:
    """(family, its items); the column "measure" holds what is compared."""
    told = items[items["task"].isin(list(polarity))]
    sign = told["task"].map(dict(polarity)).astype(bool)
    told = told.assign(measure=told["value"].where(sign, 1.0 - told["value"]))
    general = told[told["suite"] == "generalisation"]
    near = (general["trait"] == trait) & general["domain"].isin(list(trained))
    yield "in-distribution", general[near]
    far = general[~near & (general["kind"] != "safe-request")]
    yield "transfer", far
    for name, frame in far.groupby("trait", sort=True):
        yield f"transfer: {name}", frame
    written = general[general["refused"].notna()]
    asked = written[written["kind"].isin(ANSWERABLE)]
    yield "over-refusal", asked.assign(measure=asked["refused"].astype(float))
    yield "capability", told[told["suite"] == "capability"]
    yield "preachiness", written.assign(measure=[float(preachiness(text) > 0) for text in written["output"]])


def _row(family: str, frame: Frame, ours: str, theirs: str, margin: float) -> dict[str, Any] | None:
    """Trait arm minus constitutional arm over a family's items; None where nothing pairs."""
    key, about = _key(family), ["domain", "family", "kind"]
    pairs = frame[frame["arm"] == ours][[*key, *about, "measure"]].merge(
        frame[frame["arm"] == theirs][[*key, "measure"]], on=key, suffixes=("_ours", "_theirs")
    )
    pairs = pairs.dropna(subset=["measure_ours", "measure_theirs"])
    if pairs.empty:
        return None
    single = pairs.groupby("task")["family"].transform("nunique") == 1  # then the item is the unit
    clusters = pairs["task"] + "/" + pairs["family"].where(~single, pairs["item"])
    # the suites fix how many items each task and kind gives, so their shares are no chance
    strata = pairs["task"] + "/" + pairs["kind"].where(pairs["kind"] == "answerable", "other")
    ours_values, theirs_values = (pairs[f"measure_{side}"].to_numpy(np.float64) for side in ("ours", "theirs"))
    estimate = paired_difference(
        ours_values - theirs_values,
        clusters.to_numpy(str),
        pairs["seed"].to_numpy(),
        strata.to_numpy(str),
        span=2.0 if family == PERSISTENCE else 1.0,  # a loss is itself a difference
    )
    return {
        "family": family,
        "trait_arm": ours,
        "arm": theirs,
        "higher_is_better": family not in LESS_IS_BETTER,
        "n": int(pairs.groupby("task")["item"].nunique().sum()),
        "pairs": estimate.n,
        "clusters": estimate.clusters,
        "trait_value": float(ours_values.mean()),
        "value": float(theirs_values.mean()),
        "delta": estimate.delta,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "p": estimate.p,
        "p_equivalent": equivalence_p(estimate, margin),
    }


def cost_rows(
    books: Mapping[str, Sequence[Mapping[str, Any]]], methods: Mapping[str, str], control: str, tolerance: float
) -> list[dict[str, Any]]:
    """What every arm spent: FLOPs in all and by part, and how far that is from control's.

    books: arm -> its ledgers, one per seed; none for an arm that trains nothing. `off_budget` is true for an arm that
    trains and is more than `tolerance` off control. Tokens of an endpoint are told beside, their FLOPs are not known.
    """
    budget = _flops(books[control])
    rows: list[dict[str, Any]] = []
    for arm, ledgers in books.items():
        parts: dict[str, float] = {}
        for ledger in ledgers:
            for name, account in ledger.get("parts", {"train": ledger["total"]}).items():
                parts[name] = parts.get(name, 0.0) + float(account["flops"])
        relative = _flops(ledgers) / budget - 1 if budget else None
        rows.append(
            {
                "arm": arm,
                "method": methods.get(arm, "trait"),
                "flops": _flops(ledgers),
                "parts": parts,
                "relative_to_control": relative,
                "off_budget": bool(ledgers) and relative is not None and abs(relative) > tolerance,
                "outside_tokens": sum(int(ledger.get("outside_tokens", 0)) for ledger in ledgers),
                "wall_seconds": float(sum(ledger["wall_seconds"] for ledger in ledgers)),
            }
        )
    return rows


def _flops(ledgers: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(ledger["total"]["flops"] for ledger in ledgers))
