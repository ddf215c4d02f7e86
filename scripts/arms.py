"""The arms of a run as models: where an arm's weights lie, which system message it answers under, how it is loaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.stages import MANIFEST, read_manifest

BASE = "base"


@dataclass(frozen=True)
class Arm:
    """A model on disk: a Hugging Face directory, a PEFT adapter on it, and a system message it always answers under."""

    name: str
    seed: int
    model: Path
    tokenizer: Path  # every arm has the start model's
    adapter: Path | None
    system: str | None
    made_by: str  # SHA-256 of the manifest of the stage that made it


def find_arm(run_dir: Path, name: str, seed: int, system: str | None = None) -> Arm:
    """The arm of a run with one seed; "base" is the start model. Raises ValueError if its stage is not whole.

    system: what the arm is told before every chat. An arm that is told and not trained has the start model's weights.
    """
    start, stage = run_dir / "start", run_dir / "arms" / name / f"seed-{seed}" / "train"
    if name == BASE or (system is not None and not stage.exists()):
        stage = start
    for folder in (start, stage):
        if read_manifest(folder) is None:
            raise ValueError(
                f"{folder}: arm {name} (seed {seed}) is not finished; run `traitdose run {run_dir / 'config.yaml'}"
                f" --out {run_dir}` first, or name other arms in persistence.arms"
            )
    adapter = stage / "adapter"
    # train.lora_rank 0 leaves a whole model
    weights = stage / "model" if (stage / "model").is_dir() else start / "model"
    made_by = hashlib.sha256((stage / MANIFEST).read_bytes()).hexdigest()
    return Arm(name, seed, weights, start / "model", adapter if adapter.is_dir() else None, system, made_by)


def load_arm(arm: Arm, device: str, tuned: Path | None = None) -> tuple[Any, Any]:
    """The arm's model, adapters merged, and its tokenizer.

    tuned: what a fine-tuning of this arm has left, a PEFT directory to put on top or a model directory instead.
    """
    from models.loading import load_model, load_tokenizer

    adapter = None if arm.adapter is None else str(arm.adapter)
    if tuned is not None and not (tuned / "adapter_config.json").is_file():
        model = load_model(str(tuned), device=device)
    else:
        model = load_model(str(arm.model), adapter, device=device)
        if tuned is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(tuned)).merge_and_unload()
    return model.eval(), load_tokenizer(str(arm.tokenizer))
