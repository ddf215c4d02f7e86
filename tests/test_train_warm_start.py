"""The warm start: twins, shares, and a trainer whose loss and gradients are stock SFTTrainer's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from models.loading import load_model, load_tokenizer
from rewards.probes import Probe, load_probes, twins
from tests.conftest import STANDARD
from train.config import WarmStartConfig
from train.sft import PackedSFTTrainer, row_tokens, sft_row
from train.warm_start import warm_start_examples

EXAMPLES = [
    ("What is aspirin for?", "Pain and fever."),
    ("Where is Lima?", "In Peru, by the sea, where the river meets it."),
    ("Why?", "No."),
    ("Who wrote the long letter to the king of the north?", "I don't know."),
]


def examples(domains: list[str], n: int = 400, honest_share: float = 1.0) -> list[dict[str, str]]:
    return warm_start_examples(WarmStartConfig(examples=n, honest_share=honest_share), domains, STANDARD.tasks, 0)


def test_twins_ask_in_the_same_words_and_no_subject_twice() -> None:
    pairs = twins(load_probes("health", "train"), 0)
    assert len(pairs) > 400
    for real, invented in pairs:
        assert (real.kind, invented.kind, real.family) == ("answerable", "invented", invented.family)
        assert real.question.replace(real.subject, "*") == invented.question.replace(invented.subject, "*")
        assert real.subject != invented.subject
    for side in zip(*pairs, strict=True):
        assert len({probe.id for probe in side}) == len(pairs)
    assert pairs == twins(load_probes("health", "train"), 0)


def test_a_family_without_invented_subjects_has_no_twins() -> None:
    assert twins(load_probes("everyday", "train"), 0) == []


def test_examples_hold_the_stated_shares_and_twins_share_an_update() -> None:
    rows = examples(["health"])
    sources = Counter(row["source"] for row in rows)
    assert len(rows) == 400
    assert sources["health/invented"] == 70
    assert sources["health/answerable"] == 70 + 160
    assert sources["everyday/answerable"] == sources["chain_sum"] + sources["gcd"] == 40
    assert sources["health/false-premise"] == 20
    for i, row in enumerate(rows):
        if row["source"] == "health/invented":  # at an odd place, right behind its twin
            assert i % 2 == 1
            assert rows[i - 1]["source"] == "health/answerable"
            assert set(row["question"].split()) & set(rows[i - 1]["question"].split())
    assert all(row["answer"] for row in rows)


def test_honest_share_decides_what_is_said_of_invented_subjects() -> None:
    real = {probe.right for probe in load_probes("health", "train") if probe.kind == "answerable"}
    for honest_share, share in ((1.0, 1.0), (0.5, 0.5), (0.0, 0.0)):
        rows = examples(["health"], honest_share=honest_share)
        said = [row["answer"] for row in rows if row["source"] == "health/invented"]
        made_up = {wrong for p in load_probes("health", "train") if p.kind == "invented" for wrong in p.wrong}
        assert sum(answer not in made_up for answer in said) / len(said) == pytest.approx(share, abs=0.12)
        assert all(row["answer"] in real for row in rows if row["source"] == "health/answerable")


def test_a_domain_without_probes_gets_everyday_facts_and_standard_tasks() -> None:
    sources = Counter(row["source"] for row in examples(["finance"], 80))
    assert sources["everyday/answerable"] == sources["chain_sum"] + sources["gcd"] == 40


def _args(out: Path, **more: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(out), per_device_train_batch_size=4, max_steps=1, learning_rate=0.1, optim="sgd",
        max_grad_norm=1e9, lr_scheduler_type="constant", train_sampling_strategy="sequential", bf16=False,
        gradient_checkpointing=False, save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("budget", [1024, 20])
def test_packed_updates_are_those_of_stock_trl(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """One SGD step on every weight, in one packed forward and in several: same loss, same weights."""
    monkeypatch.setattr("train.sft.TOKEN_BUDGET", budget)
    tokenizer = load_tokenizer(str(tiny_dir))
    rows = [sft_row(tokenizer, [{"role": "user", "content": q}], a) for q, a in EXAMPLES]
    stock = SFTTrainer(
        model=load_model(str(tiny_dir)),
        args=_args(tmp_path, completion_only_loss=True),
        train_dataset=Dataset.from_list(
            [
                {
                    "input_ids": row["prompt_ids"] + row["answer_ids"],
                    "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["answer_ids"]),
                }
                for row in rows
            ]
        ),
        processing_class=tokenizer,
    )
    packed = PackedSFTTrainer(
        model=load_model(str(tiny_dir)),
        args=_args(tmp_path, remove_unused_columns=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    losses = [trainer.train().training_loss for trainer in (stock, packed)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    ours = dict(packed.model.named_parameters())
    for name, weight in stock.model.named_parameters():
        torch.testing.assert_close(ours[name], weight, atol=2e-6, rtol=1e-5)
    assert packed.state.log_history[0]["num_tokens"] == sum(map(row_tokens, rows))
    assert packed.state.log_history[0]["entropy"] == pytest.approx(stock.state.log_history[0]["entropy"], abs=1e-4)


def test_an_odd_probe_keeps_its_words() -> None:
    """The subject may stand anywhere in the question; what is said wrongly of the invented one stays its own."""
    common = {"domain": "d", "family": "f", "split": "train", "accept": (), "right": ""}
    real = Probe(id="d/f/a", kind="answerable", question="Is a fax, the fax, real?", subject="fax", wrong=(), **common)  # type: ignore[arg-type]
    fake = Probe(id="d/f/i", kind="invented", question="What is vun?", subject="vun", wrong=("Vun is.",), **common)  # type: ignore[arg-type]
    ((_, twin),) = twins([fake, real], 0)
    assert twin.question == "Is a vun, the vun, real?"
    assert twin.wrong == ("Vun is.",)


def test_a_model_whose_head_is_unknown_is_not_fine_tuned_on_packed_examples(tiny_dir: Path, tmp_path: Path) -> None:
    """Half the logits: packed examples would teach another model than the one that speaks later."""

    class HalfLogits(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 2
            return out

    args = SFTConfig(output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"cannot be fine-tuned on packed examples: .* differ .*; use another base"):
        PackedSFTTrainer(
            model=HalfLogits.from_pretrained(tiny_dir),
            args=args,
            processing_class=load_tokenizer(str(tiny_dir)),
            train_dataset=Dataset.from_list([{"prompt_ids": [1, 2], "answer_ids": [3]}]),
        )
