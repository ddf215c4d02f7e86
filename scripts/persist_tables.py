"""`traitdose eval persistence RUN`: the persistence part of a run's results as Markdown and pictures for a document."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from scripts.stages import write_text


def write_persistence(run_dir: Path, out: Path, console: Console) -> None:
    """Write persistence.md and a picture of every plot. Raises ValueError if the run was not attacked."""
    import vl_convert

    from eval.results import build_results
    from eval.results_persistence import persistence_pictures, persistence_section

    results = build_results(run_dir)
    if results["persistence"] is None:
        raise ValueError(f"{run_dir}: the run was not attacked; run `traitdose persist {run_dir}` first")
    out.mkdir(parents=True, exist_ok=True)
    charts = persistence_pictures(results)
    paths = [out / "persistence.md"]
    write_text(paths[0], persistence_section(results, {name: f"{name}.svg" for name in charts}) + "\n")
    for name, chart in charts.items():
        paths.append(out / f"{name}.svg")
        write_text(paths[-1], vl_convert.vegalite_to_svg(chart))
    for path in paths:
        console.print(str(path), soft_wrap=True, highlight=False)
