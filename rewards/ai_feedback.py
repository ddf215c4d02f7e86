"""AI feedback: how much better one reply is than another under principles, as a probability (Bai et al. 2022, 4.1).

The feedback model is asked a multiple-choice question, and the normalised log-probabilities of (A) and (B) are its
vote. Every question is asked in both orders, and the log-odds are averaged: a liking for one letter, whatever its
size, cancels exactly. The label of a pair is the mean of its principles' votes. With chain of thought a vote is
clamped, because thoughts make it overconfident.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.kv_cache import common_beginning
from models.replies import Messages, encode, reply
from models.shared_prompt import Tree, branch_logps
from rewards.constitution import CHOICES, Principle, comparison_chat, thought_chat
from rewards.endpoint import Answer, Chat, EndpointConfig, TransientError, with_retries

LogProbs = tuple[float, float]  # of (A) and of (B)
SURE = math.log(99)  # log-odds of a letter from an endpoint that gives no log-probabilities: 0.99


class Feedback(Protocol):
    """Who compares. `read` counts the tokens that a model of this machine has read or written for it."""

    read: int
    outside: int  # tokens of an endpoint, whose compute is not known

    def choose(self, chats: Sequence[Messages]) -> list[LogProbs]:
        """The log-probabilities of (A) and (B) as replies to each chat."""
        ...

    def think(self, chats: Sequence[Messages], keys: Sequence[str]) -> list[str]:
        """A reply to each chat; noise is a function of the key."""
        ...


@dataclass(frozen=True)
class Pair:
    """Two replies to one prompt, the principles under which they are compared, and the key of the noise."""

    prompt: Messages
    first: str
    second: str
    principles: tuple[Principle, ...]
    key: str


@dataclass(frozen=True)
class Label:
    """The probability that the first reply is better: the mean of a vote for every principle; and the thoughts."""

    p: float
    votes: tuple[float, ...]
    thoughts: tuple[str, ...] = ()


def vote(forward: LogProbs, backward: LogProbs, clamp: tuple[float, float] | None = None) -> float:
    """P(the first reply is better) under one principle.

    forward: log-probabilities of (A) and (B) with the first reply as (A); backward: with the first reply as (B).
    clamp: the least and the most that comes out.
    """
    odds = ((forward[0] - forward[1]) + (backward[1] - backward[0])) / 2
    p = 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
    return p if clamp is None else min(max(p, clamp[0]), clamp[1])


def label_pairs(feedback: Feedback, pairs: Sequence[Pair], clamp: tuple[float, float] | None = None) -> list[Label]:
    """A label for every pair; with `clamp` the feedback model thinks first, and its votes are held within it."""
    asked = [
        (pair, principle, first, second, f"{pair.key}/{principle.id}/{order}")
        for pair in pairs
        for principle in pair.principles
        for order, (first, second) in enumerate(((pair.first, pair.second), (pair.second, pair.first)))
    ]
    thoughts = [""] * len(asked)
    if clamp is not None:
        chats = [thought_chat(pair.prompt, first, second, principle) for pair, principle, first, second, _ in asked]
        thoughts = feedback.think(chats, [key for *_, key in asked])
    answers = feedback.choose(
        [
            comparison_chat(pair.prompt, first, second, principle, thought)
            for (pair, principle, first, second, _), thought in zip(asked, thoughts, strict=True)
        ]
    )
    labels: list[Label] = []
    start = 0
    for pair in pairs:
        mine = slice(start, start + 2 * len(pair.principles))
        start = mine.stop
        chosen = answers[mine]
        votes = tuple(vote(chosen[k], chosen[k + 1], clamp) for k in range(0, len(chosen), 2))
        labels.append(Label(sum(votes) / len(votes), votes, tuple(thoughts[mine]) if clamp is not None else ()))
    return labels


@dataclass
class PolicyFeedback:
    """The policy itself compares."""

    model: Any
    tokenizer: Any
    thought_tokens: int
    temperature: float
    read: int = 0
    outside: int = 0

    def choose(self, chats: Sequence[Messages]) -> list[LogProbs]:
        """By one forward over each chat with both choices as its branches."""
        branches = [self.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in CHOICES]
        trees = [Tree(encode(self.tokenizer, chat), branches) for chat in chats]
        begun = common_beginning(self.model, [tree.prompt for tree in trees])
        self.read += sum(map(len, trees)) - begun * (len(trees) - 1)
        return [(float(a.sum()), float(b.sum())) for a, b in branch_logps(self.model, trees)]

    def think(self, chats: Sequence[Messages], keys: Sequence[str]) -> list[str]:
        """Sampled."""
        replies = reply(self.model, self.tokenizer, chats, keys, self.thought_tokens, self.temperature)
        self.read += sum(r.encoded + r.generated for r in replies)
        return [" ".join(r.text.split()) for r in replies]


@dataclass
class EndpointFeedback:
    """A served model compares (rewards/endpoint.py). Its compute is not known: only its tokens are counted."""

    cfg: EndpointConfig
    read: int = 0
    outside: int = 0
    without_logprobs: int = field(default=0)  # choices that were read from the letter alone

    def choose(self, chats: Sequence[Messages]) -> list[LogProbs]:
        """From the answer's first token that holds a letter, or from the letter where no log-probabilities come."""
        return self._ask(chats, self._choice, logprobs=True)

    def think(self, chats: Sequence[Messages], keys: Sequence[str]) -> list[str]:
        """As the endpoint's temperature has it."""
        return self._ask(chats, lambda answer: " ".join(answer.text.split()), logprobs=False)

    def _choice(self, answer: Answer) -> LogProbs:
        found = choice_logps(answer)
        if found is None:
            raise TransientError(f"{self.cfg.model}: chose neither {CHOICES[0]} nor {CHOICES[1]}: {answer.text[:60]!r}")
        self.without_logprobs += answer.tokens is None
        return found

    def _ask(self, chats: Sequence[Messages], read: Callable[[Answer], Any], logprobs: bool) -> list[Any]:
        """All chats at once, within cfg.max_concurrency, in their order. Raises ValueError when one keeps failing."""

        async def all_of_them() -> list[Any]:
            gate = asyncio.Semaphore(self.cfg.max_concurrency)
            async with Chat(self.cfg) as chat:

                async def one(messages: Messages) -> Any:
                    async def attempt() -> Any:
                        answer = await chat.complete(messages, logprobs=logprobs)
                        self.outside += answer.input_tokens + answer.output_tokens
                        return read(answer)

                    async with gate:
                        return await _sure(attempt)

                return await asyncio.gather(*(one(messages) for messages in chats))

        async def _sure(attempt: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await with_retries(self.cfg, attempt)
            except TransientError as error:
                raise ValueError(
                    f"constitution.feedback: {error}; asked {self.cfg.attempts} times. Give the same command again "
                    "when it answers, or name another model"
                ) from error

        return asyncio.run(all_of_them())


def choice_logps(answer: Answer) -> LogProbs | None:
    """The log-probabilities of the letters A and B in an endpoint's answer; None if it chooses neither.

    A letter that is not among a token's alternatives gets the most that it can have: the probability of the least
    likely one of them, or what all of them leave over.
    """
    for token in answer.tokens or ():
        if re.sub(rb"[^A-Za-z]", b"", token.raw) in (b"A", b"B"):
            masses = {"A": 0.0, "B": 0.0}
            for word, logprob in token.alternatives:
                if (letter := re.sub(r"[^A-Za-z]", "", word)) in masses:
                    masses[letter] += math.exp(logprob)
            given = [math.exp(logprob) for _, logprob in token.alternatives]
            absent = max(min(min(given), 1 - sum(given)), math.exp(-2 * SURE))
            return math.log(masses["A"] or absent), math.log(masses["B"] or absent)
    letters = re.findall(r"\(?\b([AB])\b\)?", answer.text)
    if not letters:
        return None
    return (0.0, -SURE) if letters[-1] == "A" else (-SURE, 0.0)
