"""Settings that libraries read while they are imported: no network without need, no questions, a clean terminal."""

from __future__ import annotations

import os
import warnings

from scripts.experiment import is_hub_id

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


def be_quiet(base: str) -> None:
    """To be called before torch or a library of Hugging Face is imported; what the user has set stays."""
    if not is_hub_id(base):
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    warnings.filterwarnings("ignore")
