"""The whole constitutional experiment on the tiny model, from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from rewards.constitution import load_constitution
from scripts.cli import app
from scripts.experiment import CHECKOUT, load_experiment
from scripts.plan_constitution import fine_tuned_models, part_flops
from scripts.run import list_stages

SHIPPED = CHECKOUT / "configs" / "experiments" / "constitution.yaml"


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path) -> Path:
    content = yaml.safe_load(SHIPPED.read_text())
    content |= {"base": str(tiny_dir), "seeds": [0, 1], "tracking": {"backend": "none"}}
    content["warm_start"] = {"examples": 16, "batch_size": 8, "lora_rank": 2}
    content["reward"] |= {"probes": 16, "min_accuracy": 0.0, "audit": "warn"}
    content["train"] = {
        "budget_tflops": 0.02, "max_steps": 1600, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4,
        "lora_rank": 2,
    }  # fmt: skip
    content["constitution"] = {"demonstrations": 1, "critique_tokens": 4, "principles": 1, "lora_rank": 2}
    for suite in content["eval"]["suites"].values():
        suite["limit"] = 2
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_stages_and_plan(config: Path, tmp_path: Path) -> None:
    """The parts in their order, each after the ones before it; a trait arm's stages are as ever."""
    experiment = load_experiment(config)
    stages = {stage.name: stage for stage in list_stages(experiment, tmp_path / "run")}
    rl = [f"arms/constitution-rl/seed-1/{part}" for part in ("revisions", "sl", "feedback", "preference", "train")]
    assert [name for name in stages if name.startswith("arms/constitution-rl/seed-1")] == [*rl, rl[0][:-9] + "eval"]
    for k, name in enumerate(rl):
        assert stages[name].needs == ("start", *rl[:k])
        assert stages[name].together == (k == 4)
    assert stages["arms/constitution-prompt/seed-0/eval"].needs == ("start",)
    constitution = load_constitution(CHECKOUT / "configs" / "constitution" / "constitution.yaml")
    assert stages["arms/constitution-prompt/seed-0/eval"].inputs["system"] == constitution.system_prompt()
    assert "system" not in stages["arms/constitution-sl/seed-0/eval"].inputs
    assert stages["arms/trait-rl/seed-0/train"].inputs["arm"] == {"dose": 0.25}
    for arm in experiment.arms:
        if arm.startswith("constitution-") and arm != "constitution-prompt":
            assert sum(part_flops(experiment, arm).values()) == pytest.approx(2e10)
    assert part_flops(experiment, "constitution-prompt") == {}
    assert fine_tuned_models(experiment) == 2


@pytest.mark.slow
def test_the_experiment_from_command_line_to_report(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", str(config), "seeds=[0]", "--out", str(run)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "revisions, dropped" in result.stdout
    results = json.loads((run / "results.json").read_text())
    cost = {row["arm"]: row for row in results["constitution"]["cost"]}
    assert not any(row["off_budget"] for row in cost.values())
    assert cost["constitution-prompt"]["flops"] == 0
    assert list(cost["constitution-rl"]["parts"]) == ["revisions", "sl", "feedback", "preference", "train"]
    rows = results["constitution"]["rows"]
    arms = {"constitution-prompt", "constitution-sl", "constitution-rl", "constitution-dpo"}
    assert {(row["trait_arm"], row["arm"]) for row in rows} == {("trait-rl", arm) for arm in arms}
    families = {"in-distribution", "transfer", "over-refusal", "capability", "preachiness"}
    assert families <= {row["family"] for row in rows if row["arm"] == "constitution-dpo"}
    told = pd.read_parquet(run / "arms" / "constitution-prompt" / "seed-0" / "eval" / "items.parquet")
    assert told[told["suite"] == "capability"]["prompt"].str.startswith("You are a helpful assistant.").all()
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "trait-rl minus constitution-rl" in page
    assert page.count("P(first is better)") == 20
    assert "more than 1% off" not in page
    again = CliRunner().invoke(app, ["run", str(config), "seeds=[0]", "--out", str(run)])
    assert "already whole" in again.stdout
    assert "stages" in again.stdout
