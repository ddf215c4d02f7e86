"""A resumed training goes on in its tracker's run."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.experiment import CHECKOUT, load_experiment
from scripts.tracking import run_id, tracked


def test_the_run_id_is_made_once_for_each_stage_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first != run_id(tmp_path / "b")
    assert first.isalnum()


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    experiment = load_experiment(CHECKOUT / "configs" / "experiments" / "quickstart.yaml", ["tracking.mode=offline"])
    seen = []
    for _ in range(2):
        with tracked(experiment, "control", 0, tmp_path):
            assert wandb.run is not None
            seen.append(wandb.run.id)
    assert seen == [run_id(tmp_path)] * 2


def test_only_the_main_process_is_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    experiment = load_experiment(CHECKOUT / "configs" / "experiments" / "quickstart.yaml")
    with tracked(experiment, "control", 0, tmp_path):
        assert not list(tmp_path.iterdir())
