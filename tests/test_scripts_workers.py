"""Stages side by side: their order, their processes, and what is left when one of them fails."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from scripts.stages import Bars, Stage
from scripts.workers import Workers, in_order
from tests.children import end_with_killed_parent, is_alive, wait_for


def stage(name: str, *needs: str) -> Stage:
    return Stage(name, lambda out, bars: None, {}, needs)


STAGES = [
    stage("start"),
    stage("reward", "start"),
    stage("base", "start"),
    stage("a", "start", "reward"),
    stage("a-eval", "a"),
    stage("b", "start", "reward"),
    stage("b-eval", "b"),
]


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_a_stage_begins_when_what_it_needs_is_made(jobs: int) -> None:
    made: list[str] = []
    running, most = 0, 0
    lock = threading.Lock()

    def make(stage: Stage) -> None:
        nonlocal running, most
        with lock:
            assert set(made).issuperset(stage.needs)
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
            made.append(stage.name)

    in_order(STAGES, jobs, make)
    assert sorted(made) == sorted(stage.name for stage in STAGES)
    assert most <= jobs
    if jobs == 1:
        assert made == ["start", "reward", "a", "b", "base", "a-eval", "b-eval"]  # what others wait for comes first


def test_what_is_not_in_the_list_counts_as_made() -> None:
    made: list[str] = []
    in_order(STAGES[3:], 1, lambda stage: made.append(stage.name))
    assert made == ["a", "b", "a-eval", "b-eval"]


def test_two_stages_are_made_at_the_same_time() -> None:
    """Each waits for the other: one after the other would never end."""
    meeting = threading.Barrier(2, timeout=60)

    def make(stage: Stage) -> None:
        meeting.wait()

    in_order([stage("a"), stage("b")], 2, make)


def test_an_error_stops_the_others_and_begins_nothing() -> None:
    stopped = threading.Event()
    begun: list[str] = []

    def make(stage: Stage) -> None:
        begun.append(stage.name)
        if stage.name == "reward":
            raise ValueError("the reward is poor")
        if stage.name == "base":
            assert stopped.wait(60)

    with pytest.raises(ValueError, match="poor"):
        in_order(STAGES, 2, make, stopped.set)
    assert set(begun) <= {"start", "reward", "base"}


def add(a: int, b: int, bars: Bars) -> tuple[int, int, str | None]:
    report = bars("sum")
    report(1, 2)
    report(2, 2)
    return a + b, os.getpid(), os.environ.get("OMP_NUM_THREADS")


def fail(bars: Bars) -> None:
    raise ValueError("a user's mistake")


def linger(path: str, bars: Bars) -> None:
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)


def test_a_worker_is_another_process_whose_progress_and_errors_arrive_here() -> None:
    reports: list[tuple[str, int, int]] = []
    workers = Workers(2, threads=3)

    def bars(label: str):
        return lambda done, total: reports.append((label, done, total))

    total, pid, threads = workers.call("add", bars, add, 2, 3)
    assert (total, threads) == (5, "3")
    assert pid != os.getpid()
    assert workers.cpu_seconds("add") >= 0
    with pytest.raises(ValueError, match="mistake"):
        workers.call("fail", bars, fail)
    workers.close()
    assert reports == [("sum", 1, 2), ("sum", 2, 2)]


def test_killing_the_workers_ends_what_they_do(tmp_path: Path) -> None:
    workers = Workers(1, threads=1)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            workers.call("linger", lambda label: lambda done, total: None, linger, str(tmp_path / "pid"))
        except BrokenProcessPool as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    pid = wait_for(tmp_path / "pid")
    workers.kill()
    thread.join()
    assert len(errors) == 1
    assert not is_alive(pid)


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """Else two processes would write into one run: the orphan, and the worker of the run that goes on."""
    code = (
        "import sys; from scripts.workers import Workers; from tests.test_scripts_workers import linger\n"
        "if __name__ == '__main__':\n"
        "    Workers(1, 1).call('linger', lambda label: lambda done, total: None, linger, sys.argv[1])\n"
    )
    end_with_killed_parent(code, tmp_path)
