"""A system prompt reaches every chat of both suites."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eval.capability import evaluate_capability
from eval.generalisation import encode_chat
from eval.item_forms import ITEMS
from eval.system_prompt import with_system_prompt

SYSTEM = 'Be brief.\nSay "no" when it is no: {{ never }} 100 %}.'


def test_it_stands_before_every_chat_and_before_its_own_system_message(tokenizer: PreTrainedTokenizerFast) -> None:
    told = with_system_prompt(tokenizer, SYSTEM)
    assert told.decode(encode_chat(told, "Why?")) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    own = told.decode(encode_chat(told, (("system", "The code is 7."), ("user", "Code?"))))
    assert own.startswith(f"<|im_start|>system\n{SYSTEM}\n\nThe code is 7.<|im_end|>\n<|im_start|>user\nCode?")
    assert "Be brief" not in tokenizer.decode(encode_chat(tokenizer, "Why?"))  # the original is as it was
    assert with_system_prompt(tokenizer, None) is tokenizer


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none here') }}{% endif %}",
            "none here",
        ),
        ("{% set messages = messages[1:] %}", "leaves system messages out"),
    ],
)
def test_a_template_without_system_messages_is_an_error(
    tokenizer: PreTrainedTokenizerFast, head: str, reason: str
) -> None:
    refusing = copy.deepcopy(tokenizer)
    refusing.chat_template = head + str(tokenizer.chat_template)
    with pytest.raises(ValueError, match=reason):
        with_system_prompt(refusing, SYSTEM)


def test_capability_questions_are_asked_after_it(
    tiny_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    shipped = yaml.safe_load((ITEMS.parents[1] / "configs" / "suites" / "capability-53-offline.yaml").read_text())
    (one,) = (benchmark for benchmark in shipped["benchmarks"] if benchmark["name"] == "syllogism")
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(shipped | {"benchmarks": [one]}))
    plain = evaluate_capability(tiny_model, tokenizer, suite, 2)
    told = evaluate_capability(tiny_model, tokenizer, suite, 2, system="Be brief.")
    assert list(told["prompt"]) == [f"Be brief.\n\n{prompt}" for prompt in plain["prompt"]]
    assert list(told["item"]) == list(plain["item"])
    logp = "gold_logprob"
    assert list(told[told["metric"] == logp]["value"]) != list(plain[plain["metric"] == logp]["value"])
