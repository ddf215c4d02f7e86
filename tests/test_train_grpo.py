"""The shared-prompt trainer equals stock TRL: log-probabilities, loss, gradients, and what it records."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from models.loading import load_model, load_tokenizer
from models.shared_prompt import Tree
from tests.conftest import tiny_tokenizer
from train.batches import group_rows
from train.grpo import SharedPromptGRPOTrainer, step_seed

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def build(
    tiny_dir: Path,
    out: Path,
    share: bool,
    lora: bool,
    records: list[Any] | None = None,
    kind: type[SharedPromptGRPOTrainer] = SharedPromptGRPOTrainer,
    noise: Any = "step",
    token_budget: int = 64,
    fall_back: Any = None,
    canary: bool = False,
    rewards: list[Any] | None = None,
    **config: Any,
) -> SharedPromptGRPOTrainer:
    def length(completions: Any, **_: Any) -> list[float]:
        return [float(len(c[0]["content"])) for c in completions]

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 2,
        "top_k": 0,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
        "scale_rewards": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    } | config
    torch.manual_seed(0)
    prompts = ["hello there", "count to ten", "a", "what is this thing called love"]
    attention = "eager" if "gemma2" in str(tiny_dir) else "sdpa"
    return kind(
        # From disk: with a KL term TRL loads the reference from the same place.
        model=load_model(str(tiny_dir), attention=attention),
        reward_funcs=rewards or [length],
        args=GRPOConfig(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts]),
        processing_class=load_tokenizer(str(tiny_dir)),
        peft_config=LORA if lora else None,
        token_budget=token_budget,
        record=lambda *row: None if records is None else records.append(row),
        keep=len,
        share=share,
        noise=noise,
        fall_back=fall_back,
        canary=canary,
    )


def a_batch(shuffle: bool) -> dict[str, torch.Tensor]:
    """Two prompts x 4 completions of unequal length, one masked empty, one cut short, rows shuffled as TRL would."""
    g = torch.Generator().manual_seed(0)
    prompts = [[1, 40, 41, 42, 43, 44, 2, 1], [1, 50, 2, 1]]
    lengths = [[6, 3, 1, 0], [2, 6, 4, 5]]
    rows = [(p, n) for p, group in zip(prompts, lengths, strict=True) for n in group]
    width = max(len(p) for p, _ in rows)
    batch = {
        "prompt_ids": torch.tensor([[0] * (width - len(p)) + p for p, _ in rows]),
        "prompt_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows]),
        "completion_ids": torch.randint(3, 250, (8, 6), generator=g),
        "completion_mask": torch.tensor([[1] * n + [0] * (6 - n) for _, n in rows]),
        "advantages": torch.randn(8, generator=g),
        "num_items_in_batch": torch.tensor(sum(n for _, n in rows)),
    }
    batch["completion_ids"] = batch["completion_ids"] * batch["completion_mask"]
    batch["old_per_token_logps"] = -torch.rand(8, 6, generator=g) * 6
    batch["ref_per_token_logps"] = -torch.rand(8, 6, generator=g) * 6
    if shuffle:
        order = torch.randperm(8, generator=g)
        batch = {key: value[order] if value.dim() else value for key, value in batch.items()}
    return batch


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"loss_type": "grpo", "beta": 0.04},
        {"loss_type": "dapo"},
        {"loss_type": "dr_grpo", "temperature": 0.7},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},  # GSPO
    ],
    ids=["grpo+kl", "dapo", "dr_grpo", "gspo"],
)
def test_loss_and_gradients_equal_stock(tiny_dir: Path, tmp_path: Path, lora: bool, config: dict[str, Any]) -> None:
    assert_equals_stock(tiny_dir, tmp_path, lora, config)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("family", ["qwen2-window", "qwen3", "gemma2", "gemma3"])
def test_other_families_equal_stock(tmp_path: Path, lora: bool, family: str) -> None:
    """With a KL term, two steps of accumulation, and sliding windows shorter than the texts."""
    from tests.test_models_self_check import tiny

    folder = tmp_path / family
    tiny(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    config = {"loss_type": "dapo", "beta": 0.04, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    assert_equals_stock(folder, tmp_path, lora, config)


@pytest.mark.parametrize("idle", ["some", "a whole group", "all"])
@pytest.mark.parametrize(
    "config",
    [{"loss_type": name} for name in ("grpo", "dapo", "dr_grpo", "bnpo")] + [{"importance_sampling_level": "sequence"}],
    ids=["grpo", "dapo", "dr_grpo", "bnpo", "gspo"],
)
def test_rows_without_an_advantage_are_not_read(
    tiny_dir: Path, tmp_path: Path, config: dict[str, Any], idle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the loss, its gradients and TRL's metrics are those of all rows, even where their old ratio was absurd."""
    batch = {key: value for key, value in a_batch(shuffle=False).items() if key != "ref_per_token_logps"}
    batch["advantages"][{"some": [1, 2, 5], "a whole group": [0, 1, 2, 3], "all": list(range(8))}[idle]] = 0.0
    batch["old_per_token_logps"] = -torch.rand(8, 6, generator=torch.Generator().manual_seed(1)) * 6
    batch["old_per_token_logps"][batch["advantages"] == 0] = -60.0
    read: list[list[int]] = []

    def packed(self: SharedPromptGRPOTrainer, model: Any, trees: list[Tree]) -> Any:
        read.extend([len(tree.prompt), *map(len, tree.branches)] for tree in trees)
        return stock_packed(self, model, trees)

    stock_packed = SharedPromptGRPOTrainer._packed_logps
    monkeypatch.setattr(SharedPromptGRPOTrainer, "_packed_logps", packed)
    trainers = assert_equals_stock(tiny_dir, tmp_path, True, config, batch)
    lengths = {"some": [[8, 6, 0], [4, 2, 4, 5]], "a whole group": [[4, 2, 6, 4, 5]], "all": [[8, 6]]}
    assert read[2:] == lengths[idle]  # the first two: the log-probabilities of all rows, as they are compared
    ours, stock = ({k: v[-1] for k, v in t._metrics["train"].items() if k != "entropy"} for t in trainers)
    assert ours == pytest.approx(stock, nan_ok=True)
    assert len(ours) > 3


def assert_equals_stock(
    tiny_dir: Path, tmp_path: Path, lora: bool, config: dict[str, Any], batch: dict[str, Any] | None = None
) -> list[SharedPromptGRPOTrainer]:
    """Log-probabilities within 1e-4, loss, and gradients within 1e-5 (relative) of TRL's own path."""
    results, trainers = [], []
    for share in (True, False):
        trainer = build(tiny_dir, tmp_path / str(share), share, lora, **config)
        trainers.append(trainer)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        batch = batch or a_batch(shuffle=True)
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
            6,
        )
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        results.append((logps * batch["completion_mask"], loss, grads))
    (logps, loss, grads), (stock_logps, stock_loss, stock_grads) = results
    torch.testing.assert_close(logps, stock_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, stock_loss, atol=1e-6, rtol=1e-5)
    assert grads.keys() == stock_grads.keys()
    assert len(grads) > 10
    for name, grad in grads.items():
        assert (grad - stock_grads[name]).norm() <= 1e-5 * stock_grads[name].norm() + 1e-9, name
    return trainers


def test_two_steps_move_every_lora_weight_and_record_every_rollout(tiny_dir: Path, tmp_path: Path) -> None:
    records: list[Any] = []
    trainer = build(tiny_dir, tmp_path, True, True, records)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and not p.equal(before[n])]
    assert moved == list(before)
    assert [row[0] for row in records] == [0, 1]
    for _, inputs, prompt_ids, completion_ids, rewards, advantages in records:
        assert len(inputs) == len(prompt_ids) == len(completion_ids) == len(rewards) == len(advantages) == 8
        # Advantages without scaling are rewards minus their group's mean, in the order of the rows.
        torch.testing.assert_close(
            advantages, (rewards[:, 0].view(2, 4) - rewards[:, 0].view(2, 4).mean(1, keepdim=True)).view(-1)
        )


def test_rollouts_are_a_function_of_seed_and_step(tiny_dir: Path, tmp_path: Path) -> None:
    runs = []
    for attempt in range(2):
        records: list[Any] = []
        build(tiny_dir, tmp_path / str(attempt), True, True, records).train()
        runs.append([row[3] for row in records])
    assert runs[0] == runs[1]
    assert step_seed(0, 1, 0) != step_seed(0, 2, 0)


def test_noise_by_row_does_not_depend_on_the_batch(tiny_dir: Path, tmp_path: Path) -> None:
    """The first group of a step of two is that of a step of one, and every row draws for itself."""
    runs = []
    for rows in (8, 4):
        records: list[Any] = []
        build(
            tiny_dir, tmp_path / str(rows), True, True, records, noise="row", max_steps=1,
            per_device_train_batch_size=rows, max_completion_length=12,
        ).train()  # fmt: skip
        runs.append(records[0][3])
    assert runs[0][:4] == runs[1]
    assert len({tuple(ids) for ids in runs[0]}) == 8


@pytest.mark.parametrize("loss", ["dr_grpo", "grpo", "dapo"])
def test_a_batch_trained_in_two_parts_is_the_batch_trained_at_once(tiny_dir: Path, tmp_path: Path, loss: str) -> None:
    """And no group is torn apart: every part sees whole groups."""
    seen: list[int] = []

    class Watching(SharedPromptGRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            trees, _ = group_rows(inputs["prompt_ids"], inputs["prompt_mask"], inputs["prompt_ids"].shape[1])
            seen.extend(len(tree.branches) for tree in trees)
            return super()._compute_loss(model, inputs)

    weights = []
    for parts in (1, 2):
        trainer = build(
            tiny_dir, tmp_path / str(parts), True, True, kind=Watching, loss_type=loss,
            per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts, max_grad_norm=0.0,
            learning_rate=1e-2, optim="sgd",
        )  # fmt: skip
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert seen == [4] * 8
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-6, rtol=1e-5)


def test_truncated_completions_can_be_masked(tiny_dir: Path, tmp_path: Path) -> None:
    """TRL masks them whole, so branches become empty; the step still trains on the others, or on nothing."""
    trainer = build(tiny_dir, tmp_path, True, True, mask_truncated_completions=True)
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_model_that_cannot_share_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A hybrid of convolution and attention trains as stock TRL does, bit for bit, with one warning."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from tests.test_models_self_check import SHAPE

    torch.manual_seed(0)
    folder = tmp_path / "lfm2"
    Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention"])).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights, reasons = [], []
    for share in (True, False):
        trainer = build(folder, tmp_path / str(share), share, False, fall_back=reasons.append, canary=True)
        with caplog.at_level(logging.WARNING, "traitdose"):
            trainer.train()
        assert not trainer.share
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    assert all(weight.equal(weights[1][name]) for name, weight in weights[0].items())
    assert len(reasons) == 1
    assert "conv" in reasons[0]
    assert reasons[0].endswith("so train.watch.sampling_gap sees nothing and cannot stop the arm)")
    assert caplog.text.count("train.watch.sampling_gap sees nothing") == 2  # with either reason not to share
    assert "sampling/sampling_logp_difference/mean" not in set().union(*trainer.state.log_history)
    assert caplog.text.count("prompt sharing is off for") == 1
    assert "lfm2" in caplog.text


def test_a_wrong_shared_forward_is_caught_before_it_is_used(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(SharedPromptGRPOTrainer):
        def _packed_logps(self, model: Any, trees: Any) -> Any:
            logps, entropies = super()._packed_logps(model, trees)
            return logps + 2e-4, entropies

    reasons: list[str] = []
    trainer = build(tiny_dir, tmp_path, True, True, kind=Wrong, fall_back=reasons.append, max_steps=1)
    with caplog.at_level(logging.WARNING, "traitdose"):
        trainer.train()
    assert not trainer.share
    assert "differ from the plain forward's by 0.0002" in reasons[0]
    assert str(tiny_dir) in caplog.text


def test_group_rows_finds_groups_wherever_they_are() -> None:
    ids = torch.tensor([[0, 5, 6, 9], [4, 5, 6, 8], [0, 5, 6, 7]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]])
    trees, rows = group_rows(ids, mask, width=3)
    assert [tree.prompt for tree in trees] == [[5, 6], [4, 5, 6]]
    assert [tree.branches for tree in trees] == [[[9], []], [[8]]]
    assert rows == [[0, 2], [1]]


@pytest.mark.parametrize("share", [True, False])
def test_a_missing_score_is_left_out_of_its_groups_baseline(tiny_dir: Path, tmp_path: Path, share: bool) -> None:
    def paid(completions: Any, **_: Any) -> list[float | None]:
        return [None if row == 1 else float(row) for row in range(len(completions))]

    def monitor(completions: Any, **_: Any) -> list[float]:
        return [7.0] * len(completions)

    records: list[Any] = []
    rewards = [paid, monitor]
    weights = [1.0, 0.0]
    trainer = build(tiny_dir, tmp_path, share, True, records, rewards=rewards, max_steps=1, reward_weights=weights)
    trainer.train()
    _, _, _, _, recorded, advantages = records[0]
    # Group 1 is 0, missing, 2, 3 with mean 5/3; with a 0 for the missing score it would be 5/4. Group 2 is 4, 5, 6, 7.
    expected = torch.tensor([-5 / 3, 0.0, 1 / 3, 4 / 3, -1.5, -0.5, 0.5, 1.5])
    torch.testing.assert_close(advantages, expected)
    assert recorded[:, 0].isnan().tolist() == [False, True] + [False] * 6
    assert recorded[:, 1].tolist() == [7.0] * 8  # the monitor is logged all the same
