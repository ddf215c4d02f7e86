"""The parts of a constitutional arm: what each spends, and rows that are sampled chunk by chunk and survive a kill.

FLOPs are counted as in train/ledger.py: 2N a token that a model of N parameters reads or writes, 6N a trained one.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from models.checkpoints import write_whole
from train.ledger import SOURCES, Account

Item = TypeVar("Item")
Row = dict[str, Any]
Progress = Callable[[int, int], None]

CHUNK = 16  # prompts that are sampled for together, and lost together by a kill


def part_ledger(accounts: Mapping[str, Account], n_policy: int, **facts: Any) -> Row:
    """A part's ledger.json: the accounts of train/ledger.py with their total, N, and what else is to be told."""
    every = {source: accounts.get(source, Account()) for source in SOURCES}
    return {source: asdict(account) for source, account in every.items()} | {
        "total": _sum([asdict(account) for account in every.values()]),
        "n_policy": n_policy,
        **facts,
    }


def arm_ledger(parts: Mapping[str, Row], last: Row) -> Row:
    """The whole arm's ledger: the last part's, its accounts summed with those of the parts before it.

    `parts` keeps every part's total under its name, the last one's as "train". A ledger that holds them is returned
    as it is. The seconds of a part are those of the attempt that finished it; its manifest has those of all.
    """
    if "parts" in last:
        return last
    ledgers = [*parts.values(), last]
    accounts = {name: _sum([ledger[name] for ledger in ledgers]) for name in (*SOURCES, "total")}
    totals = {name: ledger["total"] for name, ledger in {**parts, "train": last}.items()}
    seconds = {key: sum(float(ledger[key]) for ledger in ledgers) for key in ("wall_seconds", "cpu_seconds")}
    outside = sum(int(ledger.get("outside_tokens", 0)) for ledger in ledgers)
    return last | accounts | seconds | {"parts": totals, "outside_tokens": outside}


def read_ledgers(folder: Path, names: Sequence[str]) -> dict[str, Row]:
    """The ledgers of an arm's finished parts, by name."""
    return {name: json.loads((folder / name / "ledger.json").read_text(encoding="utf-8")) for name in names}


def finished(out: Path) -> Row | None:
    """The ledger of a part that was finished though its stage was not: it is the last thing to be written."""
    path = out / "ledger.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_ledger(out: Path, ledger: Row) -> Row:
    """Write ledger.json; returns it."""
    write_whole(out / "ledger.json", json.dumps(ledger, indent=1))
    return ledger


def sample_chunks(
    journal: Path, allowance: float, make: Callable[[int], list[Row]], progress: Progress | None = None
) -> list[Row]:
    """Rows of make(0), make(1), ... until their "flops" come as near to the allowance as whole chunks can.

    Every finished chunk is a line of the journal, so that a killed sampling goes on after its last one. A chunk's rows
    have to be a function of its number alone.
    """
    chunks = load_chunks(journal)
    while True:
        spent = [sum(row["flops"] for row in rows) for rows in chunks]
        if progress is not None:
            progress(min(round(100 * sum(spent) / allowance), 100), 100)
        if chunks and sum(spent) + sum(spent) / len(spent) / 2 > allowance:
            return [row for rows in chunks for row in rows]
        rows = make(len(chunks))
        with journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows) + "\n")
            file.flush()
            os.fsync(file.fileno())
        chunks.append(rows)


def load_chunks(journal: Path) -> list[list[Row]]:
    """The whole chunks of a journal; a line that a kill has torn is removed from it."""
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    lines = text.split("\n")[:-1]
    if text and not text.endswith("\n"):
        write_whole(journal, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]


def passes(items: Sequence[Item], seed: str) -> Iterator[Item]:
    """The items over and over, every pass in an order of its own."""
    lap = 0
    while True:
        yield from random.Random(f"{seed}/{lap}").sample(list(items), len(items))
        lap += 1


def until_spent(items: Iterator[Item], cost: Callable[[Item], float], allowance: float) -> list[Item]:
    """The first items whose costs come nearest to the allowance; at least one."""
    taken = [next(items)]
    spent = cost(taken[0])
    for item in items:
        price = cost(item)
        if spent + price / 2 > allowance:
            break
        taken.append(item)
        spent += price
    return taken


def _sum(accounts: Sequence[Mapping[str, Any]]) -> Row:
    total = asdict(Account())
    return {key: type(value)(sum(account[key] for account in accounts)) for key, value in total.items()}
