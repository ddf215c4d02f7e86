"""docs/results.md, a run with constitutional arms: what was found, values side by side, differences, cost, the filter.

Numbers are those of results.json's key "constitution" (eval/constitution_table.py), and of "persistence" where the run
was attacked. Words follow the interval of the one difference, verdicts follow q (eval/wording.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair

from eval.markdown import SIGNIFICANT, details, percent, picture, table
from eval.report_charts import QUIET, SHAPES, arm_colours
from eval.wording import SIDES, listed, points, side

alt: Any = altair  # its generated signatures are narrower than what it takes

Row = Mapping[str, Any]
ABOUT = (
    "Every difference is trait RL minus one constitutional arm, paired by item and seed. In-distribution is the "
    "trained trait in its trained domains, transfer everything else of the generalisation suite (a task of which "
    "less is better is turned round), over-refusal the share of answerable questions and harmless requests that "
    "are refused, preachiness the share of written replies that lecture (a rule)"
)
ATTACKED = (
    "; persistence is what harmful personas and pressure take away, in points lost from the clean to the attacked score"
)
LIMITS = "What such a comparison of embedded models can and cannot say: docs/constitution.md."


def constitution_section(results: Row, images: Mapping[str, str]) -> str:
    """The section without its heading. images: as `constitution_pictures` names them -> path as the page links it."""
    found = results["constitution"]
    attacked = any(row["family"] == "persistence" for row in found["levels"])
    parts = [ABOUT + (ATTACKED if attacked else "") + ". " + LIMITS, *_findings(found["rows"])]
    parts += ["#### Values side by side", *_levels(results)]
    for ours in _names(found["rows"], "trait_arm"):
        mine = [row for row in found["rows"] if row["trait_arm"] == ours]
        parts += [f"#### {ours} minus each constitutional arm", *_differences(mine, images.get(f"constitution-{ours}"))]
    parts += ["#### What each arm cost", _cost(found["cost"])]
    if found["filter"]:
        parts += ["#### Revisions and the filter", _filter(found["filter"])]
    return "\n\n".join(part for part in parts if part)


def constitution_pictures(results: Row) -> dict[str, dict[str, Any]]:
    """One plot of differences for each trait arm, as Vega-Lite on white; none without constitutional arms."""
    found = results["constitution"]
    if not found:
        return {}
    colours = arm_colours(results)
    return {
        f"constitution-{ours}": _chart([row for row in found["rows"] if row["trait_arm"] == ours], ours, colours)
        for ours in _names(found["rows"], "trait_arm")
    }


def _findings(rows: Sequence[Row]) -> list[str]:
    """One sentence for each pair of arms: in what trait RL is better, in what worse, in what not told apart."""
    lines: list[str] = []
    pairs = list(dict.fromkeys((row["trait_arm"], row["arm"]) for row in rows))
    for ours, theirs in pairs:
        sides: dict[str, list[str]] = {name: [] for name in SIDES}
        for row in rows:
            if (row["trait_arm"], row["arm"]) == (ours, theirs) and _pooled(row):
                found = side(row, row["higher_is_better"])
                numbers = f" ({points(row)}, q = {row['q']:.2g})"
                sides[found].append(row["family"] + ("" if found == SIDES[-1] else numbers))
        words = {"better": "better in", "worse": "worse in", "not told apart": "not told apart in"}
        said = "; ".join(f"{words[name]} {listed(families)}" for name, families in sides.items() if families)
        lines.append(f"- **{ours}** against **{theirs}**: {said}.")
    return ["\n".join(lines)] if lines else []


# Tables


def _levels(results: Row) -> list[str]:
    """Families down, control and the arms across; the traits of transfer are folded."""
    levels = results["constitution"]["levels"]
    arms = [arm["name"] for arm in results["arms"] if any(row["arm"] == arm["name"] for row in levels)]
    values = {(row["family"], row["arm"]): row for row in levels}
    firsts = {row["family"]: row for row in reversed(levels)}
    order = _names(levels, "family")

    def shown(families: Sequence[str]) -> list[Sequence[str]]:
        return [
            (_title(firsts[name]), str(firsts[name]["n"]), *(_level(values.get((name, arm))) for arm in arms))
            for name in families
        ]

    head = ("family", "n", *arms)
    rows = shown([name for name in order if ": " not in name])
    indices = {row["arm"]: row["index"] for row in (results["persistence"] or {}).get("selective", [])}
    if indices:
        index = [f"{indices[arm]:+z.2f}" if arm in indices else "–" for arm in arms]
        rows.append(("selective-persistence index, -1 to 1", "–", *index))
    parts = [table(head, rows), "Means over the items that all of these arms have; intervals stand at the differences."]
    single = [name for name in order if ": " in name]
    if single:
        parts.append(details("Transfer by evaluated trait", table(head, shown(single))))
    return parts


def _level(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{100 * row['value']:+z.1f} points" if row["family"] == "persistence" else percent(row["value"])


def _differences(rows: Sequence[Row], path: str | None) -> list[str]:
    head = (
        "family",
        "against",
        "n",
        "trait RL",
        "constitution",
        "difference, points [95%]",
        "q",
        "verdict on trait RL",
    )

    def shown(chosen: Sequence[Row]) -> str:
        names = _names(chosen, "family")
        ordered = sorted(chosen, key=lambda row: names.index(row["family"]))
        return table(head, [_difference(row) for row in ordered])

    ours, arms = rows[0]["trait_arm"], _names(rows, "arm")
    families = _names([row for row in rows if _pooled(row)], "family")
    seen = (
        f"Dots with 95% intervals: {ours} minus {listed(arms)}, in points, for {listed(families)}; "
        "filled where the verdict is improved or regressed, hollow where it is not"
    )
    parts = [picture(seen, path), shown([row for row in rows if _pooled(row)])]
    single = [row for row in rows if not _pooled(row)]
    if single:
        parts.append(details("Transfer by evaluated trait", shown(single)))
    return parts


def _difference(row: Row) -> Sequence[str]:
    levels = [_level({"family": row["family"], "value": row[key]}) for key in ("trait_value", "value")]
    text = points(row)
    shown = f"**{text}**" if row["verdict"] in SIGNIFICANT else text
    return (_title(row), row["arm"], str(row["n"]), *levels, shown, f"{row['q']:.2g}", row["verdict"])


def _cost(rows: Sequence[Row]) -> str:
    """FLOPs in all and by part, the distance from control, minutes; an arm off budget is bold."""
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    shown: list[Sequence[str]] = []
    for row in rows:
        off = "–" if row["relative_to_control"] is None else f"{100 * row['relative_to_control']:+z.2f}%"
        if row["method"] == "constitution-prompt":
            off = "trains nothing"
        elif row["off_budget"]:
            off = f"**{off}**"
        by_part = [_tera(row["parts"].get(part)) for part in parts]
        shown.append((row["arm"], row["method"], _tera(row["flops"]), off, *by_part, f"{row['wall_seconds'] / 60:.1f}"))
    head = ("arm", "method", "TFLOPs", "off control", *(f"of it {part}" for part in parts), "wall minutes")
    text = table(head, shown) + "\n\nSums over the seeds. An arm's last part is called train."
    over = [row["arm"] for row in rows if row["off_budget"]]
    text += f" More than 1% off control's budget: {listed(over)}." if over else ""
    outside = [f"{row['outside_tokens']} for {row['arm']}" for row in rows if row["outside_tokens"]]
    return text + (f" Tokens of an endpoint, whose compute is not in the budget: {listed(outside)}." if outside else "")


def _tera(flops: float | None) -> str:
    return "–" if flops is None else f"{flops / 1e12:.2f}"


def _filter(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Revisions made, kept, and dropped by reason."""
    reasons = list(dict.fromkeys(reason for mine in counts.values() for reason in mine if reason != "revisions"))
    rows: list[Sequence[str]] = []
    for arm, mine in counts.items():
        lost = [mine.get(reason, 0) for reason in reasons]
        made, kept = mine["revisions"], mine["revisions"] - sum(lost)
        share = f"{kept} ({100 * kept / made:.0f}%)" if made else "0"
        rows.append((arm, str(made), share, *map(str, lost)))
    return table(("arm", "revisions", "kept", *(f"dropped: {reason}" for reason in reasons)), rows)


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))


def _pooled(row: Row) -> bool:
    return ": " not in row["family"]


def _title(row: Row) -> str:
    return row["family"] + ("" if row["higher_is_better"] else " (less is better)")


# Picture


def _chart(rows: Sequence[Row], ours: str, colours: Mapping[str, str]) -> dict[str, Any]:
    """Dot and interval per family and constitutional arm; a filled dot is a verdict, a hollow one is none."""
    shown = [row for row in rows if _pooled(row)]
    arms = _names(shown, "arm")
    values = [
        {
            "family": _title(row),
            "arm": row["arm"],
            "sure": row["verdict"] in SIGNIFICANT,
            **{name: 100 * row[key] for name, key in (("points", "delta"), ("low", "ci_low"), ("high", "ci_high"))},
        }
        for row in shown
    ]
    order = [_title(row) for row in sorted(shown, key=lambda row: not row["higher_is_better"])]
    axis = alt.Axis(labelLimit=230, ticks=False, domain=False, grid=True, tickBand="extent", labelPadding=8)
    colour = {"domain": arms, "range": [colours[arm] for arm in arms]}
    shape = {"domain": arms, "range": [SHAPES[k % len(SHAPES)] for k in range(len(arms))]}
    legend = alt.Legend(orient="top", title=f"{ours} minus", columns=3, labelLimit=220, symbolFillColor="white")
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("family:N", sort=list(dict.fromkeys(order)), title=None, axis=axis),
        yOffset=alt.YOffset("arm:N", sort=arms, scale=alt.Scale(paddingOuter=0.6)),
        stroke=alt.Stroke("arm:N", scale=alt.Scale(**colour), legend=legend),
    )
    x = alt.X("points:Q", title="difference, points", axis=alt.Axis(tickCount=8, grid=False))
    zero = alt.Chart(alt.Data(values=[{"x": 0.0}])).mark_rule(color=QUIET).encode(x="x:Q")
    interval = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q")
    dot = base.mark_point(size=64, strokeWidth=2, opacity=1).encode(
        x=x,
        shape=alt.Shape("arm:N", scale=alt.Scale(**shape), legend=legend),
        fill=alt.condition("datum.sure", alt.Fill("arm:N", scale=alt.Scale(**colour), legend=None), alt.value("white")),
    )
    height = (16 * len(arms) + 12) * len(set(order))
    chart = alt.layer(zero, interval, dot).properties(width=620, height=height)
    return chart.configure(background="white").to_dict()
