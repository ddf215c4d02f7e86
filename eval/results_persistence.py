"""docs/results.md, a run that was attacked: what is left of the trait, per arm, beside what is left of control's.

Numbers are those of results.json's key "persistence" (eval/persistence_results.py); formulas: docs/persistence.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.markdown import details, percent, picture, table
from eval.persistence_results import ALL, CONTROL
from eval.report_charts import arm_colours
from eval.report_persistence import crossing_text, persistence_charts
from eval.wording import against, listed, points

Row = Mapping[str, Any]
WIDTH = 640  # pixels of a picture without its labels
NOTHING = "score above the floor"  # of which there was none, where a half-life is null
ABOUT = (
    "An attack takes away clean minus attacked: a degradation, in points, on held-out items that every arm gets "
    "alike. Control is attacked in the same way, and what counts is an arm's degradation minus control's: below 0"
    " the arm holds better. Definitions, and what such a result can and cannot say: docs/persistence.md."
)
POOLED_NOTE = (
    "Pooled over the attacks. Points lost to helpful personas say whether following an innocent wish costs the "
    "trait; q, over an arm's single attacks, stands at these."
)
INDEX_NOTE = (
    "The index is *moved* minus *falls*, -1 to 1: 0 for a model that obeys everybody and for one that obeys "
    "nobody. *Falls*: the share of good clean answers that go wrong under harmful attacks. *Moved*: the share of "
    "replies that follow a helpful persona, among those that did not follow its rule anyway."
)
LADDER_NOTE = (
    "Half-life: bad steps until half of the way from the first score to the floor is lost. Recovered: good steps, "
    "after the last bad one, until {share:.0f}% of the way from the floor to the first score is regained. "
    '"> {last}": not within the steps of the ladder. *Longer half-life*, *slower recovery*: the share of the bootstrap '
    "resamples in which the arm takes more steps than control; 50% is no difference."
)
SAMPLING_NOTE = "Clean is the greedy answer; worst of n: the chance that all of n sampled replies keep to the truth."


def persistence_section(results: Row, images: Mapping[str, str]) -> str:
    """The section without its heading. images: as `persistence_pictures` names them -> path as the page links it."""
    found = results["persistence"]
    parts = [ABOUT, _findings(found)]
    if found["prompts"]:
        parts += ["#### Personas and pressure", *_prompts(found["prompts"], images.get("persistence-attacks"))]
    if found["selective"]:
        parts += ["#### Selective persistence", *_selective(found["selective"])]
    for ladder in found["finetuning"]:
        path = images.get(f"persistence-steps-{ladder['method']}")
        parts += [f"#### Fine-tuning on bad data: {ladder['method']}", *_ladder(ladder, found["settings"], path)]
    if found["generation"]:
        parts += ["#### Sampling", *_sampling(found["generation"], images.get("persistence-sampling"))]
    parts.append(details("Settings of the attacks", table(("key", "value"), _settings(found["settings"]))))
    return "\n\n".join(part for part in parts if part)


def persistence_pictures(results: Row) -> dict[str, dict[str, Any]]:
    """The report's plots of persistence as Vega-Lite on white, of a page's width; none if the run was not attacked."""
    charts = persistence_charts(results, arm_colours(results))
    return {name.replace(":", "-"): {**chart, "width": WIDTH, "background": "white"} for name, chart in charts.items()}


def _findings(found: Row) -> str:
    """One paragraph for each arm beside control: harmful prompts, the index, half-lives."""
    harmful = {row["arm"]: row for row in found["prompts"] if row["condition"] == ALL["harmful"]}
    indices = {row["arm"]: row for row in found["selective"]}
    ladders = {ladder["method"]: {row["arm"]: row for row in ladder["arms"]} for ladder in found["finetuning"]}
    arms = dict.fromkeys([*harmful, *indices, *(arm for rows in ladders.values() for arm in rows)])
    lines: list[str] = []
    for arm in arms:
        said: list[str] = []
        if arm == CONTROL:
            continue
        if row := harmful.get(arm):
            gap, theirs = row["difference"], harmful[CONTROL]["degradation"]
            said.append(
                f"harmful prompts take {100 * row['degradation']:.1f} points from it, {100 * theirs:.1f} from control, "
                f"difference {points(gap)}: {against(gap, False)}"
            )
        if (row := indices.get(arm)) and (gap := row["difference"]):
            said.append(f"selective persistence {_index(row['index'], row)}, {against(gap, True)} ({_delta(gap)})")
        for method, rows in ladders.items():
            if arm in rows:
                said.append(_life(method, rows[arm], rows[CONTROL]))
        lines.append(f"- **{arm}**: {'; '.join(said)}.")
    return "\n".join(lines)


def _life(method: str, row: Row, control: Row) -> str:
    mine, theirs = (crossing_text(found["half_life"], NOTHING) for found in (row, control))
    share = row["half_life_longer_than_control"]
    longer = "" if share is None else f", longer in {100 * share:.0f}% of the resamples"
    return f"half-life in steps ({method}) {mine}, control's {theirs}{longer}"


# Tables


def _prompts(rows: Sequence[Row], path: str | None) -> list[str]:
    pooled = [row for name in ALL.values() for row in rows if row["condition"] == name]
    single = [row for row in rows if row["condition"] not in ALL.values()]
    head = ("attack", "arm", "n", "clean", "attacked", "points lost [95%]", "minus control [95%]", "q")
    count = len(_names(single, "condition"))
    return [
        picture(f"{_seen(rows, 'single attack')}; {_pooled_text(pooled)}", path),
        table(head, [_lost(row, bold=True) for row in pooled]),
        POOLED_NOTE,
        details(f"All {count} attacks", table(head, [_lost(row) for row in _by_condition(single)])),
    ]


def _sampling(rows: Sequence[Row], path: str | None) -> list[str]:
    head = ("sampling", "arm", "n", "greedy", "sampled", "points lost [95%]", "minus control [95%]", "q")
    return [
        picture(_seen(rows, "temperature and number of replies"), path),
        table(head, [_lost(row) for row in _by_condition(rows)]),
        SAMPLING_NOTE,
    ]


def _lost(row: Row, bold: bool = False) -> Sequence[str]:
    gap = row["difference"]
    lost, name = points({**row, "delta": row["degradation"]}), row["condition"]
    q = "–" if gap is None or gap["q"] is None else f"{gap['q']:.2g}"
    shown = (f"**{name}**", f"**{lost}**") if bold else (name, lost)
    values = (row["arm"], str(row["n"]), percent(row["clean"]), percent(row["attacked"]))
    return (shown[0], *values, shown[1], points(gap) if gap else "–", q)


def _selective(rows: Sequence[Row]) -> list[str]:
    head = ("arm", "falls", "moved", "index [95%]", "minus control [95%]")
    shown = [
        (
            row["arm"],
            percent(row["falls"]),
            percent(row["moves"]),
            _index(row["index"], row),
            _delta(row["difference"]),
        )
        for row in rows
    ]
    personas = [
        (persona["condition"], row["arm"], percent(persona["anyway"]), percent(persona["followed"]))
        for name in dict.fromkeys(persona["condition"] for row in rows for persona in row["personas"])
        for row in rows
        for persona in row["personas"]
        if persona["condition"] == name
    ]
    followed = table(("helpful persona", "arm", "its rule holds without it", "and with it"), personas)
    return [table(head, shown), INDEX_NOTE, details("How often each helpful persona is followed", followed)]


def _ladder(ladder: Row, settings: Row, path: str | None) -> list[str]:
    arms = ladder["arms"]
    head = ("arm", "n", "before", "after the bad steps", "half-life, steps [95%]", "longer half-life",
            "after the good steps", "recovered, steps [95%]", "slower recovery")  # fmt: skip
    rows: list[Sequence[str]] = []
    for row in arms:
        ends = [percent(row["harmful"][k]["value"]) for k in (0, -1)]
        life, longer = crossing_text(row["half_life"], NOTHING), _share(row["half_life_longer_than_control"])
        back = ("–", "–", "–")
        if row["recovery"]:
            last, later = percent(row["recovery"][-1]["value"]), _share(row["recovery_longer_than_control"])
            back = (last, crossing_text(row["recovered"], NOTHING), later)
        rows.append((row["arm"], str(row["n"]), *ends, life, longer, *back))
    last, share = arms[0]["harmful"][-1]["step"], settings["finetune"]["recovered"]
    levels = [f"{cells[0]} from {cells[2]} to {cells[3]}" for cells in rows]
    seen = (
        f"Lines with 95% bands: score of {listed(_names(arms, 'arm'))} over the steps on bad data, then on good data; "
        f"▼ half-lives, ▲ recoveries, where reached. In the bad steps {listed(levels)}"
    )
    return [
        picture(seen, path),
        table(head, rows),
        LADDER_NOTE.format(share=100 * share, last=last),
        details("Score after every step", _by_step(arms)),
    ]


def _by_step(arms: Sequence[Row]) -> str:
    """Bad and then good steps down; arms across, each but control with its difference to control at that step."""
    head = ["data", "steps"]
    for row in arms:
        head += [row["arm"]] if row["arm"] == CONTROL else [row["arm"], f"{row['arm']} minus control"]
    rows: list[Sequence[str]] = []
    for data, key in (("bad", "harmful"), ("good", "recovery")):
        by_arm = {row["arm"]: {point["step"]: point for point in row[key]} for row in arms}
        for step in sorted({step for mine in by_arm.values() for step in mine}):
            cells = [data, str(step)]
            for arm, mine in by_arm.items():
                point = mine.get(step)
                cells.append(_score(point))
                if arm != CONTROL:
                    gap = point["difference"] if point else None
                    cells.append(points(gap) if gap else "–")
            rows.append(cells)
    return table(head, rows)


def _score(point: Row | None) -> str:
    if point is None:
        return "–"
    return f"{percent(point['value'])} [{100 * point['ci_low']:.1f}, {100 * point['ci_high']:.1f}]"


def _settings(settings: Row, prefix: str = "") -> list[tuple[str, str]]:
    """Every key of the persistence section with its value; null takes all there are."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += _settings(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + key, "all" if value is None else text))
    return rows


# Words


def _seen(rows: Sequence[Row], what: str) -> str:
    arms = _names(rows, "arm")
    return f"Dots with 95% intervals: points that {listed(arms)} lose, for every {what}; right of 0 is lost"


def _pooled_text(pooled: Sequence[Row]) -> str:
    texts: list[str] = []
    for name in _names(pooled, "condition"):
        lost = [f"{row['arm']} {100 * row['degradation']:+z.1f}" for row in pooled if row["condition"] == name]
        texts.append(f"{name}: {listed(lost)}")
    return "; ".join(texts)


def _by_condition(rows: Sequence[Row]) -> list[Row]:
    """The arms of one condition below one another."""
    order = _names(rows, "condition")
    return sorted(rows, key=lambda row: order.index(row["condition"]))


def _names(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(str(row[key]) for row in rows))


def _index(value: float, row: Row) -> str:
    return f"{value:+z.2f} [{row['ci_low']:+z.2f}, {row['ci_high']:+z.2f}]"


def _delta(gap: Row | None) -> str:
    return _index(gap["delta"], gap) if gap else "–"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"
