"""Several processes of one run, as accelerate or torchrun start them and tell them their places by the environment.

The first process is the main one: it holds the lock, prints, and writes. The others wait for its word.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from typing import Any, TypeVar

Result = TypeVar("Result")

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
LAUNCHERS = ("ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "MASTER_")  # how their other variables begin
EVERY = 0.5  # seconds between two looks at the parent
PATIENCE = timedelta(days=30)  # the others wait while the main process fits, evaluates and reports


def count() -> int:
    """How many processes this run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the first process."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def join() -> None:
    """Meet the other processes, which must come within minutes; from then on all have patience with each other."""
    if count() > 1:
        _group()


def leave() -> None:
    """Part from the other processes."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def agree(value: Any) -> Any:
    """The main process's value, in every process; waits until all have called."""
    if count() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def alone(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args) in a fresh process that knows no launcher and sees one device; its errors are raised here."""
    with _no_launcher():
        return _fresh(function, *args)


def afresh(function: Callable[..., Result], *args: Any) -> Result:
    """function(*args) in a fresh process that has this one's place among the others, each of which calls this, too.

    What a library keeps for as long as its process lives ends with it. Errors are raised here.
    """
    if count() == 1:
        return alone(function, *args)
    with _own_meeting(agree(_free_port())):
        return _fresh(function, *args)


def end_with(parent: int) -> None:
    """Let this process end with its parent, even one that was killed and could not say so."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(EVERY)
    os._exit(1)


def _fresh(function: Callable[..., Result], *args: Any) -> Result:
    with ProcessPoolExecutor(1, get_context("spawn"), end_with, (os.getpid(),)) as pool:
        return pool.submit(function, *args).result()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def free_memory() -> None:
    """Give back what a stage has left, to be called in every process that made it.

    torch keeps freed GPU memory for itself; the stage after a training is made by another process, on the first GPU.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def _group() -> Any:
    """A group of all processes that waits as long as a stage takes; training keeps the usual timeouts."""
    import torch
    from accelerate import PartialState

    if not torch.cuda.is_available():  # without this, accelerate takes each process for the only one
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # not "cpu:0", onto which torch.load reads no checkpoint
    PartialState(cpu=not torch.cuda.is_available())
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


@contextmanager
def _no_launcher() -> Iterator[None]:
    with _environment_again():
        for key in list(os.environ):
            if key in PLACE or key.startswith(LAUNCHERS):
                del os.environ[key]
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        yield


@contextmanager
def _own_meeting(port: int) -> Iterator[None]:
    """The launcher's places, but they meet at a port of their own: this process's group still holds the launcher's."""
    with _environment_again():
        for key in list(os.environ):
            if key.startswith("TORCHELASTIC_"):  # else they would look for the launcher's own store
                del os.environ[key]
        os.environ["MASTER_PORT"] = str(port)
        yield


@contextmanager
def _environment_again() -> Iterator[None]:
    """Puts the environment back as it was."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
