"""Every mistake in a config: one line that names file, key, value and remedy, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from scripts import experiment as experiments
from scripts.cli import app
from scripts.experiment import load_experiment

QUICKSTART = experiments.CHECKOUT / "configs" / "experiments" / "quickstart.yaml"


@pytest.fixture
def config(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The quickstart with a tiny base, a trait and suites of its own."""
    (tmp_path / "traits").mkdir()
    (tmp_path / "traits" / "truthfulness.md").write_text("---\nid: truthfulness\n---\n")
    monkeypatch.setattr(experiments, "TRAITS", tmp_path / "traits")
    (tmp_path / "suite.yaml").write_text("benchmarks:\n  - name: syllogism\n    source: reasoning-gym:syllogism\n")
    content = yaml.safe_load(QUICKSTART.read_text())
    content["base"] = str(tiny_dir)
    for suite in content["eval"]["suites"].values():
        suite["file"] = str(tmp_path / "suite.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(*words: str) -> str:
    """The one line that a failing `traitdose run` prints."""
    result = CliRunner().invoke(app, ["run", *words])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_every_shipped_experiment_is_valid():
    for path in sorted(QUICKSTART.parent.glob("*.yaml")):
        experiment = load_experiment(path)
        assert experiment.arms["control"].dose == 0
        assert experiment.name == path.stem


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.max_stpes=3", ["command line", "train.max_stpes", "3", "did you mean max_steps?"]),
        ("trian.max_steps=3", ["trian", "did you mean train?"]),
        ("arms.dose-25.dose=1.5", ["command line", "arms.dose-25.dose = 1.5", "less than or equal to 1", "Share of"]),
        ("arms.dose-25.dose=-0.1", ["arms.dose-25.dose = -0.1", "greater than or equal to 0"]),
        ("arms.dose-25.dose=much", ["arms.dose-25.dose = 'much'", "valid number"]),
        ("arms.dose-25.dose=0", ["arms", "exactly one arm has dose 0"]),
        ("arms.half={dose: 0.25}", ["arms.half", "the same as arms.dose-25"]),
        ("arms.dose-25.dose=0.0001", ["arms.dose-25.dose = 0.0001", "no trait prompt", "1600"]),
        ("arms.base.dose=0.3", ["arms", "'base'", "common start"]),
        ("reward.trait=truthfullness", ["reward.trait = 'truthfullness'", "did you mean truthfulness?"]),
        ("reward.domains=[helth]", ["reward.domains = 'helth'", "did you mean health?"]),
        (
            "reward.domains=[astronomy]",
            ["reward.domains = ['astronomy']", "truthfulness has no training prompt", "probes: everyday, health;"],
        ),
        ("reward.prompts={conduct: 0}", ["reward.prompts", "every share is 0"]),
        ("reward.prompts={chats: 1}", ["unknown key reward.prompts.chats = 1", "probes, conduct, scenarios"]),
        (
            "eval.suites.capability.file=configs/suites/none.yaml",
            ["capability.file = 'configs/suites/none.yaml'", "no such"],
        ),
        ("eval.suites.safety.file=x.yaml", ["eval.suites.safety", "'capability'"]),
        ("base=embedded:smollm3", ["base = 'embedded:smollm3'", "embedded:smollm2-135m-instruct"]),
        ("base=./nowhere", ["base = './nowhere'", "model directory"]),
        ("base=justaname", ["base = 'justaname'", "org/model"]),
        ("base=configs", ["base = 'configs'", "config.json"]),
        ("seeds=[]", ["seeds = []"]),
        ("seeds=[1,1]", ["seeds = [1, 1]", "different"]),
        ("seeds=[4294967296]", ["seeds.0 = 4294967296", "less than 4294967296"]),
        ("seeds=[true]", ["seeds.0 = True", "valid integer"]),
        ("seeds=0", ["seeds = 0", "a list is wanted, written [value]"]),
        ("name=3", ["name = 3", "put a number in quotes"]),
        ("train.budget_tflops=.inf", ["train.budget_tflops = inf", "finite number"]),
        ("arms={}", ["command line", "arms = {}", "at least 1 item"]),
        ("arms.nope=null", ["command line", "arms.nope = 'null'", "control, dose-25"]),
        ("persistence.arms=[dose-26]", ["persistence.arms = 'dose-26'", "did you mean dose-25?"]),
        ("tracking.backend=tensorboard", ["tracking.backend = 'tensorboard'", "'wandb'"]),
        ("standard.tasks.no_such_task={}", ["standard.tasks.no_such_task", "reasoning-gym"]),
        ("standard.tasks.gcd.max_valeu=3", ["standard.tasks.gcd", "max_valeu"]),
        ("standard.tasks.syllogism={}", ["standard.tasks.syllogism", "capability suite measures"]),
        ("train.gae_lambda=0.9", ["train.gae_lambda = 0.9", "grpo does not read this", "set train.algorithm: ppo"]),
        ("train.watch.kl.threshold=-1", ["train.watch.kl.threshold = -1", "greater than 0", "nats per token"]),
        ("name=a/b", ["name = 'a/b'"]),
        ("justakey", ["command line", "justakey", "key=value"]),
    ],
)
def test_a_mistake_gets_one_clear_line(config, tmp_path, monkeypatch, override, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    line = run(str(config), override)
    for part in parts:
        assert part in line
    assert not (tmp_path / "runs").exists()


def test_a_mistake_in_the_file_names_the_file(config):
    config.write_text(config.read_text().replace("group_size: 8", "group_size: eight"))
    line = run(str(config))
    assert f"{config}: train.group_size = 'eight'" in line
    assert "Completions per prompt" in line


def test_a_missing_section_is_named(config):
    content = yaml.safe_load(config.read_text())
    del content["arms"]
    config.write_text(yaml.safe_dump(content))
    assert "arms is missing; add it" in run(str(config))


def test_files_that_are_no_configs(tmp_path):
    assert "did you mean configs/experiments/quickstart.yaml?" in run("quikstart.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not readable as YAML" in run(str(tmp_path / "broken.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "no `key: value` mapping" in run(str(tmp_path / "list.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "not readable as YAML" in run(str(tmp_path / "binary.yaml"))


def test_overrides_change_scalars_lists_and_whole_sections(config):
    words = ["train.max_steps=7", "seeds=[3,4]", "arms.dose-25.dose=0.1", "reward.learning_rate=1e-5"]
    experiment = load_experiment(config, [*words, "eval.suites.capability.limit=null", "arms.tenth={dose: 0.02}"])
    assert experiment.train.max_steps == 7
    assert experiment.seeds == (3, 4)
    assert experiment.arms["dose-25"].dose == 0.1
    assert experiment.arms["tenth"].dose == 0.02
    assert experiment.reward.learning_rate == 1e-5
    assert experiment.eval.suites["capability"].limit is None


def test_a_section_is_replaced_and_null_takes_an_entry_out(config):
    tasks = "standard.tasks={gcd: {max_value: 9}}"
    experiment = load_experiment(config, [tasks, "arms.tenth={dose: 0.1}", "arms.dose-25=null"])
    assert experiment.standard.tasks == {"gcd": {"max_value": 9}}
    assert list(experiment.arms) == ["control", "tenth"]
    assert list(load_experiment(config, ["eval.suites.capability=null"]).eval.suites) == ["generalisation"]


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_vllm_is_set_off_from_the_command_line_and_from_the_file(config, word):
    """YAML 1.1 reads a bare `off` as False."""
    assert load_experiment(config, [f"train.vllm={word}"]).train.vllm == "off"
    text = config.read_text()
    config.write_text(text.replace("\ntrain:\n", f"\ntrain:\n  vllm: {word}\n"))
    assert config.read_text() != text
    assert load_experiment(config).train.vllm == "off"
    assert load_experiment(config, ["train.vllm=colocate"]).train.vllm == "colocate"
    assert "train.vllm = True" in run(str(config), "train.vllm=on")


def test_a_resolved_config_reads_back_as_the_same_experiment(config, tmp_path):
    experiment = load_experiment(config, ["train.max_steps=7"])
    copy = tmp_path / "config.yaml"
    copy.write_text(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
    assert load_experiment(copy) == experiment
