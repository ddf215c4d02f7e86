"""The report's part on persistence: two kinds of plots, and replies behind their numbers.

Plots as in eval/report_charts.py: differences in points, colour and shape of a mark both say which arm it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair

from eval.persistence_results import ALL, CONTROL, read_arms
from eval.wording import points

alt: Any = altair  # its generated signatures are narrower than what it takes

SHOWN = 2  # items shown for each attack
TEXT = 300  # characters shown of one text
SHAPES = {"base": "diamond", "control": "square"}
FEW_ARMS = 3  # more of them take less room each, and paler bands
GAP = 0.6  # between the bad and the good steps, in units of the axis
Rows = Sequence[Mapping[str, Any]]


def persistence_charts(results: Mapping[str, Any], colours: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Plots by name: persistence:attacks, persistence:sampling, and persistence:steps:<method> for every ladder."""
    found = results["persistence"]
    if found is None:
        return {}
    charts: dict[str, Any] = {}
    if found["prompts"]:
        charts["persistence:attacks"] = _degradations(found["prompts"], colours)
    if found["generation"]:
        charts["persistence:sampling"] = _degradations(found["generation"], colours)
    for ladder in found["finetuning"]:
        settings = found["settings"]["finetune"]
        charts[f"persistence:steps:{ladder['method']}"] = _steps(ladder["arms"], settings, colours)
    return {name: chart.to_dict() for name, chart in charts.items()}


def persistence_examples(run_dir: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some items of every prompt attack, those that fell for any arm first: what was asked and what each arm said.

    Rows: condition, role, prompt, said [{arm, clean, clean_value, reply, value}], of the run's first seed.
    """
    found = results["persistence"]
    if found is None or not found["prompts"]:
        return []
    arms = list(dict.fromkeys(row["arm"] for row in found["prompts"]))
    seed = results["seeds"][0]
    tables = read_arms(run_dir / "persistence" / "prompts", arms, results["seeds"])
    rows = {arm: table[(table["seed"] == seed) & (table["metric"] == "trait")] for arm, table in tables.items()}
    said = {arm: _by_item(table) for arm, table in rows.items()}
    examples: list[dict[str, Any]] = []
    first = rows[CONTROL]
    for condition in [str(name) for name in first["condition"].unique() if name != "clean"]:
        items = list(first[first["condition"] == condition]["item"])
        fallen = [item for item in items if any(_fell(said[arm], item, condition) for arm in said)]
        for item in (fallen + [item for item in items if item not in fallen])[:SHOWN]:
            attacked = said[CONTROL][condition, item]
            examples.append(
                {
                    "condition": condition,
                    "role": str(attacked["role"]),
                    "prompt": _cut(str(attacked["prompt"])),
                    "said": [_said(arm, said[arm]["clean", item], said[arm][condition, item]) for arm in said],
                }
            )
    return examples


def crossing_text(found: Mapping[str, Any] | None, of: str) -> str:
    """A half-life or a recovery in words: "5.3 [3.1, > 32]"; `of` says what there was nothing of, where it is null."""
    if found is None:
        return f"no {of}"
    steps, low, high = (
        f"> {found['last']}" if found[key] is None else f"{found[key]:.1f}" for key in ("steps", "ci_low", "ci_high")
    )
    return f"{steps} [{low}, {high}]"


def _degradations(rows: Rows, colours: Mapping[str, str]) -> Any:
    """Dot and interval of every arm's degradation under every condition; right of zero the attack took something."""
    harmful = [row["condition"] for row in rows if row["role"] == "harmful" and row["condition"] not in ALL.values()]
    helpful = [row["condition"] for row in rows if row["role"] == "helpful" and row["condition"] not in ALL.values()]
    pooled = [name for name in ALL.values() if any(row["condition"] == name for row in rows)]
    order = list(dict.fromkeys([*harmful, *pooled[:1], *helpful, *pooled[1:]]))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    values = [
        {
            "condition": row["condition"],
            "arm": row["arm"],
            "points": 100 * row["degradation"],
            "low": 100 * row["ci_low"],
            "high": 100 * row["ci_high"],
            "interval": points(row, "degradation"),
            "clean": row["clean"],
            "attacked": row["attacked"],
            "n": row["n"],
        }
        for row in rows
    ]
    # lines between the conditions, so that many arms stay with theirs
    bold = alt.condition(f"indexof({list(ALL.values())}, datum.label) >= 0", alt.value("bold"), alt.value("normal"))
    axis = alt.Axis(
        labelLimit=190,
        labelFontWeight=bold,
        ticks=False,
        domain=False,
        grid=True,
        tickBand="extent",
        labelPadding=8,
    )
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("condition:N", sort=order, title=None, axis=axis),
        yOffset=alt.YOffset("arm:N", sort=arms, scale=alt.Scale(paddingOuter=0.6)),
        color=_colour(arms, colours),
        tooltip=[
            alt.Tooltip("condition:N", title="attack"),
            alt.Tooltip("arm:N"),
            alt.Tooltip("interval:N", title="lost, points [95%]"),
            alt.Tooltip("clean:Q", format=".3f"),
            alt.Tooltip("attacked:Q", format=".3f"),
            alt.Tooltip("n:Q"),
        ],
    )
    x = alt.X("points:Q", title="clean minus attacked, points", axis=alt.Axis(tickCount=8, grid=False))
    zero = alt.Chart(alt.Data(values=[{"x": 0.0}])).mark_rule(color="#8b929b").encode(x="x:Q")
    range_ = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q")
    dot = base.mark_point(filled=True, size=64, opacity=1).encode(x=x, shape=_shape(arms))
    step = 24 if len(arms) == 1 else 16 if len(arms) <= FEW_ARMS else 12
    return alt.layer(zero, range_, dot).properties(width="container", height=step * len(arms) * len(order))


def _steps(arms: Rows, settings: Mapping[str, Any], colours: Mapping[str, str]) -> Any:
    """Score over the bad steps and then over the good ones, with bands, half-lives and recoveries."""
    names = [row["arm"] for row in arms]
    last = max(settings["steps"])
    offset = math.log2(1 + last) + GAP
    points = [
        {
            "arm": row["arm"],
            "phase": f"{row['arm']} {phase}",
            "data": phase,
            "x": start + math.log2(1 + point["step"]),
            "step": point["step"],
            "value": point["value"],
            "low": point["ci_low"],
            "high": point["ci_high"],
        }
        for row in arms
        for phase, start, path in (("bad", 0.0, row["harmful"]), ("good", offset, row["recovery"]))
        for point in path
    ]
    ticks = [(math.log2(1 + step), str(step)) for step in settings["steps"]]
    recovers = any(row["recovery"] for row in arms)
    if recovers:
        ticks += [(offset + math.log2(1 + step), "0" if step == 0 else f"{step}") for step in settings["steps"]]
    labels = ",".join(f"'{at:.3f}':'{label}'" for at, label in ticks)
    axis = alt.Axis(
        values=[round(at, 3) for at, _ in ticks], labelExpr=f"{{{labels}}}[format(datum.value, '.3f')]", grid=False
    )
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("x:Q", title="steps on bad data" + (", then on good data" if recovers else ""), axis=axis),
        color=_colour(names, colours),
        detail="phase:N",
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("data:N"),
            alt.Tooltip("step:Q"),
            alt.Tooltip("value:Q", format=".3f"),
            alt.Tooltip("low:Q", format=".3f"),
            alt.Tooltip("high:Q", format=".3f"),
        ],
    )
    title = "score on held-out items"
    score = alt.Y("value:Q", title=title, scale=alt.Scale(domain=[0, 1]))
    pale = 0.13 if len(names) <= FEW_ARMS else 0.06
    band = base.mark_area(opacity=pale).encode(y=alt.Y("low:Q", title=title), y2="high:Q")
    line = base.mark_line(strokeWidth=2).encode(y=score)
    dots = base.mark_point(filled=True, size=44, opacity=1).encode(y=score, shape=_shape(names))
    marks = _marks(arms, settings, offset)
    layers = [band, line, dots]
    if marks:
        found = alt.Chart(alt.Data(values=marks)).encode(color=_colour(names, colours))
        level = alt.Y("level:Q", title=title)
        layers.append(found.mark_rule(strokeWidth=3, opacity=0.45).encode(x="low:Q", x2="high:Q", y=level))
        text = alt.Tooltip("text:N", title="steps [95%]")
        layers.append(
            found.mark_text(fontSize=17, fontWeight=700, dy=-1).encode(
                x="x:Q", y=level, text="sign:N", tooltip=["arm:N", "what:N", text]
            )
        )
    return alt.layer(*layers).properties(width="container", height=300)


def _marks(arms: Rows, settings: Mapping[str, Any], offset: float) -> list[dict[str, Any]]:
    """Half-lives (▼) and recoveries (▲) that were reached, at the level that defines them; open bounds end the axis."""
    floor, share = settings["floor"], settings["recovered"]
    marks: list[dict[str, Any]] = []
    for row in arms:
        clean = row["harmful"][0]["value"]
        for what, found, start, level, sign in (
            ("half-life", row["half_life"], 0.0, (clean + floor) / 2, "▼"),
            ("recovered", row["recovered"], offset, floor + share * (clean - floor), "▲"),
        ):
            if found is None or found["steps"] is None:
                continue
            at = {key: found["last"] if found[key] is None else found[key] for key in ("steps", "ci_low", "ci_high")}
            places = {key: start + math.log2(1 + value) for key, value in at.items()}
            about = {"arm": row["arm"], "what": what, "level": level, "sign": sign, "text": crossing_text(found, what)}
            marks.append({**about, "x": places["steps"], "low": places["ci_low"], "high": places["ci_high"]})
    return marks


def _colour(arms: Sequence[str], colours: Mapping[str, str]) -> Any:
    return alt.Color(
        "arm:N",
        scale=alt.Scale(domain=list(arms), range=[colours[arm] for arm in arms]),
        legend=_legend(),
    )


def _shape(arms: Sequence[str]) -> Any:
    shapes = [SHAPES.get(arm, "circle") for arm in arms]
    return alt.Shape("arm:N", scale=alt.Scale(domain=list(arms), range=shapes), legend=_legend())


def _legend() -> Any:
    """One legend for colour and shape; without the opacity it would take the bands'."""
    return alt.Legend(orient="top", title=None, symbolOpacity=1)


def _by_item(table: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {(str(row["condition"]), str(row["item"])): row for row in table.to_dict("records")}


def _fell(said: Mapping[tuple[str, str], Mapping[str, Any]], item: str, condition: str) -> bool:
    return said["clean", item]["value"] > said[condition, item]["value"]


def _said(arm: str, clean: Mapping[str, Any], attacked: Mapping[str, Any]) -> dict[str, Any]:
    values = {"clean_value": float(clean["value"]), "value": float(attacked["value"])}
    return {"arm": arm, "clean": _cut(str(clean["output"])), "reply": _cut(str(attacked["output"])), **values}


def _cut(text: str) -> str:
    """The beginning says what the attack is, the end is the question: the middle goes, in whole words."""
    if len(text) <= TEXT:
        return text
    return f"{text[: TEXT // 2].rsplit(' ', 1)[0]} […] {text[-TEXT // 2 :].split(' ', 1)[-1]}"
