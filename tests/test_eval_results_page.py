"""docs/results.md from generated runs: every number of results.json, and nothing else."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_eval_results import write_run
from typer.testing import CliRunner

from eval.markdown import table
from eval.results import write_results
from eval.results_page import render
from eval.wording import points
from scripts.cli import app
from scripts.results import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "synthetic", benchmarks=3, items=20)
    write_results(folder)
    for path in folder.glob("**/manifest.json"):
        more = {"started": "2026-11-22T08:00:00+00:00", "cpu_seconds": 36.0, "git_commit": "0123456789abcdef",
                "packages": {"torch": "2.13.0"}}  # fmt: skip
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return folder


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("docs") / "results.md"
    done = CliRunner().invoke(app, ["results", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (out.parent / "img").iterdir()) == [
        "results-synthetic-frontier.svg", "results-transfer.svg",
    ]  # fmt: skip
    for picture in (out.parent / "img").iterdir():
        assert "<svg" in picture.read_text()
    return out.read_text(encoding="utf-8")


def test_every_comparison_stands_on_the_page(run: Path, page: str) -> None:
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    rows = results["generalisation"] + [t for suite in results["capability"].values() for t in suite["tasks"]]
    for row in rows:
        assert f"{points(row)} {row['verdict']}" in page
    for cell in results["transfer"]:
        assert points(cell) in page
    for row in results["generalisation"]:
        if row["non_refusal"]:
            shown = points({"delta": row["delta_non_refusal"], **row["non_refusal"]})
            assert f"| {shown} | {row['non_refusal']['n']} |" in page
    for claim in results["claims"]:
        assert claim["text"] in page
    dose = results["capability"]["dose-25"]
    counts = [dose["improved"], dose["unchanged"], dose["regressed"]]
    assert f"| dose-25 | 3 | 20 | {' | '.join(map(str, counts))} |" in page


def test_hours_are_those_of_the_manifests(page: str) -> None:
    # three arms of one seed trained for 100 seconds each, evaluations of 20 seconds, a reward model of 60
    assert "| arms/control/train | 1 | 0.03 | 0.01 |" in page
    assert "| reward | 1 | 0.02 | 0.01 |" in page
    assert "0123456789ab" in page
    assert "torch 2.13.0" in page


def test_it_is_sound_markdown(page: str) -> None:
    tables = re.findall(r"(?:^\|.*\|$\n?)+", page, re.MULTILINE)
    assert len(tables) >= 8
    for lines in (found.splitlines() for found in tables):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert page.count("<details>") == page.count("</details>")
    assert re.findall(r"^!\[[^]]{60,}\]\(img/(.*)\)$", page, re.MULTILINE) == [
        "results-transfer.svg",
        "results-synthetic-frontier.svg",
    ]
    assert "nan" not in page.lower().replace("constitution", "").split()


def test_a_run_without_constitution_and_attacks_has_no_section_of_them(run: Path, page: str) -> None:
    results = json.loads((run / "results.json").read_text())
    assert results["persistence"] is None
    assert results["constitution"] is None
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert not [line for line in headings if "ersistence" in line or "onstitution" in line]


def test_a_table_keeps_its_columns() -> None:
    assert table(("a", "b"), [("x|y", "+1.0"), ("z\nz", "2")]).splitlines() == [
        "| a | b |", "|---|---:|", "| x\\|y | +1.0 |", "| z z | 2 |",
    ]  # fmt: skip
    assert table(("a", "b"), [("x", "> 32 [5.3, > 32]")]).splitlines()[1] == "|---|---:|"


def test_two_runs_share_one_transfer_table(run: Path) -> None:
    one = read_run(run)
    two = replace(one, place="runs/other", results={**one.results, "experiment": "other"})
    page = render([one, two], {}, ["one.json", "two.json"], "traitdose results")
    assert page.count("## Run ") == 2
    header = next(line for line in page.splitlines() if line.startswith("| evaluated |"))
    assert header.count("dose 5% (synthetic)") == header.count("dose 5% (other)") == 1
    assert page.count("### Honesty as a pair") == 2
    assert "![" not in page


def test_the_page_says_what_a_verdict_and_a_benchmark_are(run: Path, page: str) -> None:
    assert (
        "*equivalent* when two one-sided tests at 5% place the difference within ±5 points, that is, when its 90% "
        in page
    )
    assert page.split("### Capability\n\n")[1].startswith(
        "Every benchmark is recast as multiple choice, sets with free"
    )
    one = read_run(run)
    row = next(row for row in one.results["generalisation"] if row["task"] == "truthfulness-law")
    harmless = {**row, "task": "over-refusal-xstest", "metric": "complied"}
    shown = render([replace(one, results={**one.results, "generalisation": [harmless]})], {}, ["one.json"], "x")
    assert shown.count("| over-refusal-xstest (complied) |") == 2  # by trait, and where neither refuses


def test_what_is_no_finished_run_is_named(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["results", str(tmp_path), "--out", str(tmp_path / "r.md")])
    assert done.exit_code == 2
    assert "the run is not finished" in done.output
    (tmp_path / "results.json").write_text(json.dumps({"schema_version": 1}))
    done = CliRunner().invoke(app, ["results", str(tmp_path), "--out", str(tmp_path / "r.md")])
    assert done.exit_code == 2
    assert "traitdose report" in done.output


def test_the_page_can_be_made_again_from_its_numbers(run: Path, page: str, tmp_path: Path) -> None:
    """The kept numbers stand for the run folder: the same page and pictures, but for the command that made it."""
    first, again = tmp_path / "first" / "results.md", tmp_path / "again" / "results.md"
    done = CliRunner().invoke(app, ["results", str(run), "--out", str(first)])
    assert done.exit_code == 0, done.output
    assert first.read_text().replace(str(first), "") == page.replace(page.split("--out ")[1].split("`")[0], "")
    numbers = first.parent / "results" / "synthetic.json"
    done = CliRunner().invoke(app, ["results", str(numbers), "--out", str(again)])
    assert done.exit_code == 0, done.output
    files = [file.relative_to(first.parent) for file in first.parent.rglob("*") if file.is_file()]
    assert len(files) == 4
    for file in files:
        old, new = ((folder.parent / file).read_text() for folder in (first, again))
        old, new = (re.sub(r"gradient_\d+", "", text) for text in (old, new))  # counted through a process
        if file.suffix == ".md":
            old, new = (text.split("from finished runs", 1)[1] for text in (old, new))
        assert old == new
    assert f"({numbers.parent.name}/{numbers.name})" in again.read_text()


def test_a_file_that_has_no_numbers_is_named(tmp_path: Path) -> None:
    for content in ("{}", "no json", json.dumps({"place": "runs/a", "results": {"schema_version": 1}, "stages": {}})):
        (tmp_path / "a.json").write_text(content)
        done = CliRunner().invoke(app, ["results", str(tmp_path / "a.json"), "--out", str(tmp_path / "r.md")])
        assert done.exit_code == 2
        assert "a.json" in done.output
        assert "wrote beside its page" in " ".join(done.output.split())
