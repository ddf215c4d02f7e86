"""Time prompt sharing against stock TRL in one run: the update and the rollout, same model, prompts and seeds.

    make bench                       # every case, three repetitions
    python -m scripts.bench --quick  # the smallest case, once

Writes runs/bench/bench.json: {machine, rows: [{case, stage, ours_s, stock_s, ratio, tokens_per_s, fraction_of_limit,
grad_rel_error}]}. fraction_of_limit is the FLOPs that the stage needs with shared prompts (2N a token forward, 4N
forward and backward of LoRA, whose frozen weights need no gradient) over the time it took at this machine's
matrix-product rate, measured in the same run.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

import torch
import typer
from rich.console import Console
from rich.table import Table

from models.loading import load_model, load_tokenizer, resolve_model
from train.grpo import SharedPromptGRPOTrainer

BASE = "embedded:smollm2-135m-instruct"
CASES = {"G8 64+32": (8, 64, 32), "G8 256+64": (8, 256, 64), "G16 256+64": (16, 256, 64)}  # group, prompt, completion


def main(quick: bool = False, repeats: int = 3, out: Path = Path("runs/bench")) -> None:
    """Print the table and write bench.json."""
    console = Console()
    cases = dict(list(CASES.items())[:1]) if quick else CASES
    gflops = matmul_gflops()
    rows: list[dict[str, Any]] = []
    for name, (group, prompt, completion) in cases.items():
        ours, stock = (make_trainer(group, completion, share) for share in (True, False))
        parameters = sum(p.numel() for p in ours.model.parameters())
        batch = make_batch(group, prompt, completion)
        tokens = prompt + group * completion

        errors = gradient_error(ours, stock, batch)
        n = 1 if quick else repeats
        took, stock_took = paired(partial(update, ours, batch), partial(update, stock, batch), n)
        update_row = row(name, "update", took, stock_took, tokens, 4 * parameters * tokens / gflops / 1e9)
        rows.append(update_row | {"grad_rel_error": errors})

        prompts = [batch["prompt_ids"][0].tolist()] * group
        took, stock_took = paired(partial(rollout, ours, prompts), partial(rollout, stock, prompts), n)
        rows.append(row(name, "rollout", took, stock_took, tokens, 2 * parameters * tokens / gflops / 1e9))
        console.print(f"{name} done", style="dim")
    result = {"machine": {"gemm_gflops": gflops, "threads": torch.get_num_threads(), "device": "cpu"}, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    console.print(table(rows, gflops))
    console.print(f"{out / 'bench.json'}")


def make_trainer(group: int, completion: int, share: bool) -> SharedPromptGRPOTrainer:
    """A trainer on the embedded base with LoRA; share=False is TRL's own code path."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig

    torch.manual_seed(0)
    trainer = SharedPromptGRPOTrainer(
        model=load_model(BASE),
        reward_funcs=[lambda completions, **_: [0.0] * len(completions)],
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=group,
            num_generations=group,
            max_completion_length=completion,
            top_k=0,
            loss_type="dr_grpo",
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            generation_kwargs={"min_new_tokens": completion} if not share else None,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}]}] * group),
        processing_class=load_tokenizer(resolve_model(BASE)),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        token_budget=2048,
        record=lambda *_: None,
        keep=len,
        share=share,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    if share:
        trainer.eos_token_ids = []  # both sides decode to the full length
    return trainer


def make_batch(group: int, prompt: int, completion: int) -> dict[str, torch.Tensor]:
    """One group of random tokens in TRL's padded form."""
    g = torch.Generator().manual_seed(0)
    return {
        "prompt_ids": torch.randint(100, 40_000, (1, prompt), generator=g).expand(group, -1).contiguous(),
        "prompt_mask": torch.ones(group, prompt, dtype=torch.long),
        "completion_ids": torch.randint(100, 40_000, (group, completion), generator=g),
        "completion_mask": torch.ones(group, completion, dtype=torch.long),
        "advantages": torch.randn(group, generator=g),
        "num_items_in_batch": torch.tensor(group * completion),
    }


def update(trainer: SharedPromptGRPOTrainer, batch: dict[str, torch.Tensor]) -> None:
    """Loss and gradients of one batch."""
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()


def rollout(trainer: SharedPromptGRPOTrainer, prompts: list[list[int]]) -> None:
    """Sample one group."""
    trainer._generate_single_turn(prompts, None, {}, len(prompts))


def gradient_error(
    ours: SharedPromptGRPOTrainer, stock: SharedPromptGRPOTrainer, batch: dict[str, torch.Tensor]
) -> float:
    """Relative distance of the two gradients, over all weights together."""
    grads = []
    for trainer in (ours, stock):
        update(trainer, batch)
        grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    return ((grads[0] - grads[1]).norm() / grads[1].norm()).item()


def paired(ours: Callable[[], None], stock: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of both, taken in turn, so that a machine that slows down slows both."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, kept in zip((ours, stock), times, strict=True):
            started = time.perf_counter()
            run()
            kept.append(time.perf_counter() - started)
    return times


def row(case: str, stage: str, ours: list[float], stock: list[float], tokens: int, floor_s: float) -> dict[str, Any]:
    """Medians, and the median of the ratios pair by pair."""
    took = statistics.median(ours)
    return {
        "case": case,
        "stage": stage,
        "ours_s": took,
        "stock_s": statistics.median(stock),
        "ratio": statistics.median(b / a for a, b in zip(ours, stock, strict=True)),
        "tokens_per_s": tokens / took,
        "fraction_of_limit": floor_s / took,
    }


def matmul_gflops(n: int = 2048, repeats: int = 5) -> float:
    """fp32 matrix product of this machine, best of some."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    best = min(_seconds(lambda: a @ b) for _ in range(repeats + 1))
    return 2 * n**3 / best / 1e9


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def table(rows: list[dict[str, Any]], gflops: float) -> Table:
    """The rows for the terminal."""
    view = Table(title=f"Prompt sharing against stock TRL (matrix product {gflops:.0f} GFLOP/s)", title_justify="left")
    for head in ("case", "stage", "ours s", "stock s", "ratio", "tokens/s", "of the limit", "gradient error"):
        view.add_column(head, justify="left" if head in ("case", "stage") else "right")
    for r in rows:
        error = f"{r['grad_rel_error']:.1e}" if "grad_rel_error" in r else ""
        view.add_row(
            r["case"],
            r["stage"],
            f"{r['ours_s']:.2f}",
            f"{r['stock_s']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['fraction_of_limit']:.0%}",
            error,
        )
    return view


if __name__ == "__main__":
    typer.run(main)
