"""Suites that need a hub: lm-eval's tasks and inspect-evals' tasks, run by these programs themselves.

Items and metrics are theirs; what is decided here is which tasks in which version, with how many examples, and by which
judge. A judge that graded the training must not grade the evaluation: it would reward what it taught.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from eval.item_forms import Strict
from eval.kept_settings import check_kept, write_kept
from eval.local_models import weights_hash

INSPECT: Literal["inspect-evals"] = "inspect-evals"
CODE_EVAL = "HF_ALLOW_CODE_EVAL"  # the code_eval metric executes nothing unless this variable is 1
DECIDES = {"runner", "metric", "fewshot", "code", "judged", "judge_args", "args", "epochs"}  # a task's answers or score


class HubTask(Strict):
    """One task of a hub suite."""

    name: str = Field(description="the task's name in lm-eval's registry or in inspect_evals")
    runner: Literal["lm-eval", "inspect-evals"] = "lm-eval"
    category: str = Field(description="ability, or trait family")
    metric: str | None = Field(description="null: every metric of the log, as score/metric; inspect-evals only")
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
) -> tuple[dict[str, Any], dict[str, str]]:
    """Run the tasks that have no result in `out` yet; returns the scores and the errors, both by task.

    Every lm-eval task leaves <task>.json with its samples, every inspect task its log in inspect/<task>/. A task that
    fails leaves nothing, stops no other one, and is tried again by the next call. Raises ValueError as check_suite
    does, and where `out` holds the results of another model, limit, judge, suite or task entry.
    """
    tasks = check_suite(suite, judge, training_judge, allow_code)
    _check_folder(out, suite, tasks, model, limit, judge)
    scores: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for k, task in enumerate(tasks):
        progress(task.name, k, len(tasks))
        path = out / f"{task.name}.json"
        if not path.is_file():
            work = _run_lm_eval if task.runner == "lm-eval" else _run_inspect
            try:
                content = work(task, model, limit, judge, out)
            except Exception as error:  # gated data, a missing extra, a judge that is down: whatever the programs raise
                errors[task.name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                continue
            partial = path.with_suffix(".partial")
            record = content | {"task": _deciding(task)}
            partial.write_text(json.dumps(record, ensure_ascii=False, default=str), encoding="utf-8")
            partial.replace(path)
        scores[task.name] = json.loads(path.read_text(encoding="utf-8"))["score"]
    return scores, errors


def _check_folder(
    out: Path, suite: HubSuite, tasks: Sequence[HubTask], model: str, limit: int | None, judge: str | None
) -> None:
    """Note what decides the results, or raise ValueError if the folder holds the results of something else."""
    settings_file = out / "settings.json"
    weights = weights_hash(model) if Path(model).is_dir() else None
    settings = {
        "suite": suite.name,
        "model": model,
        "limit": limit,
        "judge": judge if any(task.judged for task in tasks) else None,
        "lm_eval": suite.lm_eval,
        "inspect_evals": suite.inspect_evals,
    }
    if not settings_file.is_file() and any((out / f"{task.name}.json").is_file() for task in tasks):
        raise ValueError(
            f"{out}: holds results but no settings.json, so nothing says which model they are of; use another folder "
            "with --out"
        )
    theirs = check_kept(settings_file, settings)
    if theirs is not None and theirs.get("weights") != weights:
        raise ValueError(
            f"{settings_file}: model = {model!r}: its files are not those that the results are of; use another folder "
            "with --out, or remove this one"
        )
    for task in tasks:
        path = out / f"{task.name}.json"
        if not path.is_file():
            continue
        then = json.loads(path.read_text(encoding="utf-8"))["task"]
        for key, value in _deciding(task).items():
            if then.get(key) != value:
                raise ValueError(
                    f"{path}: {key} was {then.get(key)!r} in the suite, now it is {value!r}; use another folder with "
                    "--out, or remove this file to have the task run again"
                )
    write_kept(settings_file, settings | {"weights": weights})


def _deciding(task: HubTask) -> dict[str, Any]:
    return task.model_dump(mode="json", include=DECIDES)


@contextmanager
def code_eval_allowed(allowed: bool) -> Iterator[None]:
    """Lets the metric of the code tasks execute what the model wrote, in here and nowhere else."""
    before = os.environ.get(CODE_EVAL)
    if allowed:
        os.environ[CODE_EVAL] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CODE_EVAL, None)
        else:
            os.environ[CODE_EVAL] = before


@cache
def _registry() -> Any:
    """lm-eval's tasks; to list its thousands of files takes seconds, so it is done once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _run_lm_eval(task: HubTask, model: str, limit: int | None, judge: str | None, out: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate

    from models.loading import best_device

    with code_eval_allowed(task.code):
        answer: Any = cast(Any, simple_evaluate)(
            model="hf",
            model_args={"pretrained": model},
            tasks=[task.name],
            num_fewshot=None if task.fewshot == "own" else task.fewshot,
            batch_size="auto",
            device=best_device(),  # lm-eval's own default is CUDA even where there is none
            limit=limit,
            confirm_run_unsafe_code=task.code,
            task_manager=_registry(),
        )
    shown = answer["results"] | answer.get("groups", {})
    score = pick_metric(shown[task.name], str(task.metric))
    return {"score": score, "metric": task.metric, "results": shown, "versions": answer["versions"],
            "samples": answer.get("samples")}  # fmt: skip


def pick_metric(results: Mapping[str, Any], metric: str) -> float:
    """The metric's value from lm-eval's "metric,filter" keys; of several filters the first in lm-eval's order.

    Raises ValueError that lists what there is, and for a value that is not a number.
    """
    values = [value for key, value in results.items() if key.split(",")[0] == metric]
    if not values:
        raise ValueError(f"metric {metric!r} is not among lm-eval's results: {', '.join(results)}")
    if not math.isfinite(float(values[0])):
        raise ValueError(f"metric {metric!r} is {values[0]!r} in lm-eval's results, which is no score")
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
    try:
        score = inspect_score(log, task.metric)
    except ValueError as error:
        raise ValueError(f"{logs[-1]}: {error}") from error
    return {"score": score, "metric": task.metric, "log": str(logs[-1])}


def inspect_score(log: Mapping[str, Any], metric: str | None) -> float | dict[str, float | None]:
    """The metric from an Inspect log, or with None all of them by name; null is one without a number.

    A name is "score/metric", because the scores of a log often share their metrics' names; `metric` may leave the
    score's name out where only one score has the metric. Raises ValueError for a log that did not end well (Inspect's
    exit code does not tell), for one without scores, and for a metric that it lacks or has no number for.
    """
    if log.get("status") != "success":
        cause = (log.get("error") or {}).get("message") or "no error is named"
        raise ValueError(f"inspect's log has status {log.get('status')!r}, not 'success': {cause}")
    scores: Sequence[Mapping[str, Any]] = (log.get("results") or {}).get("scores") or []
    if not scores:
        raise ValueError("inspect's log has no scores")
    names = [score["name"] for score in scores]
    found: dict[str, float | None] = {}
    for score in scores:
        # two scorers may share a score's name, and one scorer has as many as there are ways to reduce epochs
        parts = (score["scorer"], score.get("reducer")) if names.count(score["name"]) > 1 else ()
        whose = "/".join([*(part for part in parts if part), score["name"]])
        for name, entry in score["metrics"].items():
            value = entry["value"]
            found[f"{whose}/{name}"] = float(value) if value is not None and math.isfinite(value) else None
    if metric is None:
        return found
    meant = [name for name in found if name == metric or name.endswith(f"/{metric}")]
    if len(meant) != 1:
        fault = "is of several scores in" if meant else "is not in"
        raise ValueError(f"metric {metric!r} {fault} the log, which has: {', '.join(found)}")
    value = found[meant[0]]
    if value is None:
        raise ValueError(f"metric {metric!r} is not a number in the log")
    return value
