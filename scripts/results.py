"""`traitdose results`: docs/results.md and its pictures from finished runs."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import vl_convert
from rich.console import Console

from eval.results import SCHEMA
from eval.results_page import Run, pictures, render
from scripts.stages import MANIFEST, write_text


def write_results_page(runs: Sequence[Path], out: Path, console: Console) -> None:
    """Write the page, and its pictures into img/ beside it. Raises ValueError for a run that is not finished."""
    found = [read_run(run) for run in runs]
    command = shlex.join(["traitdose", "results", *map(str, runs), "--out", str(out)])
    images: dict[str, str] = {}
    for name, chart in pictures(found).items():
        picture = out.parent / "img" / f"{out.stem}-{name}.svg"
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_text(picture, vl_convert.vegalite_to_svg(chart))
        images[name] = os.path.relpath(picture, out.parent).replace(os.sep, "/")
        console.print(str(picture), soft_wrap=True, highlight=False)
    write_text(out, render(found, images, command))
    console.print(str(out), soft_wrap=True, highlight=False)


def read_run(run: Path) -> Run:
    """A finished run. Raises ValueError that names what is missing and how to make it."""
    path = run / "results.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run is not finished; run `traitdose run` with its config again")
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    try:
        jsonschema.validate(results, json.loads(SCHEMA.read_text(encoding="utf-8")))
    except jsonschema.ValidationError as error:
        raise ValueError(
            f"{path}: {error.json_path}: {error.message[:200]}; the file is of another version: make it again with "
            f"`traitdose report {run}`"
        ) from None
    manifests = {
        str(file.parent.relative_to(run)): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(run.glob(f"**/{MANIFEST}"), key=lambda file: file.stat().st_mtime)
        if not any(part.endswith((".partial", ".stale")) for part in file.relative_to(run).parts)
    }
    return Run(str(run), results, manifests)
