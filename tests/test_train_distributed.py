"""Two processes on one CPU (gloo) end where one process ends: DDP through a whole arm, FSDP2 and DDP on the trainer."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed_worker import TRAIN, train_arm, train_trainer
from train.grpo import SharedPromptGRPOTrainer
from train.policy import grpo_config

CHECKOUT = Path(__file__).parent.parent


def launch(mode: str, folder: Path, out: Path) -> subprocess.Popen[str]:
    """torchrun with two processes of tests/distributed_worker.py."""
    out.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    return subprocess.Popen(
        [*command, str(CHECKOUT / "tests" / "distributed_worker.py"), mode, str(folder), str(out)],
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-4000:]


def assert_close(one: Path, two: Path) -> None:
    ours, theirs = load_file(one), load_file(two)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(theirs[name], weight, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_arm_of_two_processes_is_that_of_one_also_after_a_kill(tiny_stages: Path, tmp_path: Path) -> None:
    """Weights within 1e-5, the same rollouts in the same order, the same ledger; all processes are killed once."""
    train_arm(tiny_stages, tmp_path / "one")
    finish(launch("arm", tiny_stages, tmp_path / "two"))
    process = launch("arm", tiny_stages, tmp_path / "killed")
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for victim in (*launcher.children(recursive=True), launcher):  # the launcher's workers have sessions of their own
        victim.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "ledger.json").exists()
    finish(launch("arm", tiny_stages, tmp_path / "killed"))

    weights = "adapter/adapter_model.safetensors"
    assert_close(tmp_path / "one" / weights, tmp_path / "two" / weights)
    assert (tmp_path / "two" / weights).read_bytes() == (tmp_path / "killed" / weights).read_bytes()
    one, two, killed = (pd.read_parquet(tmp_path / name / "rollouts.parquet") for name in ("one", "two", "killed"))
    pd.testing.assert_frame_equal(two, killed)
    exact = ["step", "position", "source", "prompt_id", "prompt", "completion", "tokens"]
    pd.testing.assert_frame_equal(one[exact], two[exact])
    pd.testing.assert_frame_equal(one.drop(columns=exact), two.drop(columns=exact), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "ddp-full", "fsdp", "fsdp-full"])
def test_two_processes_end_as_one(tiny_dir: Path, tmp_path: Path, mode: str) -> None:
    """And, resumed from their checkpoint after two of three steps, as the uninterrupted two."""
    finish(launch(mode, tiny_dir, tmp_path / "two"))
    lora = not mode.endswith("full")
    (tmp_path / "one").mkdir()
    train_trainer(tiny_dir, tmp_path / "one", SharedPromptGRPOTrainer, lora, processes=1)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert_close(tmp_path / "one" / "weights" / name, tmp_path / "two" / "weights" / name)
    whole, resumed = (load_file(tmp_path / "two" / part / "weights" / name) for part in ("", "resumed"))
    assert all(weight.equal(resumed[key]) for key, weight in whole.items())


def test_a_step_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        ValueError, match=r"train.prompts_per_step = 4: does not divide among 3 processes.*multiple of 3"
    ):
        grpo_config(TRAIN, [1.0], tmp_path, 0)
