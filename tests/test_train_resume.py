"""A training that is killed at any moment and started again ends as the uninterrupted one, bit for bit.

Trainings run in forked children, so that SIGKILL is real and costs no imports. All use one thread: a kernel's sums may
depend on the number of threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from models.checkpoints import latest, partial_folder
from tests.children import finish, fork, kill_at_flush
from tests.conftest import REWARD, STANDARD
from tests.test_models_checkpoints import flip
from tests.test_train_grpo import build
from train.config import ArmConfig, TrainConfig
from train.policy import train_policy, whole_lines

TRAIN = TrainConfig(
    max_steps=5, prompts_per_step=4, group_size=2, max_new_tokens=4, lora_rank=2, save_every=2, micro_batches=2
)


def test_a_torn_line_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    lines = [json.dumps({"step": step, "text": "a\u2028b"}) for step in (0, 0, 1, 2)]
    path.write_text("\n".join(lines) + "\n" + lines[-1][:9])
    assert whole_lines(path, before=9) == lines
    assert whole_lines(path, before=1) == lines[:2]
    assert whole_lines(tmp_path / "none", before=9) == []


def test_rollouts_that_serve_several_steps_survive(tiny_dir: Path, tmp_path: Path) -> None:
    """TRL forgets how far it was in a batch of rollouts; with two iterations on each, odd steps begin in the middle."""
    config: dict[str, Any] = {"num_iterations": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    whole = build(tiny_dir, tmp_path / "run", True, True, save_total_limit=9, **config)
    whole.train()
    for step in (1, 2, 3):
        records: list[Any] = []
        again = build(tiny_dir, tmp_path / f"again-{step}", True, True, records, **config)
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert len(records) == {1: 1, 2: 1, 3: 0}[step]  # new rollouts at step 2 alone
        for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
            assert a.equal(b), (step, name)


# -- real kills


def start(stages: Path, out: Path, before: Callable[[], None] | None = None, config: TrainConfig = TRAIN) -> int:
    """Train in a forked child; returns its pid."""
    out.mkdir(exist_ok=True)

    def work() -> None:
        if before is not None:
            before()
        train_policy(config, STANDARD, ArmConfig(dose=0.5), REWARD, stages / "start", stages / "reward", out, 0)

    return fork(work)


def assert_same_end(whole: Path, killed: Path) -> None:
    weights = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (whole, killed)]
    assert weights[0] == weights[1]
    frames = [pd.read_parquet(out / "rollouts.parquet") for out in (whole, killed)]
    pd.testing.assert_frame_equal(*frames)
    frames = [pd.read_parquet(out / "steps.parquet").drop(columns="seconds") for out in (whole, killed)]
    pd.testing.assert_frame_equal(*frames)
    ledgers = [json.loads((out / "ledger.json").read_text()) for out in (whole, killed)]
    for ledger in ledgers:
        del ledger["wall_seconds"], ledger["cpu_seconds"]
    assert ledgers[0] == ledgers[1]
    assert not (killed / "rollouts.jsonl").exists()


@pytest.fixture(scope="module")
def whole(tiny_stages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, int]:
    """An uninterrupted training, its seconds, and how often it flushes."""
    out = tmp_path_factory.mktemp("whole") / "train"
    count = out.with_name("flushes")

    def counting() -> None:
        flush = os.fsync

        def fsync(descriptor: Any) -> None:
            with count.open("a") as file:
                file.write(".")
            flush(descriptor)

        os.fsync = fsync

    began = time.monotonic()
    assert finish(start(tiny_stages, out, counting)) is None
    return out, time.monotonic() - began, len(count.read_text())


def test_killed_inside_a_checkpoint_write(tiny_stages: Path, whole: tuple[Path, float, int], tmp_path: Path) -> None:
    """The second checkpoint is being sealed: the first one counts, and nothing of the second is left."""
    out, _, flushes = whole
    assert finish(start(tiny_stages, tmp_path / "train", kill_at_flush(flushes // 2))) == signal.SIGKILL
    checkpoints = tmp_path / "train" / "checkpoints"
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert partial_folder(checkpoints, 4).exists()
    assert finish(start(tiny_stages, tmp_path / "train")) is None
    assert_same_end(out, tmp_path / "train")


@pytest.mark.slow
def test_killed_at_five_random_moments_and_with_a_damaged_checkpoint(
    tiny_stages: Path, whole: tuple[Path, float, int], tmp_path: Path
) -> None:
    out, seconds, _ = whole
    moments = random.Random(5)
    for case in range(5):
        train = tmp_path / f"train-{case}"
        for _ in range(1 + case % 3):  # some are killed again while they go on
            pid = start(tiny_stages, train)
            time.sleep(moments.uniform(0.1, 0.95) * seconds)
            os.kill(pid, signal.SIGKILL)
            finish(pid)
        newest = latest(train / "checkpoints")
        if case == 4 and newest is not None:
            flip(newest / "optimizer.pt")
        assert finish(start(tiny_stages, train)) is None
        assert_same_end(out, train)


@pytest.mark.slow
def test_killed_at_every_third_flush(tiny_stages: Path, whole: tuple[Path, float, int], tmp_path: Path) -> None:
    out, _, flushes = whole
    for n in [*range(1, flushes, 3), flushes]:
        train = tmp_path / f"train-{n}"
        assert finish(start(tiny_stages, train, kill_at_flush(n))) == signal.SIGKILL
        assert finish(start(tiny_stages, train)) is None
        assert_same_end(out, train)


@pytest.mark.slow
def test_killed_as_soon_as_a_partial_checkpoint_appears(
    tiny_stages: Path, whole: tuple[Path, float, int], tmp_path: Path
) -> None:
    train = tmp_path / "train"
    for step in (2, 4, 5):
        pid = start(tiny_stages, train)
        partial = partial_folder(train / "checkpoints", step)
        deadline = time.monotonic() + 60
        while not partial.exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert finish(pid) == signal.SIGKILL
        assert not (train / "ledger.json").exists()
    assert finish(start(tiny_stages, train)) is None
    assert_same_end(whole[0], train)


@pytest.mark.slow
def test_a_training_that_had_ended_at_its_budget_takes_no_further_step(
    tiny_stages: Path, whole: tuple[Path, float, int], tmp_path: Path
) -> None:
    """Its last checkpoint came with the step that spent the budget; killed right after, it only has to finish."""
    spent = json.loads((whole[0] / "ledger.json").read_text())["total"]["flops"]
    config = TRAIN.model_copy(update={"budget_tflops": 0.5 * spent / 1e12, "save_every": 1})
    assert finish(start(tiny_stages, tmp_path / "whole", config=config)) is None
    steps = json.loads((tmp_path / "whole" / "ledger.json").read_text())["steps"]
    assert steps < TRAIN.max_steps

    def kill_when_saving() -> None:
        import train.policy

        train.policy.save_weights = lambda *_: os.kill(os.getpid(), signal.SIGKILL)

    assert finish(start(tiny_stages, tmp_path / "killed", kill_when_saving, config)) == signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoints" / f"checkpoint-{steps}").exists()
    assert finish(start(tiny_stages, tmp_path / "killed", config=config)) is None
    assert_same_end(tmp_path / "whole", tmp_path / "killed")
