"""The command line as a user meets it, on a tiny random model. No test here may open a connection."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from models.embedded import gguf_path
from scripts import experiment as experiments
from scripts.cli import app
from scripts.doctor import found_keys, hub_reachable, version_differences
from scripts.experiment import load_experiment
from scripts.make_stages import stage_inputs, whole_stages
from scripts.plan import gguf_size, model_size, plan_arm
from scripts.run import list_stages
from scripts.stages import run_stage

QUICKSTART = experiments.CHECKOUT / "configs" / "experiments" / "quickstart.yaml"
HOLDS_LOCK = """
import sys, time
from pathlib import Path
from scripts.stages import lock_run

with lock_run(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path) -> Path:
    """A complete experiment that takes seconds: tiny model, two steps, one generalisation suite."""
    content = yaml.safe_load(QUICKSTART.read_text())
    content |= {
        "base": str(tiny_dir),
        "tracking": {"backend": "none"},
        "warm_start": {"examples": 8, "batch_size": 8},
        "arms": {"control": {"dose": 0.0}, "half": {"dose": 0.5}},
    }
    content["reward"] |= {"probes": 16, "min_accuracy": 0.0, "audit": "warn"}
    content["train"] |= {"max_steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4}
    content["eval"]["suites"]["generalisation"]["limit"] = 2
    del content["eval"]["suites"]["capability"]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test at once."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("this test blocks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def invoke(*words: str, code: int = 0):
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "100"})
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_help_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "scripts.cli", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds, so that a busy machine does not fail the test
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    for command in ("run", "report", "plan", "doctor"):
        assert command in done.stdout


@pytest.mark.usefixtures("no_network")
def test_plan_counts_what_a_run_would_do_without_a_model_or_a_connection(config, tmp_path):
    before = set(sys.modules)
    text = invoke("plan", str(config), "seeds=[0,1]", "--out", str(tmp_path / "out")).stdout
    assert not (tmp_path / "out").exists()
    assert "lm_eval.evaluator" not in set(sys.modules) - before
    assert "0 of 11 are whole already" in text  # start, reward, base; train and eval of 2 arms with 2 seeds
    assert "in steps of 2 prompts x 2 completions" in text
    assert "6N forward and backward" in text

    experiment = load_experiment(config)
    size = model_size(experiment.base)
    assert size is not None
    # tied embeddings 259 x 64; a layer: queries and outputs 64 x 64, keys and values 64 x 32, 3 x 64 x 128, two norms
    assert size.parameters == 259 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    half = plan_arm(experiment, "half", size.parameters, peak=1e11)
    control = plan_arm(experiment, "control", size.parameters, peak=1e11)
    assert (half.steps, half.trait_prompts, half.standard_prompts, half.completions) == (2, 2, 2, 8)
    assert (control.trait_prompts, control.standard_prompts, control.completions) == (0, 4, 8)


def test_the_embedded_base_is_measured_from_its_header():
    size = gguf_size(gguf_path("embedded:smollm2-135m-instruct"))
    assert (size.parameters, size.layers, size.hidden, size.inner, size.vocabulary) == (
        134_515_008,
        30,
        576,
        1536,
        49152,
    )
    name_only = model_size("org/some-model-1.7B-Instruct")
    assert name_only is not None
    assert name_only.parameters == 1.7e9
    assert model_size("org/some-model") is None


@pytest.mark.usefixtures("no_network")
def test_doctor_tells_names_of_keys_never_values(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "value-of-the-key")
    text = invoke("doctor").stdout
    assert "WANDB_API_KEY" in text
    assert "value-of-the-key" not in text
    assert "not reachable" in text
    assert found_keys()[0] == "WANDB_API_KEY"
    assert all(len(pair) == 2 for pair in version_differences().values())


def test_a_hub_that_never_answers_is_given_up_after_two_seconds(monkeypatch):
    listener = socket.create_server(("127.0.0.1", 0))  # accepts, and never says a word
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = time.monotonic()
    assert not hub_reachable()
    assert time.monotonic() - started < 10
    listener.close()


def test_report_wants_a_run_folder(tmp_path):
    assert "no run folder" in invoke("report", str(tmp_path), code=2).stderr


def test_a_run_in_a_folder_in_use_names_the_other_pid(config, tmp_path):
    out = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", HOLDS_LOCK, str(out)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    other.stdout.readline()
    try:
        line = invoke("run", str(config), "--out", str(out), code=2).stderr
        assert f"in use by process {other.pid}" in line
        assert len(line.splitlines()) == 1
    finally:
        other.kill()
        other.wait()


def test_online_tracking_without_a_key_is_told_before_anything_runs(config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["tracking.backend=wandb", "tracking.mode=online", "--out", str(tmp_path / "out")]
    assert "tracking.mode = 'online'" in invoke("run", str(config), *words, code=2).stderr
    assert not list((tmp_path / "out").glob("*/manifest.json"))


def test_what_a_changed_key_does_over(config, tmp_path):
    def make_all(experiment) -> None:
        for stage in list_stages(experiment, tmp_path / "out"):
            run_stage(tmp_path / "out" / stage.name, stage_inputs(stage, tmp_path / "out"), lambda out: None)

    def stale(*overrides: str) -> set[str]:
        stages = list_stages(load_experiment(config, overrides), tmp_path / "out")
        return {stage.name for stage in stages} - whole_stages(stages, tmp_path / "out")

    make_all(load_experiment(config))
    assert stale() == set()
    assert stale("train.save_every=1", "reward.min_accuracy=0.1", "tracking.project=other") == set()
    assert stale("arms.half.dose=0.25") == {"arms/half/seed-0/train", "arms/half/seed-0/eval"}
    assert stale("train.max_steps=3") == {
        f"arms/{arm}/seed-0/{kind}" for arm in ("control", "half") for kind in ("train", "eval")
    }
    assert stale("eval.suites.generalisation.limit=4") == {f"arms/{a}/seed-0/eval" for a in ("base", "control", "half")}
    assert stale("seeds=[0,1]") == {
        f"arms/{arm}/seed-1/{kind}" for arm in ("control", "half") for kind in ("train", "eval")
    }
    assert len(stale("warm_start.examples=16")) == 7  # everything: the reward model prices the start model's answers


def test_persistence_can_reuse_the_trained_arms_of_constitution(tmp_path):
    def trained(name: str) -> dict[str, dict[str, object]]:
        stages = list_stages(load_experiment(QUICKSTART.with_name(f"{name}.yaml")), tmp_path)
        return {stage.name: stage_inputs(stage, tmp_path) for stage in stages if not stage.name.endswith("/eval")}

    wanted, made = trained("persistence"), trained("constitution")
    assert len(wanted) == 8  # start, reward, and two arms with three seeds
    assert {name: made[name] for name in wanted} == wanted


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_a_whole_run_on_a_tiny_model_then_a_second_that_skips_everything(config, tmp_path):
    out = tmp_path / "out"
    words = ["run", str(config), "--out", str(out)]
    first = invoke(*words).stdout
    results = json.loads((out / "results.json").read_text())
    assert {arm["name"] for arm in results["arms"]} == {"base", "control", "half"}
    assert (out / "report.html").stat().st_size > 10_000
    assert str(out / "report.html") in first.replace("\n", "")
    assert not list(out.rglob("*.partial"))
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}
    assert len(stamps) == 8  # seven stages and the contamination check

    second = invoke(*words).stdout
    assert second.count("already whole") == 7
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("manifest.json")}

    other = tmp_path / "other"
    words = [*words[:-1], str(other), "arms.half.dose=0.25", "--reuse", str(out)]
    third = invoke(*words).stdout
    assert "7, of which 5 are whole already" in third
    assert f"copied from {out}: start, reward, arms/base/seed-0/eval, arms/control" in third.replace("\n", "")
    assert (other / "start" / "manifest.json").read_bytes() == (out / "start" / "manifest.json").read_bytes()
    assert "--reuse" in invoke(*words[:-1], str(tmp_path), code=2).stderr


@pytest.mark.slow
def test_an_interrupted_run_says_how_to_go_on(config, tmp_path):
    out = tmp_path / "out"
    # SIGINT during the reward stage, from inside, where Ctrl-C would arrive
    script = (
        "import os, signal, threading, time, pathlib, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background shells start tests with it ignored
        f"out = pathlib.Path({str(out)!r})\n"
        "def stop():\n"
        "    while not (out / 'start' / 'manifest.json').exists(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=stop, daemon=True).start()\n"
        "from scripts.cli import main\n"
        f"sys.argv = ['traitdose', 'run', {str(config)!r}, '--out', {str(out)!r}]\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        f"Stopped. Finished stages are kept. Go on with: traitdose run {config} --out {out}"
    )
    assert "Traceback" not in done.stderr
    assert (out / "start" / "manifest.json").exists()
