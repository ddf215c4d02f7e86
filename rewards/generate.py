"""New scenarios from a served model: asked for with the trait's card and a domain, checked, and asked for again.

What is kept goes, in the bank's form, line by line into one file; beside it <file>.log.jsonl has every attempt with
what was wrong. Both are only ever appended to, so a run that was stopped goes on where it was.

A kept scenario is well formed, unlike the bank and unlike the evaluation items. Whether it is true, hard and fair, a
person has to judge before it moves into rewards/scenarios/.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewards.contamination import EvaluationItem, asked, evaluation_items
from rewards.endpoint import Answer, Chat, EndpointConfig, TransientError, with_retries
from rewards.generate_prompt import request_messages
from rewards.scenario_check import (
    HELDOUT_SHARE,
    Finding,
    line_findings,
    near_duplicates,
    near_evaluation,
    shared_word_findings,
    template_findings,
)
from rewards.scenarios import Line, Scenario, Split, read_bank
from rewards.sentences import embed
from rewards.traits import TraitCard, describe, load_traits

Status = Literal["kept", "malformed", "duplicate", "overlap"]

TRIES = 3  # answers a scenario may take: the first, and two corrections
STATUS: dict[str, Status] = {
    "template": "duplicate",
    "near-duplicate": "duplicate",
    "evaluation-overlap": "overlap",
}  # every other kind of finding is a matter of form
# What the author is told; where the likeness lies stands in the log alone, or evaluation items would reach the author.
UNLIKE = {
    "duplicate": "It is too like a scenario that exists; change the person, the situation and the opening words.",
    "overlap": "It is too like a public test question; choose another fact and another situation.",
}
MAX_QUOTED = 12_000  # characters of a refused answer that are shown again


class GeneratorConfig(EndpointConfig):
    """A served model as author."""

    temperature: float | None = Field(1.0, ge=0, le=2, description="Sampling temperature; null for the model's own.")
    max_tokens: int = Field(8000, ge=1, description="Tokens of an answer, at most, reasoning included.")


@dataclass(frozen=True)
class Generated:
    """What a file holds and what it took, over all runs on it: answers asked for, by their fate."""

    path: Path
    wanted: int
    asked: int
    malformed: int
    duplicate: int
    overlap: int
    kept: int


class Checker:
    """The bank and the evaluation items, ready to be compared with one scenario after another."""

    def __init__(self, bank: Path | None, cards: Path | None, items: Sequence[EvaluationItem] | None) -> None:
        self.cards = load_traits(cards)
        self.items = evaluation_items() if items is None else items
        self.lines = [line for line in read_bank(bank) if line.scenario is not None]
        self.vectors = embed([asked(_of(line)) for line in self.lines])

    def add(self, line: Line) -> None:
        """From now on, nothing like this scenario."""
        self.lines.append(line)
        self.vectors = np.concatenate([self.vectors, embed([asked(_of(line))])])

    def findings(self, line: Line) -> list[Finding]:
        """The errors of a new line; what is dear to find is looked for only where the rest is right."""
        found = [*line_findings(line, self.cards)]
        if not found and line.scenario is not None:
            found += [f for f in template_findings([*self.lines, line]) if f.where == line.where]
            found += shared_word_findings([line], self.items)
        if not found:
            vector = embed([asked(_of(line))])
            both = np.concatenate([self.vectors, vector])
            found += [f for f in near_duplicates([*self.lines, line], both) if f.where == line.where]
            found += near_evaluation([line], vector, self.items, embed)
        return [finding for finding in found if finding.severity == "error"]

    def split(self, family: str, trait: str) -> Split:
        """The family's side if it has one; a new family is held out while less than a quarter of the trait's are."""
        sides: dict[str, Split] = {_of(line).family: _of(line).split for line in self.lines}
        if family in sides:
            return sides[family]
        families = {_of(line).family: _of(line).split for line in self.lines if _of(line).trait == trait}
        held = sum(side == "heldout" for side in families.values())
        return "heldout" if held < HELDOUT_SHARE * (len(families) + 1) else "train"


def generate(
    trait: str,
    domain: str,
    n: int,
    cfg: GeneratorConfig,
    out: Path,
    *,
    bank: Path | None = None,
    cards: Path | None = None,
    items: Sequence[EvaluationItem] | None = None,
) -> Generated:
    """Write scenarios until `out` holds n, or each missing one has had its TRIES answers.

    Raises ValueError for an unknown trait or domain, a file in use or of another form, and an endpoint that does not
    answer; what was kept stays, and the same call goes on.
    """
    card = load_traits(cards).get(trait)
    if card is None:
        raise ValueError(f"trait {trait!r} has no card; there are: {', '.join(load_traits(cards))}")
    if domain not in card.domains:
        raise ValueError(f"domain {domain!r} is not on the card of {trait}; there are: {', '.join(card.domains)}")
    log = out.with_name(f"{out.name}.log.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    with _alone(log):
        for path in (out, log):
            _mend_end(path)
        kept, attempts = [*_kept(out, trait, domain)], [*_records(log)]
        if len(kept) < n:
            checker = Checker(bank, cards, items)
            for line in kept:
                checker.add(line)
            author = _Author(card, domain, cfg, out, log, checker, len(kept), len(attempts))
            asyncio.run(author.write(n - len(kept)))
            kept, attempts = [*_kept(out, trait, domain)], [*_records(log)]
    fates = Counter(record["status"] for record in attempts)
    counts = {status: fates[status] for status in ("malformed", "duplicate", "overlap")}
    return Generated(out, n, asked=len(attempts), kept=len(kept), **counts)


class _Author:
    """One run: asks for scenarios side by side, checks each answer, appends to the two files."""

    def __init__(
        self,
        card: TraitCard,
        domain: str,
        cfg: GeneratorConfig,
        out: Path,
        log: Path,
        checker: Checker,
        kept: int,
        attempts: int,
    ) -> None:
        self.card, self.domain, self.cfg, self.out, self.log, self.checker = card, domain, cfg, out, log, checker
        self.kept, self.attempts = kept, attempts
        ids = [_of(line).id for line in checker.lines if _of(line).id.startswith(f"{card.id}-{domain}-")]
        self.number = max((int(name.rpartition("-")[2]) for name in ids), default=0)
        # only training scenarios are shown to an author, as forms and as what exists already
        shown = [_of(line) for line in checker.lines if _of(line).split == "train"]
        self.examples = [scenario for scenario in shown if scenario.trait == card.id] or shown
        self.families = [s.family for s in shown if s.trait == card.id or s.domain == domain]

    async def write(self, n: int) -> None:
        """Ask for n scenarios. Raises ValueError if the endpoint does not answer."""
        gate = asyncio.Semaphore(self.cfg.max_concurrency)
        async with Chat(self.cfg) as chat:
            await asyncio.gather(*(self._slot(chat, gate, self.attempts + i) for i in range(n)))

    async def _slot(self, chat: Chat, gate: asyncio.Semaphore, turn: int) -> None:
        """One scenario, with TRIES answers. `turn` decides which failures and examples the request shows."""
        async with gate:
            request = request_messages(self.card, self.domain, turn, self.examples, self.families)
            turns = list(request)
            for _ in range(TRIES):
                try:
                    answer = await with_retries(self.cfg, partial(chat.complete, turns))
                except TransientError as error:
                    raise ValueError(f"{error}; run the same command again to go on") from None
                problems = self._take(answer)
                if not problems:
                    return
                note = "This can't be used:\n" + "\n".join(f"- {problem}" for problem in problems)
                note += "\nWrite the whole scenario again, mended, as one JSON object."
                quoted = {"role": "assistant", "content": answer.text[:MAX_QUOTED] or "(nothing)"}
                turns = [*request, quoted, {"role": "user", "content": note}]

    def _take(self, answer: Answer) -> list[str]:
        """Keep the scenario of an answer, or say what is wrong with it. The log gets a line either way."""
        try:
            scenario = self._scenario(answer)
        except ValidationError as error:
            return self._refuse("malformed", describe(error), answer)
        except ValueError as error:
            return self._refuse("malformed", [str(error)], answer)
        line = Line(Path("generated", self.card.id, f"{self.domain}.jsonl"), self.kept + 1, scenario)
        findings = self.checker.findings(line)
        if findings:
            problems = [f"{finding.message}; {finding.remedy}" for finding in findings]
            status = STATUS.get(findings[0].kind, "malformed")
            refused = self._refuse(status, problems, answer)
            return refused if status == "malformed" else [UNLIKE[status]]
        _append(self.out, scenario.model_dump(mode="json"))
        _append(self.log, {"status": "kept", "id": scenario.id, "model": self.cfg.model})
        self.checker.add(line)
        self.kept, self.number = self.kept + 1, self.number + 1
        if scenario.split == "train":
            self.families.append(scenario.family)
        return []

    def _refuse(self, status: Status, problems: list[str], answer: Answer) -> list[str]:
        _append(self.log, {"status": status, "problems": problems, "model": self.cfg.model, "answer": answer.text})
        return problems

    def _scenario(self, answer: Answer) -> Scenario:
        """The answer's draft with the keys that are ours to give. Raises ValueError or ValidationError."""
        if answer.cut:
            raise ValueError(f"answer: ends after {self.cfg.max_tokens} tokens; write a shorter scenario")
        text = answer.text[answer.text.find("{") : answer.text.rfind("}") + 1]
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"answer: is no JSON object ({error}); write one object and nothing else") from None
        draft = Draft.model_validate(content).model_dump(mode="json")
        ours = {
            "id": f"{self.card.id}-{self.domain}-{self.number + 1:04d}",
            "split": self.checker.split(draft["family"], self.card.id),
            "trait": self.card.id,
            "domain": self.domain,
        }
        return Scenario.model_validate(draft | ours)


class Draft(BaseModel):
    """What the model writes; Scenario checks the values."""

    model_config = ConfigDict(extra="forbid")

    family: str
    messages: list[dict[str, Any]]
    rubric: list[dict[str, Any]]
    exemplars: dict[str, Any]
    notes: str = ""


# Files


@contextmanager
def _alone(log: Path) -> Iterator[None]:
    """Hold the log for this process. Raises ValueError if another one writes to it."""
    with log.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{log}: another process writes here; wait for it or name another --out") from None
        yield


def _kept(out: Path, trait: str, domain: str) -> Iterator[Line]:
    for number, record in enumerate(_records(out), start=1):
        try:
            scenario = Scenario.model_validate(record)
        except ValidationError as error:
            raise ValueError(f"{out}:{number}: {'; '.join(describe(error))}") from None
        if (scenario.trait, scenario.domain) != (trait, domain):
            raise ValueError(f"{out}:{number}: is of {scenario.trait}/{scenario.domain}; name another --out")
        yield Line(Path("generated", trait, f"{domain}.jsonl"), number, scenario)


def _mend_end(path: Path) -> None:
    """A last line without its end is completed if it is whole, and taken off the file if a kill cut it short."""
    if not path.exists():
        return
    whole, newline, rest = path.read_bytes().rpartition(b"\n")
    if not rest:
        return
    try:
        json.loads(rest)
        path.write_bytes(whole + newline + rest + b"\n")
    except ValueError:
        path.write_bytes(whole + newline)


def _records(path: Path) -> Iterator[Any]:
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: is no JSON ({error}); mend the line or name another --out") from None


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _of(line: Line) -> Scenario:
    assert line.scenario is not None, line.where
    return line.scenario
