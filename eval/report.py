"""One report.html per run, complete in itself: no network, no other file. And the summary for the terminal.

The page carries the numbers of results.json, the plots as Vega-Lite with the Vega runtime inside, and the items behind
every number as compact JSON, cut to fit SIZE_LIMIT; what was left out stands on the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from eval.report_charts import arm_colours, build_charts
from eval.report_constitution import samples, side_by_side
from eval.report_persistence import crossing_text, persistence_charts, persistence_examples
from eval.results import BASE, CONTROL, LEDGER_KEYS, MARGIN, Frame, load_items, primary_rows
from eval.wording import AS_CHOICES, SIDES, against, equivalent_means, listed, points, side, task_label

SIZE_LIMIT = 8_000_000  # bytes of the whole page
PROMPT_LIMIT, OUTPUT_LIMIT = 900, 500  # characters shown of one text
TEMPLATES = Path(__file__).parent / "templates"


def write_report(run_dir: Path) -> Path:
    """Write runs/<name>/report.html from results.json and the items. Raises ValueError if there are no results yet."""
    source = run_dir / "results.json"
    if not source.is_file():
        raise ValueError(f"{source} is missing: there is nothing to report; run `traitdose run` with its config first")
    results = json.loads(source.read_text(encoding="utf-8"))
    runtime = vl_convert.javascript_bundle().replace("</script", "<\\/script")  # pyright: ignore[reportCallIssue]
    plots = build_charts(results) | persistence_charts(results, arm_colours(results))
    charts = _embed(plots)
    room = SIZE_LIMIT - len(runtime) - len(charts) - 250_000  # the rest of the page is far below that
    payload, shown, total = pack_items(primary_rows(load_items(run_dir)), results, room)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        percent=lambda x: "–" if x is None else f"{100 * x:.1f}%",
        points=points,
        task_label=task_label,
        p=_p_value,
        count=_count,
        span=_duration,
        crossing=crossing_text,
        unbroken=lambda text: unbroken(text, [arm["name"] for arm in results["arms"]]),
    )
    page = environment.get_template("report.html.j2").render(
        r=results,
        doses=[arm["name"] for arm in results["arms"] if arm["role"] == "dose"],
        pooled={(row["name"], row["arm"]): row for row in results["aggregates"]},
        honesty={(row["arm"], row["domains"]): row for row in results["honesty"]},
        headline=headline(results),
        colours=arm_colours(results),
        runtime=runtime,
        charts=charts,
        charts_has_others="others" in plots,
        curves=_curves(results),
        ledger_keys=LEDGER_KEYS,
        accuracy=_accuracy_rows(results["reward_accuracy"]),
        items=payload,
        shown=shown,
        total=total,
        as_choices=AS_CHOICES,
        equivalent_means=equivalent_means(MARGIN),
        limits=(PROMPT_LIMIT, OUTPUT_LIMIT),
        examples=persistence_examples(run_dir, results),
        samples=samples(run_dir, [arm["name"] for arm in results["arms"]], results["seeds"]),
    )
    path = run_dir / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def headline(results: Mapping[str, Any]) -> str:
    """The answer in one sentence: does a dose carry over, and at what price in refusals?"""
    pooled = {(row["name"], row["arm"]): row for row in results["aggregates"]}
    gains = [row for (name, _), row in pooled.items() if name == "truthfulness-heldout-domains"]
    if not gains:
        return "This run has no truthfulness tasks in domains that were never trained."
    groups: dict[str, list[str]] = {}
    for row in sorted(gains, key=lambda row: SIDES.index(side(row, True))):
        refusal = pooled.get(("over-refusal-answerable", row["arm"]))
        price = f", refused answerable questions {_words(refusal)}" if refusal else ""
        numbers = f" ({_words(row)}{price})" if side(row, True) != "not told apart" else ""
        groups.setdefault(against(row, True), []).append(row["arm"] + numbers)
    parts = [f"{listed(arms)} {'is' if len(arms) == 1 else 'are'} {words}" for words, arms in groups.items()]
    return f"On truthfulness in domains never trained, {'; '.join(parts)}."


def unbroken(text: str, names: Sequence[str]) -> str:
    """A sentence whose intervals, equations and names no browser breaks at the end of a line."""
    text = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\u00a0"), text).replace(" = ", "\u00a0=\u00a0")
    for name in sorted(names, key=len, reverse=True):  # "dose-50" before "dose-5"
        text = text.replace(name, name.replace("-", "-\u2060"))
    return text


def _words(row: Mapping[str, Any]) -> str:
    delta, interval = points(row).split(" ", 1)
    return f"{delta} points {interval}"


def pack_items(items: Frame, results: Mapping[str, Any], room: int) -> tuple[str, int, int]:
    """The items as JSON for the page, at most `room` characters; how many items are in it, and how many there are.

    {"arms", "seeds", "trained", "tasks": {task: {"suite", "metric", "items": [item, ...]}}}; an item is [id, kind,
    domain, family, prompt, {arm: [[value, refused, output], one per seed]}]. Too much is cut task by task to the same
    number of items, so no task is left without.
    """
    about_run = {
        "arms": [arm["name"] for arm in results["arms"]],
        "seeds": results["seeds"],
        "trained": results["trained_domains"],
    }
    tasks: dict[str, dict[str, Any]] = {}
    for row in items.sort_values(["task", "seed"], kind="stable").to_dict("records"):
        task = tasks.setdefault(row["task"], {"suite": row["suite"], "metric": row["metric"], "items": {}})
        about = [row["item"], row["kind"], row["domain"], row["family"], _cut(row["prompt"], PROMPT_LIMIT), {}]
        item = task["items"].setdefault(row["item"], about)
        value = None if row["value"] != row["value"] else round(float(row["value"]), 4)
        refused = bool(row["refused"]) if row["refused"] in (True, False) else None
        item[-1].setdefault(row["arm"], []).append([value, refused, _cut(row["output"], OUTPUT_LIMIT)])
    most = max((len(task["items"]) for task in tasks.values()), default=0)
    total = sum(len(task["items"]) for task in tasks.values())
    while True:
        kept = {name: {**task, "items": list(task["items"].values())[:most]} for name, task in tasks.items()}
        text = _embed({**about_run, "tasks": kept})
        if len(text.encode()) <= room or most <= 1:
            return text, sum(len(task["items"]) for task in kept.values()), total
        most = min(most - 1, int(most * room / len(text.encode())))


def summary_table(results: Mapping[str, Any]) -> Group:
    """The result for a terminal of 80 columns: a table, then the claims in words."""
    results = {**results, "arms": [arm for arm in results["arms"] if arm.get("method") in (None, "trait")]}
    arms = [arm["name"] for arm in results["arms"] if arm["role"] == "dose"]
    pooled = {(row["name"], row["arm"]): row for row in results["aggregates"]}
    title = f"{results['experiment']}: arm minus control, in points, with 95% intervals"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", min_width=25)
    for arm in (BASE, CONTROL):
        table.add_column(arm, justify="right", style="dim", no_wrap=True)
    for arm in results["arms"]:
        if arm["role"] == "dose":
            table.add_column(f"{arm['name']}\ndose {100 * arm['dose']:g}%", justify="right", no_wrap=True)
    names = {
        "truthfulness-trained-domain": "truthful, trained domain",
        "truthfulness-heldout-domains": "truthful, never trained",
        "over-refusal-answerable": "refused, answerable",
    }
    for name, title in names.items():
        rows = [pooled.get((name, arm)) for arm in arms]
        first = next((row for row in rows if row), None)
        if first is None:
            continue
        base = "–" if first["base"] is None else f"{100 * first['base']:.1f}%"
        cells = [_cell(row) if row else Text("–") for row in rows]
        table.add_row(f"{title}\n[dim]n = {first['n']}[/]", base, f"{100 * first['control']:.1f}%", *cells)
    if results["capability"]:
        suites = [results["capability"].get(arm) for arm in arms]
        cells = [
            f"{s['improved']} of {s['n_benchmarks']} ahead\n"
            f"{s['significantly_improved']} up, {s['significantly_regressed']} down"
            if s
            else "–"
            for s in suites
        ]
        table.add_row("capability benchmarks\n[dim]significantly[/]", "", "", *cells)
    cells = []
    for arm in arms:
        spent = results["ledger"][arm]
        off = spent["off_budget"]
        worst = max(off, key=lambda key: abs(spent["relative_to_control"][key]), default="flops")
        text = f"{worst.replace('_', ' ')} {100 * spent['relative_to_control'][worst]:+z.1f}%"
        cells.append(Text(text, style="bold red" if off else ""))
    table.add_row("spent against control", "", "", *cells)
    marks = {True: ("✓ ", "green"), False: ("✗ ", "yellow"), None: ("· ", "dim")}
    claims = [Text.assemble(marks[claim["holds"]], claim["text"]) for claim in results["claims"]]
    beside = side_by_side(results)
    return Group(table, *([beside] if beside else []), *claims)


def _cell(row: Mapping[str, Any]) -> Text:
    style = {"improved": "green", "regressed": "yellow"}.get(row["verdict"], "")
    delta, interval = points(row).split(" ", 1)
    return Text.assemble(f"{100 * row['value']:.1f}%  ", (f"{delta}\n{interval}", style))


def _curves(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Which proxy-and-gold plots there are: arm and source, seeds together."""
    pairs = dict.fromkeys((line["arm"], line["source"]) for line in results["rewards"])
    return [{"arm": arm, "source": source} for arm, source in pairs]


def _accuracy_rows(
    node: Mapping[str, Any], name: str = "", level: int = -1
) -> list[tuple[str, Any, float | None, int]]:
    """(name, n, accuracy, depth) of every part of accuracy.json that has an accuracy, outer parts first."""
    rows = [(name, node.get("n"), node["accuracy"], level)] if "accuracy" in node else []
    for key, child in node.items():
        if isinstance(child, Mapping):
            below = level + 1 if "accuracy" in node or level < 0 else level
            rows += _accuracy_rows(child, key.replace("heldout", "held-out families"), below)
    return rows


def _embed(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _cut(text: str, limit: int) -> str:
    """The end of a long prompt is what is asked, its start is the setting: the middle goes."""
    return text if len(text) <= limit else f"{text[: limit // 3]} […] {text[-(limit * 2 // 3) :]}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _count(x: float) -> str:
    """A large number in four characters: 950, 12.3k, 4.56M, 1.2e13."""
    for size, unit in ((1e12, None), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x:.2e}" if unit is None else f"{x / size:.3g}{unit}"
    return f"{x:.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"
