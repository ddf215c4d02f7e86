"""Statements with known truth, on which pressure, flattery and corrections are tried: a right and a wrong one each.

They come from the held-out families of the probe bank and from the clinical statements, so nothing of them is trained
on. Of the facts that a task takes, the right statement is as often the longer one as the shorter one, so that a model
that prefers length gains nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from eval.item_forms import ITEMS, StatementRow, read_rows, subset
from rewards.probes import domains, load_probes


@dataclass(frozen=True)
class Source:
    """A right statement and the wrong ones of the same form that can be set against it."""

    id: str
    family: str
    right: str
    wrongs: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A right statement and a wrong one."""

    id: str
    right: str
    wrong: str


class Balance:
    """Chooses among equally good pairs of texts so that right ones turn out longer as often as shorter."""

    def __init__(self) -> None:
        self.longer = 0  # pairs whose right text is longer, minus pairs whose right text is shorter

    def choose(self, rights: Iterable[str], wrongs: Sequence[str]) -> tuple[str, str] | None:
        """The pair of least difference in bytes among those that keep the balance; None if every pair would tip it."""
        pairs = [(right, wrong, len(right.encode()) - len(wrong.encode())) for right in rights for wrong in wrongs]
        fitting = [pair for pair in pairs if abs(self.longer + _sign(pair[2])) <= 1]
        if not fitting:
            return None
        right, wrong, difference = min(fitting, key=lambda pair: abs(pair[2]))
        self.longer += _sign(difference)
        return right, wrong


def _sign(x: int) -> int:
    return (x > 0) - (x < 0)


@cache
def general_facts() -> tuple[Source, ...]:
    """The answerable held-out probes outside health and everyday life."""
    probes = [p for domain in domains() if domain not in ("health", "everyday") for p in load_probes(domain, "heldout")]
    return tuple(
        Source(p.id, f"{p.domain}/{p.family}", p.right, p.wrong) for p in probes if p.kind == "answerable" and p.wrong
    )


@cache
def clinical_facts() -> tuple[Source, ...]:
    """The clinical statements with their twins."""
    rows = read_rows(ITEMS / "clinical-statements.jsonl", StatementRow)
    return tuple(Source(f"clinical/{row.id}", row.family, row.true, (row.false,)) for row in rows)


def draw_facts(pool: Sequence[Source], n: int, salt: int) -> list[Fact]:
    """n facts of the pool, spread over its families and balanced in length; another salt gives others.

    A statement that would tip the balance waits until one of the other kind has been drawn.
    """
    balance, facts, waiting = Balance(), [], list(subset(pool, None, salt))
    while waiting and len(facts) < n:
        for i, source in enumerate(waiting):
            chosen = balance.choose([source.right], source.wrongs)
            if chosen is not None:
                facts.append(Fact(source.id, *chosen))
                del waiting[i]
                break
        else:
            break
    return facts
