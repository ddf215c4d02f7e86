"""Every shipped configuration is read by the program that it is written for. No hub, no GPU, no connection."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from typer.testing import CliRunner

from scripts.cli import app
from scripts.experiment import CHECKOUT, load_experiment
from scripts.plan import Size, memory_bytes
from train.config import check_step, cuda_settings
from train.policy import grpo_config

EXPERIMENTS = sorted((CHECKOUT / "configs" / "experiments").glob("*.yaml"))
ACCELERATE = {path.stem: path for path in sorted((CHECKOUT / "configs" / "accelerate").glob("*.yaml"))}
LAUNCH = CHECKOUT / "scripts" / "launch"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("this test blocks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment(path: Path, tmp_path: Path) -> None:
    """It is valid, TRL takes its settings, and its plan can be made."""
    train = load_experiment(path).train
    trl = grpo_config(train, [1.0], tmp_path, seed=0)
    rows = train.prompts_per_step * train.group_size
    assert trl.generation_batch_size == rows
    assert trl.per_device_train_batch_size * trl.gradient_accumulation_steps == rows
    assert trl.use_vllm == (train.vllm != "off")
    assert (trl.loss_type, trl.num_generations, trl.max_steps) == (train.loss, train.group_size, train.max_steps)
    result = CliRunner().invoke(app, ["plan", str(path), "--out", str(tmp_path / "run")], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert path.stem in result.stdout
    assert ("a CUDA device" in result.stdout) == bool(cuda_settings(train))
    assert not (tmp_path / "run").exists()


def test_recomputed_layers_take_the_memory_that_the_plan_says() -> None:
    """By hand: 64 tokens of float32, 3 layers of 16 x 5 + 4 x 7 = 108 numbers each, or their inputs and one layer."""
    config = CHECKOUT / "configs" / "experiments" / "quickstart.yaml"
    size = Size(1000, layers=3, hidden=5, inner=7, vocabulary=11, source="")
    stored, again = (
        memory_bytes(load_experiment(config, ["train.token_budget=64", f"train.gradient_checkpointing={again}"]), size)
        for again in ("false", "true")
    )
    assert stored - again == pytest.approx(64 * 4 * (3 * 108 - (3 * 5 + 108)))


def test_the_full_size_experiment_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = str(CHECKOUT / "configs" / "experiments" / "gpu-7b.yaml")
    result = CliRunner().invoke(app, ["run", config, "tracking.backend=none", "--out", str(out)])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert all(part in line for part in ("train.dtype = 'bfloat16'", "train.vllm = 'colocate'", "needs a CUDA device"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (["train.micro_batches=3"], ["train.micro_batches = 3", "does not divide train.prompts_per_step = 8"]),
        (["train.dtype=bfloat16", "train.lora_rank=0"], ["train.dtype = 'bfloat16'", "a rank above 0"]),
        (["train.vllm=server"], ["train.vllm_server_url = None", "http://host:8000"]),
        (["train.vllm_server_url=http://a:1"], ["train.vllm_server_url = 'http://a:1'", "leave it out"]),
    ],
)
def test_training_settings_that_do_not_go_together(override: list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_experiment(CHECKOUT / "configs" / "experiments" / "quickstart.yaml", override)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate(name: str) -> None:
    """accelerate's launcher knows every key and makes the environment that the file promises."""
    words = ["--config_file", str(ACCELERATE[name]), "--main_process_ip", "localhost", "-m", "scripts.cli", "run"]
    args = launch_command_parser().parse_args(words)
    content = yaml.safe_load(ACCELERATE[name].read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        assert all(hasattr(args, key) for key in content.get(section, {})), section
    args, config, _ = _validate_launch_command(args)
    assert config is not None
    assert args.num_processes == content["num_processes"]
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(args)
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name.removeprefix("zero")
        return
    environment = prepare_multi_gpu_env(args)
    assert environment.get("ACCELERATE_USE_FSDP", "false") == ("true" if name == "fsdp2" else "false")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    if name == "fsdp2":
        assert environment["FSDP_VERSION"] == "2"


def test_every_accelerate_way_is_there() -> None:
    assert set(ACCELERATE) == {"one-gpu", "ddp", "fsdp2", "zero2", "zero3", "multi-node", "vllm-server"}
    for path in (*ACCELERATE.values(), *EXPERIMENTS, LAUNCH / "skypilot.yaml"):
        assert path.read_text().startswith("# "), f"{path} has no header"


def test_launch_examples_name_what_exists() -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for text in (
        sky["run"],
        sky["setup"],
        (LAUNCH / "slurm.sh").read_text(),
        *map(Path.read_text, ACCELERATE.values()),
    ):
        for word in text.replace("\\\n", " ").split():
            if word.startswith(("configs/", "requirements/", "scripts/")):
                assert (CHECKOUT / word.strip(".,:")).exists(), word


def commands(text: str) -> list[list[str]]:
    """The commands of a header, an indent behind its #, and of a script, each as its words."""
    lines = re.sub(r"\\\n#? *", " ", text).splitlines()
    return [line.lstrip("# ").split() for line in lines if re.match(r"(#   |    )\S", line)]


def check_words(words: list[str], processes: int) -> None:
    """Check the step of the experiment that a command runs, with the settings that it gives."""
    (config,) = (word for word in words if word.startswith("configs/experiments/"))
    overrides = [word for word in words if word.startswith("train.")]
    check_step(load_experiment(CHECKOUT / config, overrides).train, processes)


def test_every_shipped_launch_shares_its_step_out_in_whole_groups() -> None:
    """Else it would fail where the training begins, hours after its start."""
    checked = 0
    for text in (*map(Path.read_text, ACCELERATE.values()), (CHECKOUT / "README.md").read_text()):
        for words in commands(text):
            if words[:2] == ["accelerate", "launch"] or words[:1] == ["ACCELERATE_USE_CPU=true"]:
                default = yaml.safe_load((CHECKOUT / words[words.index("--config_file") + 1]).read_text())
                own = words[words.index("--num_processes") + 1] if "--num_processes" in words else None
                check_words(words, int(own or default["num_processes"]))
                checked += 1
    slurm = (LAUNCH / "slurm.sh").read_text()
    nodes, gpus = (int(re.findall(rf"#SBATCH --{key}=(\d+)", slurm)[0]) for key in ("nodes", "gpus-per-node"))
    (submit,) = (words for words in commands(slurm) if words[0] == "sbatch")
    check_words(submit, nodes * gpus)
    sky = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert "run $CONFIG $OVERRIDES" in sky["run"]
    processes = sky["num_nodes"] * int(sky["resources"]["accelerators"].split(":")[1])
    check_words([sky["envs"]["CONFIG"], *sky["envs"]["OVERRIDES"].split()], processes)
    assert (checked, nodes * gpus, processes) == (len(ACCELERATE) + 2, 16, 16)


def test_a_step_that_does_not_divide_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    config = str(CHECKOUT / "configs" / "experiments" / "gpu-7b.yaml")
    result = CliRunner().invoke(app, ["run", config, "tracking.backend=none", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "train.prompts_per_step = 32: does not divide among 16 processes x 4 micro-batches" in line
    assert "use a multiple of 64, or fewer train.micro_batches" in line
    assert not (tmp_path / "run").exists()
