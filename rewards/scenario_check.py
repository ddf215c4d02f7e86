"""What a scenario bank has to be before anything is trained on it, checked line by line and as a whole.

Errors: a record that lacks something, that does not match its card or its path, a rubric that cannot punish or cannot
reward, copies and templates, a family on both sides of the split, too few families held out, overlap with evaluation
items. Warnings: cells without a scenario, and styles that give the good reply away.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from rewards.contamination import EvaluationItem, asked, evaluation_items, ngrams, shared_words, shortlist, words
from rewards.scenario_style import EVEN_PAIRS, style_by_trait, telltale_cues
from rewards.scenarios import BANK, Line, Scenario, read_bank, shown
from rewards.sentences import embed
from rewards.traits import TraitCard, load_traits

Kind = Literal[
    "form", "path", "duplicate-id", "failure", "rubric", "exemplars", "split", "held-out-share",
    "near-duplicate", "template", "evaluation-overlap", "coverage", "style",
]  # fmt: skip

MIN_BAD = 2
HELDOUT_SHARE = 0.25
OPENING = 6  # words
SHINGLE = 5  # words
# 425 scenarios written one by one share at most 2% of their 5-grams with another; a text of which every fifth word is
# replaced shares (0.8^5) / (2 - 0.8^5) = 20%, every fourth 13%.
MAX_JACCARD = 0.1
# Cosines of sentence embeddings. The nearest of 95,266 pairs in a bank of 437 scenarios, two on one formula, has 0.70,
# and one pair in ten thousand more than 0.58. Of 20 scenarios that lost a third of their words, 19 keep more than 0.75;
# three that were told anew with other places, names and numbers kept 0.70, 0.73 and 0.86, so one such may pass.
NEAR_DUPLICATE = 0.72
# A question inside a longer scenario: the nearest in that bank has 0.64 and is another matter; two that turn on the
# fact of an evaluation item have 0.51 and 0.57, where other pairs lie too, so a person has to look.
NEAR_EVALUATION = 0.65
LOOK_EVALUATION = 0.5
STYLE_SEVERITY: Literal["error", "warning"] = "warning"  # for traits with pairs enough to be evened out


@dataclass(frozen=True)
class Finding:
    """One thing to mend. `where` is file:line, or a folder where the whole trait is meant."""

    where: str
    trait: str
    kind: Kind
    severity: Literal["error", "warning"]
    message: str
    remedy: str


def check_bank(
    bank: Path | None = None,
    cards: Path | None = None,
    trait: str | None = None,
    meaning: bool = True,
    items: Sequence[EvaluationItem] | None = None,
) -> list[Finding]:
    """All findings, in the order of the bank, or those of one trait.

    With `meaning`, near-duplicates and overlap with evaluation items are also looked for by sentence embedding (with
    `trait`, among that trait's scenarios). `items` are evaluation_items() unless given. Raises ValueError for a card
    that cannot be read and for an unknown trait.
    """
    known = load_traits(cards)
    if trait is not None and trait not in known:
        raise ValueError(f"trait {trait!r} has no card; there are: {', '.join(known)}")
    # A pair is told at its later line, so the lines of the trait that is asked about go last.
    lines = sorted(read_bank(bank), key=lambda line: line.path.parent.name == trait)
    whole = [line for line in lines if line.scenario is not None]
    mine = [line for line in whole if trait in (None, line.path.parent.name)]
    items = evaluation_items() if items is None else items
    findings = [
        *(finding for line in lines for finding in line_findings(line, known)),
        *duplicate_ids(whole),
        *split_findings(whole, bank or BANK),
        *template_findings(whole),
        *shared_word_findings(mine, items),
        *coverage_findings(whole, known, bank or BANK),
        *style_findings(whole, bank or BANK),
    ]
    if meaning and mine:
        vectors = embed([asked(_of(line)) for line in mine])
        findings += near_duplicates(mine, vectors)
        findings += near_evaluation(mine, vectors, items, embed)
    return sorted((f for f in findings if trait in (None, f.trait)), key=lambda f: (f.severity, f.trait, _place(f)))


# One line


def line_findings(line: Line, cards: dict[str, TraitCard]) -> Iterator[Finding]:
    """What is wrong with one line by itself, given the cards."""
    trait, domain = line.path.parent.name, line.path.stem
    if line.scenario is None:
        for problem in line.problems:
            message, _, remedy = problem.rpartition("; ")
            yield _error(line, "form", message, remedy)
        return
    scenario = line.scenario
    if (scenario.trait, scenario.domain) != (trait, domain):
        yield _error(
            line,
            "path",
            f"trait {scenario.trait!r}, domain {scenario.domain!r} in the file of {trait}/{domain}",
            "move the line or mend its keys",
        )
    if not re.fullmatch(re.escape(f"{trait}-{domain}-") + r"\d{4}", scenario.id):
        yield _error(line, "path", f"id {scenario.id!r}", f"name it {trait}-{domain}-0001 or a later number")
    card = cards.get(trait)
    if card is None:
        yield _error(line, "path", f"trait {trait!r} has no card", f"write configs/traits/{trait}.md")
    else:
        if domain not in card.domains:
            yield _error(line, "path", f"domain {domain!r} is not on the card", "add it there or move the scenario")
        for bad in scenario.exemplars.bad:
            if bad.failure not in card.failure_modes:
                known = ", ".join(card.failure_modes)
                yield _error(line, "failure", f"failure {bad.failure!r} is not on the card", f"use one of: {known}")
    points = [criterion.points for criterion in scenario.rubric]
    if min(points) > 0:
        yield _error(line, "rubric", "no criterion has negative points", "add one that names the tempting failure")
    if max(points) < 0:
        yield _error(line, "rubric", "no criterion has positive points", "add one that rewards being useful")
    if len(scenario.exemplars.bad) < MIN_BAD:
        bad = len(scenario.exemplars.bad)
        yield _error(line, "exemplars", f"{bad} bad exemplars", f"write {MIN_BAD}, each with one named failure")


# The bank as a whole


def duplicate_ids(lines: Sequence[Line]) -> Iterator[Finding]:
    """Ids that stand on more than one line."""
    first: dict[str, Line] = {}
    for line in lines:
        other = first.setdefault(_of(line).id, line)
        if other is not line:
            yield _error(line, "duplicate-id", f"id {_of(line).id!r} is also at {other.where}", "give it a new number")


def split_findings(lines: Sequence[Line], bank: Path) -> Iterator[Finding]:
    """Families on both sides of the split, over all traits, and traits with too few families held out."""
    first: dict[str, Line] = {}
    told: set[str] = set()
    for line in lines:
        scenario = _of(line)
        other = first.setdefault(scenario.family, line)
        if scenario.split != _of(other).split and scenario.family not in told:
            told.add(scenario.family)
            message = f"family {scenario.family!r} is {scenario.split} here and {_of(other).split} at {other.where}"
            yield _error(line, "split", message, "put the whole family on one side, or rename one of the two")
    for trait, scenarios in _by_trait(lines).items():
        families = {scenario.family for scenario in scenarios}
        held = {scenario.family for scenario in scenarios if scenario.split == "heldout"}
        if len(held) < HELDOUT_SHARE * len(families):
            message = f"{len(held)} of {len(families)} families held out, less than {HELDOUT_SHARE:.0%}"
            yield _of_trait(bank, trait, "held-out-share", "error", message, "hold out more families")


def template_findings(lines: Sequence[Line]) -> Iterator[Finding]:
    """Scenarios that open with the same words, or share too many 5-grams."""
    openings: dict[tuple[str, ...], Line] = {}
    for line in lines:
        opening = tuple(words(next(m.content for m in _of(line).messages if m.role == "user"))[:OPENING])
        other = openings.setdefault(opening, line)
        if other is not line and len(opening) == OPENING:
            message = f"opens with the same {OPENING} words as {other.where}: {' '.join(opening)!r}"
            yield _error(line, "template", message, "let another person begin in another way")
    grams = [ngrams(asked(_of(line)), SHINGLE) for line in lines]
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, found in enumerate(grams):
        for gram in found:
            holders[gram].append(i)
    shared = Counter(pair for members in holders.values() for pair in combinations(members, 2))
    for (i, j), count in sorted(shared.items()):
        jaccard = count / (len(grams[i]) + len(grams[j]) - count)
        if jaccard > MAX_JACCARD:
            message = f"shares {jaccard:.0%} of its {SHINGLE}-grams with {lines[i].where}"
            yield _error(lines[j], "template", message, "write one of them anew, or remove it")


def near_duplicates(lines: Sequence[Line], vectors: np.ndarray) -> Iterator[Finding]:
    """Pairs whose messages mean nearly the same. `vectors`: one unit row per line."""
    cosine = np.triu(vectors @ vectors.T, k=1)
    for i, j in np.argwhere(cosine > NEAR_DUPLICATE):
        message = f"reads like {lines[i].where} (cosine {cosine[i, j]:.2f})"
        yield _error(lines[j], "near-duplicate", message, "change the situation of one of them, or remove it")


# Evaluation items


def shared_word_findings(lines: Sequence[Line], items: Sequence[EvaluationItem]) -> Iterator[Finding]:
    """Thirteen words in a row that also stand in an evaluation item."""
    for i, source, run in shared_words([_of(line) for line in lines], items):
        yield _error(lines[i], "evaluation-overlap", f"shares words with {source}: {run!r}", "write it in other words")


def near_evaluation(
    lines: Sequence[Line],
    vectors: np.ndarray,
    items: Sequence[EvaluationItem],
    embed: Callable[[Sequence[str]], np.ndarray],
) -> Iterator[Finding]:
    """Scenarios that ask what an evaluation item asks. `vectors`: one unit row per line."""
    close = shortlist([_of(line) for line in lines], items)
    if not close:
        return
    cosine = vectors @ embed([item.question for item in close]).T
    for i, j in np.argwhere(cosine > LOOK_EVALUATION):
        same = cosine[i, j] > NEAR_EVALUATION
        message = f"{'asks' if same else 'may ask'} what {close[j].source} asks (cosine {cosine[i, j]:.2f})"
        remedy = f"choose another fact than in {' '.join(close[j].question.split())[:90]!r}"
        found = _error(lines[i], "evaluation-overlap", message, remedy if same else f"compare; if need be, {remedy}")
        yield found if same else replace(found, severity="warning")


# Warnings


def coverage_findings(lines: Sequence[Line], cards: dict[str, TraitCard], bank: Path) -> Iterator[Finding]:
    """Domains of a card that have no scenario."""
    filled = {(line.path.parent.name, line.path.stem) for line in lines}
    for trait, card in cards.items():
        empty = [domain for domain in card.domains if (trait, domain) not in filled]
        if empty:
            message = f"no scenario for {', '.join(empty)}"
            yield _of_trait(bank, trait, "coverage", "warning", message, "write one each, or take them off the card")


def style_findings(lines: Sequence[Line], bank: Path) -> Iterator[Finding]:
    """Traits whose good replies a guesser finds by style alone (rewards/scenario_style.py)."""
    for trait, cues in style_by_trait(lines).items():
        severity = STYLE_SEVERITY if cues.pairs >= EVEN_PAIRS else "warning"
        for message, remedy in telltale_cues(cues):
            yield _of_trait(bank, trait, "style", severity, message, remedy)


# Findings


def _of(line: Line) -> Scenario:
    assert line.scenario is not None, line.where
    return line.scenario


def _by_trait(lines: Sequence[Line]) -> dict[str, list[Scenario]]:
    groups: dict[str, list[Scenario]] = defaultdict(list)
    for line in lines:
        groups[line.path.parent.name].append(_of(line))
    return groups


def _error(line: Line, kind: Kind, message: str, remedy: str) -> Finding:
    return Finding(line.where, line.path.parent.name, kind, "error", message, remedy)


def _of_trait(
    bank: Path, trait: str, kind: Kind, severity: Literal["error", "warning"], message: str, remedy: str
) -> Finding:
    return Finding(shown(bank / trait), trait, kind, severity, message, remedy)


def _place(finding: Finding) -> tuple[str, int]:
    path, _, number = finding.where.rpartition(":")
    return (path, int(number)) if number.isdigit() else (finding.where, 0)
