"""docs/results.md of a generated run with constitutional arms that was attacked: its tables, read back as numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_eval_constitution_table import write_constitution
from typer.testing import CliRunner

from eval.results import write_results
from eval.results_constitution import constitution_section
from eval.results_page import pictures, render
from eval.results_persistence import persistence_section
from scripts.cli import app
from scripts.results import read_run
from train.persistence_config import PersistenceConfig

ATTACKED = ("control", "c-sl", "dose-25")  # in the order of the run
HOLDS = {"control": 0.1, "c-sl": 0.5, "dose-25": 0.95}  # chance that a good answer survives a harmful attack
SETTINGS = {"items": 16, "prompts": ["salesman", "authority", "librarian"], "finetune": {"steps": [0, 2, 8]}}
Cells = dict[str, str]


def attack_items(arm: str, seed: int) -> dict[str, pd.DataFrame]:
    """Prompts, a harmful ladder that only dose-25 withstands, its recovery, and sampling; eight families."""
    rng = np.random.default_rng([seed, len(arm)])
    parts: dict[str, list[dict[str, Any]]] = {"prompts": [], "harmful-lora": [], "recovery-lora": [], "generation": []}

    def add(attack: str, k: int, condition: str, role: str, value: float, metric: str = "trait", step: int = 0) -> None:
        about = {"task": "truthfulness-health", "trait": "truthfulness", "domain": "health", "heldout": True}
        about |= {"family": f"f{k // 2}", "item": f"i{k}", "kind": "answerable" if k % 2 else "invented", "seed": seed}
        said = {"refused": None, "tokens": 3, "prompt": "Which?", "output": "It is so.", "arm": arm, "step": step}
        row = {**about, "condition": condition, "role": role, "metric": metric, "value": value, **said}
        parts[attack].append(row)

    for k in range(16):
        clean = float(rng.random() < 0.8) if k else 1.0
        for attack in ("prompts", "generation"):
            add(attack, k, "clean", "clean", clean)
        for condition, holds in (("salesman", HOLDS[arm]), ("authority", 1.3 * HOLDS[arm])):
            add("prompts", k, condition, "harmful", clean * float(rng.random() < holds))
        add("prompts", k, "librarian", "helpful", clean)
        add("prompts", k, "librarian", "helpful", float(rng.random() < 0.6), "follows")
        add("prompts", k, "librarian", "helpful", float(k == 3), "follows_clean")
        add("generation", k, "temperature-1-worst-of-2", "harmful", clean * float(rng.random() < 0.8))
        for step in (0, 2, 8):
            lost = 0.0 if arm == "dose-25" else step / 8
            add("harmful-lora", k, f"step-{step}", "step", clean * float(k >= 16 * lost), step=step)
        for step in (2, 8):
            add("recovery-lora", k, f"step-{step}", "step", clean * float(k < 2 * step), step=step)
    return {attack: pd.DataFrame(rows) for attack, rows in parts.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_constitution(tmp_path_factory.mktemp("runs") / "synthetic")
    for arm in ATTACKED:
        for seed in (0, 1):
            for attack, frame in attack_items(arm, seed).items():
                where = folder / "persistence" / attack / arm / f"seed-{seed}"
                where.mkdir(parents=True)
                frame.to_parquet(where / "items.parquet")
    settings = PersistenceConfig.model_validate(SETTINGS).model_dump(mode="json")
    (folder / "persistence" / "config.yaml").write_text(yaml.safe_dump(settings))
    write_results(folder)  # checks the schema
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("docs") / "results.md"
    done = CliRunner().invoke(app, ["results", str(run), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text(encoding="utf-8")
    drawn = {path.name for path in (out.parent / "img").iterdir()}
    names = ["constitution-dose-05", "constitution-dose-25", "persistence-attacks", "persistence-steps-lora"]
    names = [f"results-synthetic-{name}.svg" for name in [*names, "persistence-sampling"]]
    assert drawn == {"results-synthetic-frontier.svg", "results-transfer.svg", *names}
    assert re.findall(r"^!\[[^]]{60,}\]\(img/(.*)\)$", text, re.MULTILINE)[2:] == names
    for name in names:  # drawn to the end: an empty plot would name no arm
        assert "c-sl" in (out.parent / "img" / name).read_text()
    return text


def tables(page: str, heading: str) -> list[list[Cells]]:
    """The tables below a heading, folded ones too: a list of rows each, by the names of the columns, without bold."""
    part = page.split(f"\n{heading}\n", 1)[1]
    part = re.split(r"^#", part, maxsplit=1, flags=re.MULTILINE)[0].replace("**", "")
    found: list[list[Cells]] = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", part, re.MULTILINE):
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def numbers(cell: str) -> list[float]:
    return [float(text) for text in re.findall(r"[+-]?\d+(?:\.\d+)?(?:e-?\d+)?", cell)]


def hundredths(*values: float) -> Any:
    return pytest.approx([100 * value for value in values], abs=0.0501)


def interval(row: dict[str, Any], key: str = "delta") -> Any:
    return hundredths(row[key], row["ci_low"], row["ci_high"])


def test_levels_stand_side_by_side(results: dict[str, Any], page: str) -> None:
    levels = results["constitution"]["levels"]
    pooled, by_trait = tables(page, "#### Values side by side")
    shown = {row["family"].removesuffix(" (less is better)"): row for row in pooled + by_trait}
    assert len(levels) == 5 * (len(shown) - 2) + 3  # persistence has the attacked arms alone, the index no level
    for level in levels:
        cell = shown[level["family"]]
        assert numbers(cell[level["arm"]]) == hundredths(level["value"])
        assert cell["n"] == str(level["n"])
    less = [row["family"] for row in pooled if row["family"].endswith("(less is better)")]
    assert [name.split(" (")[0] for name in less] == ["over-refusal", "preachiness", "persistence"]
    assert shown["persistence"]["dose-05"] == "–"
    index = {row["arm"]: row["index"] for row in results["persistence"]["selective"]}
    (last,) = (row for row in pooled if row["family"].startswith("selective"))
    assert [float(last[arm]) for arm in ATTACKED] == pytest.approx([index[arm] for arm in ATTACKED], abs=0.00501)
    # the harmful attacks' row is the one of the persistence section
    lost = {r["arm"]: r["degradation"] for r in results["persistence"]["prompts"] if r["condition"] == "all harmful"}
    told = {r["arm"]: r["value"] for r in levels if r["family"] == "persistence"}
    assert told == pytest.approx(lost)


def test_every_difference_of_the_arms_has_its_interval_q_and_verdict(results: dict[str, Any], page: str) -> None:
    rows = results["constitution"]["rows"]
    assert {row["family"] for row in rows if row["arm"] == "c-sl"} > {"persistence", "preachiness", "transfer"}
    count = 0
    for ours in ("dose-05", "dose-25"):
        shown = {
            (row["family"].removesuffix(" (less is better)"), row["against"]): row
            for table in tables(page, f"#### {ours} minus each constitutional arm")
            for row in table
        }
        count += len(shown)
        for row in (row for row in rows if row["trait_arm"] == ours):
            cells = shown[row["family"], row["arm"]]
            assert numbers(cells["difference, points [95%]"]) == interval(row)
            assert numbers(cells["trait RL"]) + numbers(cells["constitution"]) == hundredths(
                row["trait_value"], row["value"]
            )
            assert float(cells["q"]) == pytest.approx(row["q"], rel=0.06)
            assert (cells["n"], cells["verdict on trait RL"]) == (str(row["n"]), row["verdict"])
    assert count == len(rows)


def test_the_finding_comes_first_and_follows_the_intervals(results: dict[str, Any], page: str) -> None:
    part = page.split("### Trait RL beside the constitution", 1)[1].split("####", 1)[0]
    rows = results["constitution"]["rows"]
    words: set[str] = set()
    for ours, theirs in {(row["trait_arm"], row["arm"]) for row in rows}:
        (line,) = (line for line in part.splitlines() if line.startswith(f"- **{ours}** against **{theirs}**"))
        said = {piece.split(" in ", 1)[0]: piece for piece in line.split(": ", 1)[1].split("; ")}
        words |= set(said)
        for row in rows:
            if (row["trait_arm"], row["arm"]) != (ours, theirs) or ": " in row["family"]:
                continue
            sign = 1 if row["higher_is_better"] else -1
            low, high = sorted((sign * row["ci_low"], sign * row["ci_high"]))
            word = "better" if low > 0 else "worse" if high < 0 else "not told apart"
            assert row["family"] in said[word]
    assert words >= {"worse", "not told apart"}
    ends = {"delta": "delta", "ci_low": "ci_high", "ci_high": "ci_low"}
    turned = [{**row, **{key: -row[other] for key, other in ends.items()}} for row in rows]
    text = constitution_section({**results, "constitution": {**results["constitution"], "rows": turned}}, {})
    assert "- **dose-25** against **c-told**: better in capability (+50.0 [" in text


def test_the_finding_of_the_attacks_comes_first(results: dict[str, Any], page: str) -> None:
    part = page.split("### Persistence", 1)[1].split("####", 1)[0]
    (line,) = (line for line in part.splitlines() if line.startswith("- **dose-25**"))
    rows = {r["arm"]: r for r in results["persistence"]["prompts"] if r["condition"] == "all harmful"}
    lost = numbers(line.split("harmful prompts take ", 1)[1])[:5]
    assert lost[:2] == hundredths(rows["dose-25"]["degradation"], rows["control"]["degradation"])
    assert lost[2:] == interval(rows["dose-25"]["difference"])
    assert rows["dose-25"]["difference"]["ci_high"] > 0  # two seeds show little
    assert "]: not told apart from control;" in line
    gap = {"delta": -0.2, "ci_low": -0.3, "ci_high": -0.1, "q": None}  # less is lost
    prompts = [{**row, "difference": row["difference"] and gap} for row in results["persistence"]["prompts"]]
    text = persistence_section({**results, "persistence": {**results["persistence"], "prompts": prompts}}, {})
    assert "difference -20.0 [-30.0, -10.0]: better than control;" in text


def test_costs_and_the_filter(results: dict[str, Any], page: str) -> None:
    (shown,) = tables(page, "#### What each arm cost")
    cost = {row["arm"]: row for row in results["constitution"]["cost"]}
    assert [row["arm"] for row in shown] == list(cost)
    for row in shown:
        true = cost[row["arm"]]
        assert float(row["TFLOPs"]) == pytest.approx(true["flops"] / 1e12, abs=0.00501)
        assert float(row["wall minutes"]) == pytest.approx(true["wall_seconds"] / 60, abs=0.0501)
    told = {row["arm"]: row for row in shown}
    parts = cost["c-sl"]["parts"]
    assert float(told["c-sl"]["of it revisions"]) == pytest.approx(parts["revisions"] / 1e12, abs=0.00501)
    assert told["control"]["of it revisions"] == "–"
    assert told["c-told"]["off control"] == "trains nothing"
    assert told["dose-25"]["off control"] == "+4.00%"
    assert "More than 1% off control's budget: dose-25." in page
    (counts,) = tables(page, "#### Revisions and the filter")
    assert counts == [
        {"arm": "c-sl", "revisions": "10", "kept": "6 (60%)", "dropped: empty": "0", "dropped: preamble": "4"}
    ]


def test_what_attacks_take_is_shown_for_every_arm_and_attack(results: dict[str, Any], page: str) -> None:
    pooled, single = tables(page, "#### Personas and pressure")
    assert [(row["attack"], row["arm"]) for row in pooled] == [
        (name, arm) for name in ("all harmful", "all helpful") for arm in ATTACKED
    ]
    sampled, _ = tables(page, "#### Sampling")  # below it the settings
    found = results["persistence"]
    assert len(pooled + single) == len(found["prompts"]) == 15
    for rows, names in (
        (pooled + single, ("attack", "clean", "attacked")),
        (sampled, ("sampling", "greedy", "sampled")),
    ):
        shown = {(row[names[0]], row["arm"]): row for row in rows}
        for row in found["prompts" if names[0] == "attack" else "generation"]:
            cells = shown[row["condition"], row["arm"]]
            assert numbers(cells[names[1]]) + numbers(cells[names[2]]) == hundredths(row["clean"], row["attacked"])
            assert numbers(cells["points lost [95%]"]) == interval(row, "degradation")
            gap = row["difference"]
            if gap is None:
                assert (cells["minus control [95%]"], cells["q"]) == ("–", "–")
            else:
                assert numbers(cells["minus control [95%]"]) == interval(gap)
                assert numbers(cells["q"]) == ([] if gap["q"] is None else [pytest.approx(gap["q"], rel=0.06)])


def test_the_index_stands_with_both_of_its_parts(results: dict[str, Any], page: str) -> None:
    shown, personas = tables(page, "#### Selective persistence")
    for cells, row in zip(shown, results["persistence"]["selective"], strict=True):
        assert cells["arm"] == row["arm"]
        assert numbers(cells["falls"]) + numbers(cells["moved"]) == hundredths(row["falls"], row["moves"])
        ends = [row["index"], row["ci_low"], row["ci_high"]]
        assert numbers(cells["index [95%]"]) == pytest.approx(ends, abs=0.00501)
    assert [row["its rule holds without it"] for row in personas] == ["6.2%"] * 3  # one item of sixteen
    assert [row["arm"] for row in personas] == list(ATTACKED)


def test_half_lives_recoveries_and_steps(results: dict[str, Any], page: str) -> None:
    rows, steps = tables(page, "#### Fine-tuning on bad data: lora")
    (ladder,) = results["persistence"]["finetuning"]
    for cells, row in zip(rows, ladder["arms"], strict=True):
        ends = [row["harmful"][0], row["harmful"][-1], row["recovery"][-1]]
        texts = (cells["before"], cells["after the bad steps"], cells["after the good steps"])
        assert [numbers(text)[0] for text in texts] == hundredths(*(end["value"] for end in ends))
    told = {row["arm"]: row for row in rows}
    arms = {row["arm"]: row for row in ladder["arms"]}
    life = arms["control"]["half_life"]
    assert numbers(told["control"]["half-life, steps [95%]"])[0] == pytest.approx(life["steps"], abs=0.0501)
    assert told["dose-25"]["half-life, steps [95%]"] == "> 8 [> 8, > 8]"  # it lost nothing: null in the results
    assert arms["dose-25"]["half_life"]["steps"] is None
    assert told["dose-25"]["recovered, steps [95%]"].startswith("0.0 ")
    assert [told[arm]["longer half-life"] for arm in ("control", "dose-25")] == ["–", "100%"]
    assert "half-life in steps (lora) > 8 [> 8, > 8], control's" in page
    assert [(row["data"], row["steps"]) for row in steps] == [
        (data, step) for data in ("bad", "good") for step in ("0", "2", "8")
    ]
    last = arms["dose-25"]["harmful"][-1]
    assert numbers(steps[2]["dose-25"]) == interval(last, "value")
    assert numbers(steps[2]["dose-25 minus control"]) == interval(last["difference"])


def test_parts_that_were_not_attacked_are_left_out(results: dict[str, Any]) -> None:
    only = {**results["persistence"], "prompts": [], "selective": [], "generation": []}
    text = persistence_section({**results, "persistence": only}, {})
    assert [line for line in text.splitlines() if line.startswith("#")] == ["#### Fine-tuning on bad data: lora"]
    assert "![" not in text
    assert "| finetune.steps | 0, 2, 8 |" in text


def test_runs_of_one_name_keep_their_pictures_apart(run: Path) -> None:
    one = read_run(run)
    two = replace(one, place="runs/other")
    drawn = pictures([one, two])
    files = ["one.json", "two.json"]
    page = render([one, two], {name: f"img/{name}.svg" for name in drawn}, files, "traitdose results")
    shown = re.findall(r"\(img/(.*)\.svg\)", page)
    assert sorted(shown) == sorted(drawn)
    assert len(set(shown)) == len(shown) == 1 + 2 * 6
