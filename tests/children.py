"""Forked children for tests: real processes that can be killed, without the seconds that imports take."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def fork(work: Callable[[], None], environment: dict[str, str] | None = None) -> int:
    """Do `work` in a forked child with one thread; returns its pid. It exits with 0, or 1 after a traceback."""
    pid = os.fork()
    if pid:
        return pid
    try:
        torch.set_num_threads(1)
        os.environ.update(environment or {})
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def fork_group(work: Callable[[], None], processes: int = 2) -> list[int]:
    """Do `work` in forked children that a launcher seems to have started as one group on CPU; returns their pids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def member() -> None:
        work()
        torch.distributed.destroy_process_group()

    place = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    place["ACCELERATE_TORCH_DEVICE"] = "cpu"  # as scripts/processes.py sets it
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [fork(member, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to all, and wait for them."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


def kill_at_flush(n: int) -> Callable[[], None]:
    """Makes a child kill itself at its n-th flush: inside a checkpoint's sealing, or another critical write."""

    def arm() -> None:
        flushes, flush = itertools.count(1), os.fsync

        def fsync(descriptor: Any) -> None:
            if next(flushes) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = fsync

    return arm


def finish(pid: int) -> int | None:
    """Wait for a child; the signal that ended it, or None if it ended well."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0
    return None


def finish_all(pids: Sequence[int], seconds: float = 60) -> None:
    """Wait until all have ended well; where one fails, or time is up, the others are killed."""
    running, deadline = list(pids), time.monotonic() + seconds
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                if status:
                    kill(running)
                    raise AssertionError(f"process {pids.index(pid)} ended with status {status}")
        if time.monotonic() > deadline:
            kill(running)
            raise AssertionError(f"{len(running)} processes had not ended after {seconds} s")
        time.sleep(0.01)


def wait_for(path: Path) -> int:
    while not (path.exists() and path.read_text()):
        time.sleep(0.05)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def end_with_killed_parent(code: str, tmp_path: Path) -> None:
    """Run the code, whose child writes its pid into sys.argv[1] and lingers; kill it, and wait for the child's end.

    A child that outlives its parent runs into the test's time limit.
    """
    script = tmp_path / "parent.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pid")], env=env)
    pid = wait_for(tmp_path / "pid")
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    while is_alive(pid):
        time.sleep(0.05)
