"""Capability: a suite of multiple-choice benchmarks, run through lm-eval on a model in memory.

Each benchmark of the suite file becomes an lm-eval task over a local dataset: lm-eval builds the requests and computes
the metrics, models/scoring.py scores the answers. No hub, no socket, no code of a set or a model is executed.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any, cast

import pandas as pd
import yaml
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.capability_tasks import Benchmark, Item, load_items
from models.scoring import SharedContextLM

COLUMNS = [
    "suite",
    "task",
    "trait",
    "domain",
    "heldout",
    "family",
    "item",
    "kind",
    "metric",
    "value",
    "refused",
    "tokens",
    "prompt",
    "output",
]


class Suite(BaseModel):
    """A capability suite file: how items are drawn and the list of benchmarks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int  # of the generators
    max_context: int = Field(ge=16)  # tokens; longer contexts lose their left end
    benchmarks: tuple[Benchmark, ...] = Field(min_length=1)

    @field_validator("benchmarks")
    @classmethod
    def _distinct(cls, benchmarks: tuple[Benchmark, ...]) -> tuple[Benchmark, ...]:
        names = [benchmark.name for benchmark in benchmarks]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"benchmark names stand twice: {', '.join(double)}")
        return benchmarks


def load_suite(path: Path) -> Suite:
    """Read and check a suite file. Raises ValueError that names the file, the key and the value."""
    if not path.is_file():
        raise ValueError(f"suite {path}: no such file; the suites are in configs/suites/")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Suite.model_validate(content)
    except yaml.YAMLError as error:
        raise ValueError(f"suite {path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ValueError(f"suite {path}: {_first_problem(error, content)}") from error


def _first_problem(error: ValidationError, content: Any) -> str:
    problem = error.errors()[0]
    where = list(problem["loc"])
    if len(where) > 1 and where[0] == "benchmarks" and isinstance(where[1], int):
        entry = content["benchmarks"][where[1]]
        where[1] = entry.get("name", where[1]) if isinstance(entry, dict) else where[1]
    value = problem["input"]
    shown = f" (value: {value!r})" if isinstance(value, str | int | float | bool) else ""
    return f"{'.'.join(map(str, where))}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def evaluate_capability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Path,
    limit: int | None,
    progress: Callable[[int, int], None] | None = None,
    system: str | None = None,
    kept: Path | None = None,
) -> pd.DataFrame:
    """Score a model on a suite: two rows per item, in the columns of items.parquet without arm and seed.

    The first row's metric is the benchmark's (acc or acc_norm; value 0 or 1), the second's is gold_logprob: the
    log-probability per token of the right answer. `limit` takes that many items per benchmark, spread over it, the same
    ones for every model. progress is called with (answers scored, answers in all). `system` stands before every
    question (eval/system_prompt.py). `kept` is a file of scores, by which an interrupted evaluation of the same model
    goes on (models/scoring.py). Raises ValueError if a benchmark does not give the items it promises.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"capability limit {limit}: give at least 1 item per benchmark, or none for all")
    plan = load_suite(suite)
    items: dict[str, list[Item]] = {}
    for benchmark in plan.benchmarks:
        try:
            items[benchmark.name] = load_items(benchmark, plan.seed, limit)
        except ValueError as error:
            raise ValueError(f"suite {suite}: {error}") from error
    system = f"{system}\n\n" if system else None
    told = len(tokenizer.encode(system, add_special_tokens=False)) if system else 0
    lm = SharedContextLM(model, tokenizer, max_context=plan.max_context + told, progress=progress, kept=kept)
    with quiet_lm_eval():
        tasks = {b.name: lm_eval_task(b, items[b.name]) for b in plan.benchmarks}
        results = cast(dict[str, Any], evaluate(lm, cast(Any, tasks), bootstrap_iters=0, system_instruction=system))
    rows = [
        row
        for benchmark in plan.benchmarks
        for sample in results["samples"][benchmark.name]
        for row in _rows(lm, benchmark, sample)
    ]
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS)).astype({"value": "float64", "refused": "boolean"})


class _Task(ConfigurableTask):
    """lm-eval's task; its own bar per task stays off the terminal, where one bar for all is shown."""

    def build_all_requests(self, **kwargs: Any) -> None:
        with redirect_stderr(io.StringIO()):
            super().build_all_requests(**kwargs)


def lm_eval_task(benchmark: Benchmark, items: list[Item]) -> ConfigurableTask:
    """The lm-eval task of a benchmark over the given items. Any lm-eval LM can run it."""
    partial_context = bool(items[0].suffix)
    rows = [
        {"item": i.id, "prompt": i.prompt, "choices": list(i.choices), "gold": i.gold, "suffix": i.suffix}
        for i in items
    ]
    config = {
        "task": benchmark.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        # with partial contexts the choices are what is read and the suffix is what is scored
        "doc_to_text": "gold" if partial_context else "prompt",
        "doc_to_target": "suffix" if partial_context else "gold",
        "doc_to_choice": "choices",
        "target_delimiter": benchmark.delimiter,
        "num_fewshot": benchmark.fewshot,
        "metric_list": [{"metric": benchmark.metric, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return _Task(config=config)


def _rows(lm: SharedContextLM, benchmark: Benchmark, sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An lm-eval sample as two rows of items.parquet."""
    doc = sample["doc"]
    arguments = list(sample["arguments"])
    logps = [logp for logp, _ in sample["filtered_resps"]]
    lengths = [len(c) if benchmark.metric == "acc_norm" else 1 for c in doc["choices"]]
    chosen = max(range(len(logps)), key=lambda i: logps[i] / lengths[i])
    context, continuation = arguments[doc["gold"]][:2]
    tokens = len(lm._encode_pair(context, continuation)[1])
    row = {
        "suite": "capability",
        "task": benchmark.name,
        "trait": "",
        "domain": benchmark.category,
        "heldout": True,
        "family": benchmark.name,
        "item": doc["item"],
        "kind": "multiple-choice",
        "refused": None,
        "tokens": tokens,
        "prompt": context,
        "output": doc["choices"][chosen],
    }
    yield {**row, "metric": benchmark.metric, "value": float(sample[benchmark.metric])}
    yield {**row, "metric": "gold_logprob", "value": logps[doc["gold"]] / tokens}


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval warns once per task about choices that the suite file makes on purpose."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
