"""The report's plots as Vega-Lite specifications.

Colours of text and grid are left to the page, which knows light from dark. Colour and shape of a mark say the same, and
the colours are safe for colour-blind readers. Differences are in points (hundredths). Every mark carries its task, so
that the page can open the items behind it; @trained, @heldout and @answerable name the items behind a pooled row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair

from eval.wording import points, task_label

alt: Any = altair  # its generated signatures are narrower than what it takes

ARM_COLOURS = ("#2f7fc1", "#e08a1e", "#1b9e8a", "#9a6dc8", "#c95d8b", "#7d8a2e")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-right", "triangle-left")
QUIET = "#8b929b"  # base, control, reference lines: readable on white and on near-black
VERDICTS = {
    "improved": ("#2f7fc1", "triangle-up"),
    "regressed": ("#d9632a", "triangle-down"),
    "equivalent": ("#1b9e8a", "square"),
    "inconclusive": (QUIET, "circle"),
}
WHERE = "filled: domains never trained, hollow: trained domains"
TRANSFER_SPAN = 20  # points at which the transfer table is deepest blue or orange
Rows = Sequence[Mapping[str, Any]]


def arm_colours(results: Mapping[str, Any]) -> dict[str, str]:
    """Base and control are grey, dose arms take the colours in their order."""
    doses = [arm["name"] for arm in results["arms"] if arm["role"] == "dose"]
    return {"base": QUIET, "control": QUIET} | {arm: ARM_COLOURS[k % len(ARM_COLOURS)] for k, arm in enumerate(doses)}


def colours_of(arms: Sequence[str]) -> dict[str, str]:
    """The same for the arms of several runs, named experiment/arm."""
    trained = [arm for arm in arms if arm.rsplit("/", 1)[-1] not in ("base", "control")]
    return dict.fromkeys(arms, QUIET) | {arm: ARM_COLOURS[k % len(ARM_COLOURS)] for k, arm in enumerate(trained)}


def build_charts(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every plot of the report by the name under which the page asks for it."""
    colours = arm_colours(results)
    doses = [arm["name"] for arm in results["arms"] if arm["role"] == "dose"]
    charts: dict[str, Any] = {}
    pooled = [row for row in results["aggregates"] if row["name"] != "over-refusal-answerable"]
    probes = [row for row in results["generalisation"] if row["metric"] == "truthful"]
    others = [row for row in results["generalisation"] if row["metric"] != "truthful"]
    if probes:
        marked = [{**row, "label": _domain_label(row)} for row in probes]
        marked += [
            {**row, "label": "ALL NEVER TRAINED", "task": "@heldout"}
            for row in pooled
            if row["name"] == "truthfulness-heldout-domains"
        ]
        order = sorted({row["label"] for row in marked}, key=lambda x: (not x.endswith("(trained)"), x.isupper(), x))
        charts["domains"] = _intervals(marked, order, doses, colours, "difference to control, points")
    if others:
        marked = [{**row, "label": task_label(row)} for row in others]
        charts["others"] = _intervals(
            marked, list(dict.fromkeys(r["label"] for r in marked)), doses, colours, "difference to control, points"
        )
    refusal = [row for row in results["aggregates"] if row["name"] == "over-refusal-answerable"]
    if refusal:
        marked = [{**row, "label": row["arm"], "task": "@answerable"} for row in refusal]
        charts["refusal"] = _intervals(marked, doses, doses, colours, "change in refused share, points", bar=15.0)
    if results["transfer"]:
        charts["transfer"] = transfer_chart(results["transfer"])
    if results["honesty"]:
        charts["honesty"] = honesty_chart(results["honesty"], colours)
    for arm, suite in results["capability"].items():
        charts[f"forest:{arm}"] = _forest(suite["tasks"])
    for line in results["rewards"]:
        charts.setdefault(
            f"curve:{line['arm']}:{line['source']}", _curve(results["rewards"], line["arm"], line["source"])
        )
    return {name: chart.to_dict() for name, chart in charts.items()}


def _domain_label(row: Mapping[str, Any]) -> str:
    return f"{row['domain']} (trained)" if row["trained_domain"] else str(row["domain"])


def _in_points(rows: Rows) -> list[dict[str, Any]]:
    """The columns a plot needs, differences in points, and a sentence for the tooltip."""
    kept = ("label", "task", "arm", "n", "q", "verdict", "base", "control", "value")
    return [
        {key: row[key] for key in kept}
        | {key: 100 * row[key] for key in ("delta", "ci_low", "ci_high")}
        | {"interval": points(row)}
        for row in rows
    ]


def _tooltip() -> list[Any]:
    return [
        alt.Tooltip("label:N", title="what"),
        alt.Tooltip("arm:N"),
        alt.Tooltip("interval:N", title="difference [95%]"),
        alt.Tooltip("control:Q", format=".3f"),
        alt.Tooltip("value:Q", title="this arm", format=".3f"),
        alt.Tooltip("base:Q", format=".3f"),
        alt.Tooltip("n:Q"),
        alt.Tooltip("q:Q", format=".3g"),
        alt.Tooltip("verdict:N"),
    ]


def _line(at: float, dash: bool) -> Any:
    mark = {"strokeDash": [4, 3]} if dash else {}
    return alt.Chart(alt.Data(values=[{"x": at}])).mark_rule(color=QUIET, **mark).encode(x="x:Q")


def _intervals(
    rows: Rows,
    order: Sequence[str],
    arms: Sequence[str],
    colours: Mapping[str, str],
    title: str,
    bar: float | None = None,
) -> Any:
    """Dot and 95% interval per label and arm; zero, and a bar where one was set, as reference lines."""
    step = 15 if len(arms) > 1 and len(order) > len(arms) else 24
    base = alt.Chart(alt.Data(values=_in_points(rows))).encode(
        y=alt.Y("label:N", sort=list(order), title=None, axis=alt.Axis(labelLimit=190, ticks=False, domain=False)),
        color=alt.Color(
            "arm:N",
            scale=alt.Scale(domain=list(arms), range=[colours[arm] for arm in arms]),
            legend=alt.Legend(orient="top", title=None) if list(order) != list(arms) else None,
        ),
        tooltip=_tooltip(),
    )
    if list(order) != list(arms):
        base = base.encode(yOffset=alt.YOffset("arm:N", sort=list(arms)))
    rule = base.mark_rule(strokeWidth=2.5, opacity=0.55).encode(
        x=alt.X("ci_low:Q", title=title, axis=alt.Axis(tickCount=8)), x2="ci_high:Q"
    )
    dot = base.mark_point(filled=True, size=75, opacity=1, cursor="pointer").encode(x="delta:Q")
    layers = [_line(0, dash=False), rule, dot]
    if bar is not None:
        layers.append(_line(bar, dash=True))
    per_label = step * len(arms) + 8 if list(order) != list(arms) else step
    return alt.layer(*layers).properties(width="container", height=max(70, per_label * len(order)))


def _forest(tasks: Rows) -> Any:
    """All benchmarks of an arm, best on top; colour and shape tell the verdict."""
    rows = _in_points([{**row, "label": row["task"]} for row in sorted(tasks, key=lambda row: -row["delta"])])
    scale = {"domain": list(VERDICTS), "range": [colour for colour, _ in VERDICTS.values()]}
    shapes = {"domain": list(VERDICTS), "range": [shape for _, shape in VERDICTS.values()]}
    legend = alt.Legend(orient="top", title=None, columns=2)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y(
            "label:N",
            sort=[row["label"] for row in rows],
            title=None,
            axis=alt.Axis(labelLimit=150, labelFontSize=10, ticks=False, domain=False, grid=True, gridOpacity=0.35),
        ),
        color=alt.Color("verdict:N", scale=alt.Scale(**scale), legend=legend),
        tooltip=_tooltip(),
    )
    rule = base.mark_rule(strokeWidth=2, opacity=0.55).encode(
        x=alt.X("ci_low:Q", title="difference to control, points", axis=alt.Axis(tickCount=6)), x2="ci_high:Q"
    )
    dot = base.mark_point(filled=True, size=48, opacity=1, cursor="pointer").encode(
        x="delta:Q", shape=alt.Shape("verdict:N", scale=alt.Scale(**shapes), legend=legend)
    )
    return alt.layer(_line(0, dash=False), rule, dot).properties(width="container", height=14 * len(rows))


def honesty_chart(rows: Rows, colours: Mapping[str, str]) -> Any:
    """Honesty as a pair: share answered against error rate when answering, with intervals. Bottom right is best.

    An arm is a colour and a shape; hollow in the trained domain, filled where it was never trained.
    """
    names = {"trained": "trained domain", "heldout": "domains never trained"}
    dots = [
        {
            "arm": row["arm"],
            "task": f"@{row['domains']}",
            "domains": names[row["domains"]],
            **{
                f"{axis}{end}": None if row[key]["rate"] is None else 100 * row[key][part]
                for axis, key in (("x", "answered"), ("y", "error_when_answered"))
                for end, part in (("", "rate"), ("_low", "low"), ("_high", "high"))
            },
            "honest": row["honest_when_unanswerable"]["rate"],
            "best": row["on_frontier"] and row["error_when_answered"]["rate"] is not None,
        }
        for row in rows
    ]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    colour = {"domain": arms, "range": [colours[arm] for arm in arms]}
    shape = {"domain": arms, "range": [SHAPES[k % len(SHAPES)] for k in range(len(arms))]}
    legend = alt.Legend(
        orient="top", title=WHERE, titleLimit=600, titleFontWeight=400, columns=4, labelLimit=220, symbolOpacity=1
    )
    zero = alt.Scale(zero=False, nice=False, padding=16)
    few = alt.Axis(tickCount=8)
    titles = ("answerable questions answered, %", "wrong when answered, %")
    x = alt.X("x:Q", scale=zero, axis=few, title=titles[0])
    y = alt.Y("y:Q", scale=zero, axis=few, title=titles[1])
    base = alt.Chart(alt.Data(values=dots)).encode(
        color=alt.Color("arm:N", scale=alt.Scale(**colour), legend=legend),
        tooltip=[
            alt.Tooltip("arm:N"),
            alt.Tooltip("domains:N", title="where"),
            alt.Tooltip("x:Q", title="answered %", format=".1f"),
            alt.Tooltip("y:Q", title="wrong when answered %", format=".1f"),
            alt.Tooltip("honest:Q", title="honest when unanswerable", format=".1%"),
            alt.Tooltip("best:N", title="on the frontier"),
        ],
    )
    across = base.mark_rule(opacity=0.3).encode(
        x=alt.X("x_low:Q", scale=zero, axis=few, title=titles[0]), x2="x_high:Q", y=y
    )
    along = base.mark_rule(opacity=0.3).encode(
        x=x, y=alt.Y("y_low:Q", scale=zero, axis=few, title=titles[1]), y2="y_high:Q"
    )
    dot = base.mark_point(filled=True, size=90, opacity=1, strokeWidth=2, cursor="pointer").encode(
        x=x,
        y=y,
        shape=alt.Shape("arm:N", scale=alt.Scale(**shape), legend=legend),
        stroke=alt.Stroke("arm:N", scale=alt.Scale(**colour), legend=None),
        fillOpacity=alt.condition("datum.task === '@trained'", alt.value(0.0), alt.value(1.0)),
    )
    # the staircase through the arms that no other arm beats in both
    frontier = (
        alt.Chart(alt.Data(values=[dot for dot in dots if dot["best"]]))
        .mark_line(interpolate="step-before", strokeDash=[4, 3], opacity=0.6, color=QUIET)
        .encode(x=x, y=y, detail="domains:N", order=alt.Order("x:Q"))
    )
    return alt.layer(frontier, across, along, dot).properties(width="container", height=330)


def transfer_chart(cells: Rows) -> Any:
    """The transfer table as a picture: evaluated trait and domain down, trained set across; blue is a gain.

    A filled dot before the number marks a trained cell; a paler number is not significant.
    """
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    places = sorted({(not cell["trained"], cell["trait"], cell["domain"]) for cell in cells})
    order = list(dict.fromkeys(f"{trait} · {domain}" for _, trait, domain in places))
    tiles = [
        {
            "column": cell["column"],
            "place": f"{cell['trait']} · {cell['domain']}",
            "delta": 100 * cell["delta"],
            "text": ("● " if cell["trained"] else "") + points(cell).split(" ", 1)[0],
            "interval": points(cell).split(" ", 1)[1],
            "sure": 1.0 if cell["verdict"] in ("improved", "regressed") else 0.75,
            "strong": abs(cell["delta"]) > 0.75 * TRANSFER_SPAN / 100,  # paler tiles want dark ink
            "where": "trained domain, other families" if cell["trained"] else "never trained",
            "task": cell["tasks"][0],
            **{key: cell[key] for key in ("n", "q", "verdict")},
        }
        for cell in cells
    ]
    # a long name takes several lines: the trained set, the dose, the arm or the experiment
    lines = "split(replace(datum.label, ' (', ', ('), ', ')"
    most = max(column.replace(" (", ", (").count(", ") for column in columns)
    # Vega reserves room for one line and writes the others below it
    across = alt.Axis(orient="top", labelAngle=0, labelLimit=230, labelExpr=lines, labelPadding=4 + 14 * most)
    base = alt.Chart(alt.Data(values=tiles)).encode(
        x=alt.X("column:N", sort=columns, title=None, axis=across),
        y=alt.Y("place:N", sort=order, title=None, axis=alt.Axis(labelLimit=230, ticks=False, domain=False)),
        tooltip=[
            alt.Tooltip("place:N", title="evaluated"),
            alt.Tooltip("column:N", title="trained"),
            alt.Tooltip("where:N"),
            alt.Tooltip("text:N", title="gain, points"),
            alt.Tooltip("interval:N", title="95%"),
            alt.Tooltip("n:Q"),
            alt.Tooltip("q:Q", format=".3g"),
            alt.Tooltip("verdict:N"),
        ],
    )
    scale = alt.Scale(domain=[-TRANSFER_SPAN, 0, TRANSFER_SPAN], range=["#d9632a", "#f3f1ec", "#2f7fc1"], clamp=True)
    tile = base.mark_rect(cornerRadius=3, stroke="white", strokeWidth=2, cursor="pointer").encode(
        color=alt.Color("delta:Q", scale=scale, legend=alt.Legend(orient="bottom", title="points", gradientLength=160))
    )
    ink = alt.condition("datum.strong", alt.value("#ffffff"), alt.value("#1c2228"))
    faint = alt.Opacity("sure:Q", scale=None, legend=None)
    gain = base.mark_text(fontSize=12, dy=-6, fontWeight=600).encode(text="text:N", color=ink, opacity=faint)
    range_ = base.mark_text(fontSize=10, dy=8).encode(text="interval:N", color=ink, opacity=faint)
    return alt.layer(tile, gain, range_).properties(width="container", height=38 * len(order))


def _curve(lines: Rows, arm: str, source: str) -> Any:
    """Proxy and gold of one arm over the steps, on one kind of prompts; seeds are separate thin lines."""
    dots = [
        {"step": step, "reward": name, "seed": line["seed"], "mean": value}
        for line in lines
        if line["arm"] == arm and line["source"] == source
        for name in ("proxy", "gold")
        for step, value in zip(line["step"], line[name], strict=True)
        if value is not None
    ]
    names = [name for name in ("proxy", "gold") if any(dot["reward"] == name for dot in dots)]
    look = {"proxy": ("#2f7fc1", [1, 0]), "gold": ("#e08a1e", [5, 3])}
    return (
        alt.Chart(alt.Data(values=dots))
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X("step:Q", scale=alt.Scale(zero=False), axis=alt.Axis(tickMinStep=1, tickCount=8, grid=False)),
            y=alt.Y("mean:Q", title="mean reward", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "reward:N",
                scale=alt.Scale(domain=names, range=[look[name][0] for name in names]),
                legend=alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300),
            ),
            strokeDash=alt.StrokeDash(
                "reward:N",
                scale=alt.Scale(domain=names, range=[look[name][1] for name in names]),
                legend=alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300),
            ),
            detail="seed:N",
            tooltip=["step:Q", "reward:N", "seed:N", alt.Tooltip("mean:Q", format=".3f")],
        )
        .properties(width="container", height=190)
    )
