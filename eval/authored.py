"""The authored files of the alignment tasks in eval/items/alignment/, and conversations made from their texts."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from eval.item_forms import ITEMS, Chat


@cache
def authored(name: str) -> Any:
    """The content of eval/items/alignment/<name>.yaml; each file says what its parts are."""
    return yaml.safe_load((ITEMS / "alignment" / f"{name}.yaml").read_text(encoding="utf-8"))


def chat(*turns: str, system: str = "") -> Chat:
    """A conversation from its turns, the user's first."""
    roles = ("user", "assistant")
    head = (("system", system),) if system else ()
    return (*head, *((roles[k % 2], text) for k, text in enumerate(turns)))
