"""One tracker run per arm and seed. A trainer's own callback joins it; without one, the curves follow at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from scripts.experiment import Experiment


def check_tracker(experiment: Experiment) -> None:
    """Raises ValueError if the tracker's package is not installed."""
    backend = experiment.tracking.backend
    if backend != "none" and find_spec(backend) is None:
        raise ValueError(
            f"tracking.backend = {backend!r}: the package is not installed; pip install {backend}, or use wandb or none"
        )


@contextmanager
def tracked(experiment: Experiment, arm: str, seed: int, out: Path) -> Iterator[None]:
    """Open the tracker's run around a training; afterwards log steps.parquet unless the trainer has logged live."""
    backend = experiment.tracking.backend
    if backend == "none":
        yield
        return
    tracker = import_module(backend)
    config = {"arm": arm, "seed": seed, **experiment.model_dump(mode="json")}
    grouping = {"group": experiment.name} if backend == "wandb" else {}
    run = tracker.init(
        project=experiment.tracking.project, name=f"{experiment.name}/{arm}/seed-{seed}", config=config, **grouping
    )
    try:
        yield
        if not getattr(run, "step", 0):
            _log_steps(tracker, out / "steps.parquet")
    finally:
        tracker.finish()


def _log_steps(tracker: object, path: Path) -> None:
    import pandas as pd

    log = getattr(tracker, "log")  # noqa: B009  (wandb and trackio are modules of the same shape)
    for row in pd.read_parquet(path).to_dict("records"):
        log({str(key): value for key, value in row.items() if key != "step"}, step=int(row["step"]))
