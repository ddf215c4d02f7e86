"""Watchers on step tables that must and must not alarm, the canary in a real trainer, and what a stop keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig

from models.loading import load_model, load_tokenizer
from models.rollout import sample
from models.shared_prompt import Tree, pack, packed_logps
from train.config import TrainConfig, WatchConfig
from train.grpo import SharedPromptGRPOTrainer
from train.policy import grpo_config
from train.watchers import check

WATCH = WatchConfig.model_validate({"window": 4, "kl": {"threshold": 0.5}})


def table(n: int = 16, **columns: Any) -> pd.DataFrame:
    """A healthy table of n steps, with some columns given as functions of the step or as lists."""
    rng = np.random.default_rng(0)
    healthy: dict[str, Any] = {
        "proxy": 0.5 + 0.05 * rng.standard_normal(n),
        "trait_proxy": 0.4 + 0.05 * rng.standard_normal(n),
        "gold": 0.3 + 0.05 * rng.standard_normal(n),
        "mean_tokens": 12 + rng.standard_normal(n),
        "zero_variance_groups": np.full(n, 0.3),
        "unpaid": np.zeros(n),
        "loss": 0.01 * rng.standard_normal(n),
        "kl": np.full(n, 0.05),
        "entropy": np.full(n, 0.8),
        "grad_norm": np.full(n, 0.4),
        "sampling_gap": np.full(n, 1e-6),
    }
    given = {name: [f(k) for k in range(n)] if callable(f) else f for name, f in columns.items()}
    return pd.DataFrame({"step": range(n), **healthy, **given})


def names(frame: pd.DataFrame, watch: WatchConfig = WATCH) -> list[str]:
    return [alert.watcher for alert in check(frame, watch)]


def at(step: int, value: float, otherwise: float) -> Any:
    """`otherwise` before a step, `value` from it on."""
    return lambda k: value if k >= step else otherwise


def test_a_healthy_table_is_silent_at_every_step() -> None:
    frame = table(40)
    assert all(not check(frame.iloc[: n + 1], WATCH) for n in range(40))


ALARMS: list[tuple[str, dict[str, Any], int]] = [  # watcher, columns of 16 steps, since
    ("non_finite", {"loss": at(15, float("nan"), 0.1)}, 15),
    ("non_finite", {"grad_norm": at(15, float("inf"), 0.1)}, 15),
    ("non_finite", {"proxy": at(15, float("nan"), 0.5)}, 15),
    ("non_finite", {"unpaid": at(15, 1 / 64, 0.0)}, 15),
    ("reward_collapse", {"proxy": at(12, -0.1, 0.5)}, 12),
    ("zero_variance", {"zero_variance_groups": at(12, 0.95, 0.3)}, 12),
    ("kl", {"kl": at(12, 0.6, 0.05)}, 12),
    ("entropy_rise", {"entropy": at(12, 3.0, 0.8)}, 12),
    ("entropy_fall", {"entropy": at(12, 0.03, 0.8)}, 12),
    ("proxy_gold_gap", {"trait_proxy": at(12, 0.8, 0.4), "gold": at(12, 0.0, 0.3)}, 12),
    ("length_drift", {"mean_tokens": at(12, 40.0, 12.0)}, 12),
    ("length_drift", {"mean_tokens": at(12, 3.0, 12.0)}, 12),
    ("sampling_gap", {"sampling_gap": at(15, 0.2, 1e-6)}, 15),
]


@pytest.mark.parametrize(("watcher", "columns", "since"), ALARMS)
def test_what_must_alarm(watcher: str, columns: dict[str, Any], since: int) -> None:
    alerts = check(table(16, **columns), WATCH)
    assert [(alert.watcher, alert.step, alert.since) for alert in alerts] == [(watcher, 15, since)]
    assert alerts[0].action == ("stop" if watcher in ("non_finite", "sampling_gap") else "warn")
    assert any(character.isdigit() for character in alerts[0].text) or "nan" in alerts[0].text
    off = WATCH.model_copy(update={watcher: getattr(WATCH, watcher).model_copy(update={"threshold": None})})
    assert names(table(16, **columns), off) == []


@pytest.mark.parametrize(
    "columns",
    [
        {"loss": [float("nan"), *[0.1] * 15]},  # long ago
        {"proxy": at(8, 0.9, 0.2)},  # a rise
        {"proxy": at(12, 0.1, 0.5)},  # a fall below the threshold
        {"proxy": at(15, -1.0, 0.5)},  # one bad step of a window
        {"zero_variance_groups": at(13, 1.0, 0.3)},
        {"entropy": at(12, 2.3, 0.8)},
        {"trait_proxy": at(12, 0.8, 0.4)},  # gold stays
        {"trait_proxy": at(12, 0.8, 0.4), "gold": at(12, 0.6, 0.3)},  # both rise
        {"trait_proxy": at(12, 0.1, 0.4), "gold": at(12, 0.0, 0.3)},  # both fall
        {"sampling_gap": at(15, float("nan"), 1e-6)},  # not measured
        {"trait_proxy": [np.nan] * 16, "gold": [np.nan] * 16},  # the control has no trait prompts
    ],
)
def test_what_must_not_alarm(columns: dict[str, Any]) -> None:
    assert names(table(16, **columns)) == []


def test_columns_that_are_not_there_are_not_judged() -> None:
    assert names(table(16)[["step", "loss", "grad_norm", "proxy"]]) == []


def test_some_broken_steps_may_be_tolerated() -> None:
    watch = WatchConfig.model_validate({"window": 4, "non_finite": {"threshold": 1}})
    loss = [0.1] * 16
    loss[15] = float("nan")
    assert names(table(16, loss=loss), watch) == []
    loss[3] = float("inf")
    (alert,) = check(table(16, loss=loss), watch)
    assert alert.since == 12  # no earlier than the window


def test_the_gap_is_seldom_seen_in_noise() -> None:
    """Proxy and gold of 2 trait prompts a step around a level that stays: fewer than 5% of 60-step runs alarm."""
    rng = np.random.default_rng(1)
    watch = WatchConfig()
    alarms = 0
    for _ in range(60):
        gold = 0.2 + 0.5 * rng.standard_normal(60)
        proxy = 0.5 * gold + 0.3 * rng.standard_normal(60)  # they agree in part
        frame = table(60, trait_proxy=list(proxy), gold=list(gold))
        alarms += any("proxy_gold_gap" in names(frame.iloc[: n + 1], watch) for n in range(16, 60, 6))
    assert alarms < 3


def test_the_gap_is_seen_when_the_reward_is_gamed() -> None:
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(20):
        drift = np.clip((np.arange(60) - 20) / 12, 0, 1)
        gold = 0.3 - 0.9 * drift + 0.25 * rng.standard_normal(60)
        proxy = 0.3 + 0.9 * drift + 0.25 * rng.standard_normal(60)
        frame = table(60, trait_proxy=list(proxy), gold=list(gold))
        found += any("proxy_gold_gap" in names(frame.iloc[: n + 1], WatchConfig()) for n in range(16, 60))
    assert found >= 19


@pytest.mark.parametrize("noise", ["step", "row"])
@pytest.mark.parametrize("batch_size", [64, 3])
def test_sampled_log_probabilities_are_the_models(tiny_dir: Path, noise: str, batch_size: int) -> None:
    """The longer prompt comes first, so the order of decoding is not that of the prompts."""

    def generators() -> Any:
        streams = [torch.Generator().manual_seed(i) for i in range(6)]
        return streams[0] if noise == "step" else streams

    model = load_model(str(tiny_dir))
    prompts = [[1, 40, 41, 42, 2, 1], [1, 50, 2, 1]]
    logps: list[list[list[float]]] = []
    settings: dict[str, Any] = {"group_size": 3, "max_new_tokens": 5, "temperature": 0.7, "eos_ids": [2]}
    settings["batch_size"] = batch_size
    groups = sample(model, prompts, generator=generators(), logps=logps, **settings)
    assert groups == sample(model, prompts, generator=generators(), **settings)
    with torch.no_grad():
        expected, _ = packed_logps(model, pack([Tree(p, g) for p, g in zip(prompts, groups, strict=True)]), 0.7)
    flat = torch.tensor([logp for group in logps for row in group for logp in row])
    torch.testing.assert_close(flat, expected, atol=1e-4, rtol=0)


def build(cls: Any, tiny_dir: Path, out: Path, **config: Any) -> Any:
    def letters(completions: Any, **_: Any) -> list[float]:
        return [float(len(c[0]["content"])) for c in completions]

    cfg = TrainConfig(
        prompts_per_step=2, group_size=4, max_new_tokens=6, max_steps=3, warmup_steps=0, **config.pop("train", {})
    )
    args: GRPOConfig = grpo_config(cfg, [1.0], out, 0)
    args.save_strategy = "no"
    prompts = ["hello there", "count to ten", "a", "what is this"] * 2
    return cls(
        model=load_model(str(tiny_dir)),
        reward_funcs=[letters],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": p}]} for p in prompts]),
        processing_class=load_tokenizer(str(tiny_dir)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        token_budget=64,
        record=lambda *_: None,
        keep=len,
        **config,
    )


class StaleSampler(SharedPromptGRPOTrainer):
    """Samples with other weights than it trains: the fault that the canary is for."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        weights = [p for n, p in self.model.named_parameters() if "lora_B" in n]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(0.5)
            result = super()._generate_single_turn(*args, **kwargs)
            for weight in weights:
                weight.mul_(2.0)
        return result


def test_the_canary_tells_a_stale_sampler(tiny_dir: Path, tmp_path: Path) -> None:
    key = "sampling/sampling_logp_difference/mean"
    gaps = {}
    for cls in (SharedPromptGRPOTrainer, StaleSampler):
        trainer = build(cls, tiny_dir, tmp_path / cls.__name__, canary=True)
        trainer.train()
        gaps[cls] = [log[key] for log in trainer.state.log_history if key in log]
    assert len(gaps[SharedPromptGRPOTrainer]) == len(gaps[StaleSampler]) == 3
    assert max(gaps[SharedPromptGRPOTrainer]) < 1e-4
    assert min(gaps[StaleSampler]) > 0.01


def test_the_kl_is_measured_without_a_penalty_as_with_one(tiny_dir: Path, tmp_path: Path) -> None:
    """With a penalty too small to matter, also to Adam, which scales up what is above 1e-8, TRL logs the KL itself."""
    kls = []
    for name, options in (("measured", {"measure_kl": True}), ("stock", {"train": {"beta": 1e-13}})):
        trainer = build(SharedPromptGRPOTrainer, tiny_dir, tmp_path / name, **options)
        trainer.train()
        kls.append([log["kl"] for log in trainer.state.log_history if "kl" in log])
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)
    assert len(kls[0]) == 3
    assert min(kls[0]) > 1e-3


def test_half_precision_continuous_batching_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    class Batched(SharedPromptGRPOTrainer):
        def __init__(self, *, args: GRPOConfig, **kwargs: Any) -> None:
            args.bf16, args.use_transformers_continuous_batching = True, True
            super().__init__(args=args, **kwargs)

    with pytest.raises(ValueError, match="casts the policy's fp32 weights"):
        build(Batched, tiny_dir, tmp_path)
