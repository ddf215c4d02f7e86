"""The transfer table: what was gained where, by what was trained.

Down go the evaluated traits and domains, across the trained sets of domains ("health", "all but health and science",
"all"), one column per dose arm of every run. A cell pools the tasks of its trait and domain: arm minus control of the
same run, paired by item and seed, signed so that more is better. Every cell is of held-out families; a cell is marked
trained where its trait and domain supplied other families to the training, all the others were never trained at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.stats import benjamini_hochberg, equivalence_p, paired_difference, verdict
from eval.wording import listed, points

Cell = dict[str, Any]


def transfer_cells(
    pairs: Any, polarity: Mapping[str, bool], column: str, trait: str, trained: Sequence[str], margin: float
) -> list[Cell]:
    """One cell per trait and domain.

    pairs: control and arm side by side (eval.results.pair), generalisation rows only; polarity: task -> whether more is
    better; column: the column's name; trait, trained: what the arm was trained on; margin: of equivalence. q is
    Benjamini-Hochberg over the column. A task without polarity is left out.
    """
    cells: list[Cell] = []
    known = pairs[pairs["task"].isin(list(polarity))]
    for (of, domain), group in known.groupby(["trait", "domain"], sort=True):
        signs = np.array([1.0 if polarity[task] else -1.0 for task in group["task"]])
        d = signs * (group["value_arm"].to_numpy(np.float64) - group["value_control"].to_numpy(np.float64))
        answerable = group["kind"].where(group["kind"] == "answerable", "other")
        # the suite fixes how many items each task and kind gives, so their shares are no chance
        strata = (group["task"] + "/" + answerable).to_numpy(str)
        estimate = paired_difference(d, _clusters(group), group["seed"].to_numpy(), strata)
        cells.append(
            {
                "column": column,
                "trait": str(of),
                "domain": str(domain),
                "trained": bool(of == trait and domain in trained),
                "tasks": sorted(group["task"].unique()),
                "n": int(group.groupby("task")["item"].nunique().sum()),
                "clusters": estimate.clusters,
                "delta": estimate.delta,
                "ci_low": estimate.ci_low,
                "ci_high": estimate.ci_high,
                "p": estimate.p,
                "p_equivalent": equivalence_p(estimate, margin),
            }
        )
    for cell, q in zip(cells, benjamini_hochberg([cell["p"] for cell in cells]), strict=True):
        cell["q"] = float(q)
        cell["verdict"] = verdict(cell["delta"], float(q), cell["p_equivalent"])
    return cells


def _clusters(group: Any) -> np.ndarray:
    """The family, or the item where a task has one family only."""
    single = group.groupby("task")["family"].transform("nunique") == 1
    names = group["task"] + "/" + group["family"].where(~single, group["item"])
    return names.to_numpy(str)


def set_name(trained: Sequence[str], known: Sequence[str]) -> str:
    """The trained domains in words, given all that could have been trained: "health", "all but x and y", "all"."""
    missing = [domain for domain in known if domain not in trained]
    if not set(trained) <= set(known):
        return listed(sorted(trained))
    if not missing and len(known) > 1:
        return "all"
    if 0 < len(missing) < len(trained) - 1:
        return f"all but {listed(missing)}"
    return listed(sorted(trained))


def column_name(trained: Sequence[str], known: Sequence[str], dose: float, experiment: str = "") -> str:
    """A column's name: trained set, dose, and the experiment or the arm where several are shown."""
    what = f"{set_name(trained, known)}, dose {100 * dose:g}%" if trained else "nothing"
    return what + (f" ({experiment})" if experiment else "")


def cells_of(runs: Sequence[Mapping[str, Any]]) -> list[Cell]:
    """The cells of one or more runs' results; several runs have their experiment in the columns' names."""
    cells: list[Cell] = []
    for results in runs:
        end = f" ({results['experiment']})" if len(runs) > 1 else ""
        cells += [{**cell, "column": cell["column"] + end} for cell in results["transfer"]]
    return cells


def markdown_table(cells: Sequence[Cell]) -> str:
    """The table as Markdown: gain and interval in points, † for a trained cell, bold where significant after BH."""
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    by_place = {(cell["trait"], cell["domain"], cell["column"]): cell for cell in cells}
    places = sorted({(cell["trait"], cell["domain"]) for cell in cells}, key=lambda place: _order(place, cells))
    lines = [
        "| evaluated | " + " | ".join(f"trained: {column}" for column in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for trait, domain in places:
        shown = [_shown(by_place.get((trait, domain, column))) for column in columns]
        lines.append(f"| {trait} · {domain} | " + " | ".join(shown) + " |")
    note = (
        "Arm minus control in points, with 95% intervals; more is better in every cell. All items are of families that "
        "were never trained. † the domain itself supplied other families to the training; every other cell is of a "
        "domain or trait that was never trained. Bold: significant after Benjamini-Hochberg over the column."
    )
    return "\n".join([*lines, "", note, ""])


def _order(place: tuple[str, str], cells: Sequence[Cell]) -> tuple[bool, str, str]:
    """Trained places first, then by name."""
    trained = any(cell["trained"] for cell in cells if (cell["trait"], cell["domain"]) == place)
    return not trained, place[0], place[1]


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = f"**{points(cell)}**" if cell["verdict"] in ("improved", "regressed") else points(cell)
    return text + (" †" if cell["trained"] else "")
