"""Time our training and scoring against stock TRL and lm-eval in one run: same model, prompts, seeds and machine.

    make bench                                    # every case, twice
    python -m scripts.bench --quick               # the smallest case, once
    python -m scripts.bench --part score          # lm-eval alone; the parts: steps, score, growth
    python -m scripts.bench --device cuda         # random weights in the shape of Qwen2.5-1.5B

Each side runs in a process of its own and they take turns. Writes runs/bench/bench.json: {machine: {gemm_gflops,
copy_gbps, device, threads}, rows: [{case, stage: update | rollout | step | score, ours_s, stock_s, ratio, tokens_per_s,
fraction_of_limit, ours_peak_mb, stock_peak_mb, grad_rel_error}], growth: [{case, stage, ours_s, tokens_per_s}]}. What
the limit is stands in docs/performance.md.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from enum import StrEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error", LMEVAL_LOG_LEVEL="ERROR",
    TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1",
)  # fmt: skip

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from models.linear import linear
from scripts.bench_side import Case, serve

CASES = (
    Case("G8 64+32", prompts=4, group=8, prompt=64, completion=32),
    Case("G8 256+64", prompts=2, group=8, prompt=256, completion=64),
    Case("G8 1024+128", prompts=1, group=8, prompt=1024, completion=128),
    Case("G16 256+64", prompts=2, group=16, prompt=256, completion=64),
)
# One thing grows at a time, from the first case.
GROWTH = (
    Case("G4", 4, 4, 64, 32),
    Case("G16", 4, 16, 64, 32),
    Case("prompt 128", 4, 8, 128, 32),
    Case("prompt 256", 4, 8, 256, 32),
    Case("2 prompts", 2, 8, 64, 32),
    Case("8 prompts", 8, 8, 64, 32),
)
STAGES = ("update", "rollout", "step")


class Part(StrEnum):
    """What can be measured by itself."""

    steps = "steps"
    score = "score"
    growth = "growth"


def main(
    quick: bool = False,
    repeats: int = 2,
    device: str = "cpu",
    part: list[Part] | None = None,
    out: Path = Path("runs/bench"),
) -> None:
    """Print the table and write bench.json; all parts, unless some are named."""
    parts, console = part or list(Part), Console(width=120)
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: --device cuda: torch finds no CUDA device here; leave the option out")
    repeats = 1 if quick else repeats
    machine = {**speeds(device), "device": device, "threads": torch.get_num_threads()}
    console.print(
        f"{machine['gemm_gflops']:.0f} GFLOP/s matrix product, {machine['copy_gbps']:.0f} GB/s copy", highlight=False
    )
    ours, stock = Remote(True, device), Remote(False, device)
    sizes = stock.call("sizes")
    rows: list[dict[str, Any]] = []
    growth: list[dict[str, Any]] = []

    def add(kind: list[dict[str, Any]], found: list[dict[str, Any]], name: str) -> None:
        """Keep what is measured so far, whatever becomes of the rest."""
        kind += found
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine, "rows": rows, "growth": growth}, indent=1)
        (out / "bench.json").write_text(text + "\n", encoding="utf-8")
        console.print(f"{name} done", style="dim")

    if Part.steps in parts:
        for case in CASES[:1] if quick else CASES:
            add(rows, compare(case, ours, stock, repeats, sizes, machine), case.name)
    if Part.score in parts:
        add(rows, [compare_scores(ours, stock, 1 if quick else 2)], "score")
    if Part.growth in parts and not quick:
        for case in (CASES[0], *GROWTH):
            add(growth, grow(case, ours), f"growth: {case.name}")
    ours.close()
    stock.close()
    console.print(table(rows))
    if growth:
        console.print(growth_table(growth))
    console.print(f"{out / 'bench.json'}")


class Remote:
    """A side in its process."""

    def __init__(self, ours: bool, device: str) -> None:
        context = get_context("spawn")
        self.name = "our side" if ours else "stock TRL"
        self.calls, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, ours, device), daemon=True)
        self.process.start()

    def call(self, method: str, *arguments: Any) -> Any:
        """Its result; SystemExit with the error's text if it failed."""
        self.calls.send((method, arguments))
        try:
            result, error = self.calls.recv()
        except EOFError:
            self.process.join()
            raise SystemExit(
                f"bench: {method}: {self.name} ended with exit code {self.process.exitcode} (-9: out of memory)"
            ) from None
        if error is not None:
            raise SystemExit(f"bench: {method}: {error}")
        return result

    def close(self) -> None:
        """End the process."""
        self.calls.send(None)
        self.process.join()


def compare(
    case: Case, ours: Remote, stock: Remote, repeats: int, sizes: dict[str, int], machine: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of one case; both sides are warmed up by the comparison of their gradients."""
    gradients = []
    for side in (ours, stock):
        side.call("prepare", case)
        side.call("update")
        with tempfile.NamedTemporaryFile(suffix=".pt") as file:
            side.call("gradient", file.name)
            gradients.append(torch.load(file.name))
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    limits = limit_seconds(case, sizes, machine["gemm_gflops"] * 1e9, machine["copy_gbps"] * 1e9)
    tokens = case.prompts * case.prompt + case.rows * case.completion
    rows = []
    for stage in STAGES:
        took = [(ours.call(stage), stock.call(stage)) for _ in range(repeats)]
        made = row(case.name, stage, took, tokens)
        made["fraction_of_limit"] = limits[stage] / made["ours_s"]
        rows.append(made | ({"grad_rel_error": error} if stage == "update" else {}))
    return rows


def compare_scores(ours: Remote, stock: Remote, limit: int) -> dict[str, Any]:
    """The capability suite's answers: our scorer against lm-eval's HFLM.

    There is no limit: what has to be computed depends on what a scorer shares.
    """
    took = (ours.call("score", limit), stock.call("score", limit))
    apart = max(abs(a - b) for a, b in zip(took[0]["logps"], took[1]["logps"], strict=True))
    made = row(f"53 benchmarks x {limit}", "score", [took], took[1]["tokens"])
    return made | {"largest_logp_difference": apart, "answers": len(took[0]["logps"])}


def row(case: str, stage: str, took: list[tuple[dict[str, Any], dict[str, Any]]], tokens: int) -> dict[str, Any]:
    """Medians, and the median of the ratios pair by pair."""
    seconds = statistics.median(ours["seconds"] for ours, _ in took)
    return {
        "case": case,
        "stage": stage,
        "ours_s": seconds,
        "stock_s": statistics.median(stock["seconds"] for _, stock in took),
        "ratio": statistics.median(stock["seconds"] / ours["seconds"] for ours, stock in took),
        "tokens_per_s": tokens / seconds,
        "ours_peak_mb": max(ours["peak_mb"] for ours, _ in took),
        "stock_peak_mb": max(stock["peak_mb"] for _, stock in took),
    }


def grow(case: Case, ours: Remote) -> list[dict[str, Any]]:
    """Our seconds for a case, after one untimed update."""
    ours.call("prepare", case)
    ours.call("update")
    tokens = case.prompts * case.prompt + case.rows * case.completion
    rows = []
    for stage in ("update", "rollout"):
        seconds = ours.call(stage)["seconds"]
        rows.append({"case": case.name, "stage": stage, "ours_s": seconds, "tokens_per_s": tokens / seconds})
    return rows


def limit_seconds(case: Case, sizes: dict[str, int], flops: float, bandwidth: float) -> dict[str, float]:
    """Least seconds of each stage on this machine: what has to be computed at the speed of its matrix product, or what
    has to be read at the speed of its memory, whichever takes longer (docs/performance.md).
    """
    shared, sampled = case.prompts * case.prompt, case.rows * case.completion
    pair = 4 * sizes["attention"] * sizes["layers"]  # operations of one token that looks at another
    reading = pair * case.prompts * case.prompt**2 / 2
    attention = reading + pair * sampled * (case.prompt + case.completion / 2)
    read = shared + sampled - case.rows  # a completion's last token predicts nothing
    body = (4 * sizes["body"] + 6 * sizes["lora"]) * read  # frozen weights need no gradient
    update = (body + 4 * sizes["head"] * sampled + 3 * attention) / flops
    weights = sizes["body"] + sizes["head"]
    cached = 2 * sizes["kv"] * sizes["layers"] * (shared + sampled / 2)
    computed = case.rows * (2 * weights + pair * (case.prompt + case.completion / 2))
    decode = max(computed / flops, 4 * (weights + cached) / bandwidth)
    rollout = (2 * sizes["body"] * shared + reading) / flops + (case.completion - 1) * decode
    return {"update": update, "rollout": rollout, "step": update + rollout}


def speeds(device: str, n: int = 2048, repeats: int = 8) -> dict[str, float]:
    """The machine's best matrix product (of both libraries that torch has), and bytes read and written in a copy."""
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    n = 8192 if device == "cuda" else n
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        product = min(best(lambda: a @ b, device, repeats), best(lambda: linear(a, b), device, repeats))
        product = min(product, best(lambda: nn.functional.linear(a, b), device, repeats))
        copy = best(lambda: target.copy_(source), device, repeats)
    return {"gemm_gflops": 2 * n**3 / product / 1e9, "copy_gbps": 2 * source.numel() / copy / 1e9}


def best(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Least seconds of several."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def table(rows: list[dict[str, Any]]) -> Table:
    """The comparison for the terminal."""
    view = Table(title="Ours against stock TRL 1.16 and lm-eval", title_justify="left")
    heads = ("case", "stage", "ours s", "stock s", "ratio", "tokens/s", "of limit", "ours MB", "stock MB", "difference")
    for head in heads:
        view.add_column(head, justify="left" if head in ("case", "stage") else "right")
    for r in rows:
        apart = r.get("grad_rel_error", r.get("largest_logp_difference"))
        view.add_row(
            r["case"],
            r["stage"],
            f"{r['ours_s']:.2f}",
            f"{r['stock_s']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['fraction_of_limit']:.0%}" if "fraction_of_limit" in r else "",
            f"{r['ours_peak_mb']:.0f}",
            f"{r['stock_peak_mb']:.0f}",
            "" if apart is None else f"{apart:.1e}",
        )
    return view


def growth_table(rows: list[dict[str, Any]]) -> Table:
    """How our time grows."""
    view = Table(title=f"From {CASES[0].name}, {CASES[0].prompts} prompts", title_justify="left")
    for head in ("case", "stage", "ours s", "tokens/s"):
        view.add_column(head, justify="left" if head in ("case", "stage") else "right")
    for r in rows:
        view.add_row(r["case"], r["stage"], f"{r['ours_s']:.2f}", f"{r['tokens_per_s']:.0f}")
    return view


if __name__ == "__main__":
    typer.run(main)
