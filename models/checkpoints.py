"""Checkpoints that a kill at any moment leaves whole: written aside, hashed, flushed, renamed.

<folder>/partial/checkpoint-<step> is written first. When every process has put its part there, hashes.json (SHA-256 of
every file) is added, all of it is brought to the disk, and one rename makes it <folder>/checkpoint-<step>. A reader
takes the newest checkpoint whose files still have their hashes. SealedTrainer does so for a Hugging Face trainer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

HASHES = "hashes.json"
PARTIAL = "partial"
PREFIX = "checkpoint-"

log = logging.getLogger("traitdose")


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is sealed."""
    return folder / PARTIAL / f"{PREFIX}{step}"


def clear_partial(folder: Path) -> None:
    """Remove what a killed write left."""
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)


def seal(partial: Path, folder: Path, keep: int) -> Path:
    """Turn a written partial checkpoint into a checkpoint of `folder`, of which the newest `keep` stay. Returns it."""
    hashes = {str(path.relative_to(partial)): _sha256(path) for path in _files(partial)}
    (partial / HASHES).write_text(json.dumps(hashes, indent=1, sort_keys=True), encoding="utf-8")
    for path in (*partial.rglob("*"), partial):
        flush(path)
    final = folder / partial.name
    if final.exists():  # damaged, or the run would have gone on from it
        _remove(final)
    partial.rename(final)
    flush(folder)
    for old in _checkpoints(folder)[keep:]:
        _remove(old)
    return final


def step_of(checkpoint: Path) -> int:
    """How many steps its weights have taken."""
    return int(checkpoint.name.removeprefix(PREFIX))


def latest(folder: Path, before: int | None = None) -> Path | None:
    """The newest whole checkpoint (of fewer than `before` steps), or None.

    Every damaged one that is passed over is told as a warning.
    """
    found = [path for path in _checkpoints(folder) if before is None or step_of(path) < before]
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        log.warning("%s is damaged (%s): it is not used, the previous checkpoint is", checkpoint, damage)
    if found:
        log.warning("%s holds no whole checkpoint: the training starts again from its beginning", folder)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file has the hash that it was sealed with."""
    try:
        hashes = json.loads((checkpoint / HASHES).read_text(encoding="utf-8"))
        for name, expected in hashes.items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{HASHES} or a file that it names cannot be read: {error}"
    return None


def write_whole(path: Path, text: str) -> None:
    """Write text so that the file is either the old one or the whole new one, also after a power cut."""
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(text, encoding="utf-8")
    flush(scratch)
    scratch.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SealedTrainer(Trainer):
    """To be inherited before a Trainer: its checkpoints are sealed, the newest args.save_total_limit of them stay."""

    _sealing = False

    def save_extras(self, folder: Path) -> None:
        """Add to a checkpoint, before it is sealed, what the trainer leaves out; called in every process."""

    def load_extras(self, folder: Path) -> None:
        """Take back what save_extras wrote."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = Path(super()._get_output_dir(trial))
        return str(folder / PARTIAL if self._sealing else folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(str(self.args.output_dir))
        partial = partial_folder(folder, self.state.global_step)
        if self.args.should_save:
            clear_partial(folder)
        self.accelerator.wait_for_everyone()
        self._sealing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._sealing = False
        self.save_extras(partial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (partial / "training_args.bin").unlink(missing_ok=True)  # a pickle that nothing reads
            seal(partial, folder, keep=self.args.save_total_limit or 2)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_extras(Path(checkpoint))


def _checkpoints(folder: Path) -> list[Path]:
    """Sealed checkpoints, the newest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no kill leaves half of one under its name."""
    grave = checkpoint.parent / PARTIAL / f"removed-{checkpoint.name}"
    grave.parent.mkdir(exist_ok=True)
    checkpoint.rename(grave)
    shutil.rmtree(grave)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
