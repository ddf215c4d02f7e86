"""The parts of a constitutional arm on the tiny model: what they spend, what they keep, what a kill leaves."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from models.loading import load_model
from rewards.constitution import load_constitution
from scripts.constitution import constitution_parts, run_texts, training_texts
from scripts.experiment import CHECKOUT, Experiment, load_experiment
from scripts.stages import run_stage
from tests.children import finish, fork, kill_at_flush
from tests.conftest import REWARD, STANDARD
from train.config import TrainConfig
from train.constitution_config import PARTS, ConstitutionConfig, allowance
from train.mix import standard_prompts, trait_prompts
from train.parts import load_chunks, passes, sample_chunks, until_spent
from train.revision_tuning import fine_tune, prefer_revisions, supervised_examples
from train.revisions import accepted, sample_revisions

CONSTITUTION = CHECKOUT / "configs" / "constitution" / "constitution.yaml"
SLOW = pytest.mark.slow
METHODS = ["constitution-rl", *(pytest.param(f"constitution-{name}", marks=SLOW) for name in ("sl", "dpo"))]
SETTINGS = {"demonstrations": 0, "critique_tokens": 4, "principles": 1, "lora_rank": 2}
TRAIN = {
    "budget_tflops": 0.012, "max_steps": 400, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4,
    "lora_rank": 2, "save_every": 50,
}  # fmt: skip


# -- budgets and streams


def test_a_part_gets_its_share_and_the_last_one_the_rest() -> None:
    cfg = ConstitutionConfig()
    for method, parts in PARTS.items():
        spent: dict[str, float] = {}
        for part in parts:
            allowed = allowance(cfg, method, part, 100.0, spent)
            spent[part] = allowed * (1.1 if part != parts[-1] else 1.0)  # each overdraws, the last one pays for it
        assert not parts or sum(spent.values()) == pytest.approx(100.0)
    with pytest.raises(ValueError, match=r"constitution\.shares\.constitution-sl: nothing.*revisions 0\.1"):
        allowance(cfg, "constitution-sl", "train", 1e11, {"revisions": 1.05e11})


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"constitution-sl": {"revisions": 1.0}}, "leave something for the last part"),
        ({"constitution-rl": {"revisions": 0.5}}, "has the parts revisions, sl, feedback, preference"),
        ({"trait": {"rollouts": 0.5}}, "'trait' has no shares"),
    ],
)
def test_shares_that_cannot_be(shares: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConstitutionConfig(shares=shares)
    with pytest.raises(ValueError, match=r"between 0 and 0\.5"):
        ConstitutionConfig(clamp=(0.5, 0.6))


def test_a_stream_stops_nearest_to_its_allowance() -> None:
    assert until_spent(iter([3, 3, 3, 3]), float, 7.4) == [3, 3]
    assert until_spent(iter([3, 3, 3, 3]), float, 7.6) == [3, 3, 3]
    assert until_spent(iter([9, 1]), float, 2.0) == [9]
    twice = list(itertools.islice(passes(range(5), "s"), 10))
    assert sorted(twice[:5]) == sorted(twice[5:]) == list(range(5))
    assert twice[:5] != twice[5:]


def test_chunks_go_on_after_a_torn_line(tmp_path: Path) -> None:
    made: list[int] = []

    def make(chunk: int) -> list[dict[str, Any]]:
        made.append(chunk)
        return [{"chunk": chunk, "text": "\u2028", "flops": 1.0}] * 2

    whole = sample_chunks(tmp_path / "whole.jsonl", 7.0, make)
    assert [row["chunk"] for row in whole] == [0, 0, 1, 1, 2, 2, 3, 3]  # 8 is as near to 7 as 6
    lines = (tmp_path / "whole.jsonl").read_text()
    torn = tmp_path / "torn.jsonl"
    torn.write_text(lines[: len(lines) * 5 // 8])
    assert len(load_chunks(torn)) == 2
    made.clear()
    assert sample_chunks(torn, 7.0, make) == whole
    assert made == [2, 3]
    assert torn.read_text() == lines


def test_supervised_examples_are_the_mix_with_answers() -> None:
    revisions = [{"prompt": [{"role": "user", "content": str(i)}], "chosen": f"r{i}"} for i in range(3)]
    examples = list(itertools.islice(supervised_examples(revisions, STANDARD.tasks, 0.25, 0), 200))
    assert [k for k, e in enumerate(examples) if e["source"] == "trait"] == list(range(3, 200, 4))
    standard = standard_prompts(200, 0, STANDARD.tasks)
    for k, example in enumerate(examples):
        if example["source"] == "standard":
            assert example["prompt"] == standard[k]["prompt"]
            assert example["answer"] == str(json.loads(standard[k]["truth"])["answer"])
    used = [e["answer"] for e in examples if e["source"] == "trait"]
    assert all(sorted(used[i : i + 3]) == ["r0", "r1", "r2"] for i in range(0, 48, 3))


def test_the_last_accepted_revision_counts() -> None:
    rows = [(0, 0, True, "a"), (0, 1, True, "b"), (1, 0, True, "c"), (1, 1, False, "d"), (2, 0, False, "e")]
    frame = pd.DataFrame(rows, columns=["position", "round", "kept", "revision"])
    frame = frame.assign(first="first", messages=json.dumps([{"role": "user", "content": "?"}]))
    found = accepted(frame)
    assert [row["chosen"] for row in found] == ["b", "c"]
    assert {row["rejected"] for row in found} == {"first"}
    assert found[0]["prompt"] == [{"role": "user", "content": "?"}]


# -- whole arms


@pytest.fixture(scope="module")
def run(tiny_dir: Path, tiny_stages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Path]:
    """A tiny experiment with every constitutional method, and a run folder that has its start."""
    folder = tmp_path_factory.mktemp("constitution")
    content = yaml.safe_load((CHECKOUT / "configs" / "experiments" / "constitution.yaml").read_text())
    content |= {"base": str(tiny_dir), "tracking": {"backend": "none"}, "constitution": SETTINGS, "train": TRAIN}
    content["standard"] = STANDARD.model_dump(mode="json")
    content["eval"]["suites"] = {"generalisation": content["eval"]["suites"]["generalisation"] | {"limit": 1}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    (folder / "run").mkdir()
    (folder / "run" / "start").symlink_to(tiny_stages / "start")
    return load_experiment(folder / "mine.yaml"), folder / "run"


@pytest.mark.parametrize("method", METHODS)
def test_an_arm_spends_its_budget_within_one_percent(run: tuple[Experiment, Path], method: str) -> None:
    """Part by part, and all of it is in the arm's ledger; its weights load and differ from the start's."""
    experiment, run_dir = run
    folder = run_dir / "arms" / method / "seed-0"
    for stage in constitution_parts(experiment, run_dir, method, 0):
        run_stage(run_dir / stage.name, {}, lambda out, work=stage.work: work(out, lambda _: lambda done, total: None))
    ledgers = {part: json.loads((folder / part / "ledger.json").read_text()) for part in PARTS[method]}
    arm = ledgers["train"]
    budget = experiment.train.budget_tflops * 1e12
    assert arm["total"]["flops"] == pytest.approx(budget, rel=0.01)
    assert list(arm["parts"]) == list(PARTS[method])
    assert sum(part["flops"] for part in arm["parts"].values()) == pytest.approx(arm["total"]["flops"])
    assert arm["trait"]["flops"] + arm["standard"]["flops"] == pytest.approx(arm["total"]["flops"])
    for part in PARTS[method][:-1]:
        assert arm["parts"][part] == ledgers[part]["total"]
        if part in ("sl", "preference"):  # the others sample whole chunks of prompts
            share = experiment.constitution.shares[method][part]
            assert arm["parts"][part]["flops"] == pytest.approx(share * budget, rel=0.05)
    assert arm["ended"]["by"] == "train.budget_tflops"
    assert load_file(folder / "train" / "adapter" / "adapter_model.safetensors")

    start = load_model(str(run_dir / "start" / "model"))
    fine_tuned = folder / "train" / "model"
    assert fine_tuned.exists() == (method != "constitution-sl")  # else the adapter stands on start/model
    weights = str(fine_tuned) if fine_tuned.exists() else str(run_dir / "start" / "model")
    trained = load_model(weights, str(folder / "train" / "adapter"))
    changed = [not a.equal(b) for a, b in zip(start.parameters(), trained.parameters(), strict=True)]
    assert sum(changed) >= 14  # every linear layer


def test_feedback_asks_other_prompts_than_the_revisions(run: tuple[Experiment, Path]) -> None:
    """And every intermediate is in a Parquet file."""
    experiment, run_dir = run
    folder = run_dir / "arms" / "constitution-rl" / "seed-0"
    revisions = pd.read_parquet(folder / "revisions" / "revisions.parquet")
    pairs = pd.read_parquet(folder / "feedback" / "pairs.parquet")
    assert {"prompt", "answer", "critique", "principle", "revision", "kept", "why"} <= set(revisions)
    assert {"prompt", "first", "second", "label", "principles", "votes"} <= set(pairs)
    asked = trait_prompts(int(pairs["position"].max()) + 1, 0, experiment.reward)
    assert [asked[k]["prompt_id"] for k in revisions["position"]] == list(revisions["prompt_id"])
    assert [asked[k]["prompt_id"] for k in pairs["position"]] == list(pairs["prompt_id"])
    assert pairs["position"].min() == revisions["position"].max() + 1
    assert pairs["label"].between(0, 1).all()
    assert (pairs["label"] == pairs["votes"].map(lambda votes: votes.mean())).all()


def test_every_text_that_is_trained_on_reaches_the_contamination_check(run: tuple[Experiment, Path]) -> None:
    experiment, run_dir = run
    told = {text.text for text in training_texts(experiment)}
    constitution = load_constitution(CONSTITUTION)
    assert {p.critique for p in constitution.principles} | {d.question for d in constitution.demonstrations} <= told
    made = {text.text for text in run_texts(run_dir)}
    folder = run_dir / "arms" / "constitution-rl" / "seed-0"
    rows: Any = pd.read_parquet(folder / "revisions" / "revisions.parquet")
    assert (set(rows[rows["kept"]]["revision"]) | set(rows[rows["kept"]]["first"])) - {""} <= made
    pairs = pd.read_parquet(folder / "feedback" / "pairs.parquet")
    assert (set(pairs["first"]) | set(pairs["second"])) - {""} <= made


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("arms.constitution-prompt.dose=0.5", ["arms.constitution-prompt.dose = 0.5", "takes a dose of 0"]),
        ("arms.constitution-sl.dose=0", ["arms.constitution-sl.dose = 0.0", "takes a dose above 0"]),
        ("arms.constitution-sl.method=constitution", ["arms.constitution-sl.method = 'constitution'"]),
        ("arms.control.method=constitution-prompt", ["arms", "exactly one arm has dose 0"]),
        ("constitution.file=none.yaml", ["constitution.file: there is no such file", "none.yaml"]),
        ("constitution.rounds=0", ["constitution.rounds = 0", "Critiques and revisions"]),
        ("constitution.clamp=[0.6,0.4]", ["constitution.clamp", "between 0 and 0.5"]),
        ("constitution.feedback={model: nowhere}", ["constitution.feedback.model = 'nowhere'", "http://host:port"]),
        ("constitution.shares.constitution-sl.revisions=1.2", ["constitution.shares", "sum below 1"]),
        ("constitution.demonstration=3", ["did you mean demonstrations?"]),
    ],
)
def test_mistakes_in_the_config(override: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_experiment(CHECKOUT / "configs" / "experiments" / "constitution.yaml", [override])
    assert all(part in str(error.value) for part in parts), str(error.value)


# -- kills


class KilledError(Exception):
    """Stands for a signal between two updates."""


@pytest.mark.parametrize("part", ["sl", pytest.param("dpo", marks=SLOW)])
def test_a_killed_fine_tuning_ends_as_a_whole_one(tiny_stages: Path, tmp_path: Path, part: str) -> None:
    """Killed after the first checkpoint, the weights are those of the uninterrupted training."""
    cfg = ConstitutionConfig(**{**SETTINGS, "batch_size": 2})
    train = TrainConfig(save_every=2)
    asked = [{"role": "user", "content": "Why?"}]
    rows = [{"prompt": asked, "chosen": f"Because {i}.", "rejected": f"No {i}!"} for i in range(4)]
    start = tiny_stages / "start" / "model"

    def tune(out: Path, stop_at: int) -> bytes:
        def progress(done: int, total: int) -> None:
            if done == stop_at:
                raise KilledError

        if part == "sl":
            fine_tune(cfg, train, STANDARD, 0.5, rows, start, out, 0, 3e8, merge=False, progress=progress)
        else:
            prefer_revisions(cfg, train, rows, start, out, 0, 7e8, progress)
        return (out / "adapter" / "adapter_model.safetensors").read_bytes()

    whole = tune(tmp_path / "whole", 0)
    with pytest.raises(KilledError):
        tune(tmp_path / "killed", 3)
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert tune(tmp_path / "killed", 0) == whole


def revise(start: Path, out: Path, allowed: float, before: Callable[[], None] = lambda: None) -> int:
    """Sample revisions of two rounds in a forked child; returns its pid."""
    out.mkdir(exist_ok=True)

    def work() -> None:
        before()
        cfg = ConstitutionConfig(rounds=2, **SETTINGS)
        train = TrainConfig(max_new_tokens=4)
        constitution = load_constitution(CONSTITUTION)

        def first(texts: Sequence[str]) -> list[bool]:
            return [i == 0 for i in range(len(texts))]

        ledger = sample_revisions(cfg, train, constitution, REWARD, start, out, 0, allowed, first)
        (out / "ledger.json").write_text(json.dumps(ledger))

    return fork(work)


def test_a_kill_in_the_revisions_leaves_the_same_parquet(tiny_stages: Path, tmp_path: Path) -> None:
    start, allowed = tiny_stages / "start" / "model", 9e9
    assert finish(revise(start, tmp_path / "whole", allowed)) is None
    assert finish(revise(start, tmp_path / "killed", allowed, kill_at_flush(2))) == signal.SIGKILL
    assert len(load_chunks(tmp_path / "killed" / "revisions.jsonl")) == 2
    with (tmp_path / "killed" / "revisions.jsonl").open("a") as journal:
        journal.write('[{"position": 3')  # and a third is torn
    assert finish(revise(start, tmp_path / "killed", allowed)) is None
    whole, killed = (pd.read_parquet(tmp_path / name / "revisions.parquet") for name in ("whole", "killed"))
    pd.testing.assert_frame_equal(whole, killed)
    ledgers = [json.loads((tmp_path / name / "ledger.json").read_text()) for name in ("whole", "killed")]
    assert ledgers[0] == ledgers[1]

    assert len(whole) >= 3 * 16 * 2
    assert whole["why"].iloc[0] in ("evaluation", "unchanged", "empty")  # its text "occurs" in the evaluation
    assert (whole["kept"] == (whole["why"] == "")).all()
    second = whole[whole["round"] == 1].set_index("position")
    first = whole[whole["round"] == 0].set_index("position")
    went_on = first["revision"].where(first["why"].isin(["", "evaluation"]), first["answer"])
    assert (second["answer"] == went_on).all()
    assert ledgers[0]["total"]["flops"] == pytest.approx(whole["flops"].sum())
    assert ledgers[0]["total"]["flops"] == pytest.approx(allowed, rel=0.2)
    assert sum(ledgers[0]["dropped"].values()) == (~whole["kept"]).sum()
