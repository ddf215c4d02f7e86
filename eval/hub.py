"""Suites that need a hub: lm-eval's tasks and inspect-evals' tasks, run by these programs themselves.

Items and metrics are theirs; what is decided here is which tasks in which version, with how many examples, and by which
judge. A judge that graded the training must not grade the evaluation: it would reward what it taught.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from eval.item_forms import Strict

INSPECT: Literal["inspect-evals"] = "inspect-evals"


class HubTask(Strict):
    """One task of a hub suite."""

    name: str = Field(description="the task's name in lm-eval's registry or in inspect_evals")
    runner: Literal["lm-eval", "inspect-evals"] = "lm-eval"
    category: str = Field(description="ability, or trait family")
    metric: str | None = Field(description="null: every metric of the log; inspect-evals only")
    higher_is_better: bool = True
    fewshot: int | Literal["own"] = Field(default="own", description="worked examples; own: the task's setting")
    chance: float | None = Field(default=None, description="score of guessing; null where there is no such thing")
    version: float | int | None = Field(default=None, description="lm-eval: the task's version; null if it has none")
    code: bool = Field(default=False, description="executes code that the model wrote")
    judged: bool = Field(default=False, description="a model grades the answers")
    judge_args: tuple[str, ...] = Field(default=(), description="inspect-evals: task arguments that name the judge")
    args: dict[str, str | int | float | bool] = Field(default={}, description="inspect-evals: further task arguments")
    epochs: int | None = Field(default=None, ge=1, description="inspect-evals: how often each item is asked")
    why: str

    @model_validator(mode="after")
    def _judge_where_judged(self) -> HubTask:
        if self.judge_args and not self.judged:
            raise ValueError(f"{self.name}: judge_args without judged: true")
        if self.runner == "lm-eval" and (self.args or self.epochs):
            raise ValueError(f"{self.name}: args and epochs are for inspect-evals; lm-eval's task file has its own")
        if self.runner == "lm-eval" and self.judged:
            raise ValueError(f"{self.name}: lm-eval's tasks are scored by rule; judged is for inspect-evals")
        if self.runner == "lm-eval" and self.metric is None:
            raise ValueError(f"{self.name}: metric is null; name one of the task's metrics")
        return self


class HubSuite(Strict):
    """A hub suite file."""

    name: str
    lm_eval: str = Field(description="version of lm_eval whose task versions are listed")
    inspect_evals: str | None = Field(default=None, description="version of inspect-evals whose tasks are named")
    tasks: tuple[HubTask, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> HubSuite:
        names = [task.name for task in self.tasks]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks of the same name: {', '.join(doubled)}")
        if self.inspect_evals is None and any(task.runner == INSPECT for task in self.tasks):
            raise ValueError("inspect_evals: a suite with tasks of inspect-evals names its version")
        return self


def load_suite(path: Path) -> HubSuite:
    """Read a hub suite. Raises ValueError that names the file, the key and the value."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such suite file; see configs/suites/")
    try:
        return HubSuite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_suite(suite: HubSuite, judge: str | None, training_judge: str | None, allow_code: bool) -> list[HubTask]:
    """The tasks that will run. Raises ValueError for a missing package, a wrong version or an unfit judge.

    training_judge: the judge or reward model that graded the training; "none" if no model did.
    """
    tasks = [task for task in suite.tasks if allow_code or not task.code]
    judged = [task.name for task in tasks if task.judged]
    if judged:
        check_judge(judge, training_judge, len(judged))
    if any(task.runner == "lm-eval" for task in tasks):
        installed = importlib.metadata.version("lm_eval")
        if installed != suite.lm_eval:
            raise ValueError(
                f"{suite.name}: the suite is for lm_eval {suite.lm_eval}, installed is {installed}; "
                f"install it with: pip install lm_eval=={suite.lm_eval}"
            )
    if any(task.runner == INSPECT for task in tasks) and find_spec("inspect_evals") is None:
        count = sum(task.runner == INSPECT for task in tasks)
        raise ValueError(
            f"{suite.name}: {count} tasks come from the package {INSPECT}, which is not installed; install it in an "
            f"environment of its own with: pip install {INSPECT}=={suite.inspect_evals}"
        )
    if any(task.runner == INSPECT for task in tasks):
        installed = importlib.metadata.version("inspect_evals")
        if installed != suite.inspect_evals:
            raise ValueError(
                f"{suite.name}: the suite names tasks and arguments of {INSPECT} {suite.inspect_evals}, installed is "
                f"{installed}; install it with: pip install {INSPECT}=={suite.inspect_evals}"
            )
    return tasks


def check_judge(judge: str | None, training_judge: str | None, tasks: int) -> None:
    """Raises ValueError unless there is a judge and it is another model than the one that graded the training."""
    if not judge:
        raise ValueError(f"judge: {tasks} tasks are graded by a model; name it with --judge, for example openai/gpt-4o")
    if not training_judge:
        raise ValueError(
            "training judge: say which model graded the training with --training-judge (none if no model did), so that "
            "it does not grade the evaluation too"
        )
    if _model_name(judge) == _model_name(training_judge):
        raise ValueError(
            f"judge = {judge!r}: the same model as the training judge {training_judge!r}; name another with --judge, "
            "or the evaluation repeats what the training was paid for"
        )


def _model_name(model: str) -> str:
    """The model without its provider: openai/gpt-4o, gpt-4o and openrouter/openai/gpt-4o are one."""
    return model.strip().rstrip("/").rsplit("/", 1)[-1].lower()


def run_suite(
    suite: HubSuite,
    model: str,
    out: Path,
    limit: int | None,
    judge: str | None,
    training_judge: str | None,
    allow_code: bool,
    progress: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """Run the tasks that have no result in `out` yet; returns task -> score and metric.

    Every lm-eval task leaves <task>.json with its samples, every inspect task its log in inspect/<task>/.
    Raises ValueError as check_suite does, and for an inspect task that failed.
    """
    tasks = check_suite(suite, judge, training_judge, allow_code)
    out.mkdir(parents=True, exist_ok=True)
    scores: dict[str, Any] = {}
    for k, task in enumerate(tasks):
        progress(task.name, k, len(tasks))
        path = out / f"{task.name}.json"
        if not path.is_file():
            work = _run_lm_eval if task.runner == "lm-eval" else _run_inspect
            content = work(task, model, limit, judge, out)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(content, ensure_ascii=False, default=str), encoding="utf-8")
            partial.replace(path)
        scores[task.name] = json.loads(path.read_text(encoding="utf-8"))["score"]
    return scores


def _run_lm_eval(task: HubTask, model: str, limit: int | None, judge: str | None, out: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    answer: Any = cast(Any, simple_evaluate)(
        model="hf",
        model_args={"pretrained": model},
        tasks=[task.name],
        num_fewshot=None if task.fewshot == "own" else task.fewshot,
        batch_size="auto",
        limit=limit,
        confirm_run_unsafe_code=task.code,
    )
    shown = answer["results"] | answer.get("groups", {})
    score = pick_metric(shown[task.name], str(task.metric))
    return {"score": score, "metric": task.metric, "results": shown, "versions": answer["versions"],
            "samples": answer.get("samples")}  # fmt: skip


def pick_metric(results: Mapping[str, Any], metric: str) -> float:
    """The metric's value from lm-eval's "metric,filter" keys; of several filters the first in lm-eval's order.

    Raises ValueError that lists what there is.
    """
    values = [value for key, value in results.items() if key.split(",")[0] == metric]
    if not values:
        raise ValueError(f"metric {metric!r} is not among lm-eval's results: {', '.join(results)}")
    return float(values[0])


def inspect_command(task: HubTask, model: str, limit: int | None, judge: str | None, log_dir: Path) -> list[str]:
    """The command line of Inspect for one task; the judge is the role grader and every argument that names a judge."""
    local = ["hf/local", "-M", f"model_path={model}"] if Path(model).is_dir() else [f"hf/{model}"]
    command = [sys.executable, "-m", "inspect_ai", "eval", f"inspect_evals/{task.name}", "--model", *local]
    command += ["--log-dir", str(log_dir), "--log-format", "json", "--display", "plain", "--ctl-server", "false"]
    if limit is not None:
        command += ["--limit", str(limit)]
    if task.epochs is not None:
        command += ["--epochs", str(task.epochs)]
    for key, value in task.args.items():
        command += ["-T", f"{key}={value}"]
    if task.judged and judge:
        command += ["--model-role", f"grader={judge}"]
        for argument in task.judge_args:
            command += ["-T", f"{argument}={judge}"]
    return command


def _run_inspect(task: HubTask, model: str, limit: int | None, judge: str | None, out: Path) -> dict[str, Any]:
    log_dir = out / "inspect" / task.name
    done = subprocess.run(inspect_command(task, model, limit, judge, log_dir), check=False)
    logs = sorted(log_dir.glob("*.json"))
    if done.returncode or not logs:
        raise ValueError(f"{task.name}: inspect ended with code {done.returncode}; its messages are above ({log_dir})")
    log = json.loads(logs[-1].read_text(encoding="utf-8"))
    return {"score": inspect_score(log, task.metric), "metric": task.metric, "log": str(logs[-1])}


def inspect_score(log: Mapping[str, Any], metric: str | None) -> float | dict[str, float]:
    """The metric from an Inspect log, from whichever scorer reports it, or with None all of them by name.

    Raises ValueError that lists what there is.
    """
    scores: Sequence[Mapping[str, Any]] = (log.get("results") or {}).get("scores") or []
    found = {name: float(m["value"]) for score in scores for name, m in score["metrics"].items()}
    if metric is None:
        return found
    if metric not in found:
        raise ValueError(f"metric {metric!r} is not in the log, which has: {', '.join(found) or 'none'}")
    return found[metric]
