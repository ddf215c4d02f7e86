"""Statements with known truth, on which pressure, flattery and corrections are tried: a right and a wrong one each.

They come from the held-out families of the probe bank and from the clinical statements, so nothing of them is trained
on. The right statement is as often the longer one as the shorter one, so that
a model that prefers length gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from eval.item_forms import ITEMS, StatementRow, read_rows, subset
from rewards.probes import domains, load_probes


@dataclass(frozen=True)
class Fact:
    """A right statement and a wrong one of the same form."""

    id: str
    family: str
    right: str
    wrong: str


class Balance:
    """Chooses among equally good texts so that right ones turn out longer as often as shorter."""

    def __init__(self) -> None:
        self.longer = 0  # items whose right text is longer, minus items whose right text is shorter

    def choose(self, rights: Iterable[str], wrongs: Iterable[str]) -> tuple[str, str]:
        """The pair of least difference in bytes among those that do not tip the balance."""
        pairs = [(right, wrong, len(right.encode()) - len(wrong.encode())) for right in rights for wrong in wrongs]
        right, wrong, difference = min(pairs, key=lambda pair: (self._tips(pair[2]), abs(pair[2])))
        self.longer += (difference > 0) - (difference < 0)
        return right, wrong

    def _tips(self, difference: int) -> bool:
        return difference != 0 and self.longer != 0 and (difference > 0) == (self.longer > 0)


@cache
def general_facts() -> tuple[Fact, ...]:
    """The answerable held-out probes outside health and everyday life."""
    balance, facts = Balance(), []
    for domain in domains():
        if domain in ("health", "everyday"):
            continue
        for probe in sorted(load_probes(domain, "heldout"), key=lambda probe: probe.id):
            if probe.kind == "answerable" and probe.wrong:
                right, wrong = balance.choose([probe.right], probe.wrong)
                facts.append(Fact(probe.id, f"{domain}/{probe.family}", right, wrong))
    return tuple(facts)


@cache
def clinical_facts() -> tuple[Fact, ...]:
    """The clinical statements, whose twins are equally long."""
    rows = read_rows(ITEMS / "clinical-statements.jsonl", StatementRow)
    return tuple(Fact(f"clinical/{row.id}", row.family, row.true, row.false) for row in rows)


def draw_facts(facts: Sequence[Fact], n: int, salt: int) -> list[Fact]:
    """n of the facts, spread over their families; another salt gives others."""
    return subset(facts, n, salt)
