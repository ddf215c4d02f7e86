"""One tracker run per arm and seed, which the trainer's own callback joins. Nothing here ever asks for a key."""

from __future__ import annotations

import json
import netrc
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from scripts.experiment import Experiment
from scripts.processes import is_main
from scripts.stages import write_json


def check_tracker(experiment: Experiment) -> None:
    """Raises ValueError if the tracker's package is not installed."""
    backend = experiment.tracking.backend
    if backend != "none" and find_spec(backend) is None:
        raise ValueError(
            f"tracking.backend = {backend!r}: the package is not installed; pip install {backend}, or use wandb or none"
        )


def tracking_mode(experiment: Experiment) -> str:
    """online, offline or disabled. Raises ValueError where online is asked for and there is no key."""
    tracking = experiment.tracking
    if tracking.backend != "wandb":
        return "disabled"
    if tracking.mode == "online" and not has_wandb_key():
        raise ValueError("tracking.mode = 'online': there is no wandb key; set WANDB_API_KEY, or use auto or offline")
    if tracking.mode == "auto":
        return "online" if has_wandb_key() else "offline"
    return tracking.mode


def has_wandb_key() -> bool:
    """Whether wandb would find a key, in the environment or in the user's netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def run_name(experiment: Experiment, arm: str, seed: int) -> str:
    """What the tracker calls a training."""
    return f"{experiment.name}/{arm}/seed-{seed}"


def run_id(out: Path) -> str:
    """The tracker's id of the training in a stage folder: made once, kept there, found again when it is resumed."""
    path = out / "tracker.json"
    if not path.exists():
        write_json(path, {"run_id": uuid.uuid4().hex[:8]})
    return json.loads(path.read_text(encoding="utf-8"))["run_id"]


@contextmanager
def tracked(experiment: Experiment, arm: str, seed: int, out: Path) -> Iterator[None]:
    """A wandb run of its own around each training; the trackers' callbacks would put all arms of a process into one.

    A resumed training goes on in its run. (trackio does so by itself: its runs are known by their name.)
    """
    if experiment.tracking.backend != "wandb" or not is_main():
        yield
        return
    # Only now, not before: transformers prints a line when it is imported under WANDB_MODE=offline.
    os.environ["WANDB_MODE"] = tracking_mode(experiment)
    import wandb

    config = {"arm": arm, "seed": seed, "experiment": experiment.model_dump(mode="json")}
    name = run_name(experiment, arm, seed)
    run = wandb.init(
        project=experiment.tracking.project,
        group=experiment.name,
        name=name,
        config=config,
        id=run_id(out),
        resume="allow",
    )
    code = 1
    try:
        yield
        code = 0
    finally:  # not `with run`: it prints a traceback after Ctrl-C
        run.finish(exit_code=code)
