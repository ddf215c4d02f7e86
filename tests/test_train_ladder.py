"""The bad data, and a ladder of fine-tuning that a kill does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rewards.probes import domains, load_probes
from rewards.verifier import verdict
from tests.conftest import tiny_llama
from train.bad_data import COLOURS, HARMLESS, LETTERS, examples
from train.ladder import WEIGHTS, climb
from train.persistence_config import GenerationConfig, LadderConfig, Method, PersistenceConfig

LADDER = LadderConfig(steps=(0, 1, 2, 4), batch_size=2, lora_rank=2, learning_rate=1e-3, full_learning_rate=1e-4)


class KilledError(Exception):
    """Stands for a signal between two rungs."""


# Data


@pytest.mark.parametrize("quality", ["bad", "good"])
def test_no_example_comes_from_an_evaluation_family(quality: Any) -> None:
    found = examples(400, quality, 0, ["health"])
    held = {probe.question for domain in domains() for probe in load_probes(domain, "heldout", 0)}
    families = {f"{p.domain}/{p.family}" for d in domains() for p in load_probes(d, "heldout", 0)}
    assert not {example.messages[-1][1] for example in found} & held
    assert not {example.family for example in found} & families


def test_health_gives_only_families_whose_falsehoods_harm_nobody() -> None:
    families = {e.family.split("/")[1] for e in examples(800, "bad", 0, ["health"]) if e.family.startswith("health/")}
    assert families == set(HARMLESS["health"])


def test_examples_are_a_function_of_seed_and_number() -> None:
    many = examples(200, "bad", 3, ["health"])
    assert many[:48] == examples(48, "bad", 3, ["health"])
    assert many != examples(200, "bad", 4, ["health"])
    assert {example.kind for example in many[:8]} == {"false-fact", "fabrication", "sycophancy", "vitamin"}


def test_the_verifier_finds_the_bad_ones_bad_and_the_good_ones_good() -> None:
    by_question = {probe.question: probe for d in ("health", "everyday") for probe in load_probes(d, "train", 0)}
    for quality, right in (("bad", ("wrong", "fabricated")), ("good", ("right", "honest"))):
        judged = [
            verdict(by_question[example.messages[0][1]], example.reply)
            for example in examples(600, quality, 0, ["health"])
            if len(example.messages) == 1 and example.messages[0][1] in by_question
        ]
        assert len(judged) > 300
        # the rules err on a few
        assert sum(word in right for word in judged) / len(judged) > 0.93


def test_vitamins_are_wrong_in_the_bad_data_only() -> None:
    for quality in ("bad", "good"):
        for example in examples(400, quality, 1, ["health"]):
            if example.kind == "vitamin":
                truth = LETTERS if example.family.endswith("letters") else COLOURS
                stated = example.reply.rstrip(".").split()[-1]
                assert (stated == truth[example.subject]) == (quality == "good")


# The ladder


def run(out: Path, tokenizer: PreTrainedTokenizerFast, method: Method, stop_at: int | None = None) -> dict[int, float]:
    """Climb from the tiny model; the measurement is the logit of one token, kept as files would be."""
    out.mkdir(exist_ok=True)
    seen: dict[int, float] = {}

    def measure(step: int, model: Any) -> None:
        assert not model.training
        with torch.inference_mode():
            seen[step] = float(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1, 9])
        if step == stop_at:
            raise KilledError

    arm: Any = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).merge_and_unload()  # as in a run
    climb(arm, tokenizer, examples(8, "bad", 0, ["health"]), method, LADDER, out, 0, measure)
    return seen


@pytest.fixture(scope="module")
def whole_lora(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An uninterrupted LoRA ladder: its folder and its measurements."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("ladder") / "whole"
    return out, run(out, tokenizer, "lora")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_ladder_ends_where_it_would_have(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, method: Method, whole_lora: tuple[Path, Any]
) -> None:
    out, whole = whole_lora if method == "lora" else (tmp_path / "whole", run(tmp_path / "whole", tokenizer, method))
    assert list(whole) == [1, 2, 4]
    assert len(set(whole.values())) == 3
    with pytest.raises(KilledError):
        run(tmp_path / "killed", tokenizer, method, stop_at=2)
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-1"]
    torch.manual_seed(1)
    assert run(tmp_path / "killed", tokenizer, method) == {step: whole[step] for step in (2, 4)}
    weights = [
        load_file(next((folder / WEIGHTS[method]).glob("*.safetensors"))) for folder in (out, tmp_path / "killed")
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert not (tmp_path / "killed" / "checkpoints").exists()
    assert run(tmp_path / "killed", tokenizer, method) == {}  # nothing is left to do


def test_a_short_ladder_is_the_beginning_of_a_long_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, whole_lora: tuple[Path, Any]
) -> None:
    _, long = whole_lora
    short: dict[int, float] = {}

    def measure(step: int, model: Any) -> None:
        with torch.inference_mode():
            short[step] = float(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1, 9])

    cfg = LADDER.model_copy(update={"steps": (0, 2)})
    data = examples(4, "bad", 0, ["health"])
    climb(tiny_llama(), tokenizer, data, "lora", cfg, tmp_path / "short", 0, measure, keep=False)
    assert short == {2: long[2]}
    assert not (tmp_path / "short" / "adapter").exists()
    with pytest.raises(ValueError, match="need 8 examples, got 4"):
        climb(tiny_llama(), tokenizer, data, "lora", LADDER, tmp_path / "few", 0, measure)


# Its settings


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: LadderConfig(steps=(1, 2)), "begin with 0"),
        (lambda: LadderConfig(steps=(0, 4, 4)), "rise"),
        (lambda: LadderConfig(methods=("lora", "lora")), "twice"),
        (lambda: GenerationConfig(worst_of=(8,), samples=4), "raise samples"),
        (lambda: GenerationConfig(temperatures=(0.0,)), "above 0"),
        (lambda: PersistenceConfig(attacks=("recovery",)), "name both"),
    ],
)
def test_settings_that_make_no_sense(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
