"""The hub suites are well formed and name what is installed; a run says what it lacks."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml
from typer.testing import CliRunner

from eval.hub import (
    HubTask,
    check_judge,
    check_suite,
    code_eval_allowed,
    inspect_command,
    inspect_score,
    load_suite,
    pick_metric,
    run_suite,
)
from scripts.cli import app

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
    with pytest.raises(ValueError, match="'mean' is nan"):
        pick_metric({"mean,none": float("nan")}, "mean")


def score_entry(name: str, scorer: str, reducer: str | None = None, **metrics: float) -> dict[str, Any]:
    values = {key: {"name": key, "value": value} for key, value in metrics.items()}
    return {"name": name, "scorer": scorer, "reducer": reducer, "metrics": values}


def test_scores_that_share_a_metric_are_told_apart() -> None:
    """agentic_misalignment reports the accuracy of two scores."""
    scores = [score_entry("harmful", "harmfulness_scorer", accuracy=0.5, stderr=0.1),
              score_entry("classifier_verdict", "harmfulness_scorer", accuracy=0.25, mean=float("nan"))]  # fmt: skip
    log = {"status": "success", "results": {"scores": scores}}
    assert inspect_score(log, None) == {
        "harmful/accuracy": 0.5, "harmful/stderr": 0.1, "classifier_verdict/accuracy": 0.25,
        "classifier_verdict/mean": None,
    }  # fmt: skip
    assert inspect_score(log, "classifier_verdict/accuracy") == 0.25
    assert inspect_score(log, "stderr") == 0.1
    for metric, message in (
        ("accuracy", "of several scores in the log, which has: harmful/accuracy"),
        ("f1", "not in the log, which has: harmful/accuracy"),
        ("mean", "not a number"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect_score(log, metric)


def test_scores_of_one_name_carry_their_scorer_and_reducer() -> None:
    scores = [score_entry("score", "a", "mean", accuracy=0.5), score_entry("score", "a", "max", accuracy=1.0)]
    found = inspect_score({"status": "success", "results": {"scores": scores}}, None)
    assert found == {"a/mean/score/accuracy": 0.5, "a/max/score/accuracy": 1.0}


INSPECT_TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import includes, match
from inspect_ai.solver import solver

@solver
def say(text):
    async def solve(state, generate):
        if not text:
            raise RuntimeError("the judge is down")
        state.output = ModelOutput.from_content("mockllm/model", text)
        return state
    return solve

def made(text):
    samples = [Sample(input="a", target="yes"), Sample(input="b", target="no")]
    return Task(dataset=MemoryDataset(samples), solver=say(text), scorer=[match(location="begin"), includes()])

@task
def bad():
    return made("")

@task
def good():
    return made("yes and no")
"""


def test_inspects_own_logs_of_a_failed_and_a_finished_task(tmp_path: Path) -> None:
    """Inspect ends with code 0 though a task failed."""
    (tmp_path / "tasks.py").write_text(INSPECT_TASKS)
    entry = HubTask(name="x", runner="inspect-evals", category="x", metric=None, why="x")
    command = inspect_command(entry, "m", None, None, tmp_path / "logs")
    command[command.index("inspect_evals/x")] = "tasks.py"
    command[command.index("hf/m")] = "mockllm/model"
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    logs = {path.stem.split("_")[1]: json.loads(path.read_text()) for path in (tmp_path / "logs").glob("*.json")}
    assert {name: log["status"] for name, log in logs.items()} == {"bad": "error", "good": "success"}
    with pytest.raises(ValueError, match=r"status 'error', not 'success': .*the judge is down"):
        inspect_score(logs["bad"], None)
    found = inspect_score(logs["good"], None)
    assert isinstance(found, dict)
    assert (found["match/accuracy"], found["includes/accuracy"]) == (0.5, 1.0)  # it begins with yes, and holds both


def test_a_log_without_scores_is_no_result() -> None:
    with pytest.raises(ValueError, match="no scores"):
        inspect_score({"status": "success", "results": {"scores": []}}, None)


# A folder of results


SMALL_SUITE = """
name: small
lm_eval: {version}
tasks:
  - {{name: gpqa_diamond_zeroshot, category: knowledge, metric: acc, fewshot: 0, why: its data are gated}}
  - {{name: sciq, category: knowledge, metric: acc, fewshot: 0, why: its data are here}}
"""


@pytest.fixture
def suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of two tasks; the data of the second are in the working folder, under their name on the hub."""
    rows = [{"question": "What is wet?", "distractor1": "fire", "distractor2": "sand", "distractor3": "wind",
             "correct_answer": "water", "support": ""}] * 2  # fmt: skip
    (tmp_path / "allenai" / "sciq").mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (tmp_path / "allenai" / "sciq" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_SUITE.format(version=importlib.metadata.version("lm_eval")))
    return path


def run_small(suite_file: Path, model: Path | str, out: Path, limit: int | None = 2) -> tuple[Any, dict[str, str]]:
    return run_suite(load_suite(suite_file), str(model), out, limit, None, None, False, lambda *_: None)


def test_a_failing_task_stops_no_other_one_and_results_stay_with_what_made_them(
    suite_file: Path, tiny_dir: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    shutil.copytree(tiny_dir, model)
    scores, errors = run_small(suite_file, model, out)
    assert list(errors) == ["gpqa_diamond_zeroshot"], errors
    assert scores["sciq"] in (0.0, 1.0)  # one question, twice
    # a finished task is read, not run: its score is the file's; the failed one is tried again
    result = out / "sciq.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | {"score": 0.75}))
    scores, errors = run_small(suite_file, model, out)
    assert (scores, list(errors)) == ({"sciq": 0.75}, ["gpqa_diamond_zeroshot"])

    with pytest.raises(ValueError, match=r"settings\.json: model is .*, now 'org/other' is asked for.*--out"):
        run_small(suite_file, "org/other", out)
    with pytest.raises(ValueError, match=r"settings\.json: limit is 2, now None is asked for"):
        run_small(suite_file, model, out, None)
    text = suite_file.read_text()
    suite_file.write_text(text.replace("metric: acc, fewshot: 0, why: its data are here", "metric: acc_norm, why: x"))
    with pytest.raises(ValueError, match=r"sciq\.json: (metric|fewshot) was .* in the suite, now it is"):
        run_small(suite_file, model, out)
    suite_file.write_text(text.replace("its data are here", "other words"))
    assert run_small(suite_file, model, out)[0] == {"sciq": 0.75}  # a reason decides nothing
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(
        ValueError, match=r"settings\.json: model = .*: its files are not those that the results are of"
    ):
        run_small(suite_file, model, out)


def test_results_of_nobody_knows_which_model_are_refused(suite_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sciq.json").write_text('{"score": 0.9}')
    with pytest.raises(ValueError, match=r"out: holds results but no settings\.json.*--out"):
        run_small(suite_file, "org/m", tmp_path / "out")
    assert not (tmp_path / "out" / "settings.json").exists()


def test_the_command_shows_what_failed_and_ends_with_2(suite_file: Path, tiny_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    shutil.copytree(tiny_dir, model)
    done = CliRunner().invoke(app, ["eval", "hub", "run/model", "--suite", str(suite_file), "--limit", "1"])
    assert done.exit_code == 2, done.output
    assert "1 tasks failed: gpqa_diamond_zeroshot; the same command tries them again" in done.output
    content = json.loads((tmp_path / "runs" / "hub" / "small" / "run-model" / "scores.json").read_text())
    assert content["model"] == "run/model"
    assert list(content["scores"]) == ["sciq"]
    assert list(content["errors"]) == ["gpqa_diamond_zeroshot"]


def test_code_may_be_executed_while_a_code_task_runs_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with code_eval_allowed(False):
        assert "HF_ALLOW_CODE_EVAL" not in os.environ
    with code_eval_allowed(True):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    with pytest.raises(KeyError), code_eval_allowed(True):
        raise KeyError
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"
