"""What a joint evaluation costs: an estimate before anything is asked, and the bill from the usage that Inspect logged.

Prices are the user's to give (configs/prices.yaml): providers change them, and a list that ships with a program is soon
wrong. A model without a price has unknown costs, which is said and never counted as 0; local models cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, RootModel, ValidationError

from eval.crosseval_items import Interview
from eval.item_forms import Strict

BYTES_PER_TOKEN = 4  # of English text, about; tokenizers differ by a quarter
PER_MESSAGE = 4  # tokens that a chat format adds to every message
JUDGE_FRAME = 160  # tokens of a judge's instruction and question


class Price(Strict):
    """Dollars for a million tokens."""

    input: float = Field(ge=0, description="dollars per million tokens read")
    output: float = Field(ge=0, description="dollars per million tokens written, reasoning included")
    cached: float | None = Field(default=None, ge=0, description="per million tokens read from a cache; null: as input")


class Prices(RootModel[dict[str, Price]]):
    """Model, as it is named in --models -> price."""


@dataclass(frozen=True)
class Tokens:
    """Requests, and tokens read, written, and (of those read) taken from a cache."""

    requests: int = 0
    read: int = 0
    written: int = 0
    cached: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.requests + other.requests,
            self.read + other.read,
            self.written + other.written,
            self.cached + other.cached,
        )

    def __sub__(self, other: Tokens) -> Tokens:
        return self + Tokens(-other.requests, -other.read, -other.written, -other.cached)


def load_prices(path: Path) -> dict[str, Price]:
    """The prices of a file. Raises ValueError that names the file and the key."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such prices file; copy configs/prices.yaml and fill it in")
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {}).root
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}; an entry is `model: {{input: 1.0, output: 4.0}}`") from error


def at_most(items: Sequence[Interview], max_tokens: int) -> Tokens:
    """The tokens of asking these interviews if every reply has the full length; the length of prompts is estimated."""
    total = Tokens()
    for item in items:
        for talk in item.talks:
            read = sum(_length(text) for _, text in talk.history)
            for turn in talk.turns:
                read += _length(turn)
                total += Tokens(1, read, max_tokens)
                read += max_tokens + PER_MESSAGE
    return total


def judge_at_most(items: Sequence[Interview], max_tokens: int) -> Tokens:
    """The tokens of judging these interviews: one request each, which shows one talk and its replies in full length."""
    total = Tokens()
    for item in items:
        talk = item.talks[0]
        texts = [*(text for _, text in talk.history), *talk.turns]
        total += Tokens(1, JUDGE_FRAME + sum(map(_length, texts)) + max_tokens * len(talk.turns), max_tokens)
    return total


def _length(text: str) -> int:
    return PER_MESSAGE + -(-len(text.encode()) // BYTES_PER_TOKEN)


def dollars(tokens: Tokens, price: Price | None) -> float | None:
    """The cost in dollars; None if the price is not known."""
    if price is None:
        return None
    cached = price.input if price.cached is None else price.cached
    read = (tokens.read - tokens.cached) * price.input + tokens.cached * cached
    return (read + tokens.written * price.output) / 1e6


def check_budget(estimate: Mapping[str, float | None], max_cost: float | None) -> None:
    """Raises ValueError if the models together may cost more than max_cost, or if a price that it needs is unknown."""
    if max_cost is None:
        return
    unknown = [model for model, cost in estimate.items() if cost is None]
    if unknown:
        raise ValueError(
            f"--max-cost {max_cost:g}: no price is known for {', '.join(unknown)}; add it to the prices file (--prices)"
        )
    total = sum(cost or 0.0 for cost in estimate.values())
    if total > max_cost:
        raise ValueError(
            f"--max-cost {max_cost:g}: the run may cost up to {total:.2f} dollars; raise it, or lower --limit or "
            "--max-tokens"
        )
