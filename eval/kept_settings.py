"""The settings beside the answers of a folder: answers to others do not compare, so a second call must ask alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def check_kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings in the file, None if there is none. Raises ValueError if one of `settings` (plain data) differs."""
    if not path.is_file():
        return None
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if theirs.get(key) != value:
            raise ValueError(
                f"{path}: {key} is {theirs.get(key)!r}, now {value!r} is asked for; answers to other settings do "
                "not compare: use the same value, or another folder with --out"
            )
    return theirs


def write_kept(path: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings, before the first answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
