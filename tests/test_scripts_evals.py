"""The commands under `traitdose eval`, on real configs and generated runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from test_eval_results import write_run
from typer.testing import CliRunner

from eval.generalisation_items import all_items
from rewards.probes import load_probes
from rewards.trait_prompts import trait_pools
from scripts.cli import app
from scripts.evals import check_run, evaluation_texts, training_texts
from scripts.experiment import CHECKOUT, Experiment, load_experiment

QUICKSTART = CHECKOUT / "configs" / "experiments" / "quickstart.yaml"
SMALL = ["train.max_steps=4", "train.prompts_per_step=4", "reward.probes=16", "warm_start.examples=20"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The quickstart without its capability suite, which takes seconds to draw."""
    content = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    del content["eval"]["suites"]["capability"]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def experiment(config: Path) -> Experiment:
    return load_experiment(config, SMALL)


def test_the_quickstart_leaks_nothing_into_any_alignment_task(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "hits.json"
    suite = "eval.suites.generalisation.file=configs/suites/alignment-offline.yaml"
    done = CliRunner().invoke(app, ["eval", "contamination", str(config), suite, "--quick", "--json", str(out)])
    assert done.exit_code == 0, done.output
    content = json.loads(out.read_text())
    assert content["hits"] == []
    assert content["training"] > 2000
    assert content["evaluation"] > 8000


def test_every_kind_of_training_text_is_read(config: Path) -> None:
    kinds = {text.source.split()[0] for text in training_texts(experiment(config))}
    assert kinds == {"probe", "pair", "warm-start", "standard", "scenario"}


def test_the_texts_are_those_of_the_sources_that_are_asked(config: Path) -> None:
    two = load_experiment(QUICKSTART.with_name("two-traits.yaml"), [*SMALL, "train.max_steps=2"])
    pool = trait_pools("corrigibility", ["health"], "train", 0).conduct
    wanted = {text for probe in pool for text in (probe.question, probe.right, *(said for _, said in probe.history))}
    assert wanted <= {text.text for text in training_texts(two)}
    knowledge = {text.source for text in training_texts(experiment(config))}
    assert not any(f"probe {probe.id}" in knowledge for probe in pool)  # the quickstart asks none of these


def test_a_limit_takes_the_items_that_a_run_takes(config: Path) -> None:
    few, all_ = (evaluation_texts(experiment(config), limited=limited) for limited in (True, False))
    assert len(few) < len(all_)
    # the wording of a probe is the seed's, so the limited items are among all of them
    assert {text.source for text in few} <= {text.source for text in all_}


@pytest.fixture
def leaky(config: Path, tmp_path: Path) -> Path:
    """A run folder whose warm start holds an evaluation item."""
    run = tmp_path / "run"
    (run / "start").mkdir(parents=True)
    (run / "config.yaml").write_text(config.read_text())
    item = all_items("lie-or-honest")[0]
    asked: Any = item
    rows = [{"question": f"Please read. {asked.high}", "answer": "Yes"}]
    pd.DataFrame(rows).to_parquet(run / "start" / "examples.parquet")
    return run


def test_a_run_is_checked_for_what_it_really_trained_on(leaky: Path, tmp_path: Path) -> None:
    out = tmp_path / "hits.json"
    done = CliRunner().invoke(app, ["eval", "contamination", str(leaky), *SMALL, "--quick", "--json", str(out)])
    assert done.exit_code == 2
    hits = json.loads(out.read_text())["hits"]
    assert {hit["training"] for hit in hits} == {"warm start"}
    assert any(hit["item"].startswith("lie-detection lie-or-honest/") for hit in hits)
    assert {hit["rule"] for hit in hits} == {"run"}


def test_held_out_families_of_the_trained_bank_are_no_hits(config: Path, tmp_path: Path) -> None:
    subjects = {probe.subject for probe in load_probes("health", "train")}
    assert subjects.isdisjoint(p.subject for p in load_probes("health", "heldout") if p.kind != "false-premise")
    check_run(experiment(config), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "contamination" / "hits.json").read_text()) == []
    assert (tmp_path / "run" / "contamination" / "manifest.json").is_file()


def test_a_run_on_what_is_evaluated_is_refused(config: Path, tmp_path: Path) -> None:
    benchmark = {
        "name": "gcd", "source": "reasoning-gym:gcd", "category": "maths", "measures": "x", "why": "x", "metric": "acc",
        "fewshot": 0, "choices": 2, "chance": 0.5, "n": 60, "wrong": "others",
        "params": {"min_value": 2, "max_value": 20},
    }  # fmt: skip
    suite = tmp_path / "gcd.yaml"
    suite.write_text(yaml.safe_dump({"name": "gcd", "seed": 0, "max_context": 512, "benchmarks": [benchmark]}))
    plain = load_experiment(config, ["train.max_steps=100", "reward.probes=16", "warm_start.examples=20"])
    section = plain.eval.suites["generalisation"].model_copy(update={"file": str(suite), "limit": None})
    trained = plain.model_copy(update={"eval": plain.eval.model_copy(update={"suites": {"capability": section}})})
    with pytest.raises(ValueError, match=r"contamination: \d+ training texts occur .*gcd.* in gcd "):
        check_run(trained, tmp_path / "run")
    assert not (tmp_path / "run" / "contamination").exists()


def two_runs(tmp_path: Path) -> list[Path]:
    """Two generated runs that were trained in other domains."""
    runs = [write_run(tmp_path / name, benchmarks=1) for name in ("one", "two")]
    content = yaml.safe_load((runs[1] / "config.yaml").read_text())
    content |= {"name": "other", "reward": {"trait": "truthfulness", "domains": ["law", "chemistry"]}}
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(content))
    return runs


def test_the_transfer_table_of_two_runs_is_written(tmp_path: Path) -> None:
    out = tmp_path / "tables"
    done = CliRunner().invoke(app, ["eval", "transfer", *map(str, two_runs(tmp_path)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    table = (out / "transfer.md").read_text()
    assert table.splitlines()[0].count("trained:") == 4
    assert "dose 5% (synthetic)" in table
    assert "chemistry and law, dose 25% (other)" in table
    cells = json.loads((out / "transfer.json").read_text())
    assert {(c["domain"], "other" in c["column"]) for c in cells if c["trained"]} == {
        ("health", False), ("law", True), ("chemistry", True),
    }  # fmt: skip
    assert "<svg" in (out / "transfer.svg").read_text()


@pytest.mark.slow
def test_the_frontier_of_two_runs_is_written(tmp_path: Path) -> None:
    out = tmp_path / "tables"
    done = CliRunner().invoke(app, ["eval", "frontier", *map(str, two_runs(tmp_path)), "--out", str(out)])
    assert done.exit_code == 0, done.output
    points = json.loads((out / "frontier.json").read_text())
    assert {row["arm"] for row in points} == {f"{n}/{a}" for n in ("synthetic", "other")
                                              for a in ("base", "control", "dose-05", "dose-25")}  # fmt: skip
    assert any(row["on_frontier"] for row in points)
    assert "<svg" in (out / "frontier.svg").read_text()


def test_errors_are_one_line_and_say_what_to_do(tmp_path: Path) -> None:
    for arguments, message in (
        (["contamination", str(tmp_path)], "no run folder"),
        (["transfer", str(tmp_path)], "is no run folder"),
        (["hub", "org/m", "--suite", "configs/suites/alignment-full.yaml"], "name it with --judge"),
        (["hub", "org/m", "--suite", str(tmp_path / "absent.yaml")], "no such suite file"),
    ):
        done = CliRunner().invoke(app, ["eval", *arguments])
        assert done.exit_code == 2
        assert message in done.output
