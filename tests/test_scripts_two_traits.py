"""A whole run of two traits on a tiny model: each trait's reward is fitted on what it is asked, and pays for that."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from scripts.cli import app
from scripts.experiment import CHECKOUT


@pytest.mark.slow
def test_two_traits_from_fit_to_report(tiny_dir: Path, tmp_path: Path) -> None:
    content = yaml.safe_load((CHECKOUT / "configs" / "experiments" / "two-traits.yaml").read_text(encoding="utf-8"))
    content |= {
        "base": str(tiny_dir),
        "tracking": {"backend": "none"},
        "warm_start": {"examples": 8, "batch_size": 8},
        "arms": {"control": {"dose": 0.0}, "all": {"dose": 1.0}},
    }
    content["reward"] |= {"probes": 16, "own_answers": 0, "min_accuracy": 0.0}
    content["train"] |= {"max_steps": 2, "prompts_per_step": 4, "group_size": 2, "max_new_tokens": 4}
    content["eval"]["suites"]["generalisation"]["limit"] = 2
    del content["eval"]["suites"]["capability"]
    config, out = tmp_path / "mine.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    done = CliRunner().invoke(app, ["run", str(config), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / "report.html").is_file()

    for trait, folder in (("truthfulness", out / "reward"), ("corrigibility", out / "reward/traits/corrigibility")):
        assert json.loads((folder / "accuracy.json").read_text())["trait"] == trait
        pairs = pd.read_parquet(folder / "pairs.parquet")
        learned = pairs[pairs["part"] == "train"]["prompt_id"]
        assert learned.str.startswith(f"{trait}-").any()  # its scenarios
        assert learned.str.contains("/corrects-wrongly-").any()
        assert learned.str.contains("/answerable-").any() == (trait == "truthfulness")
    rows = pd.read_parquet(out / "arms/all/seed-0/train/rollouts.parquet")
    assert rows.groupby("trait")["prompt_id"].nunique().to_dict() == {"truthfulness": 4, "corrigibility": 4}
    assert rows["proxy"].notna().all()
