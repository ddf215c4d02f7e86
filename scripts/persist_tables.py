"""`traitdose eval persistence RUN`: the persistence part of a run's results as Markdown and pictures for a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from scripts.stages import write_text

WIDTH = 680  # pixels of a picture
Row = Mapping[str, Any]


def write_persistence(run_dir: Path, out: Path, console: Console) -> None:
    """Write persistence.md and a picture of every plot. Raises ValueError if the run was not attacked."""
    import vl_convert

    from eval.report_charts import arm_colours
    from eval.report_persistence import persistence_charts
    from eval.results import build_results

    results = build_results(run_dir)
    if results["persistence"] is None:
        raise ValueError(f"{run_dir}: the run was not attacked; run `traitdose persist {run_dir}` first")
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "persistence.md"]
    write_text(paths[0], markdown(results["persistence"]))
    for name, chart in persistence_charts(results, arm_colours(results)).items():
        paths.append(out / f"{name.replace(':', '-')}.svg")
        write_text(paths[-1], vl_convert.vegalite_to_svg({**chart, "width": WIDTH}))
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)


def markdown(found: Row) -> str:
    """The tables: prompt attacks, selective persistence, fine-tuning, sampling; those without rows are left out."""
    parts: list[str] = []
    if found["prompts"]:
        parts.append(_table("attack", "points lost [95%]", found["prompts"]))
    if found["selective"]:
        parts.append("\n".join(_selective(found["selective"])))
    for ladder in found["finetuning"]:
        parts.append("\n".join(_ladder(ladder)))
    if found["generation"]:
        parts.append(_table("sampling", "points lost to greedy [95%]", found["generation"]))
    return "\n\n".join(parts) + "\n"


def _table(what: str, lost: str, rows: list[Row]) -> str:
    lines = [f"| {what} | arm | n | clean | attacked | {lost} | minus control [95%] |", "|---|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        values = f"{row['n']} | {100 * row['clean']:.1f}% | {100 * row['attacked']:.1f}%"
        lost_points = _points(row["degradation"], row)
        lines.append(f"| {row['condition']} | {row['arm']} | {values} | {lost_points} | {_difference(row)} |")
    return "\n".join(lines)


def _selective(rows: list[Row]) -> Iterator[str]:
    yield "| arm | good answers that fall | replies that a helpful persona moves | index [95%] | minus control [95%] |"
    yield "|---|--:|--:|--:|--:|"
    for row in rows:
        index = f"{row['index']:+.2f} [{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"
        gap = row["difference"]
        versus = f"{gap['delta']:+.2f} [{gap['ci_low']:+.2f}, {gap['ci_high']:+.2f}]" if gap else "–"
        yield f"| {row['arm']} | {100 * row['falls']:.1f}% | {100 * row['moves']:.1f}% | {index} | {versus} |"


def _ladder(ladder: Row) -> Iterator[str]:
    from eval.report_persistence import crossing_text

    heads = "n | before | after | half-life, steps [95%] | longer than control's | recovered, steps [95%]"
    yield f"| {ladder['method']} | {heads} |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    nothing = "score above the floor"
    for row in ladder["arms"]:
        first, last = row["harmful"][0]["value"], row["harmful"][-1]["value"]
        share = row["half_life_longer_than_control"]
        longer = "–" if share is None else f"{100 * share:.0f}%"
        back = crossing_text(row["recovered"], nothing) if row["recovery"] else "–"
        life = crossing_text(row["half_life"], nothing)
        yield f"| {row['arm']} | {row['n']} | {100 * first:.1f}% | {100 * last:.1f}% | {life} | {longer} | {back} |"


def _points(value: float, row: Row) -> str:
    return f"{100 * value:+.1f} [{100 * row['ci_low']:+.1f}, {100 * row['ci_high']:+.1f}]"


def _difference(row: Row) -> str:
    return _points(row["difference"]["delta"], row["difference"]) if row["difference"] else "–"
