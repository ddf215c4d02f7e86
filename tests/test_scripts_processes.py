"""Several processes of one run: what one process sees, and a whole run of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from scripts import processes
from scripts.experiment import CHECKOUT


def test_a_run_without_launcher_is_one_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in processes.PLACE:
        monkeypatch.delenv(key, raising=False)
    assert (processes.count(), processes.is_main(), processes.is_first_here()) == (1, True, True)
    assert processes.agree({"as": "it is"}) == {"as": "it is"}


def what_it_sees(key: str) -> dict[str, str]:
    if key == "fail":
        raise ValueError("in the other process")
    return {k: v for k, v in os.environ.items() if k.startswith((*processes.PLACE, *processes.LAUNCHERS, "CUDA_"))}


def test_alone_is_away_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_PORT": "29500", "FSDP_VERSION": "2"}
    for key, value in (launcher | {"CUDA_VISIBLE_DEVICES": "2,3"}).items():
        monkeypatch.setenv(key, value)
    assert processes.alone(what_it_sees, "") == {"CUDA_VISIBLE_DEVICES": "2"}
    assert {key: os.environ[key] for key in launcher} == launcher
    with pytest.raises(ValueError, match="in the other process"):
        processes.alone(what_it_sees, "fail")


@pytest.mark.slow
def test_a_run_of_two_processes_is_the_run_of_one(tiny_dir: Path, tmp_path: Path) -> None:
    """`accelerate launch -m scripts.cli run` on a CPU: one set of stages, one report, one voice, the same rollouts."""
    content = yaml.safe_load((CHECKOUT / "configs" / "experiments" / "quickstart.yaml").read_text())
    content |= {"base": str(tiny_dir), "tracking": {"backend": "none"}}
    content["warm_start"] = {"examples": 8, "batch_size": 8}
    content["arms"] = {"control": {"dose": 0.0}, "half": {"dose": 0.5}}
    content["reward"] |= {"probes": 16, "min_accuracy": 0.0, "audit": "warn"}
    content["train"] |= {
        "max_steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4, "noise": "row"
    }  # fmt: skip
    content["eval"]["suites"]["generalisation"]["limit"] = 2
    del content["eval"]["suites"]["capability"]
    config = tmp_path / "mine.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False))

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/ddp.yaml"]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", "-m"]
    printed = {}
    for name, command in (("one", [sys.executable, "-m"]), ("two", launch)):
        words = [*command, "scripts.cli", "run", str(config), "--out", str(tmp_path / name)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        printed[name] = done.stdout
    assert printed["two"].count("✓ start") == 1
    assert printed["two"].count("report.html") == 1
    assert (tmp_path / "two" / "report.html").exists()
    assert not list((tmp_path / "two").rglob("*.partial"))
    for arm in ("control", "half"):
        train = Path("arms") / arm / "seed-0" / "train"
        one, two = (pd.read_parquet(tmp_path / name / train / "rollouts.parquet") for name in ("one", "two"))
        assert one["completion"].tolist() == two["completion"].tolist()
        books = [json.loads((tmp_path / name / train / "ledger.json").read_text()) for name in ("one", "two")]
        assert books[0]["total"] == books[1]["total"]
