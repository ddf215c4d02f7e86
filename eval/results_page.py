"""docs/results.md: what finished runs found, as Markdown that reads well where a repository is shown.

Every number comes from a run's results.json (docs/results.schema.json) or its stages' manifests; rendering is pure. A
run with constitutional arms, or one that was attacked, has a section more (eval/results_constitution.py,
eval/results_persistence.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval.markdown import SIGNIFICANT, details, percent, picture, table
from eval.report_charts import arm_colours, honesty_chart, transfer_chart
from eval.results import MARGIN
from eval.results_constitution import constitution_pictures, constitution_section
from eval.results_persistence import persistence_pictures, persistence_section
from eval.transfer import cells_of, markdown_table
from eval.wording import AS_CHOICES, equivalent_means, points, task_label

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A finished run: where it lies, its results.json, and by folder what the page tells of each stage.

    A stage has started, wall_seconds, cpu_seconds, git_commit and packages (name to version); what was not recorded
    is null.
    """

    place: str
    results: Row
    stages: Mapping[str, Row]


def render(runs: Sequence[Run], images: Mapping[str, str], numbers: Sequence[str], command: str) -> str:
    """The whole page, as Markdown.

    images: picture -> path as the page links it; numbers: the file of each run, likewise; command: how it was made.
    """
    cells = cells_of([run.results for run in runs])
    parts = [
        "# Results",
        f"Made by `{command}` from finished runs; every number is read from their files. Differences are arm minus "
        "control in points (hundredths), paired by item and seed, with 95% intervals over families of items and seeds. "
        "Verdicts are by q (Benjamini-Hochberg), which knows how many comparisons were made: *improved* or *regressed* "
        f"at q ≤ 0.05, *equivalent* {equivalent_means(MARGIN)}, *inconclusive* otherwise, even where the interval of "
        "the one comparison leaves zero out.",
        *(_run_head(run, path) for run, path in zip(runs, numbers, strict=True)),
    ]
    if cells:
        parts += ["## What carried over", picture(TRANSFER_SEEN, images.get("transfer")), markdown_table(cells)]
    for run, label in zip(runs, labels(runs), strict=True):
        mine = {name.removeprefix(f"{label}-"): path for name, path in images.items() if name.startswith(f"{label}-")}
        parts += _run_body(run, mine)
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


TRANSFER_SEEN = (
    "Tiles: gain in points with its interval, evaluated trait and domain down, trained set across; blue is a gain, "
    "orange a loss, a dot marks a trained domain"
)
FRONTIER_SEEN = (
    "Points with intervals for every arm: share of the answerable questions answered (across) against error rate when "
    "answering (up); bottom right is best"
)
FRONTIER_NOTE = (
    "Share of the answerable questions that were answered, and error rate among these answers. Intervals: 95% over "
    "families and seeds; n: answers of all seeds. Refusing everything and inventing everything are the two ends; ★ "
    "marks arms that no other arm of the run beats in both."
)


def pictures(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """The page's pictures by name, as Vega-Lite on white."""
    cells = cells_of([run.results for run in runs])
    found: dict[str, dict[str, Any]] = {}
    if cells:
        columns = len({cell["column"] for cell in cells})
        found["transfer"] = _on_white(transfer_chart(cells).properties(width=190 * columns))
    for run, label in zip(runs, labels(runs), strict=True):
        r = run.results
        if r["honesty"]:
            found[f"{label}-frontier"] = _on_white(honesty_chart(r["honesty"], arm_colours(r)).properties(width=620))
        more = {**constitution_pictures(r), **persistence_pictures(r)}
        found |= {f"{label}-{name}": chart for name, chart in more.items()}
    return found


def _on_white(chart: Any) -> dict[str, Any]:
    return chart.configure(background="white").to_dict()


def labels(runs: Sequence[Run]) -> list[str]:
    """What a run's own files are called by: its experiment, with a number where several runs have the same."""
    names = [str(run.results["experiment"]) for run in runs]
    return [name if names.count(name) == 1 else f"{name}-{k}" for k, name in enumerate(names, 1)]


# One run


def _run_head(run: Run, numbers: str) -> str:
    r, stages = run.results, list(run.stages.values())
    doses = ", ".join(f"{arm['name']} ({_dose(arm)})" for arm in r["arms"] if arm["dose"] is not None)
    started = sorted(str(m["started"]) for m in stages if m["started"])
    packages = next((m["packages"] for m in reversed(stages) if m["packages"]), {})
    commits = sorted({str(m["git_commit"])[:12] for m in stages if m["git_commit"]})
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    attacked = f", then `traitdose persist {run.place}`" if r["persistence"] else ""
    lines = [
        ("command", f"`traitdose run {run.place}/config.yaml` (the resolved config of the run){attacked}"),
        ("base", f"`{r['model']}`"),
        ("arms, with their dose", doses),
        ("seeds", ", ".join(map(str, r["seeds"]))),
        ("trained domains", ", ".join(r["trained_domains"])),
        ("first and last stage begun", f"{started[0]}, {started[-1]}" if started else "–"),
        ("machine", r["device"] + (f"; {versions}" if versions else "")),
        ("commit", ", ".join(commits) or "–"),
        ("hours, all stages", f"{r['wall_seconds'] / 3600:.2f}"),
        ("numbers", f"[{numbers}]({numbers})"),
    ]
    return f"## Run {r['experiment']}\n\n" + table(("", ""), lines) + "\n\n" + details("Hours by stage", _hours(run))


def _dose(arm: Row) -> str:
    return "trains nothing" if arm["method"] == "constitution-prompt" else f"{100 * arm['dose']:g}%"


def _hours(run: Run) -> str:
    """Wall and CPU hours of every kind of stage, seeds together."""
    spent: dict[str, list[float]] = {}
    for folder, stage in run.stages.items():
        pieces = folder.split("/")
        name = "/".join(piece for piece in pieces if not piece.startswith("seed-"))
        sums = spent.setdefault(name, [0, 0.0, 0.0])
        sums[0] += 1
        sums[1] += (stage["wall_seconds"] or 0.0) / 3600
        sums[2] += (stage["cpu_seconds"] or 0.0) / 3600
    rows = [(name, f"{n:g}", f"{wall:.2f}", f"{cpu:.2f}") for name, (n, wall, cpu) in spent.items()]
    return table(("stage", "runs of it", "hours", "CPU hours"), rows)


def _run_body(run: Run, images: Mapping[str, str]) -> list[str]:
    r = run.results
    parts = [f"## {r['experiment']} in numbers", _claims(r["claims"])]
    if r["honesty"]:
        seen = picture(FRONTIER_SEEN, images.get("frontier"))
        parts += ["### Honesty as a pair", FRONTIER_NOTE, seen, _pairs(r["honesty"])]
    if r["capability"]:
        parts += ["### Capability", AS_CHOICES, _capability(r["capability"]), _benchmarks(r["capability"])]
    if r["generalisation"]:
        parts += ["### Generalisation, by trait", _generalisation(r), "### Pairs where neither refuses", _neither(r)]
    if r["constitution"]:
        parts += ["### Trait RL beside the constitution", constitution_section(r, images)]
    if r["persistence"]:
        parts += ["### Persistence", persistence_section(r, images)]
    return parts


def _claims(claims: Sequence[Row]) -> str:
    mark = {True: "yes", False: "no", None: "–"}
    return table(("speaks for the arm", "claim"), [(mark[claim["holds"]], str(claim["text"])) for claim in claims])


def _capability(suites: Mapping[str, Row]) -> str:
    head = ("arm", "benchmarks", "n each", "ahead", "tied", "behind", "sign test p",
            "improved", "regressed", "equivalent", "inconclusive")  # fmt: skip
    rows: list[Sequence[str]] = []
    for arm, suite in suites.items():
        sizes = [task["n"] for task in suite["tasks"]]
        n = str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
        keys = ("significantly_improved", "significantly_regressed", "equivalent", "inconclusive")
        sides = [str(suite[key]) for key in ("improved", "unchanged", "regressed")]
        p = f"{suite['sign_test_p']:.2g}"
        rows.append((arm, str(suite["n_benchmarks"]), n, *sides, p, *(str(suite[key]) for key in keys)))
    margin = next(iter(suites.values()))["margin"]
    note = (
        "Ahead, tied and behind count the signs of the differences to control; the last four columns are the verdicts, "
        f"which are exclusive (margin ±{100 * margin:g} points)."
    )
    return table(head, rows) + "\n\n" + note


def _benchmarks(suites: Mapping[str, Row]) -> str:
    """Every benchmark, one column for each arm."""
    by_arm = {arm: {task["task"]: task for task in suite["tasks"]} for arm, suite in suites.items()}
    tasks = list(dict.fromkeys(task for rows in by_arm.values() for task in rows))
    rows = []
    for task in tasks:
        first = next(found[task] for found in by_arm.values() if task in found)
        about = (task, str(first["n"]), percent(first["base"]), percent(first["control"]))
        rows.append((*about, *(_difference(found.get(task)) for found in by_arm.values())))
    return details(f"All {len(tasks)} benchmarks", table(("benchmark", "n", "base", "control", *by_arm), rows))


def _generalisation(r: Row) -> str:
    arms = list(dict.fromkeys(row["arm"] for row in r["generalisation"]))
    by = {(row["task"], row["arm"]): row for row in r["generalisation"]}
    firsts = {row["task"]: row for row in reversed(r["generalisation"])}
    rows: list[Sequence[str]] = []
    for task, first in sorted(firsts.items(), key=lambda pair: (pair[1]["trait"], not pair[1]["trained_domain"])):
        name = task_label(first) + (" †" if first["trained_domain"] else "")
        about = (first["trait"], name, str(first["n"]), percent(first["base"]), percent(first["control"]))
        rows.append((*about, *(_difference(by.get((task, arm))) for arm in arms)))
    note = "† another family of the domain was trained on; all other tasks are of domains or traits never trained."
    return table(("trait", "task", "n", "base", "control", *arms), rows) + "\n\n" + note


def _neither(r: Row) -> str:
    """The differences on the pairs in which neither control nor the arm refuses, beside those on all pairs."""
    rows: list[Sequence[str]] = []
    for row in [*r["aggregates"], *r["generalisation"]]:
        rest = row.get("non_refusal")
        if rest is None:
            continue
        some = points({"delta": row["delta_non_refusal"], **rest})
        what = str(row.get("title") or task_label(row))
        rows.append((what, row["arm"], some, str(rest["n"]), points(row), str(row["pairs"])))
    if not rows:
        return "No task of this run defines refusing."
    return table(("what", "arm", "neither refuses", "pairs", "all pairs", "pairs"), rows)


def _pairs(rows: Sequence[Row]) -> str:
    where = {"trained": "trained", "heldout": "never trained"}
    shown = [
        (
            row["arm"] + (" ★" if row["on_frontier"] else ""),
            where[row["domains"]],
            *(_rate(row[key]) for key in ("answered", "error_when_answered", "honest_when_unanswerable")),
        )
        for row in rows
    ]
    return table(("arm", "domains", "answered", "wrong when answered", "honest when unanswerable"), shown)


def _rate(row: Row) -> str:
    if row["rate"] is None:
        return "–"
    return f"{100 * row['rate']:.1f}% [{100 * row['low']:.1f}, {100 * row['high']:.1f}] (n = {row['n']})"


def _difference(row: Row | None) -> str:
    if row is None:
        return "–"
    text = f"{points(row)} {row['verdict']}"
    return f"**{text}**" if row["verdict"] in SIGNIFICANT else text
