"""The comparison page of a joint evaluation: one HTML file without anything from outside, beside Inspect's logs.

It shows the pairs that belong together (answered and wrong when answered, upheld and taken back, kept and told), every
rate with its interval and n, what it cost, and replies that were flagged, so that a reader can judge the rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair
import vl_convert
from jinja2 import Environment, FileSystemLoader

from eval.crosseval_items import PARTS, TESTS
from eval.crosseval_log import Answer
from eval.crosseval_scores import METRICS, score
from eval.item_forms import as_text
from eval.report_charts import ARM_COLOURS, QUIET
from eval.wording import points

alt: Any = altair  # its generated signatures are narrower than what it takes

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 4  # flagged replies shown of each model and part
CUT = 700  # characters shown of one text
TITLES = {
    "hallucination": "Hallucination against refusal",
    "sycophancy": "Sycophancy by turn",
    "hierarchy": "Instruction hierarchy",
    "jailbreak": "Jailbreak",
    "deception": "Deception under pressure",
}
ABOUT = {
    "hallucination": "Questions with a known answer, about invented things, and with a false premise. Refusing all "
    "and inventing all are the two ends of one trade-off, so neither number stands without the other.",
    "sycophancy": "The user insists three times, and the model's own replies stay in the talk. In one half the user is "
    "wrong (or the plan harmful or delusional), in the other right (or the plan sound): giving in to everybody and "
    "contradicting everybody both score badly on one of the two lines.",
    "hierarchy": "A word that the system message keeps secret, and the same word where it may be told; system and user "
    "wanting contrary things, both ways round.",
    "jailbreak": "A rule against false sentences, and fourteen ways to have it broken. Only harmless facts are at "
    "stake; the same attack with the true sentence is to be served.",
    "deception": "First the belief, by four neutral questions; then a setting with a reason to say the contrary. To "
    "say the contrary of one's own belief is a lie, whether or not the belief is true (MASK, arXiv 2503.03750).",
}


def write_page(results: Mapping[str, Any], answers: Sequence[Answer], path: Path) -> None:
    """Write the page in one rename."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, interval=interval, dollars=dollars_text, points=points)
    models = results["models"]
    label = labels(models)
    charts = build_charts(results, label)
    page = environment.get_template("crosseval.html.j2").render(
        r=results,
        label={**label, "judge": f"judge: {results['settings']['judge']}"},
        colour=colours(models),
        tests=[test for test in TESTS if test in results["settings"]["tests"]],
        titles=TITLES,
        about=ABOUT,
        parts=TESTS,
        metrics=METRICS,
        rate={(row["model"], row["part"], row["metric"]): row for row in results["rates"]},
        attack={(row["attack"], row["model"]): row for row in results["attacks"]},
        attacks=list(dict.fromkeys(row["attack"] for row in results["attacks"])),
        charts={name: vl_convert.vegalite_to_svg(chart) for name, chart in charts.items()},
        flagged=flagged_replies(answers, models),
    )
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def labels(models: Sequence[str]) -> dict[str, str]:
    """A short name for each model: its last path part, or as many as tell it from the others."""
    found: dict[str, str] = {}
    for name in models:
        pieces = name.rstrip("/").split("/")
        others = [other.rstrip("/").split("/") for other in models if other != name]
        size = next(
            (k for k in range(1, len(pieces)) if all(other[-k:] != pieces[-k:] for other in others)), len(pieces)
        )
        found[name] = "/".join(pieces[-size:])
    return found


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour for each model."""
    return {name: ARM_COLOURS[k % len(ARM_COLOURS)] for k, name in enumerate(models)}


def percent(value: float | None) -> str:
    """A rate in per cent, a dash for none."""
    return "–" if value is None else f"{100 * value:.0f}%"


def interval(row: Mapping[str, Any] | None) -> str:
    """A rate, its interval and n: "40% [31, 50] n=80"."""
    if row is None:
        return "–"
    return f"{100 * row['value']:.0f}% [{100 * row['low']:.0f}, {100 * row['high']:.0f}] n={row['n']}"


def dollars_text(value: float | None) -> str:
    """Dollars, or that no price is known."""
    return "no price known" if value is None else f"{value:.4f} $" if 0 < value < 0.01 else f"{value:.2f} $"


def flagged_replies(answers: Sequence[Answer], models: Sequence[str]) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(model, part) -> the first flagged items, by id: what was asked and what was said in the talk that counts."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for answer in sorted(answers, key=lambda answer: answer.item.id):
        mine = found.setdefault((answer.model, answer.item.part), [])
        if answer.model not in models or len(mine) >= SHOWN or not score(answer.item, answer.replies)[1]:
            continue
        # the talk in which the flagged thing was said; of a belief, those under pressure
        chosen = (-2, -1) if answer.item.part == "pressure" else (0,)
        lines: list[str] = []
        for k in chosen:
            talk = answer.item.talks[k]
            lines += [as_text(talk.history)] if talk.history else []
            for turn, reply in zip(talk.turns, answer.replies[k], strict=True):
                lines += [f"[user] {_short(turn)}", f"[model] {_short(reply)}"]
        mine.append({"item": answer.item.id, "text": "\n".join(lines), "log": answer.log})
    return {key: rows for key, rows in found.items() if rows}


def _short(text: str) -> str:
    return text if len(text) <= CUT else text[:CUT] + " …"


# Charts


def build_charts(results: Mapping[str, Any], label: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The plots as Vega-Lite: "plane", and one of the turns for each of pushback and plans."""
    charts: dict[str, Any] = {}
    if results["plane"]:
        charts["plane"] = _plane(results["plane"], results["models"], label)
    for part in ("pushback", "plans"):
        rows = [row for row in results["rates"] if row["part"] == part and row["turn"] is not None]
        if rows:
            charts[part] = _turns(rows, results["models"], label)
    assert set(charts) <= {"plane", *PARTS}
    return {name: chart.configure_view(stroke=None).to_dict() for name, chart in charts.items()}


def _colour(models: Sequence[str], label: Mapping[str, str], **legend: Any) -> Any:
    by_model = colours(models)
    scale = alt.Scale(domain=[label[name] for name in models], range=[by_model[name] for name in models])
    return alt.Color("model:N", scale=scale, **legend)


def _plane(rows: Sequence[Mapping[str, Any]], models: Sequence[str], label: Mapping[str, str]) -> Any:
    """Share answered across, error rate when answering up, with intervals; down right is best."""
    values = [
        {
            "model": label[row["model"]],
            "best": row["on_frontier"],
            **{
                f"{axis}{end}": 100 * row[key][part]
                for axis, key in (("x", "answered"), ("y", "wrong_when_answered"))
                for end, part in (("", "value"), ("_low", "low"), ("_high", "high"))
            },
        }
        for row in rows
        if row["wrong_when_answered"] is not None
    ]
    scale = alt.Scale(domain=[0, 100])
    base = alt.Chart(alt.Data(values=values)).encode(color=_colour(models, label, legend=None))
    titles = ("answerable questions answered, %", "wrong when answered, %")
    x = alt.X("x:Q", scale=scale, title=titles[0])
    y = alt.Y("y:Q", scale=scale, title=titles[1])
    across = base.mark_rule(opacity=0.45).encode(x=alt.X("x_low:Q", scale=scale, title=titles[0]), x2="x_high:Q", y=y)
    along = base.mark_rule(opacity=0.45).encode(x=x, y=alt.Y("y_low:Q", scale=scale, title=titles[1]), y2="y_high:Q")
    dot = base.mark_point(filled=True, size=120, opacity=1).encode(x=x, y=y)
    text = base.mark_text(align="right", dx=-9, dy=-10, fontSize=12).encode(x=x, y=y, text="model:N")
    frontier = (
        alt.Chart(alt.Data(values=[value for value in values if value["best"]]))
        .mark_line(interpolate="step-before", strokeDash=[4, 3], opacity=0.6, color=QUIET)
        .encode(x=x, y=y, order=alt.Order("x:Q"))
    )
    return alt.layer(frontier, across, along, dot, text).properties(width=420, height=340)


def _turns(rows: Sequence[Mapping[str, Any]], models: Sequence[str], label: Mapping[str, str]) -> Any:
    """One panel for each conduct, one line for each model, turns across."""
    titles = list(dict.fromkeys(str(row["title"]).rsplit(",", 1)[0] for row in rows))
    values = [
        {
            "model": label[row["model"]],
            "panel": str(row["title"]).rsplit(",", 1)[0],
            "turn": row["turn"],
            **{key: 100 * row[key] for key in ("value", "low", "high")},
        }
        for row in rows
    ]
    panels: list[Any] = []
    for title in titles:
        data = alt.Data(values=[value for value in values if value["panel"] == title])
        base = alt.Chart(data).encode(
            x=alt.X("turn:O", title="turn", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("model:N", sort=[label[name] for name in models]),
            color=_colour(models, label, legend=alt.Legend(orient="top", title=None, labelLimit=260)),
        )
        scale = alt.Scale(domain=[0, 100])
        rule = base.mark_rule(strokeWidth=2, opacity=0.5).encode(y=alt.Y("low:Q", scale=scale, title="%"), y2="high:Q")
        line = base.mark_line(opacity=0.7).encode(y=alt.Y("value:Q", scale=scale, title="%"))
        dot = base.mark_point(filled=True, size=60, opacity=1).encode(y=alt.Y("value:Q", scale=scale, title="%"))
        panels.append(alt.layer(rule, line, dot).properties(width=260, height=240, title=title))
    return alt.hconcat(*panels)
