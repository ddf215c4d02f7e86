"""Models on this machine by name: where their files lie, and a hash that changes when these do."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from models.loading import resolve_model

PROSE = {".md"}  # model cards; whoever edits one has not changed the model


def local_paths(name: str) -> tuple[str, str | None]:
    """(model, adapter or None) that models.loading takes: the base of a PEFT directory is the one that it names.

    Raises ValueError for a name that means no model.
    """
    record = Path(name).expanduser() / "adapter_config.json"
    if not record.is_file():
        return resolve_model(name), None
    base = str(json.loads(record.read_text(encoding="utf-8")).get("base_model_name_or_path") or "")
    # a run's arms share its start model, wherever the run lies now
    starts = (folder / "start" / "model" for folder in record.parents)
    if base.endswith("start/model") and (near := next((path for path in starts if path.is_dir()), None)):
        base = str(near)
    try:
        return resolve_model(base), str(record.parent)
    except ValueError as error:
        raise ValueError(f"{record}: base_model_name_or_path: {error}; put the base back where it was") from None


def weights_hash(name: str) -> str | None:
    """SHA-256 (16 hex digits) of the files of a local model, with an adapter also of its base; None for a hub id.

    A run that is made again puts another model under the same path. Raises ValueError as local_paths does.
    """
    folders = [Path(place) for place in local_paths(name) if place is not None and Path(place).is_dir()]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    told = [path for path in files if path.suffix not in PROSE]
    lines = [f"{path.name} {_file_hash(path, path.stat().st_size, path.stat().st_mtime_ns)}\n" for path in told]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16] if lines else None


@cache
def _file_hash(path: Path, size: int, modified: int) -> str:
    """A file is read once, unless its size or its time of change tells that it is another one."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
