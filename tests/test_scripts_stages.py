from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import stages
from scripts.stages import adopt_stage, hash_files, hash_inputs, is_whole, lock_run, read_manifest, run_stage

INPUTS = {"seed": 3, "config": {"steps": 2}}

# Writes two parts and is killed between them, as by the kernel: nothing in the process can tidy up.
KILLED = """
import os, signal, sys
from pathlib import Path
from scripts.stages import run_stage

def work(out):
    (out / "part-1").write_text("made by the first attempt")
    os.kill(os.getpid(), signal.SIGKILL)

run_stage(Path(sys.argv[1]), {"seed": 3, "config": {"steps": 2}}, work)
"""

HOLDS_LOCK = """
import sys, time
from pathlib import Path
from scripts.stages import lock_run

with lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def write(text: str):
    def work(out: Path) -> None:
        (out / "result").write_text(text)

    return work


def test_a_whole_stage_is_skipped_and_its_manifest_says_what_made_it(tmp_path):
    folder = tmp_path / "arms" / "control" / "train"
    calls: list[Path] = []

    def work(out: Path) -> dict[str, int]:
        calls.append(out)
        (out / "adapter").mkdir()
        (out / "adapter" / "weights").write_bytes(b"\1")
        sum(i * i for i in range(200_000))
        return {"steps": 2}

    made = run_stage(folder, INPUTS, work, name="arms/control/train")
    again = run_stage(folder, INPUTS, work)
    assert calls == [folder.with_name("train.partial")]
    assert not made.skipped
    assert again.skipped
    content = json.loads((folder / "manifest.json").read_text())
    assert content["stage"] == "arms/control/train"
    assert content["inputs"] == INPUTS
    assert content["inputs_hash"] == hash_inputs(INPUTS)
    assert content["seed"] == 3
    assert content["ledger"] == {"steps": 2}
    assert content["packages"]["torch"].startswith("2.")
    assert content["device"] == "cpu"
    assert content["wall_seconds"] > 0
    assert content["cpu_seconds"] > 0
    assert content["git_commit"] is None or len(content["git_commit"].removesuffix("+")) == 40
    assert sorted(p.name for p in folder.parent.iterdir()) == ["train"]
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "manifest.json"]


def test_a_killed_stage_leaves_nothing_whole_and_goes_on_in_its_partial_folder(tmp_path):
    folder = tmp_path / "start"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()

    def work(out: Path) -> None:
        assert (out / "part-1").read_text() == "made by the first attempt"
        (out / "part-2").write_text("made by the second")

    run_stage(folder, INPUTS, work)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "part-1", "part-2"]


def test_a_partial_folder_of_other_inputs_is_not_gone_on_with(tmp_path):
    folder = tmp_path / "start"
    subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)

    def work(out: Path) -> None:
        assert not (out / "part-1").exists()

    run_stage(folder, {**INPUTS, "seed": 4}, work)
    assert read_manifest(folder).seed == 4


def test_an_error_keeps_the_stale_stage_until_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "reward"
    run_stage(folder, INPUTS, write("old"))
    changed = {**INPUTS, "config": {"steps": 3}}

    def fails(out: Path) -> None:
        (out / "result").write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        run_stage(folder, changed, fails)
    assert (folder / "result").read_text() == "old"
    assert is_whole(folder, INPUTS)
    assert not is_whole(folder, changed)

    manifest = run_stage(folder, changed, write("new"))
    assert (folder / "result").read_text() == "new"
    assert not manifest.skipped
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]


def test_a_stage_of_another_run_is_copied_if_it_was_made_from_the_same_inputs(tmp_path):
    ours, theirs = tmp_path / "ours" / "reward", tmp_path / "theirs" / "reward"
    run_stage(theirs, INPUTS, write("theirs"))
    assert not adopt_stage(ours, theirs, {**INPUTS, "seed": 4})
    assert not ours.parent.exists()

    run_stage(ours, {**INPUTS, "seed": 4}, write("stale"))
    assert adopt_stage(ours, theirs, INPUTS)
    assert run_stage(ours, INPUTS, write("never called")).skipped
    assert (ours / "result").read_text() == "theirs"
    assert [p.name for p in ours.parent.iterdir()] == ["reward"]
    assert not adopt_stage(ours, theirs, INPUTS)  # it is whole already


def test_half_a_copy_is_no_stage(tmp_path, monkeypatch):
    ours, theirs = tmp_path / "ours" / "reward", tmp_path / "theirs" / "reward"
    run_stage(theirs, INPUTS, write("theirs"))

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_flush", killed)
        with pytest.raises(KeyboardInterrupt):
            adopt_stage(ours, theirs, INPUTS)
    assert not run_stage(ours, INPUTS, write("ours")).skipped
    assert (ours / "result").read_text() == "ours"


def test_time_of_an_interrupted_attempt_is_counted(tmp_path):
    folder = tmp_path / "start"

    def interrupted(out: Path) -> None:
        time.sleep(0.3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(folder, INPUTS, interrupted)
    assert run_stage(folder, INPUTS, write("done")).wall_seconds > 0.3


@pytest.mark.parametrize("cut", ["before the second rename", "before the first rename"])
def test_a_swap_that_was_cut_is_completed(tmp_path, cut):
    folder, changed = tmp_path / "reward", {**INPUTS, "seed": 9}
    run_stage(folder, INPUTS, write("old"))
    run_stage(tmp_path / "new", changed, write("new"))
    (tmp_path / "new").rename(tmp_path / "reward.partial")
    if cut == "before the second rename":
        folder.rename(tmp_path / "reward.stale")
    assert run_stage(folder, changed, write("never called")).skipped
    assert (folder / "result").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_clear_error_and_what_was_finished_stays(tmp_path):
    run_stage(tmp_path / "start", INPUTS, write("finished"))

    def work(out: Path) -> None:
        (out / "checkpoint-1").write_text("kept")
        with open("/dev/full", "wb") as file:  # noqa: PTH123  (a real ENOSPC from the operating system)
            file.write(b"x" * 100_000)

    with pytest.raises(ValueError, match=r"the disk is full: .*reward .*MB are free.*--out"):
        run_stage(tmp_path / "reward", INPUTS, work)
    assert is_whole(tmp_path / "start", INPUTS)
    assert not (tmp_path / "reward").exists()
    assert (tmp_path / "reward.partial" / "checkpoint-1").read_text() == "kept"
    assert run_stage(tmp_path / "reward", INPUTS, write("there is room again")).stage == "reward"


def test_the_words_of_safetensors_for_a_full_disk_are_understood(tmp_path):
    from safetensors import SafetensorError

    def work(out: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(ValueError, match="the disk is full"):
        run_stage(tmp_path / "start", INPUTS, work)


def test_a_second_process_is_told_the_pid_of_the_first_and_a_dead_one_holds_nothing(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLDS_LOCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=rf"in use by process {first.pid}\b.*--out"), lock_run(tmp_path):
        pass
    first.kill()
    first.wait()
    assert (tmp_path / "lock").read_text().strip() == str(first.pid)  # stale: its process is dead
    with lock_run(tmp_path):
        assert (tmp_path / "lock").read_text().strip() == str(os.getpid())
    assert (tmp_path / "lock").read_text() == ""


def test_hashes_follow_content_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.yaml").write_text("x: 1")
    before = hash_files(tmp_path)
    (tmp_path / "a.yaml").write_text("x: 2")
    assert hash_files(tmp_path) != before
    assert hash_inputs({"a": 1, "b": 2}) == hash_inputs({"b": 2, "a": 1})
    with pytest.raises(ValueError, match=r"gone\.yaml is missing"):
        hash_files(tmp_path / "gone.yaml")
