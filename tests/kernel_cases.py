"""Cases for the log-probabilities of an LM head, and the process in which Triton interprets TRL's kernels on them.

    TRITON_INTERPRET=1 python -m tests.kernel_cases MODEL OUT     # MODEL: the tiny model's directory; OUT: a file

Triton reads the variable when it is imported, hence a process of its own. TRL chooses its kernels by the device of the
tensors; here it takes them on a CPU too, and its way without Triton is taken away. What stands between the kernels is
the same as on CUDA, except that the matrix products are this machine's and not cuBLAS's.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from models.shared_prompt import token_logps
from tests.test_train_grpo import a_batch, build

Result = dict[str, Tensor]  # "logps" and "entropies" (N,), and gradients by name


@dataclass(frozen=True)
class Case:
    """N rows of D numbers before a head of V words, whose logits are made `chunk` columns at a time."""

    N: int = 12
    D: int = 24
    V: int = 1500
    chunk: int = 32768  # TRL's own
    temperature: float = 1.0
    softcap: float | None = None
    bias: bool = False
    entropy: bool = False  # whether the loss holds the entropies as well
    likely: bool = False  # whether the targets are the likeliest words, as in a trained model


CASES = {
    "one row, five words": Case(N=1, V=5),
    "one block": Case(V=1024),
    "one column more": Case(V=1025, temperature=0.7),
    "chunks that end within a block": Case(V=4000, chunk=1536, bias=True),
    "more words than TRL's chunk": Case(N=3, D=8, V=33000),
    "soft-capped": Case(softcap=5.0, temperature=1.3),
    "likely targets": Case(N=24, likely=True),
    "entropy bonus": Case(entropy=True, temperature=0.7),
}
PRECISIONS = ("float32", "bfloat16", "autocast")  # autocast: 32-bit weights, 16-bit products
TOKENS = 5  # rows that TRL takes at a time, 4,096 of them outside of this test


def inputs(case: Case, precision: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states (N, D), the head's weight (V, D) and bias (V), leaves that want gradients; and the targets (N,)."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(case.V, case.D, generator=g)
    targets = torch.randint(case.V, (case.N,), generator=g)
    targets[0], targets[-1] = 0, case.V - 1
    hidden = weight[targets] if case.likely else torch.randn(case.N, case.D, generator=g)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    bias = torch.randn(case.V, generator=g).to(dtype).requires_grad_() if case.bias else None
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), bias, targets


def autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()


def finished(case: Case, logps: Tensor, entropies: Tensor, **leaves: Tensor | None) -> Result:
    """Backward through a loss that weighs rows unequally; values and the gradients of the leaves."""
    g = torch.Generator().manual_seed(1)
    loss = (logps * torch.randn(case.N, generator=g)).sum()
    if case.entropy:
        loss = loss + (entropies * torch.randn(case.N, generator=g)).sum()
    loss.backward()
    values = {"logps": logps.detach(), "entropies": entropies.detach()}
    return values | {name: leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}


def by_definition(case: Case, precision: str, dtype: torch.dtype | None = None) -> Result:
    """log_softmax and gather, of logits computed in `dtype`, or in what the precision says."""
    hidden, weight, bias, targets = inputs(case, precision)
    with autocast(precision) if dtype is None else nullcontext():
        rows, matrix = (hidden, weight) if dtype is None else (hidden.to(dtype), weight.to(dtype))
        logits = torch.nn.functional.linear(rows, matrix, None if bias is None else bias.to(matrix.dtype))
    logits = logits.float() if dtype is None else logits
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    table = (logits / case.temperature).log_softmax(-1)
    logps, entropies = table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)
    return finished(case, logps, entropies, hidden=hidden, weight=weight, bias=bias)


def by_trl(case: Case, precision: str) -> Result:
    """The function behind TRL's fused LM head: Triton's kernels where it takes them, its torch operations elsewhere."""
    hidden, weight, bias, targets = inputs(case, precision)
    with autocast(precision):
        logps, entropies, *_ = chunked_logprob.ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, case.temperature, case.chunk, case.softcap, 1.0, ("log_probs", "entropy")
        )  # fmt: skip
    return finished(case, logps, entropies, hidden=hidden, weight=weight, bias=bias)


def by_token_logps(case: Case, precision: str, frozen: bool) -> Result:
    """models/shared_prompt.py's, which a training in one process takes; the head is frozen with LoRA."""
    hidden, weight, bias, targets = inputs(case, precision)
    head = torch.nn.Linear(case.D, case.V, bias=case.bias, dtype=weight.dtype)
    head.load_state_dict({"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()}))
    head.requires_grad_(not frozen)
    with autocast(precision):
        logps, entropies = token_logps(hidden, head, targets, case.temperature, case.softcap, chunk=TOKENS)
    return finished(case, logps, entropies, hidden=hidden, weight=head.weight, bias=head.bias)


WAYS = ("one process", "wrapped", "stock")


def by_trainer(model: Path, way: str, lora: bool, precision: str) -> Result:
    """A batch through the trainer: alone, as with DDP, FSDP or DeepSpeed, or by TRL's path that it falls back on.

    The gradients are those of all trained parameters, (parameters,).
    """
    out = model.parent / "trainer"
    trainer = build(model, out, way != "stock", lora, bf16=precision == "autocast", temperature=0.7)
    batch = a_batch(shuffle=True)
    ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
    with pytest.MonkeyPatch.context() as patch:
        if way == "wrapped":
            for state in (trainer.accelerator.state, PartialState()):
                patch.setattr(state, "distributed_type", DistributedType.MULTI_CPU)
            patch.setattr("train.grpo.packed_logps", None)  # the way of one process
        logps_BC, entropies_BC, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, batch["completion_ids"].shape[1], compute_entropy=True
        )
    assert entropies_BC is not None
    (logps_BC * batch["advantages"][:, None] * batch["completion_mask"]).sum().backward()
    kept = batch["completion_mask"].bool()
    trained = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return {"logps": logps_BC.detach()[kept], "entropies": entropies_BC[kept], "gradients": torch.cat(trained)}


def sharing_problem(model: Path, precision: str) -> str | None:
    """What the trainer's check before its first step says: prompt sharing against TRL's own path."""
    trainer = build(model, model.parent / "trainer", True, True, bf16=precision == "autocast")
    return trainer._sharing_problem()


def main(model: Path, out: Path) -> None:
    """Every case by Triton's kernels."""
    chunked_logprob._use_triton = trl_utils._use_triton = lambda device: True
    chunked_logprob._forward_tile = chunked_logprob._backward_tile = None
    chunked_logprob.TOKEN_CHUNK_SIZE = TOKENS
    results: dict[Any, Any] = {(name, p): by_trl(case, p) for name, case in CASES.items() for p in PRECISIONS}
    for precision in ("float32", "autocast"):
        for way in ("wrapped", "stock"):
            results |= {(way, lora, precision): by_trainer(model, way, lora, precision) for lora in (True, False)}
        results["problem", precision] = sharing_problem(model, precision)
    torch.save(results, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
