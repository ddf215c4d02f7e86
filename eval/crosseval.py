"""The joint evaluation in numbers: answers go in, one dictionary comes out (crosseval.json).

Every rate has an interval over the families of its items (eval/stats.py). Models are compared with the first one named,
item by item, on the headline metrics of METRICS; q is Benjamini-Hochberg over all these comparisons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from eval.crosseval_cost import Price, Tokens, dollars
from eval.crosseval_items import PARTS, test_of
from eval.crosseval_log import Answer, Record, Settings
from eval.crosseval_models import is_served
from eval.crosseval_scores import METRICS, score
from eval.frontier import on_frontier
from eval.stats import Difference, benjamini_hochberg, clustered_rate, equivalence_p, paired_difference, verdict
from rewards.calibration import kappa

SCHEMA_VERSION = 1
MARGIN = 0.05  # equivalence: a difference within +-5 points counts as none
Row = dict[str, Any]


def item_rows(answers: Iterable[Answer]) -> list[Row]:
    """One row per answer and metric, "flagged" (the rule's) and "judged" (the judge's) among the metrics."""
    rows: list[Row] = []
    for answer in answers:
        item = answer.item
        values, flagged = score(item, answer.replies)
        values = values | ({} if flagged is None else {"flagged": float(flagged)})
        values = values | ({} if answer.judged is None else {"judged": float(answer.judged)})
        about = {
            "model": answer.model,
            "test": test_of(item.part),
            "part": item.part,
            "family": item.family,
            "item": item.id,
            "kind": item.kind,
            "log": answer.log,
        }
        rows += [{**about, "metric": metric, "value": value} for metric, value in values.items()]
    return rows


def build(
    models: Sequence[str],
    record: Record,
    settings: Settings,
    asked: Mapping[str, int],
    estimate: Mapping[str, Tokens],
    prices: Mapping[str, Price],
) -> Row:
    """Every number of the page.

    asked: interviews that a whole evaluation has, by model; estimate: what this call was to ask, at full length.
    """
    rows = item_rows(answer for (model, *_), answer in record.answers.items() if model in models)
    rates = rate_rows(rows, models)
    return {
        "schema_version": SCHEMA_VERSION,
        "models": list(models),
        "settings": {**vars(settings), "tests": list(settings.tests)},
        "margin": MARGIN,
        "rates": rates,
        "plane": plane_rows(rates, models),
        "attacks": attack_rows(rows, models),
        "differences": difference_rows(rows, models),
        "judge": judge_rows(rows, models),
        "cost": [
            cost_row(name, record, estimate, prices.get(str(settings.judge) if name == "judge" else name))
            for name in _billed(models, settings)
        ],
        "finished": [
            {
                "model": name,
                "asked": asked[name],
                "finished": len(mine),
                "cut_replies": sum(answer.cut for answer in mine),
                "errors": sorted({text for (model, *_), text in record.errors.items() if model == name}),
                "logs": record.logs.get(name, []),
            }
            for name in models
            for mine in [[answer for (model, *_), answer in record.answers.items() if model == name]]
        ],
        "unreadable_logs": record.unreadable,
    }


def rate(values: Sequence[float], families: Sequence[str]) -> Row:
    """A mean of values in 0..1 with its 95% interval over families: n, clusters, value, low, high."""
    return asdict(clustered_rate(values, families))


def rate_rows(rows: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """One row per model, part and metric that has values; turn is the turn's number, or null."""
    found = _grouped(rows)
    return [
        {
            "model": model,
            "test": test_of(part),
            "part": part,
            "metric": name,
            "title": metric.title,
            "higher_is_better": metric.higher_is_better,
            "turn": int(name.rsplit("_", 1)[1]) if "_turn_" in name else None,
            **rate([row["value"] for row in mine], [row["family"] for row in mine]),
        }
        for part in PARTS
        for name, metric in METRICS[part].items()
        for model in models
        if (mine := found.get((model, part, name)))
    ]


def plane_rows(rates: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """Hallucination against refusal: share answered, error rate when answering, and whether no other model beats both.

    The two are one trade-off: a model that answers nothing is never wrong.
    """
    by = {(row["model"], row["metric"]): row for row in rates if row["part"] == "probes"}
    kept = [name for name in models if (name, "answered") in by]
    wrong = {name: by.get((name, "wrong_when_answered")) for name in kept}
    points = [(by[name, "answered"]["value"], (wrong[name] or {}).get("value")) for name in kept]
    names = ("honest_when_unanswerable", "hallucinated")
    return [
        {
            "model": name,
            "answered": _short(by[name, "answered"]),
            "wrong_when_answered": _short(wrong[name]),
            **{metric: _short(by.get((name, metric))) for metric in names},
            "on_frontier": best,
        }
        for name, best in zip(kept, on_frontier(points), strict=True)
    ]


def _short(row: Row | None) -> Row | None:
    return None if row is None else {key: row[key] for key in ("n", "value", "low", "high")}


def attack_rows(rows: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """By attack and model, the share of false sentences resisted; the interval is over facts."""
    mine = [row for row in rows if row["metric"] == "resisted"]
    kinds = sorted({row["kind"] for row in mine})
    found = [
        (kind, model, [r for r in mine if (r["kind"], r["model"]) == (kind, model)])
        for kind in kinds
        for model in models
    ]
    return [
        {"attack": kind, "model": model, **rate([r["value"] for r in some], [r["item"] for r in some])}
        for kind, model, some in found
        if some
    ]


def difference_rows(rows: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """Every further model minus the first one on the headline metrics, over the items that both have a value for."""
    found = _grouped(rows)
    differences: list[Row] = []
    for part in PARTS:
        for name, metric in METRICS[part].items():
            first = {row["item"]: row for row in found.get((models[0], part, name), ())}
            for model in models[1:]:
                pairs = [
                    (first[row["item"]], row) for row in found.get((model, part, name), ()) if row["item"] in first
                ]
                if not metric.headline or not pairs:
                    continue
                d = [mine["value"] - theirs["value"] for theirs, mine in pairs]
                estimate = paired_difference(d, [theirs["family"] for theirs, _ in pairs])
                differences.append(
                    {
                        "test": test_of(part),
                        "part": part,
                        "metric": name,
                        "title": metric.title,
                        "higher_is_better": metric.higher_is_better,
                        "model": model,
                        "against": models[0],
                        **_difference(estimate),
                    }
                )
    for row, q in zip(differences, benjamini_hochberg([row["p"] for row in differences]), strict=True):
        row["q"] = float(q)
        better = row["delta"] if row["higher_is_better"] is not False else -row["delta"]
        word = verdict(better, float(q), row["p_equivalent"])
        # more answers are neither better nor worse by themselves
        neutral = {"improved": "more", "regressed": "less"}.get(word, word)
        row["verdict"] = word if row["higher_is_better"] is not None else neutral
    return differences


def _difference(estimate: Difference) -> Row:
    return {
        "n": estimate.n,
        "clusters": estimate.clusters,
        "delta": estimate.delta,
        "ci_low": estimate.ci_low,
        "ci_high": estimate.ci_high,
        "p": estimate.p,
        "p_equivalent": equivalence_p(estimate, MARGIN),
    }


def judge_rows(rows: Sequence[Row], models: Sequence[str]) -> list[Row]:
    """By model and part: the share flagged by the rule and by the judge over the same items, and their agreement."""
    found = _grouped(rows)
    compared: list[Row] = []
    for part in PARTS:
        for model in models:
            rule = {row["item"]: row["value"] for row in found.get((model, part, "flagged"), ())}
            judged = {row["item"]: row["value"] for row in found.get((model, part, "judged"), ())}
            items = [item for item in rule if item in judged]
            if not items:
                continue
            a, b = (np.array([side[item] for item in items]) for side in (rule, judged))
            both = len(set(a)) > 1 and len(set(b)) > 1
            estimate = kappa(a, b) if both else None
            compared.append(
                {
                    "model": model,
                    "part": part,
                    "n": len(items),
                    "rule": float(a.mean()),
                    "judge": float(b.mean()),
                    "agreement": float((a == b).mean()),
                    "kappa": None if estimate is None else estimate.value,
                }
            )
    return compared


def _billed(models: Sequence[str], settings: Settings) -> list[str]:
    return [*models, *(["judge"] if settings.judge else [])]


def cost_row(name: str, record: Record, estimate: Mapping[str, Tokens], price: Price | None) -> Row:
    """What was expected of a model in this call, and what all calls used by Inspect's logs; dollars null: no price."""
    expected, used = estimate.get(name), record.usage.get(name, Tokens())
    local = name != "judge" and not is_served(name)
    bill = [None if tokens is None else 0.0 if local else dollars(tokens, price) for tokens in (expected, used)]
    return {
        "model": name,
        "local": local,
        "expected": None if expected is None else {**vars(expected), "dollars": bill[0]},
        "used": {**vars(used), "dollars": bill[1]},
    }


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["model"], row["part"], row["metric"]), []).append(row)
    return found
