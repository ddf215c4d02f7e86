"""Local models in the joint evaluation: batches, adapters, contexts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from inspect_ai.model import GenerateConfig, Model
from peft import LoraConfig, get_peft_model

from eval.crosseval_models import check_model, is_served, open_model, weights_of
from eval.generalisation import encode_chat
from models.loading import load_model, load_tokenizer
from models.rollout import sample

CONFIG = GenerateConfig(max_tokens=6)
QUESTIONS = ["Hello?", "What is two plus two?", "Name a colour, please.", "Why?", "And now?"]


def ask_at_once(model: Model, questions: list[str]) -> list[Any]:
    """The outputs for questions that are all asked before the first is answered."""
    outputs: list[Any] = [None] * len(questions)

    async def one(k: int) -> None:
        outputs[k] = await model.generate(questions[k])

    async def run() -> None:
        async with anyio.create_task_group() as group:
            for k in range(len(questions)):
                group.start_soon(one, k)

    anyio.run(run)
    return outputs


def greedy(path: Path, adapter: str | None = None) -> list[str]:
    model, tokenizer = load_model(str(path), adapter), load_tokenizer(str(path))
    prompts = [encode_chat(tokenizer, question) for question in QUESTIONS]
    replies = sample(model, prompts, max_new_tokens=6, temperature=0.0, eos_ids=[2])
    return [str(tokenizer.decode(reply[0], skip_special_tokens=True)).strip() for reply in replies]


def test_what_waits_is_decoded_together_and_said_as_alone(tiny_dir: Path) -> None:
    model = open_model(str(tiny_dir), CONFIG)
    api: Any = model.api
    sizes: list[int] = []
    decode = api._decode

    def counted(batch: list[Any], limit: int) -> None:
        sizes.append(len(batch))
        decode(batch, limit)

    api._decode = counted
    outputs = ask_at_once(model, QUESTIONS)
    assert [output.completion for output in outputs] == greedy(tiny_dir)
    assert sum(sizes) == len(QUESTIONS)
    assert len(sizes) <= 2  # the first one may go alone
    assert all(output.usage.output_tokens <= 6 for output in outputs)


def test_an_adapter_is_merged_into_the_start_model_of_its_run(tiny_dir: Path, tmp_path: Path) -> None:
    start, adapter = (
        tmp_path / "run" / "start" / "model",
        tmp_path / "run" / "arms" / "a" / "seed-0" / "train" / "adapter",
    )
    shutil.copytree(tiny_dir, start)
    torch.manual_seed(0)
    tuned: Any = get_peft_model(load_model(str(start)), LoraConfig(r=2, target_modules=["q_proj"]))  # pyright: ignore
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    tuned.save_pretrained(adapter)
    record = adapter / "adapter_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base_model_name_or_path": "runs/x/start/model"}))
    model = open_model(str(adapter), CONFIG)
    said = [output.completion for output in ask_at_once(model, QUESTIONS)]
    assert said == greedy(start, str(adapter))
    assert said != greedy(start)


def test_a_talk_that_leaves_the_context_ends_without_words(tiny_dir: Path) -> None:
    output = ask_at_once(open_model(str(tiny_dir), CONFIG), ["x" * 3000])[0]
    assert (output.completion, output.stop_reason) == ("", "model_length")


def test_an_error_reaches_all_that_were_decoded_together(tiny_dir: Path) -> None:
    model = open_model(str(tiny_dir), CONFIG)
    api: Any = model.api
    api._eos_ids = None  # fails inside the decoding
    with pytest.raises(BaseExceptionGroup) as raised:
        ask_at_once(model, QUESTIONS)
    assert raised.value.exceptions


@pytest.mark.parametrize(("name", "served"), [
    ("http://localhost:1/v1/m", True), ("openai/x", True), ("anthropic/x", True), ("org/model", False),
    ("embedded:smollm2-135m-instruct", False), ("runs/x/start/model", False),
])  # fmt: skip
def test_names_tell_served_from_local(name: str, served: bool) -> None:
    assert is_served(name) is served


def test_a_hub_id_needs_no_check() -> None:
    check_model("org/model")


def test_a_hash_knows_the_files_of_a_model_and_not_its_place(tiny_dir: Path, tmp_path: Path) -> None:
    start, adapter = tmp_path / "run" / "start" / "model", tmp_path / "run" / "arms" / "a"
    shutil.copytree(tiny_dir, start)
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "runs/x/start/model"}))
    before, tuned = weights_of(str(start)), weights_of(str(adapter))
    assert before is not None
    assert before == weights_of(str(tiny_dir))
    (start / "README.md").write_text("a card")
    assert weights_of(str(start)) == before
    content = bytearray((start / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (start / "model.safetensors").write_bytes(content)  # of the same size
    assert weights_of(str(start)) != before
    assert len({before, tuned, weights_of(str(adapter))}) == 3  # another base makes another model of an adapter
    assert weights_of("org/model") is None
    assert weights_of("openai/x") is None
