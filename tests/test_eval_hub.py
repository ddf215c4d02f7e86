"""The hub suites are well formed and name what is installed; a run says what it lacks."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from eval.hub import (
    HubTask,
    check_judge,
    check_suite,
    inspect_command,
    inspect_score,
    load_suite,
    pick_metric,
    run_suite,
)

SUITES = Path(__file__).parent.parent / "configs" / "suites"
CAPABILITY, ALIGNMENT = SUITES / "capability-53.yaml", SUITES / "alignment-full.yaml"
REGISTRY = Path(lm_eval.tasks.__file__).parent
NAMED = re.compile(r"^(?:task|group):[ \t]*[\"']?([\w.-]+)[\"']?[ \t]*$", re.MULTILINE)
BY_PROGRAM = {"squadv2", "humaneval"}  # their metrics are named in Python


@cache
def registered() -> dict[str, Any]:
    """The wanted tasks of lm-eval's registry and their configurations; to parse all 14,683 takes a minute."""
    wanted = {task.name for path in (CAPABILITY, ALIGNMENT) for task in load_suite(path).tasks}
    found: dict[str, Any] = {}
    for path in REGISTRY.glob("**/*.yaml"):
        for name in wanted.intersection(NAMED.findall(path.read_text(encoding="utf-8"))):
            found[name] = load_yaml(path, resolve_func=False, recursive=True)
    return found


def lm_eval_tasks() -> list[HubTask]:
    tasks = [task for path in (CAPABILITY, ALIGNMENT) for task in load_suite(path).tasks]
    return [task for task in tasks if task.runner == "lm-eval"]


def test_there_are_53_capability_tasks_of_ten_kinds() -> None:
    suite = load_suite(CAPABILITY)
    assert len(suite.tasks) == 53
    assert {task.category for task in suite.tasks} == {
        "knowledge", "reasoning", "maths", "code", "reading", "commonsense", "instruction-following", "multilingual",
        "long-context", "medicine",
    }  # fmt: skip
    assert all(task.why and task.chance is not None and task.higher_is_better for task in suite.tasks)


def test_the_suites_are_for_the_installed_lm_eval() -> None:
    assert {load_suite(path).lm_eval for path in (CAPABILITY, ALIGNMENT)} == {importlib.metadata.version("lm_eval")}


@pytest.mark.parametrize("task", lm_eval_tasks(), ids=lambda task: task.name)
def test_every_lm_eval_task_is_registered_in_this_version_with_this_metric(task: HubTask) -> None:
    assert task.name in registered()
    config = registered()[task.name]
    assert (config.get("metadata") or {}).get("version") == task.version
    assert task.metric in str(config) or task.name in BY_PROGRAM
    if "group" not in config and task.fewshot == "own":
        assert "num_fewshot" in config
    assert task.code == bool(config.get("unsafe_code"))


def test_the_alignment_suite_names_the_tasks_of_both_programs() -> None:
    suite = load_suite(ALIGNMENT)
    inspect = {task.name for task in suite.tasks if task.runner == "inspect-evals"}
    assert inspect == {
        "mask", "sycophancy", "simpleqa_verified", "truthfulqa", "healthbench", "medqa", "agentharm",
        "agentharm_benign", "agentic_misalignment", "xstest", "strong_reject", "abstention_bench",
    }  # fmt: skip
    rest = {task.name for task in suite.tasks} - inspect
    assert sum("corrigible" in name for name in rest) == 9
    assert sum(name.startswith("sycophancy_on_") for name in rest) == 3
    lower = {task.name for task in suite.tasks if not task.higher_is_better}
    assert lower == {name for name in rest if "sycophancy_on" in name or "corrigible-less" in name}


def inspect_tasks() -> dict[str, dict[str, str]]:
    """inspect-evals' tasks from its source: name -> argument -> annotation. Nothing of it is imported."""
    spec = find_spec("inspect_evals")
    assert spec is not None
    assert spec.origin is not None
    wanted = {task.name for task in load_suite(ALIGNMENT).tasks}
    found: dict[str, dict[str, str]] = {}
    for path in Path(spec.origin).parent.glob("*/*.py"):
        text = path.read_text(encoding="utf-8")
        if "@task" not in text:
            continue
        for node in ast.parse(text).body:
            if (
                isinstance(node, ast.FunctionDef)
                and node.name in wanted
                and "task" in map(ast.unparse, node.decorator_list)
            ):
                arguments = (*node.args.args, *node.args.kwonlyargs)
                found[node.name] = {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in arguments}
    return found


@pytest.mark.skipif(find_spec("inspect_evals") is None, reason="the package is not there")
def test_every_inspect_task_has_these_arguments_and_no_other_judge() -> None:
    tasks = inspect_tasks()
    for task in load_suite(ALIGNMENT).tasks:
        if task.runner == "inspect-evals":
            assert task.name in tasks
            assert {*task.judge_args, *task.args} <= set(tasks[task.name])
            models = {name for name, annotation in tasks[task.name].items() if re.search(r"\bModel\b", annotation)}
            assert set(task.judge_args) == models


# What a run lacks is said before it begins


def test_code_is_executed_only_when_asked_for() -> None:
    suite = load_suite(CAPABILITY)
    names = [task.name for task in check_suite(suite, None, None, allow_code=False)]
    assert len(names) == 51
    assert {"humaneval", "mbpp"}.isdisjoint(names)
    assert len(check_suite(suite, None, None, allow_code=True)) == 53


@pytest.mark.parametrize(("judge", "training", "message"), [
    (None, "none", "name it with --judge"),
    ("openai/gpt-4o", None, "--training-judge"),
    ("openai/gpt-4o", "gpt-4o", "the same model as the training judge"),
    ("openrouter/openai/GPT-4o", "openai/gpt-4o", "the same model as the training judge"),
])  # fmt: skip
def test_a_judge_is_named_and_has_not_taught(judge: str | None, training: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_judge(judge, training, 10)


def test_another_judge_is_fine() -> None:
    check_judge("openai/gpt-4o", "openai/gpt-4o-mini", 1)
    check_judge("openai/gpt-4o", "none", 1)


@pytest.mark.skipif(find_spec("inspect_evals") is not None, reason="the package is there")
def test_a_missing_package_is_named_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inspect-evals.*not installed.*pip install inspect-evals==0\.26\.0"):
        run_suite(load_suite(ALIGNMENT), "org/m", tmp_path / "out", 1, "openai/gpt-4o", "none", False, lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_another_release_of_lm_eval_is_refused() -> None:
    suite = load_suite(CAPABILITY).model_copy(update={"lm_eval": "0.0.1"})
    with pytest.raises(ValueError, match=r"for lm_eval 0\.0\.1, installed is .*pip install lm_eval==0\.0\.1"):
        check_suite(suite, None, None, False)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("name: capability-53", "title: x", "title"),
    ("name: mmlu_pro,", "name: mmlu,", "same name: mmlu"),
    ("name: boolq, category: reading", "name: boolq, judged: true, category: reading", "scored by rule"),
    ("name: boolq, category: reading", "name: boolq, runner: inspect-evals, category: reading", "names its version"),
    ("metric: f1, fewshot: 3", "metric: null, fewshot: 3", "metric is null"),
    ("name: boolq, category: reading", "name: boolq, epochs: 2, category: reading", "are for inspect-evals"),
])  # fmt: skip
def test_a_faulty_suite_names_file_and_fault(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = CAPABILITY.read_text(encoding="utf-8")
    assert old in text
    broken = tmp_path / "broken.yaml"
    broken.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_suite(broken)
    assert str(broken) in str(error.value)


# What is handed to the programs, and what is read from them


def test_inspect_is_told_the_judge_in_every_way_that_the_task_knows(tmp_path: Path) -> None:
    mask = next(task for task in load_suite(ALIGNMENT).tasks if task.name == "mask")
    line = " ".join(inspect_command(mask, "org/model", 20, "openai/gpt-4o", tmp_path))
    assert "eval inspect_evals/mask --model hf/org/model" in line
    assert "--model-role grader=openai/gpt-4o" in line
    assert "-T binary_judge_model=openai/gpt-4o" in line
    assert "--limit 20" in line
    company = next(task for task in load_suite(ALIGNMENT).tasks if task.name == "agentic_misalignment")
    line = " ".join(inspect_command(company, "org/model", None, "openai/gpt-4o", tmp_path))
    assert "--epochs 100 -T scenario=blackmail -T goal_type=explicit" in line
    assert "-T grader_model=openai/gpt-4o" in line
    local = inspect_command(mask, str(tmp_path), None, None, tmp_path)
    assert local[local.index("--model") + 1 :][:3] == ["hf/local", "-M", f"model_path={tmp_path}"]
    assert "--limit" not in local


def test_scores_are_read_from_both_programs() -> None:
    results = {"alias": "x", "exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.1,
               "exact_match,flexible-extract": 0.5}  # fmt: skip
    assert pick_metric(results, "exact_match") == 0.25
    with pytest.raises(ValueError, match=r"'acc' is not among .*exact_match,strict-match"):
        pick_metric(results, "acc")
    log = {"results": {"scores": [{"metrics": {"accuracy": {"value": 0.5}, "stderr": {"value": 0.1}}}]}}
    assert inspect_score(log, "accuracy") == 0.5
    assert inspect_score(log, None) == {"accuracy": 0.5, "stderr": 0.1}
    with pytest.raises(ValueError, match="has: accuracy, stderr"):
        inspect_score(log, "f1")
