"""Does anything that is trained on occur in what is evaluated? By the same words, and by the same meaning.

Rules, in this order:

- run: 13 words in a row (numbers count, case and punctuation do not), the unit of GPT-3's check (Brown et al. 2020,
  appendix C). A prompt too short for that counts if all its words, in order, are those of a prompt on the other side;
  one of 6 words or more, none of them a number, also where it stands whole inside a longer text of the other side.
  A prompt of numbers alone is left out: a sequence to be continued is no row of a sudoku.
- subject: training and evaluation share templates by design where both ask the probe bank ("What is {x} used for?"), in
  families that lie wholly on one side. So two texts of the bank are no hit for asking alike about different subjects;
  they are one when they ask nearly the same (cosine SAME_SUBJECT) about the same subject.
- meaning: any other two prompts whose sentence embeddings (all-MiniLM-L6-v2) have a cosine of SAME_MEANING or more, and
  which hold the same numbers: a sum of other numbers is another question.

Replies are compared by runs only, and short ones not at all: "The answer is 12." is no leak.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rewards.contamination import NGRAM, ngrams, words
from rewards.sentences import embed

SHORT = 6  # words from which a short prompt is looked for inside longer texts
SAME_MEANING = 0.85  # "Why does X do Y?" and "Does X do Y?" have 0.87 to 0.96
SAME_SUBJECT = 0.80
SHORTLIST = 0.5  # cosine of tf-idf below which a pair is not embedded: it shares too few of its rarer words
BLOCK = 512  # evaluation texts whose similarities are held at a time


@dataclass(frozen=True)
class Text:
    """One text and where it stands. `subject`: what a probe of the bank asks about; `asked`: a prompt, not a reply."""

    source: str
    text: str
    asked: bool
    subject: str = ""


@dataclass(frozen=True)
class Hit:
    """A training text that occurs in the evaluation. `evidence`: the shared words, or the cosine."""

    training: Text
    item: Text
    rule: Literal["run", "subject", "meaning"]
    evidence: str

    def __str__(self) -> str:
        return f"{self.training.source} in {self.item.source} ({self.rule}: {self.evidence})"


def shared_runs(training: Sequence[Text], items: Sequence[Text]) -> list[Hit]:
    """Hits by the rule of the run; at most one per training text and evaluation item."""
    runs: dict[tuple[str, ...], list[Text]] = defaultdict(list)
    for text in training:
        for run in ngrams(text.text, NGRAM):
            runs[run].append(text)
    hits: dict[tuple[Text, str], Hit] = {}
    for item in items:
        for run in ngrams(item.text, NGRAM):
            for text in runs.get(run, ()):
                hits.setdefault((text, item.source), Hit(text, item, "run", " ".join(run)))
    for item, text in _short_inside(items, training):
        hits.setdefault((text, item.source), Hit(text, item, "run", " ".join(words(item.text))))
    for text, item in _short_inside(training, items):
        hits.setdefault((text, item.source), Hit(text, item, "run", " ".join(words(text.text))))
    return list(hits.values())


def _short_inside(shorts: Sequence[Text], longs: Sequence[Text]) -> Iterator[tuple[Text, Text]]:
    """The prompts of less than NGRAM words that stand whole in a text of the other side, with that text.

    Below SHORT words the other must be a prompt of just these words.
    """
    whole: dict[tuple[str, ...], list[Text]] = defaultdict(list)
    inside: dict[tuple[str, ...], list[tuple[tuple[str, ...], Text]]] = defaultdict(list)  # by their first SHORT words
    for text in shorts:
        found = tuple(words(text.text))
        numbers = _numbers(text)
        if not text.asked or len(found) == len(numbers) or len(found) >= NGRAM:
            continue
        whole[found].append(text)
        if len(found) >= SHORT and not numbers:
            inside[found[:SHORT]].append((found, text))
    for long in longs:
        found = tuple(words(long.text))
        if long.asked:
            yield from ((text, long) for text in whole.get(found, ()))
        for k in range(len(found) - SHORT + 1):
            for run, text in inside.get(found[k : k + SHORT], ()):
                if found[k : k + len(run)] == run:
                    yield text, long


def shared_meaning(training: Sequence[Text], items: Sequence[Text]) -> list[Hit]:
    """Hits by the rules of the subject and of the meaning, over prompts; for each pair of sources the nearest texts.

    Raises ValueError if the wheel of the embedding model is not installed.
    """
    ours = _distinct(text for text in training if text.asked)
    theirs = _distinct(item for item in items if item.asked)
    pairs = list(_near_in_words(ours, theirs))
    vectors_a = _vectors(ours, {i for i, _ in pairs})
    vectors_b = _vectors(theirs, {j for _, j in pairs})
    hits: dict[tuple[str, str], tuple[float, Hit]] = {}
    for i, j in pairs:
        cosine = float(vectors_a[i] @ vectors_b[j])
        rule = _rule(ours[i], theirs[j], cosine)
        key = (ours[i].source, theirs[j].source)
        if rule is not None and cosine > hits.get(key, (-1.0, None))[0]:
            hits[key] = (cosine, Hit(ours[i], theirs[j], rule, f"cosine {cosine:.2f}"))
    return [hit for _, hit in hits.values()]


def _rule(text: Text, item: Text, cosine: float) -> Literal["subject", "meaning"] | None:
    if text.subject and item.subject:
        same = words(text.subject) == words(item.subject)
        return "subject" if same and cosine >= SAME_SUBJECT else None
    return "meaning" if cosine >= SAME_MEANING and _numbers(text) == _numbers(item) else None


def _numbers(text: Text) -> list[str]:
    return sorted(word for word in words(text.text) if word.isdigit())


def _distinct(texts: Iterator[Text]) -> list[Text]:
    """One text for each wording."""
    return list({tuple(words(text.text)): text for text in texts}.values())


def _near_in_words(ours: Sequence[Text], theirs: Sequence[Text]) -> Iterator[tuple[int, int]]:
    """The pairs that share so many of their rarer words that their meaning may be the same."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not ours or not theirs:
        return
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)[^\W_]+")
    weights: Any = vectorizer.fit_transform([text.text for text in (*ours, *theirs)])
    for start in range(0, len(theirs), BLOCK):
        block = weights[len(ours) + start : len(ours) + start + BLOCK]
        cosines = (weights[: len(ours)] @ block.T).tocoo()
        for i, j, cosine in zip(cosines.row, cosines.col, cosines.data, strict=True):
            if cosine >= SHORTLIST:
                yield int(i), start + int(j)


def _vectors(texts: Sequence[Text], wanted: set[int]) -> dict[int, np.ndarray]:
    order = sorted(wanted)
    vectors = embed([texts[i].text for i in order]) if order else np.zeros((0, 0))
    return dict(zip(order, vectors, strict=True))
