"""The log-probabilities that a training takes on CUDA: TRL's kernels, interpreted, against torch and our own.

`make test-kernels` fetches Triton, which torch's CPU builds leave out, and shows the differences.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel_cases import (
    CASES,
    PRECISIONS,
    Result,
    by_definition,
    by_token_logps,
    by_trainer,
    by_trl,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: make test-kernels"),
]
GRADIENTS = ("hidden", "weight", "bias")


@pytest.fixture(scope="module")
def interpreted(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Every case by Triton's kernels."""
    out = tmp_path_factory.mktemp("kernels") / "results.pt"
    command = [sys.executable, "-m", "tests.kernel_cases", str(tiny_dir), str(out)]
    subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1], check=True)
    return torch.load(out)


def off(ours: Tensor, exact: Tensor, relative: bool) -> float:
    """The largest difference, or the norm of all over the norm of the exact."""
    gap = ours.double() - exact.double()
    return (gap.norm() / exact.double().norm() if relative else gap.abs().max()).item()


def errors(ours: Result, exact: Result) -> dict[str, float]:
    """Largest difference of the values, relative difference of the gradients, of all that both have."""
    common = ours.keys() & exact.keys()
    return {key: off(ours[key], exact[key], key not in ("logps", "entropies")) for key in exact if key in common}


def shown(name: str, found: dict[str, float]) -> dict[str, float]:
    print(f"{name:<24}", "  ".join(f"{key} {value:.1e}" for key, value in found.items()))
    return found


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_definition(interpreted: dict[Any, Any], name: str, precision: str) -> None:
    """In 32 bits up to rounding, in 16 bits not much further from the exact values than torch's log_softmax."""
    case = CASES[name]
    exact = by_definition(case, precision, torch.float64)
    kernels = interpreted[name, precision]
    log_softmax = shown("log_softmax", errors(by_definition(case, precision), exact))
    ways = {"kernels": kernels}
    if not case.entropy:  # ours have no gradient of the entropies
        ways["token_logps"] = by_token_logps(case, precision, frozen=False)
        ways["token_logps, frozen head"] = by_token_logps(case, precision, frozen=True)
    # Log Z of about 24 is rounded by 2e-6: much beside the 1 - p of likely targets, and times 24 in the entropy.
    least = {"logps": 1e-5, "entropies": 1e-4} | dict.fromkeys(GRADIENTS, 3e-4 if case.likely else 1e-5)
    for way, ours in ways.items():
        for key, error in shown(way, errors(ours, exact)).items():
            assert error <= (least[key] if precision == "float32" else 2 * log_softmax[key] + 2**-7), (way, key)
    # The same products: only sums may differ, and 16-bit gradients by what the interpreter cuts off where CUDA rounds.
    least = {"logps": 1e-5, "entropies": 1e-4} | dict.fromkeys(GRADIENTS, 1e-5 if precision == "float32" else 2**-7)
    for key, error in shown("kernels, TRL's torch", errors(kernels, by_trl(case, precision))).items():
        assert error <= least[key], key


@pytest.mark.parametrize("precision", ["float32", "autocast"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("way", ["wrapped", "stock"])
def test_the_trainer_with_kernels_is_that_without(
    interpreted: dict[Any, Any], tiny_dir: Path, way: str, lora: bool, precision: str
) -> None:
    """Several processes and TRL's own path, both with kernels, against one process, which has none."""
    alone = by_trainer(tiny_dir, "one process", lora, precision)
    found = shown(way, errors(interpreted[way, lora, precision], alone))
    least = {"logps": 2e-5, "entropies": 2e-5, "gradients": 1e-5}
    if precision == "autocast":  # two forwards, rounded in different places
        least = {"logps": 0.25, "entropies": 0.25, "gradients": 0.05}
    for key, error in found.items():
        assert error <= least[key], key


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_prompt_sharing_passes_its_check_against_kernels(interpreted: dict[Any, Any], precision: str) -> None:
    assert interpreted["problem", precision] is None
