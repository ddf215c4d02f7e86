"""Several processes of one run: what one process sees, and a whole run of two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from accelerate import PartialState

from scripts import processes
from scripts.experiment import CHECKOUT, load_experiment
from scripts.make_stages import no_bars, work_here
from scripts.stages import Stage
from tests.children import end_with_killed_parent, finish_all, fork_group


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


def hold(folder: str, port: int) -> int:
    """Meet the others, add 1 + rank over all, and hold a port for as long as the process lives, as a library may."""
    held = socket.socket()
    rank = int(os.environ.get("RANK", "0"))
    held.bind(("127.0.0.1", port + rank))
    KEPT.append(held)
    state = PartialState(cpu=True)
    total = torch.tensor([1 + rank])
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    with (Path(folder) / f"{rank}.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    return int(total)


KEPT: list[socket.socket] = []


def free_ports() -> int:
    """The first of two free ports in a row, in all likelihood."""
    with socket.socket() as probe, socket.socket() as beside:
        while True:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            beside.bind(("127.0.0.1", port + 1))
            return port


def test_what_a_fresh_process_holds_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in processes.PLACE:
        monkeypatch.delenv(key, raising=False)
    port = free_ports()
    for _ in range(2):
        assert processes.afresh(hold, str(tmp_path), port) == 1
    pids = (tmp_path / "0.txt").read_text().split()
    assert len({*pids, str(os.getpid())}) == 3


def test_fresh_processes_meet_beside_the_launched_ones(tmp_path: Path) -> None:
    """Twice, in processes of their own, while the group of those that call them stays as it was."""
    port = free_ports()

    def member() -> None:
        PartialState._reset_state()  # of the process that was forked
        processes.join()
        for _ in range(2):
            before = dict(os.environ)
            assert processes.afresh(hold, str(tmp_path), port) == 3
            assert dict(os.environ) == before
        assert processes.agree(os.environ["RANK"]) == "0"

    finish_all(fork_group(member))
    pids = [(tmp_path / f"{rank}.txt").read_text().split() for rank in range(2)]
    assert len({*pids[0], *pids[1]}) == 4


def test_a_fresh_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Else it would go on to write into a run that another one continues."""
    code = (
        "import sys; from scripts.processes import alone; from tests.test_scripts_processes import linger\n"
        "if __name__ == '__main__':\n"
        "    alone(linger, sys.argv[1])\n"
    )
    end_with_killed_parent(code, tmp_path)


def linger(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def train_afresh(out: Path, bars: Any) -> dict[str, Any]:
    bars("")(1, 1)
    return {"pid": os.getpid()}


@pytest.mark.parametrize(
    ("vllm", "together", "fresh"),
    [("off", True, False), ("colocate", True, True), ("server", True, True), ("colocate", False, False)],
)
def test_a_training_that_samples_with_vllm_has_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: str, together: bool, fresh: bool
) -> None:
    for key in processes.PLACE:
        monkeypatch.delenv(key, raising=False)
    overrides = [f"train.vllm={vllm}"] + ["train.vllm_server_url=http://localhost:1"] * (vllm == "server")
    experiment = load_experiment(CHECKOUT / "configs" / "experiments" / "quickstart.yaml", overrides)
    stage = Stage("arms/control/seed-0/train", train_afresh, {}, together=together)
    made = work_here(experiment, tmp_path, stage, tmp_path, no_bars)
    assert made is not None
    assert (made["pid"] != os.getpid()) == fresh


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
