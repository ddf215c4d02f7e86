"""The constitutional arms in the report: side by side, what each part cost, samples of what they were made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eval.wording import points

SHOWN = 20  # rows of each kind on the page; the Parquet files hold all


def samples(run_dir: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, list[dict[str, Any]]]:
    """Rows of every arm's revisions and comparisons, the first SHOWN of each arm's first seed that has them.

    Revisions that the filter dropped are among them, so that its work can be judged.
    """
    found: dict[str, list[dict[str, Any]]] = {"revisions": [], "pairs": []}
    for arm in arms:
        for kind, name in (("revisions", "revisions/revisions.parquet"), ("pairs", "feedback/pairs.parquet")):
            paths = [path for s in seeds if (path := run_dir / "arms" / arm / f"seed-{s}" / name).is_file()]
            if not paths:
                continue
            rows: list[Any] = json.loads(str(pd.read_parquet(paths[0]).head(SHOWN).to_json(orient="records")))
            found[kind] += [{**row, "arm": arm} for row in rows]
    return found


def filter_counts(run_dir: Path, arms: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, int]]:
    """Arm -> how many revisions were made and how many the filter dropped, by its reasons, over all seeds."""
    counts: dict[str, dict[str, int]] = {}
    for arm in arms:
        for seed in seeds:
            path = run_dir / "arms" / arm / f"seed-{seed}" / "revisions" / "ledger.json"
            if path.is_file():
                ledger = json.loads(path.read_text(encoding="utf-8"))
                mine = counts.setdefault(arm, {"revisions": 0})
                mine["revisions"] += int(ledger["revisions"])
                for reason, count in ledger["dropped"].items():
                    mine[reason] = mine.get(reason, 0) + int(count)
    return counts


def side_by_side(results: Mapping[str, Any]) -> Table | None:
    """The differences for a terminal: families and constitutional arms down, trait arms across; None without such."""
    table = results.get("constitution")
    if not table or not table["rows"]:
        return None
    ours, theirs = (list(dict.fromkeys(row[key] for row in table["rows"])) for key in ("trait_arm", "arm"))
    cells = {(row["family"], row["trait_arm"], row["arm"]): row for row in table["rows"]}
    shown = Table(
        title="trait RL minus constitution, in points, with 95% intervals",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    shown.add_column("", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for arm in ours:
        shown.add_column(f"{arm} minus", justify="right")
    for family, more in {r["family"]: r["higher_is_better"] for r in table["rows"] if ": " not in r["family"]}.items():
        labels = [family] if more else [family, "[dim]less is better[/]"]
        for label, arm in zip_longest(labels, theirs, fillvalue=""):
            shown.add_row(label, arm, *(_cell(cells.get((family, mine, arm))) if arm else "" for mine in ours))
    return shown


def _cell(row: Mapping[str, Any] | None) -> Text:
    if row is None:
        return Text("–")
    return Text(points(row), style={"improved": "green", "regressed": "yellow"}.get(row["verdict"], ""))
