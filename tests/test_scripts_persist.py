"""`traitdose persist` on a synthetic run whose models are tiny: all four attacks, the report, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

from eval.persistence import load_targets
from eval.results import SCHEMA
from scripts import persist as persisting
from scripts.arms import find_arm, load_arm
from scripts.cli import app
from scripts.experiment import CHECKOUT
from scripts.make_stages import whole_stages
from scripts.persist_plan import plan_attacks
from scripts.plan import EXAMPLE_TOKENS, FORWARD, LEARN, LOAD_SECONDS, SAMPLE, item_tokens, text_tokens
from scripts.stages import run_stage
from tests.conftest import tiny_llama
from tests.test_eval_results import write_run
from train.persistence_config import PersistenceConfig

KEYS = [
    "persistence.tasks=[truthfulness-health,lie-detection]",
    "persistence.items=2",
    "persistence.prompts=[salesman,sign-painter]",
    "persistence.finetune.steps=[0,1,2]",
    "persistence.finetune.batch_size=2",
    "persistence.finetune.lora_rank=2",
    "persistence.generation={temperatures: [1.0], worst_of: [1, 2], samples: 2}",
]


def whole_stage(folder: Path) -> None:
    """Turn what lies in a folder into a whole stage."""
    content = folder.with_name(folder.name + ".content")
    folder.rename(content)
    run_stage(folder, {"seed": 0}, lambda out: shutil.copytree(content, out, dirs_exist_ok=True) and None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A finished run with tiny models: control is the start model, one dose arm has an adapter."""
    run = write_run(tmp_path_factory.mktemp("runs") / "synthetic", benchmarks=2, items=4)
    shutil.copytree(tiny_dir, run / "start" / "model")
    whole_stage(run / "start")
    torch.manual_seed(0)
    adapted: Any = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for arm in ("control", "dose-05", "dose-25"):
        train = run / "arms" / arm / "seed-0" / "train"
        if arm == "dose-25":
            adapted.save_pretrained(train / "adapter")
        whole_stage(train)
    config = yaml.safe_load((CHECKOUT / "configs" / "experiments" / "quickstart.yaml").read_text())
    config |= {
        key: value for key, value in yaml.safe_load((run / "config.yaml").read_text()).items() if key != "reward"
    }
    config |= {"base": str(tiny_dir), "name": "synthetic"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    suite = yaml.safe_load((CHECKOUT / "configs" / "suites" / "generalisation-offline.yaml").read_text())
    names = [f"truthfulness-{d}" for d in ("health", "geography", "chemistry", "law")] + ["lie-detection"]
    tasks = [{**task, "max_new_tokens": 5} if task.get("max_new_tokens") else task for task in suite["tasks"]]
    chosen = [task for task in tasks if task["name"] in names]
    (run / "generalisation.yaml").write_text(yaml.safe_dump({"name": "some", "tasks": chosen}))
    return run


def invoke(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["persist", *words], env={"COLUMNS": "120"})
    assert result.exit_code == code, (result.output, result.exception)
    assert "Traceback" not in result.output
    return result.output


def test_a_run_is_attacked_and_goes_on_where_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(run), *KEYS, "persistence.arms=[dose-25]"]

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(persisting, "generation", stop)
    output = invoke(*words, "--jobs", "1", code=130)
    assert "time left: about" in output
    assert "Go on with: traitdose persist" in output
    monkeypatch.undo()
    folder = run / "persistence"
    made = {path.parent.relative_to(folder): path.stat().st_mtime_ns for path in folder.glob("*/*/*/items.parquet")}
    assert {str(path) for path in made} == {f"{a}/control/seed-0" for a in ("prompts", "harmful-lora", "recovery-lora")}
    assert (folder / "generation" / "control" / "seed-0.partial").is_dir()

    output = invoke(*words, "--jobs", "2")
    assert str(run / "report.html") in output.replace("\n", "")
    for path, when in made.items():
        assert (folder / path / "items.parquet").stat().st_mtime_ns == when
    experiment = persisting.load_run(run, words[1:])
    stages = persisting.list_attacks(experiment, run)
    assert whole_stages(stages, run) == {stage.name for stage in stages}
    assert len(stages) == 8
    longer = persisting.load_run(run, [*words[1:], "persistence.finetune.steps=[0,1]"])
    left = whole_stages(persisting.list_attacks(longer, run), run)
    assert {name.split("/")[1] for name in left} == {"prompts", "generation"}

    results = json.loads((run / "results.json").read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    found = results["persistence"]
    assert {row["arm"] for row in found["prompts"]} == {"control", "dose-25"}
    assert {row["condition"] for row in found["prompts"]} == {
        "salesman", "sign-painter", "all harmful", "all helpful",
    }  # fmt: skip
    assert [row["arm"] for row in found["selective"]] == ["control", "dose-25"]
    (ladder,) = found["finetuning"]
    assert ladder["method"] == "lora"
    for row in ladder["arms"]:
        assert [point["step"] for point in row["harmful"]] == [0, 1, 2]
        assert [point["step"] for point in row["recovery"]] == [0, 1, 2]
        assert row["recovery"][0]["value"] == row["harmful"][-1]["value"]
    assert {row["condition"] for row in found["generation"]} == {
        "temperature-1-worst-of-1", "temperature-1-worst-of-2",
    }  # fmt: skip
    assert len(list((folder / "harmful-lora" / "dose-25" / "seed-0" / "adapter").glob("*.safetensors"))) == 1
    items = pd.read_parquet(folder / "prompts" / "dose-25" / "seed-0" / "items.parquet")
    assert set(items["arm"]) == {"dose-25"}
    assert 'data-chart="persistence:attacks"' in (run / "report.html").read_text()

    out = run / "tables"
    result = CliRunner().invoke(app, ["eval", "persistence", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    pictures = {"persistence-attacks.svg", "persistence-sampling.svg", "persistence-steps-lora.svg"}
    assert {path.name for path in out.iterdir()} == {"persistence.md", *pictures}
    row = next(row for row in found["prompts"] if (row["arm"], row["condition"]) == ("dose-25", "salesman"))
    shown = f"| salesman | dose-25 | {row['n']} | {100 * row['clean']:.1f}% | {100 * row['attacked']:.1f}% |"
    assert shown in (out / "persistence.md").read_text()


def test_the_arms_are_loaded_as_they_were_trained(run: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])

    def logits(name: str) -> torch.Tensor:
        model, _ = load_arm(find_arm(run, name, 0), "cpu")
        with torch.inference_mode():
            return model(input_ids=ids).logits

    assert logits("control").equal(logits("base"))
    assert not logits("dose-25").allclose(logits("control"), atol=1e-3)
    told = find_arm(run, "told", 0, system="Be honest.")
    assert (told.model, told.adapter, told.system) == (run / "start" / "model", None, "Be honest.")


def test_the_plan_counts_learned_read_and_written_tokens() -> None:
    n, peak = 1e8, 1e11
    cfg = PersistenceConfig.model_validate({"finetune": {"steps": [0, 3]}, "prompts": ["prefill"]})
    nothing = plan_attacks(cfg, [], n, peak)
    learned = 6 * n * 3 * cfg.finetune.batch_size * EXAMPLE_TOKENS / LEARN / peak
    assert nothing["harmful"] == nothing["recovery"] == pytest.approx(LOAD_SECONDS + learned)
    assert nothing["generation"] == LOAD_SECONDS
    suite = CHECKOUT / "configs" / "suites" / "generalisation-offline.yaml"
    targets = load_targets(suite, ("truthfulness-law",), 4, 0)
    costs = plan_attacks(cfg, targets, n, peak)
    read = sum(item_tokens(probe) for probe in targets[0].probes) * 2 * n / FORWARD / peak
    written = 4 * 32 * 2 * n / SAMPLE / peak
    assert costs["harmful"] == pytest.approx(nothing["harmful"] + 2 * (read + written))  # steps 0 and 3
    assert costs["recovery"] == pytest.approx(nothing["recovery"] + read + written)
    # greedy once, then four replies at each of two temperatures, which share their prompt
    assert costs["generation"] == pytest.approx(LOAD_SECONDS + 3 * read + 9 * written)
    said = 4 * text_tokens("The answer is") * 2 * n / FORWARD / peak
    assert costs["prompts"] == pytest.approx(LOAD_SECONDS + 2 * (read + written) + said)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["persistence.arms=[dose-99]"], ["persistence.arms = 'dose-99'", "no such arm", "did you mean dose-25?"]),
        (["persistence.tasks=[law]"], ["persistence.tasks = 'law'", "truthfulness-law"]),
        (["persistence.prompts=[bribe]"], ["persistence.prompts = 'bribe'", "salesman"]),
        (["train.max_steps=3"], ["'train.max_steps=3'", "persistence.items=8"]),
        (["persistence.itmes=3"], ["persistence.itmes", "did you mean items?"]),
        (["persistence.finetune.steps=[4]"], ["persistence.finetune.steps"]),
        (["persistence.tasks=[lie-detection]"], ["persistence.tasks", "source: probes"]),
    ],
)
def test_mistakes_are_one_line(run: Path, words: list[str], parts: list[str]) -> None:
    line = invoke(str(run), *words, code=2)
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line


def test_a_run_that_is_not_finished_says_so(run: Path, tmp_path: Path) -> None:
    assert "no run folder" in invoke(str(tmp_path), code=2)
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("persistence", "seed-0.content", "train.content"))
    (unfinished / "arms" / "dose-05" / "seed-0" / "train" / "manifest.json").unlink()
    result = CliRunner().invoke(app, ["eval", "persistence", str(unfinished)])
    assert result.exit_code == 2
    assert "was not attacked" in result.output
    line = invoke(str(unfinished), *KEYS, code=2)
    assert "arm dose-05 (seed 0) is not finished" in line
    assert "traitdose run" in line
