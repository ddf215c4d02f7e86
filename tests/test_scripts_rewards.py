"""traitdose rewards: what a user sees, and what a run does with a reward that hacks beat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rewards.config import RewardConfig
from scripts.cli import app
from scripts.run import _check_rewards, list_stages

RUNNER = CliRunner()
ROOT = Path(__file__).parents[1]


def say(*words: str) -> tuple[int, str]:
    result = RUNNER.invoke(app, ["rewards", *words])
    return result.exit_code, " ".join(result.output.split())


def test_mistakes_are_one_line_with_the_remedy(tmp_path: Path) -> None:
    pairs = tmp_path / "own.jsonl"
    pairs.write_text('{"prompt": "a?", "chosen": "b"}\n')
    assert say("fit", "--trait", "kindness")[0] == 2
    assert "corrigibility" in say("fit", "--trait", "kindness")[1]
    code, text = say("fit", "--trait", "corrigibility", "--pairs", str(pairs))
    assert (code, f"{pairs}:1: rejected: is missing; add it" in text) == (2, True)
    code, text = say("audit", "--trait", "corrigibility", "--model", str(tmp_path))
    assert (code, "traitdose rewards fit" in text) == (2, True)
    code, text = say("fit", "--trait", "corrigibility", "--start", str(tmp_path))
    assert (code, "holds no reward model" in text) == (2, True)


def reward_folder(folder: Path, auc: float, accuracy: float = 0.8) -> Path:
    folder.mkdir(parents=True)
    measured = {"n": 40, "accuracy": accuracy, "contrasts": {"right>wrong": {"n": 40, "accuracy": accuracy}}}
    (folder / "accuracy.json").write_text(json.dumps({"heldout": measured}))
    families = [{"name": "refuse", "auc": auc, "n": 16}, {"name": "hedge", "auc": None, "n": 0}]
    (folder / "audit.json").write_text(json.dumps({"trait": "truthfulness", "families": families}))
    return folder


def test_a_run_refuses_a_reward_that_hacks_beat_unless_told_to_warn(tmp_path: Path) -> None:
    beaten = reward_folder(tmp_path / "beaten", auc=0.4)
    console = Console(file=(tmp_path / "log").open("w"), width=500)
    with pytest.raises(
        ValueError, match=r"reward\.audit = refuse.*refuse 0\.40 < 0\.90 \(n = 16\).*reward\.audit=warn"
    ):
        _check_rewards(beaten, RewardConfig(), console)
    _check_rewards(beaten, RewardConfig(audit="warn"), console)
    _check_rewards(reward_folder(tmp_path / "fine", auc=0.95), RewardConfig(), console)
    console.file.flush()
    log = (tmp_path / "log").read_text()
    assert log.count("warning") == 1
    assert "no family of hacks beats truthfulness" in log


def test_every_trait_of_a_run_is_checked(tmp_path: Path) -> None:
    folder = reward_folder(tmp_path / "reward", auc=0.95)
    reward_folder(folder / "traits" / "corrigibility", auc=0.95, accuracy=0.5)
    with pytest.raises(ValueError, match="min_accuracy"):
        _check_rewards(folder, RewardConfig(), Console(file=(tmp_path / "log").open("w")))


def test_warn_instead_of_refuse_makes_no_stage_anew(tmp_path: Path) -> None:
    from scripts.experiment import load_experiment

    quickstart = ROOT / "configs" / "experiments" / "quickstart.yaml"
    inputs = [
        {stage.name: stage.inputs for stage in list_stages(load_experiment(quickstart, [override]), tmp_path)}
        for override in ("reward.audit=warn", "reward.audit=refuse", "reward.probes=64")
    ]
    assert inputs[0] == inputs[1]
    assert inputs[0]["reward"] != inputs[2]["reward"]


@pytest.mark.slow
def test_fit_and_audit_from_the_command_line_and_a_second_fit_is_skipped(tiny_dir: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "fitted", tmp_path / "audit.json"
    fit = ("fit", "--trait", "dense-usefulness", "--base", str(tiny_dir), "--out", str(out))
    code, text = say(*fit)
    if code == 2:  # random weights may rank the few validation pairs the wrong way round
        assert "validation" in text
        pytest.skip("the tiny model learned nothing")
    assert "held-out families" in text
    assert "already whole" in say(*fit)[1]
    code, text = say("audit", "--trait", "dense-usefulness", "--model", str(out), "--json", str(report))
    written = json.loads(report.read_text())
    assert (code == 0) == written["passed"]
    assert {"trait", "passed", "families"} == set(written)


@pytest.mark.slow
def test_two_processes_fit_one_model(tiny_dir: Path, tmp_path: Path) -> None:
    """Both processes end with the same weights: their gradients are averaged. On CPUs torchrun starts them."""
    script = tmp_path / "fit.py"
    script.write_text(
        "import hashlib, os, sys, torch\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from test_rewards_reward_model import preferences\n"
        "from rewards.reward_model import Recipe, train_reward_model\n"
        f"out = Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "out.mkdir()\n"
        f"model = train_reward_model(preferences(), {str(tiny_dir)!r}, out, 0, Recipe(epochs=2.0, lora_rank=4))\n"
        "weights = torch.cat([p.detach().flatten() for p in model.model.parameters() if p.requires_grad])\n"
        "(out / 'sum').write_text(hashlib.sha256(weights.numpy().tobytes()).hexdigest())\n"
    )
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=240,
    )
    assert (tmp_path / "0" / "sum").read_text() == (tmp_path / "1" / "sum").read_text()
