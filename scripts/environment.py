"""Settings that libraries read while they are imported: no network without need, no questions, a clean terminal."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from scripts.experiment import Experiment, is_hub_id
from scripts.processes import count
from train.config import uses_hub_kernels

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "LMEVAL_LOG_LEVEL": "ERROR",
    "TQDM_DISABLE": "1",
}


def be_quiet(base: str, hub: bool = False) -> None:
    """To be called before torch or a library of Hugging Face is imported; what the user has set stays.

    The hub is out of reach unless the base is there, or something else that `hub` stands for.
    """
    if not is_hub_id(base) and not hub:
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")


def set_environment(experiment: Experiment, run_dir: Path) -> None:
    """Environment variables of a run, for the libraries that will be imported."""
    be_quiet(experiment.base, hub=uses_hub_kernels(experiment.train))
    tracking = {
        "WANDB_DIR": str(run_dir.resolve()),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
    }
    for key, value in tracking.items():
        os.environ.setdefault(key, value)
    if count() == 1:  # one process uses one GPU; a launcher starts one process for each
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    os.environ["WANDB_PROJECT"] = experiment.tracking.project
