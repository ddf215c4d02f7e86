"""`traitdose results`: a page such as docs/results.md, its pictures, and the numbers behind it, from finished runs.

The numbers of each run are kept beside the page, so that the page can be made again, with further runs, where the run
folders no longer are: such a file is named in place of the folder.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import vl_convert
from rich.console import Console

from eval.results import SCHEMA
from eval.results_page import Run, labels, pictures, render
from scripts.stages import MANIFEST, write_text

TOLD = ("started", "wall_seconds", "cpu_seconds", "git_commit")  # of a stage's manifest
PACKAGES = ("torch", "transformers", "trl")


def write_results_page(runs: Sequence[Path], out: Path, console: Console) -> None:
    """Write the page, its pictures into img/ beside it, and each run's numbers into a folder of the page's name.

    runs: run folders, or files of numbers that this has written. Raises ValueError for a run that is not finished.
    """
    if out.is_dir() or out.suffix != ".md":
        raise ValueError(f"--out {out}: name a Markdown file, such as {out.with_suffix('') / 'results.md'}")
    found = [read_numbers(run) if run.is_file() else read_run(run) for run in runs]
    command = shlex.join(["traitdose", "results", *map(str, runs), "--out", str(out)])
    images: dict[str, str] = {}
    for name, chart in pictures(found).items():
        picture = out.parent / "img" / f"{out.stem}-{name}.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_text(picture, vl_convert.vegalite_to_svg(chart))
        images[name] = f"img/{picture.name}"
        console.print(str(picture), soft_wrap=True, highlight=False)
    numbers = [out.parent / out.stem / f"{label}.json" for label in labels(found)]
    for run, path in zip(found, numbers, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asdict(run), ensure_ascii=False, allow_nan=False) + "\n")
        console.print(str(path), soft_wrap=True, highlight=False)
    links = [f"{out.stem}/{path.name}" for path in numbers]
    write_text(out, render(found, images, links, command))
    console.print(str(out), soft_wrap=True, highlight=False)


def read_run(run: Path) -> Run:
    """A finished run. Raises ValueError that names what is missing and how to make it."""
    path = run / "results.json"
    if run.suffix == ".json":
        raise ValueError(f"{run}: there is no such file; name a run folder, or numbers that `traitdose results` wrote")
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run is not finished; run `traitdose run` with its config again")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _check(results, path, f"make it again with `traitdose report {run}`")
    stages = {
        str(file.parent.relative_to(run)): _stage(json.loads(file.read_text(encoding="utf-8")))
        for file in sorted(run.glob(f"**/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
        if not any(part.endswith((".partial", ".stale")) for part in file.relative_to(run).parts)
    }
    return Run(str(run), results, stages)


def read_numbers(path: Path) -> Run:
    """A run from the numbers that were kept of it. Raises ValueError where the file is none of those."""
    remedy = "name a run folder, or a file that `traitdose results` wrote beside its page"
    try:
        found = Run(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} has no numbers of a run; {remedy}") from None
    _check(dict(found.results), path, remedy)
    return found


def _stage(manifest: Mapping[str, Any]) -> dict[str, Any]:
    versions = manifest.get("packages") or {}
    return {key: manifest.get(key) for key in TOLD} | {
        "packages": {name: versions[name] for name in PACKAGES if name in versions}
    }


def _check(results: dict[str, Any], path: Path, remedy: str) -> None:
    try:
        jsonschema.validate(results, json.loads(SCHEMA.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        raise ValueError(
            f"{path}: {error.json_path}: {error.message[:200]}; the file is of another version: {remedy}"
        ) from None
